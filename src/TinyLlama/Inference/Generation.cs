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

    /// <summary>Gets the number of prompt tokens that a prompt cache had, so that they were not computed.</summary>
    public int CachedPromptTokens { get; private set; }

    /// <summary>Gets the number of new tokens after the first, and the time of their forwards with sampling and draft.</summary>
    public (int Tokens, TimeSpan Time) Decode { get; private set; }

    /// <summary>Gets the number of tokens that a draft proposed, and how many of them came.</summary>
    public (int Proposed, int Accepted) Drafted { get; private set; }

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
        Draft? draft = _generator.Draft;
        var next = new NextTokens(engine, rows: 1, _generator.Tokenizer.VocabularySize);
        float[] logits = draft is null ? [] : new float[(1 + draft.Tokens) * engine.VocabularySize];
        _tokens.Clear();
        _logProbabilities.Clear();
        (PrefillTime, CachedPromptTokens, Decode, Drafted, Finish) = (default, 0, default, default, state.Finish);
        while (state.Finish == FinishReason.None)
        {
            _stop.ThrowIfCancellationRequested();
            long start = Stopwatch.GetTimestamp();
            IReadOnlyList<DraftToken> proposed = [];
            if (_tokens.Count == 0)
            {
                Prefill(engine, sequence, state.Input);
                draft?.Begin(state.Input.Span, _options, _stop);
            }
            else
            {
                proposed = Propose(engine, sequence, state, draft);
                Forward(engine, sequence, state.Input[sequence.Length..], proposed);
            }

            List<GeneratedToken> accepted = proposed.Count == 0 ? [Next(next, state)] : Verify(engine, state, proposed, logits);
            engine.Truncate(sequence, state.Slid ? 0 : Math.Min(sequence.Length, state.Input.Length - 1));
            Count(accepted, proposed, draft, Stopwatch.GetElapsedTime(start));
            Finish = state.Finish;
            foreach (GeneratedToken token in accepted)
            {
                yield return token.Text;
            }
        }
    }

    private void Prefill(InferenceEngine engine, CachedSequence sequence, ReadOnlyMemory<int> input)
    {
        CachedPromptTokens = _generator.PromptCache?.Restore(engine, sequence, input.Span) ?? 0;
        engine.Feed(sequence, input[CachedPromptTokens..], _stop);
        _generator.PromptCache?.Save(engine, sequence, input.Span);
    }

    // Where one token is to be fed: several cost little more. No more than the text and the context have room for.
    private static IReadOnlyList<DraftToken> Propose(InferenceEngine engine, CachedSequence sequence, GenerationState state, Draft? draft)
    {
        int room = Math.Min(state.Left - 1, engine.ContextLength - state.Input.Length);
        return draft is not null && room > 0 && state.Input.Length - sequence.Length == 1
            ? draft.Propose(state.Input.Span, state.Tokens.Length, Math.Min(draft.Tokens, room))
            : [];
    }

    private void Forward(InferenceEngine engine, CachedSequence sequence, ReadOnlyMemory<int> pending, IReadOnlyList<DraftToken> proposed)
    {
        if (proposed.Count == 0)
        {
            engine.Feed(sequence, pending, _stop);
            return;
        }

        int[] tokens = [.. pending.Span, .. proposed.Select(token => token.Token)];
        engine.Forward(new Continuation(sequence, tokens));
    }

    private static GeneratedToken Next(NextTokens next, GenerationState state)
    {
        next.Read([state]);
        return next.Accept(state, row: 0);
    }

    // The proposed tokens up to the first that is not accepted, and the one that comes there.
    private static List<GeneratedToken> Verify(
        InferenceEngine engine, GenerationState state, IReadOnlyList<DraftToken> proposed, Span<float> logits)
    {
        int vocabularySize = engine.VocabularySize;
        engine.ReadAllLogits(logits[..((proposed.Count + 1) * vocabularySize)], part: 0);
        var accepted = new List<GeneratedToken>(proposed.Count + 1);
        for (int i = 0; i <= proposed.Count; i++)
        {
            DraftToken? draft = i < proposed.Count ? proposed[i] : null;
            accepted.Add(state.Accept(logits.Slice(i * vocabularySize, vocabularySize), draft));
            if (state.Finish != FinishReason.None || accepted[i].Token != draft?.Token)
            {
                break;
            }
        }

        return accepted;
    }

    private void Count(List<GeneratedToken> accepted, IReadOnlyList<DraftToken> proposed, Draft? draft, TimeSpan time)
    {
        if (_tokens.Count == 0)
        {
            PrefillTime = time;
        }
        else
        {
            Decode = (Decode.Tokens + accepted.Count, Decode.Time + time);
        }

        if (proposed.Count > 0)
        {
            int right = accepted.Zip(proposed).Count(pair => pair.First.Token == pair.Second.Token);
            Drafted = (Drafted.Proposed + proposed.Count, Drafted.Accepted + right);
            draft!.Learn(proposed.Count, right);
        }

        foreach (GeneratedToken token in accepted)
        {
            _tokens.Add(token.Token);
            if (token.LogProbabilities is not null)
            {
                _logProbabilities.Add(token.LogProbabilities);
            }
        }
    }
}
