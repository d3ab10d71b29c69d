using System.Runtime.InteropServices;
using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Inference;

/// <summary>
/// One text that is being continued: it says which tokens the model must see next, takes logits and gives pieces of text.
/// It knows no engine, so a text goes on the same way alone and among others.
/// </summary>
internal sealed class GenerationState
{
    private readonly ITokenizer _tokenizer;
    private readonly GenerationOptions _options;
    private readonly StreamingDecoder _decoder;
    private readonly StopStrings _stops;
    private readonly int _contextLength;
    private readonly int _promptLength;
    private readonly int[] _first;
    private readonly int _most;
    private readonly List<int> _text;
    private SplitMix64 _random;

    /// <summary>Begins after a prompt.</summary>
    /// <param name="tokenizer">The vocabulary of the tokens.</param>
    /// <param name="prompt">At least one token.</param>
    /// <param name="options">How to continue.</param>
    /// <param name="contextLength">Most tokens that the model sees.</param>
    public GenerationState(ITokenizer tokenizer, ReadOnlySpan<int> prompt, GenerationOptions options, int contextLength)
    {
        (_tokenizer, _options, _contextLength, _promptLength) = (tokenizer, options, contextLength, prompt.Length);
        _random = new SplitMix64(options.Seed);
        _stops = new StopStrings(options.StopStrings);
        _text = [.. prompt];
        _decoder = new StreamingDecoder(tokenizer, startsDocument: _text.TrueForAll(token => tokenizer.TokenBytes(token).IsEmpty));
        _first = prompt.Length < contextLength ? prompt.ToArray() : Window();
        _most = options.MaxTokens ?? contextLength - _first.Length;
        Finish = _most == 0 ? FinishReason.MaxTokens : FinishReason.None;
    }

    /// <summary>Gets the new tokens, the one that ended the text (EOS) included.</summary>
    public ReadOnlySpan<int> Tokens => CollectionsMarshal.AsSpan(_text)[_promptLength..];

    /// <summary>Gets why the text ended; <see cref="FinishReason.None"/> while it goes on.</summary>
    public FinishReason Finish { get; private set; }

    /// <summary>The tokens that the model must see before the next logits.</summary>
    /// <param name="seen">How many tokens it has seen.</param>
    /// <param name="anew">Whether it must forget those first: the window has slid.</param>
    public int[] NextInput(int seen, out bool anew)
    {
        anew = Tokens.Length > 0 && seen >= _contextLength;
        return Tokens.Length == 0 ? _first : anew ? Window() : [_text[^1]];
    }

    /// <summary>Chooses the next token.</summary>
    /// <param name="logits">(V) logits after what <see cref="NextInput"/> gave; overwritten.</param>
    /// <returns>The text that is now certain, often empty. With the last token, all that is left.</returns>
    public string Accept(Span<float> logits)
    {
        // Ids beyond the tokenizer's are padding of the model's vocabulary.
        int token = Sampler.Next(logits[.._tokenizer.VocabularySize], Recent(), _options, ref _random);
        _text.Add(token);
        if (token == _tokenizer.Eos || token == _tokenizer.Bos)
        {
            Finish = FinishReason.EndOfText;
            return Rest();
        }

        string piece = _stops.Append(_decoder.Append(token));
        if (_stops.Found is not null)
        {
            Finish = FinishReason.StopString;
        }
        else if (Tokens.Length == _most)
        {
            Finish = _options.MaxTokens is null ? FinishReason.ContextFull : FinishReason.MaxTokens;
            piece += Rest();
        }

        return piece;
    }

    // The last half of a context, after the BOS that the text began with.
    private int[] Window()
    {
        int count = Math.Max(1, _contextLength / 2);
        int[] last = [.. _text[^count..]];
        if (_text[0] == _tokenizer.Bos && count > 1)
        {
            last[0] = _text[0];
        }

        return last;
    }

    private ReadOnlySpan<int> Recent() => CollectionsMarshal.AsSpan(_text)[Math.Max(0, _text.Count - _contextLength)..];

    private string Rest() => _stops.Append(_decoder.Finish()) + _stops.Flush();
}
