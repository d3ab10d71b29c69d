namespace TinyLlama.Evaluation;

/// <summary>
/// What tables of counts reach on the same tokens: a trained model that is not better has learned nothing that counting
/// does not give.
/// </summary>
/// <remarks>
/// Unigram: p(w) = (c(w) + 1) / (N + V). Bigram: absolute discounting, interpolated with the unigram (Ney, Essen and
/// Kneser 1994): p(w | v) = max(c(vw) - d, 0) / c(v) + d · (distinct successors of v) / c(v) · p(w). The discount d is the
/// one with which the training tokens predict a last part of their own best, at most a tenth of them; validation tokens
/// have no say. Then all training tokens are counted.
/// </remarks>
public sealed class NGramBaselines
{
    private const int MostHeldOut = 200_000;

    private readonly Counts _counts;

    private NGramBaselines(Counts counts, double discount) => (_counts, Discount) = (counts, discount);

    /// <summary>Gets d, what each observed bigram gives up to the others.</summary>
    public double Discount { get; }

    /// <summary>Counts the training tokens.</summary>
    /// <param name="training">Training tokens in their order, BOS and EOS as the model sees them.</param>
    /// <param name="vocabularySize">V; every token is less.</param>
    public static NGramBaselines Count(ReadOnlySpan<int> training, int vocabularySize)
    {
        int heldOut = Math.Min(training.Length / 10, MostHeldOut);
        double discount = 0.75;
        if (heldOut > 0)
        {
            discount = FitDiscount(new Counts(training[..^heldOut], vocabularySize), training[^(heldOut + 1)..]);
        }

        return new NGramBaselines(new Counts(training, vocabularySize), discount);
    }

    /// <summary>Scores the unigram table.</summary>
    public Score Unigram(EvaluationTokens tokens)
    {
        double total = 0;
        foreach (int token in tokens.Tokens[1..])
        {
            total -= Math.Log(_counts.Unigram(token));
        }

        return new Score(tokens.TargetCount, tokens.ByteCount, total);
    }

    /// <summary>Scores the interpolated bigram table; each target is predicted from the token before it.</summary>
    public Score Bigram(EvaluationTokens tokens)
    {
        double total = 0;
        for (int i = 1; i < tokens.Tokens.Length; i++)
        {
            total -= Math.Log(Probability(tokens.Tokens[i - 1], tokens.Tokens[i]));
        }

        return new Score(tokens.TargetCount, tokens.ByteCount, total);
    }

    /// <summary>The probability that a token follows another one.</summary>
    internal double Probability(int previous, int next) => _counts.Of(previous, next).Probability(Discount);

    /// <summary>The probability of a token anywhere.</summary>
    internal double Probability(int token) => _counts.Unigram(token);

    // Golden-section search: the held-out loss falls, then rises.
    private static double FitDiscount(Counts counts, ReadOnlySpan<int> heldOut)
    {
        Evidence[] evidence = new Evidence[heldOut.Length - 1];
        for (int i = 0; i < evidence.Length; i++)
        {
            evidence[i] = counts.Of(heldOut[i], heldOut[i + 1]);
        }

        double golden = (Math.Sqrt(5) - 1) / 2;
        (double low, double high) = (0, 1);
        while (high - low > 1e-3)
        {
            double left = high - (golden * (high - low));
            double right = low + (golden * (high - low));
            (low, high) = Loss(evidence, left) < Loss(evidence, right) ? (low, right) : (left, high);
        }

        return (low + high) / 2;
    }

    private static double Loss(Evidence[] evidence, double discount)
    {
        double total = 0;
        foreach (Evidence e in evidence)
        {
            total -= Math.Log(e.Probability(discount));
        }

        return total;
    }

    /// <summary>What the tables know of one bigram: c(vw), c(v), the number of distinct successors of v, and p(w).</summary>
    private readonly record struct Evidence(int Pair, int Previous, int Distinct, double Unigram)
    {
        public double Probability(double discount) => Previous == 0
            ? Unigram
            : (Math.Max(Pair - discount, 0) + (discount * Distinct * Unigram)) / Previous;
    }

    /// <summary>
    /// Unigrams, and bigrams grouped by their first token, each group ascending by the second: passes over the tokens
    /// with tables that fit the cache, no hashing.
    /// </summary>
    private sealed class Counts
    {
        private readonly long _total;
        private readonly int[] _unigrams;
        private readonly int[] _groupSizes;
        private readonly int[] _groupEnds;
        private readonly List<int> _successors = [];
        private readonly List<int> _pairs = [];

        public Counts(ReadOnlySpan<int> tokens, int vocabularySize)
        {
            _total = tokens.Length;
            _unigrams = new int[vocabularySize];
            foreach (int token in tokens)
            {
                _unigrams[token]++;
            }

            // The last token is no bigram's first.
            _groupSizes = (int[])_unigrams.Clone();
            if (tokens.Length > 0)
            {
                _groupSizes[tokens[^1]]--;
            }

            _groupEnds = new int[vocabularySize];
            int[] bySuccessor = new int[vocabularySize];
            int[] grouped = GroupByPredecessor(tokens);
            for (int v = 0, first = 0; v < vocabularySize; first += _groupSizes[v++])
            {
                CountGroup(grouped.AsSpan(first, _groupSizes[v]), bySuccessor);
                _groupEnds[v] = _successors.Count;
            }
        }

        public double Unigram(int token) => (_unigrams[token] + 1.0) / (_total + _unigrams.Length);

        public Evidence Of(int previous, int next)
        {
            int first = previous == 0 ? 0 : _groupEnds[previous - 1];
            int distinct = _groupEnds[previous] - first;
            int place = _successors.BinarySearch(first, distinct, next, null);
            return new Evidence(place < 0 ? 0 : _pairs[place], _groupSizes[previous], distinct, Unigram(next));
        }

        private int[] GroupByPredecessor(ReadOnlySpan<int> tokens)
        {
            int[] next = new int[_groupSizes.Length];
            for (int v = 1; v < next.Length; v++)
            {
                next[v] = next[v - 1] + _groupSizes[v - 1];
            }

            int[] grouped = new int[Math.Max(0, tokens.Length - 1)];
            for (int i = 0; i < grouped.Length; i++)
            {
                grouped[next[tokens[i]]++] = tokens[i + 1];
            }

            return grouped;
        }

        // bySuccessor is all zero before and after.
        private void CountGroup(ReadOnlySpan<int> group, int[] bySuccessor)
        {
            int first = _successors.Count;
            foreach (int successor in group)
            {
                if (bySuccessor[successor]++ == 0)
                {
                    _successors.Add(successor);
                }
            }

            _successors.Sort(first, _successors.Count - first, null);
            for (int i = first; i < _successors.Count; i++)
            {
                _pairs.Add(bySuccessor[_successors[i]]);
                bySuccessor[_successors[i]] = 0;
            }
        }
    }
}
