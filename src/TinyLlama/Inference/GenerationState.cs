using System.Runtime.InteropServices;
using TinyLlama.Compute;
using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Inference;

/// <summary>
/// One text that is being continued: it says which tokens the model must see next, takes logits and gives tokens and
/// pieces of text. It knows no engine, so a text goes on the same way alone and among others.
/// </summary>
internal sealed class GenerationState
{
    private readonly ITokenizer _tokenizer;
    private readonly GenerationOptions _options;
    private readonly StreamingDecoder _decoder;
    private readonly StopStrings _stops;
    private readonly int _contextLength;
    private readonly int _promptLength;
    private readonly int _most;
    private readonly List<int> _text;
    private readonly TokenMasks? _masks;
    private readonly int[] _endings;
    private readonly int[] _input;
    private int _inputCount;
    private ConstraintState? _constraint;
    private SplitMix64 _random;

    /// <summary>Begins after a prompt.</summary>
    /// <param name="tokenizer">The vocabulary of the tokens.</param>
    /// <param name="prompt">At least one token.</param>
    /// <param name="options">How to continue.</param>
    /// <param name="contextLength">Most tokens that the model sees.</param>
    /// <param name="masks">The masks of <see cref="GenerationOptions.Json"/>.</param>
    public GenerationState(
        ITokenizer tokenizer, ReadOnlySpan<int> prompt, GenerationOptions options, int contextLength, TokenMasks? masks)
    {
        (_masks, _constraint) = (masks, masks?.Start);
        _endings = tokenizer.Eos is int eos ? [eos, .. options.StopTokens] : [.. options.StopTokens];
        (_tokenizer, _options, _contextLength, _promptLength) = (tokenizer, options, contextLength, prompt.Length);
        _random = new SplitMix64(options.Seed);
        _stops = new StopStrings(options.StopStrings);
        _text = [.. prompt];
        _decoder = new StreamingDecoder(tokenizer, startsDocument: _text.TrueForAll(token => tokenizer.TokenBytes(token).IsEmpty));
        _input = new int[contextLength];
        if (prompt.Length < contextLength)
        {
            prompt.CopyTo(_input);
            _inputCount = prompt.Length;
        }
        else
        {
            Slide();
        }

        _most = options.MaxTokens ?? contextLength - _inputCount;
        Finish = _most == 0 ? FinishReason.MaxTokens : FinishReason.None;
    }

    /// <summary>Gets the new tokens, the one that ended the text (EOS) included.</summary>
    public ReadOnlySpan<int> Tokens => CollectionsMarshal.AsSpan(_text)[_promptLength..];

    /// <summary>Gets the number of tokens that may come yet.</summary>
    public int Left => _most - Tokens.Length;

    /// <summary>Gets why the text ended; <see cref="FinishReason.None"/> while it goes on.</summary>
    public FinishReason Finish { get; private set; }

    /// <summary>Gets all tokens that the model must have seen, from position 0 on, before the next logits.</summary>
    public ReadOnlyMemory<int> Input => _input.AsMemory(0, _inputCount);

    /// <summary>Gets a value indicating whether the last token moved the window: the model must forget what it saw.</summary>
    public bool Slid { get; private set; }

    /// <summary>Gets what logits are multiplied by before they are weighed: 1 where they are not.</summary>
    public double InverseTemperature => _options.Temperature == 0 ? 1 : 1 / _options.Temperature;

    /// <summary>Whether so many likeliest tokens may decide the next one: whether to call <see cref="TryAccept"/>.</summary>
    public bool MayFollowFrom(int count) =>
        LikeliestTokens.MayDecide(_options, count) && (_options.LogProbabilities ?? 0) <= count;

    /// <summary>Chooses the next token where the likeliest decide it: the one that <see cref="Accept"/> would choose.</summary>
    /// <param name="row">The likeliest tokens after <see cref="Input"/>, with the others' weight at <see cref="InverseTemperature"/>.</param>
    /// <param name="token">The token.</param>
    /// <returns>False, and nothing is changed, where the whole row is needed.</returns>
    public bool TryAccept(TopLogitsRow row, out GeneratedToken token)
    {
        Span<float> logits = stackalloc float[row.Count];
        row.Logits.CopyTo(logits);
        _masks?.Apply(logits, row.Columns, _constraint!, _endings);
        if (LikeliestTokens.Next(row, logits, isMasked: _masks is not null, Recent(), Tokens, _options, ref _random) is not int place)
        {
            token = default;
            return false;
        }

        int id = row.Column(place);
        Append(id);
        token = new GeneratedToken(
            id, Piece(id), _options.LogProbabilities is int top ? LogProbabilities.Of(row, place, top, _tokenizer) : null);
        return true;
    }

    /// <summary>Chooses the next token.</summary>
    /// <param name="logits">(V) logits after <see cref="Input"/>; overwritten.</param>
    /// <param name="draft">A token that was proposed in its place.</param>
    public GeneratedToken Accept(Span<float> logits, DraftToken? draft = null)
    {
        // Ids beyond the tokenizer's are padding of the model's vocabulary.
        logits = logits[.._tokenizer.VocabularySize];
        float[]? unchanged = _options.LogProbabilities is null ? null : logits.ToArray();
        _masks?.Apply(logits, _constraint!, _endings);
        int token = draft is { Distribution.IsEmpty: false } proposed
            ? Verify(logits, proposed)
            : Sampler.Next(logits, Recent(), Tokens, _options, ref _random);
        Append(token);
        return new GeneratedToken(
            token, Piece(token), unchanged is null ? null : LogProbabilities.Of(unchanged, token, _options.LogProbabilities!.Value, _tokenizer));
    }

    private int Verify(Span<float> logits, DraftToken draft)
    {
        Sampler.Distribution(logits, Recent(), Tokens, _options);
        return Sampler.Verify(logits, draft.Distribution.Span, draft.Token, ref _random);
    }

    private void Append(int token)
    {
        _text.Add(token);
        Slid = _inputCount == _contextLength;
        if (Slid)
        {
            Slide();
        }
        else
        {
            _input[_inputCount++] = token;
        }
    }

    private string Piece(int token)
    {
        if (token == _tokenizer.Eos || token == _tokenizer.Bos)
        {
            Finish = FinishReason.EndOfText;
            return Rest();
        }

        if (_options.StopTokens.Contains(token))
        {
            Finish = FinishReason.StopToken;
            return Rest();
        }

        _constraint = _masks?.Advance(_constraint!, _tokenizer.TokenBytes(token).Span);
        string piece = _stops.Append(_decoder.Append(token));
        if (_stops.Found is not null)
        {
            Finish = FinishReason.StopString;
        }
        else if (_constraint is { IsFinal: true })
        {
            Finish = FinishReason.EndOfText;
            piece += Rest();
        }
        else if (Tokens.Length == _most)
        {
            Finish = _options.MaxTokens is null ? FinishReason.ContextFull : FinishReason.MaxTokens;
            piece += Rest();
        }

        return piece;
    }

    // What the model sees becomes the last half of a context, after the BOS that the text began with.
    private void Slide()
    {
        _inputCount = Math.Max(1, _contextLength / 2);
        CollectionsMarshal.AsSpan(_text)[^_inputCount..].CopyTo(_input);
        if (_text[0] == _tokenizer.Bos && _inputCount > 1)
        {
            _input[0] = _text[0];
        }
    }

    private ReadOnlySpan<int> Recent() => CollectionsMarshal.AsSpan(_text)[Math.Max(0, _text.Count - _contextLength)..];

    private string Rest() => _stops.Append(_decoder.Finish()) + _stops.Flush();
}
