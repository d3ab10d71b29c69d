using System.Collections;
using System.Diagnostics;

namespace TinyLlama.Inference;

/// <summary>Why a text ended.</summary>
public enum FinishReason
{
    /// <summary>It has not ended yet, or was not read to its end.</summary>
    None,

    /// <summary>The model ended the document (EOS), or began another one (BOS).</summary>
    EndOfText,

    /// <summary>A stop token came.</summary>
    StopToken,

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
    private readonly List<LogProbabilities> _logProbabilities = [];

    internal Generation(TextGenerator generator, int[] prompt, GenerationOptions options, CancellationToken stop)
    {
        (_generator, _prompt, _options, _stop) = (generator, prompt, options, stop);
    }

    /// <summary>Gets the prompt's tokens, BOS included.</summary>
    public IReadOnlyList<int> PromptTokens => _prompt;

    /// <summary>Gets the new tokens; the one that ended the text (EOS) included.</summary>
    public IReadOnlyList<int> Tokens => _tokens;

    /// <summary>Gets how probable each new token was, where <see cref="GenerationOptions.LogProbabilities"/> asks for it; else empty.</summary>
    public IReadOnlyList<LogProbabilities> LogProbabilities => _logProbabilities;

    /// <summary>Gets why the text ended.</summary>
    public FinishReason Finish { get; private set; }

    /// <summary>Gets the time from the start to the first new token.</summary>
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
        var state = new GenerationState(
            _generator.Tokenizer, _prompt, _options, engine.ContextLength, _generator.Constraints.For(_options.Json));
        float[] logits = new float[engine.VocabularySize];
        _tokens.Clear();
        _logProbabilities.Clear();
        (PrefillTime, Decode, Finish) = (default, default, state.Finish);
        while (state.Finish == FinishReason.None)
        {
            _stop.ThrowIfCancellationRequested();
            long start = Stopwatch.GetTimestamp();
            if (state.Slid)
            {
                engine.Truncate(sequence, 0);
            }

            engine.Feed(sequence, state.Input[sequence.Length..], _stop);
            engine.ReadLogits(logits);
            GeneratedToken token = state.Accept(logits);
            TimeSpan time = Stopwatch.GetElapsedTime(start);
            if (_tokens.Count == 0)
            {
                PrefillTime = time;
            }
            else
            {
                Decode = (Decode.Tokens + 1, Decode.Time + time);
            }

            _tokens.Add(token.Token);
            if (token.LogProbabilities is not null)
            {
                _logProbabilities.Add(token.LogProbabilities);
            }

            Finish = state.Finish;
            yield return token.Text;
        }
    }
}
