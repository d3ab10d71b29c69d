using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Model;

namespace TinyLlama.Inference;

/// <summary>How the likeliest continuations of a text are searched for.</summary>
public sealed record BeamSearchOptions
{
    private const int MostBeams = 256;

    /// <summary>Gets the number of texts that are followed at a time, and found at most.</summary>
    public int Beams { get; init; } = 4;

    /// <summary>
    /// Gets A: of texts that end, the one with the largest ln p / length^A is the best. 0 compares probabilities, which fall
    /// with each token; 1 compares the mean of ln p over the tokens.
    /// </summary>
    public double LengthPenalty { get; init; } = 1;

    /// <summary>Gets the most new tokens; null for as many as the context holds.</summary>
    public int? MaxTokens { get; init; }

    /// <summary>Gets tokens that end a text as EOS does; they are not given out as text.</summary>
    public IReadOnlyList<int> StopTokens { get; init; } = [];

    /// <summary>Refuses values without a meaning.</summary>
    /// <exception cref="UserErrorException">One is out of range.</exception>
    public void Validate()
    {
        Require(Beams is >= 1 and <= MostBeams, $"{Beams} beams are asked for, it must be 1 to {MostBeams}");
        Require(double.IsFinite(LengthPenalty), $"length penalty is {LengthPenalty}, it must be a number (0 for none)");
        Require(MaxTokens is null or >= 1, $"max tokens is {MaxTokens}, it must be 1 or more");

        static void Require(bool condition, string problem)
        {
            if (!condition)
            {
                throw new UserErrorException(problem);
            }
        }
    }
}

/// <summary>A continuation that beam search found.</summary>
/// <param name="Text">The new text.</param>
/// <param name="Tokens">The new tokens; the one that ended the text (EOS) included.</param>
/// <param name="LogProbability">ln p of all new tokens, in nats.</param>
/// <param name="Score">What texts are compared by: see <see cref="BeamSearchOptions.LengthPenalty"/>.</param>
/// <param name="Finish">Why it ended.</param>
public sealed record BeamText(string Text, IReadOnlyList<int> Tokens, double LogProbability, double Score, FinishReason Finish);

/// <summary>
/// Searches for likely texts: of all continuations of the beams by one token the likeliest become the next beams. Beams
/// that begin alike share the blocks of the key-value cache.
/// </summary>
/// <remarks>
/// A continuation that ends its text is kept where it is among the likeliest as many as there are beams. The search is over
/// when that many texts have ended and the likeliest beam, as long as it is now, is no better than the worst of them; or
/// at the most tokens, where beams end as they are. Of equal ones the one of the earlier beam, then the smaller token goes
/// first.
/// </remarks>
internal sealed class BeamSearch
{
    private readonly InferenceEngine _engine;
    private readonly ITokenizer _tokenizer;
    private readonly int[] _prompt;
    private readonly BeamSearchOptions _options;
    private readonly HashSet<int> _endings;
    private readonly List<BeamText> _ended = [];
    private List<Beam> _beams;

    private BeamSearch(InferenceEngine engine, ITokenizer tokenizer, int[] prompt, BeamSearchOptions options)
    {
        (_engine, _tokenizer, _prompt, _options) = (engine, tokenizer, prompt, options);
        _endings = [.. options.StopTokens, .. new[] { tokenizer.Eos, tokenizer.Bos }.OfType<int>()];
        _beams = [new Beam(engine.Begin(), [], 0)];
    }

    /// <summary>Searches, in memory of its own.</summary>
    /// <param name="model">The model.</param>
    /// <param name="backend">The device.</param>
    /// <param name="tokenizer">The model's tokenizer.</param>
    /// <param name="contextLength">Most tokens of prompt and continuation; they fit.</param>
    /// <param name="cacheType">What keys and values are rounded to.</param>
    /// <param name="prompt">At least one token.</param>
    /// <param name="options">What to search for.</param>
    /// <param name="progress">Is told the number of tokens of a beam.</param>
    /// <param name="stop">Ends it with <see cref="OperationCanceledException"/>.</param>
    /// <returns>The texts, the best first.</returns>
    public static IReadOnlyList<BeamText> Run(
        LlamaModel model, Backend backend, ITokenizer tokenizer, int contextLength, DType cacheType, int[] prompt, BeamSearchOptions options,
        Action<int>? progress = null, CancellationToken stop = default)
    {
        int most = options.MaxTokens ?? contextLength - prompt.Length;

        // The prompt's full blocks are everyone's; each beam may need all others for itself.
        int blocks = (prompt.Length / TokenLayout.KeyBlock) + (options.Beams * (KeyValueCache.BlocksFor(most) + 1));
        using var engine = new InferenceEngine(model, backend, prompt.Length + most, options.Beams, cacheBlocks: blocks, cacheType: cacheType);
        var search = new BeamSearch(engine, tokenizer, prompt, options);
        search.Follow(most, progress, stop);
        search.EndAll(options.MaxTokens is null ? FinishReason.ContextFull : FinishReason.MaxTokens);
        return search._ended;
    }

    private void Follow(int most, Action<int>? progress, CancellationToken stop)
    {
        float[] logits = new float[_options.Beams * _engine.VocabularySize];
        _engine.Feed(_beams[0].Sequence, _prompt, stop);
        for (int length = 1; ; length++)
        {
            _engine.ReadLogits(logits.AsSpan(0, _beams.Count * _engine.VocabularySize));
            Extend(Likeliest(logits));
            progress?.Invoke(length);
            if (length == most || _beams.Count == 0 || IsOver())
            {
                return;
            }

            stop.ThrowIfCancellationRequested();
            _engine.Forward([.. _beams.Select(beam => new Continuation(beam.Sequence, beam.Tokens.AsMemory(length - 1)))]);
        }
    }

    // Enough candidates that as many as there are beams go on, even where all that end are among them.
    private Candidate[] Likeliest(ReadOnlySpan<float> logits)
    {
        int most = _options.Beams * (1 + _endings.Count);
        var best = new PriorityQueue<Candidate, (double LogProbability, int Beam, int Token)>();
        for (int b = 0; b < _beams.Count; b++)
        {
            // Ids beyond the tokenizer's are padding of the model's vocabulary.
            ReadOnlySpan<float> row = logits.Slice(b * _engine.VocabularySize, _tokenizer.VocabularySize);
            double logSum = LogProbabilities.LogSum(row);
            for (int token = 0; token < row.Length; token++)
            {
                var candidate = new Candidate(_beams[b].LogProbability + row[token] - logSum, b, token);
                if (best.Count < most)
                {
                    best.Enqueue(candidate, candidate.Order);
                }
                else if (candidate.LogProbability > best.Peek().LogProbability)
                {
                    best.DequeueEnqueue(candidate, candidate.Order);
                }
            }
        }

        var likeliest = new Candidate[best.Count];
        for (int i = likeliest.Length - 1; i >= 0; i--)
        {
            likeliest[i] = best.Dequeue();
        }

        return likeliest;
    }

    private void Extend(Candidate[] likeliest)
    {
        var next = new List<Candidate>(_options.Beams);
        for (int rank = 0; rank < likeliest.Length && next.Count < _options.Beams; rank++)
        {
            Candidate candidate = likeliest[rank];
            if (!_endings.Contains(candidate.Token))
            {
                next.Add(candidate);
            }
            else if (rank < _options.Beams)
            {
                int[] tokens = [.. _beams[candidate.Beam].Tokens, candidate.Token];
                End(tokens, candidate.LogProbability, _options.StopTokens.Contains(candidate.Token) ? FinishReason.StopToken : FinishReason.EndOfText);
            }
        }

        _beams = Fork(next);
    }

    // The first of a beam's continuations takes its sequence, others share its blocks. Whoever has none frees them.
    private List<Beam> Fork(List<Candidate> next)
    {
        for (int b = 0; b < _beams.Count; b++)
        {
            if (!next.Exists(candidate => candidate.Beam == b))
            {
                _engine.End(_beams[b].Sequence);
            }
        }

        var taken = new HashSet<int>();
        return next.ConvertAll(candidate =>
        {
            Beam parent = _beams[candidate.Beam];
            CachedSequence sequence = taken.Add(candidate.Beam) ? parent.Sequence : _engine.Fork(parent.Sequence);
            return new Beam(sequence, [.. parent.Tokens, candidate.Token], candidate.LogProbability);
        });
    }

    private bool IsOver() =>
        _ended.Count == _options.Beams && Score(_beams[0].LogProbability, _beams[0].Tokens.Length) <= _ended[^1].Score;

    private void EndAll(FinishReason reason) => _beams.ForEach(beam => End(beam.Tokens, beam.LogProbability, reason));

    // Keeps the best; of equal ones those that ended first.
    private void End(int[] tokens, double logProbability, FinishReason reason)
    {
        double score = Score(logProbability, tokens.Length);
        int place = _ended.FindIndex(text => text.Score < score);
        _ended.Insert(place < 0 ? _ended.Count : place, new BeamText(Decode(tokens), tokens, logProbability, score, reason));
        if (_ended.Count > _options.Beams)
        {
            _ended.RemoveAt(_options.Beams);
        }
    }

    private double Score(double logProbability, int length) => logProbability / Math.Pow(length, _options.LengthPenalty);

    private string Decode(int[] tokens)
    {
        var decoder = new StreamingDecoder(_tokenizer, startsDocument: Array.TrueForAll(_prompt, token => _tokenizer.TokenBytes(token).IsEmpty));
        return string.Concat(tokens.Where(token => !_endings.Contains(token)).Select(decoder.Append)) + decoder.Finish();
    }

    /// <summary>A text that is followed.</summary>
    /// <param name="Sequence">What was fed of it: all but its last token.</param>
    /// <param name="Tokens">Its new tokens.</param>
    /// <param name="LogProbability">ln p of them.</param>
    private sealed record Beam(CachedSequence Sequence, int[] Tokens, double LogProbability);

    private readonly record struct Candidate(double LogProbability, int Beam, int Token)
    {
        /// <summary>Gets what sorts the best last.</summary>
        public (double LogProbability, int Beam, int Token) Order => (LogProbability, -Beam, -Token);
    }
}
