using System.Collections;
using System.Diagnostics;
using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Inference;

/// <summary>Why a text ended.</summary>
public enum FinishReason
{
    /// <summary>It has not ended yet, or was not read to its end.</summary>
    None,

    /// <summary>The model ended the document (EOS), or began another one (BOS).</summary>
    EndOfText,

    /// <summary>A stop string came up.</summary>
    StopString,

    /// <summary>As many tokens as were asked for.</summary>
    MaxTokens,

    /// <summary>The context is full.</summary>
    ContextFull,
}

/// <summary>
/// The continuation of a prompt in pieces, each computed when it is asked for: whole characters, no part of a stop
/// string. What it says of itself is of the last enumeration.
/// </summary>
public sealed class Generation : IEnumerable<string>
{
    private readonly TextGenerator _generator;
    private readonly int[] _prompt;
    private readonly GenerationOptions _options;
    private readonly CancellationToken _stop;
    private readonly List<int> _tokens = [];

    internal Generation(TextGenerator generator, List<int> prompt, GenerationOptions options, CancellationToken stop)
    {
        (_generator, _prompt, _options, _stop) = (generator, [.. prompt], options, stop);
    }

    /// <summary>Gets the prompt's tokens, BOS included.</summary>
    public IReadOnlyList<int> PromptTokens => _prompt;

    /// <summary>Gets the new tokens; the one that ended the text (EOS) included.</summary>
    public IReadOnlyList<int> Tokens => _tokens;

    /// <summary>Gets why the text ended.</summary>
    public FinishReason Finish { get; private set; }

    /// <summary>Gets the time from the start until the first new token could be sampled.</summary>
    public TimeSpan PrefillTime { get; private set; }

    /// <summary>Gets the number of forwards of one token each, and the time of all of them with their sampling.</summary>
    public (int Tokens, TimeSpan Time) Decode { get; private set; }

    /// <inheritdoc/>
    public IEnumerator<string> GetEnumerator()
    {
        InferenceEngine engine = _generator.Engine;
        CachedSequence sequence = engine.Begin();
        try
        {
            foreach (string piece in Run(engine, sequence))
            {
                if (piece.Length > 0)
                {
                    yield return piece;
                }
            }
        }
        finally
        {
            engine.End(sequence);
        }
    }

    /// <inheritdoc/>
    IEnumerator IEnumerable.GetEnumerator() => GetEnumerator();

    /// <summary>Generates to the end and returns the whole continuation.</summary>
    public override string ToString() => string.Concat(this);

    private IEnumerable<string> Run(InferenceEngine engine, CachedSequence sequence)
    {
        ITokenizer tokenizer = _generator.Tokenizer;
        var random = new SplitMix64(_options.Seed);
        var decoder = new StreamingDecoder(tokenizer, startsDocument: _prompt.All(token => tokenizer.TokenBytes(token).IsEmpty));
        var stops = new StopStrings(_options.StopStrings);
        float[] logits = new float[engine.VocabularySize];
        List<int> text = [.. _prompt];
        _tokens.Clear();
        (Finish, Decode) = (FinishReason.None, default);

        long start = Stopwatch.GetTimestamp();
        engine.Feed(sequence, _prompt.Length < engine.ContextLength ? _prompt : Window(text), _stop);
        engine.ReadLogits(logits);
        PrefillTime = Stopwatch.GetElapsedTime(start);

        int most = _options.MaxTokens ?? engine.ContextLength - sequence.Length;
        while (_tokens.Count < most)
        {
            _stop.ThrowIfCancellationRequested();
            start = Stopwatch.GetTimestamp();
            if (_tokens.Count > 0)
            {
                Extend(engine, sequence, text);
                engine.ReadLogits(logits);
            }

            // Ids beyond the tokenizer's are padding of the model's vocabulary.
            Span<float> named = logits.AsSpan(0, tokenizer.VocabularySize);
            int token = Sampler.Next(named, Recent(text), _options, ref random);
            if (_tokens.Count > 0)
            {
                Decode = (Decode.Tokens + 1, Decode.Time + Stopwatch.GetElapsedTime(start));
            }

            text.Add(token);
            _tokens.Add(token);
            if (token == tokenizer.Eos || token == tokenizer.Bos)
            {
                Finish = FinishReason.EndOfText;
                break;
            }

            yield return stops.Append(decoder.Append(token));
            if (stops.Found is not null)
            {
                Finish = FinishReason.StopString;
                yield break;
            }
        }

        yield return stops.Append(decoder.Finish());
        yield return stops.Flush();
        if (Finish == FinishReason.None)
        {
            Finish = _options.MaxTokens is null ? FinishReason.ContextFull : FinishReason.MaxTokens;
        }
    }

    // Feeds the newest token, after making room for it where the context is full.
    private void Extend(InferenceEngine engine, CachedSequence sequence, List<int> text)
    {
        if (sequence.Length < engine.ContextLength)
        {
            engine.Feed(sequence, new[] { text[^1] }, _stop);
            return;
        }

        engine.Clear(sequence);
        engine.Feed(sequence, Window(text), _stop);
    }

    // The last half of a context, after the BOS that every text began with in training.
    private int[] Window(List<int> text)
    {
        int count = Math.Max(1, _generator.ContextLength / 2);
        int[] last = [.. text[^count..]];
        if (_generator.AddBos && count > 1)
        {
            last[0] = text[0];
        }

        return last;
    }

    private ReadOnlySpan<int> Recent(List<int> text)
    {
        ReadOnlySpan<int> all = System.Runtime.InteropServices.CollectionsMarshal.AsSpan(text);
        return all[Math.Max(0, all.Length - _generator.ContextLength)..];
    }
}
