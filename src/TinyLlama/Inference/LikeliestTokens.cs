using TinyLlama.Compute;

namespace TinyLlama.Inference;

/// <summary>Chooses among the likeliest tokens of a row what <see cref="Sampler.Next"/> chooses from the whole row, where they decide it.</summary>
/// <remarks>
/// No other token weighs more than the lightest of them, so those above that one are known by rank: a cut that falls among
/// them is the row's, if it does for every sum that the others' weights may have. A draw without a cut is decided where its point lies in
/// the same token for every such sum. Nothing else is guessed; so the device's sums choose who reads the row, never the token.
/// A mask, a bias or a penalty that makes no token likelier keeps all that but for the sum, of which nothing may be left.
/// </remarks>
internal static class LikeliestTokens
{
    // How far two sums of the same weights in fp64 are apart at most, as a share of them: 2²⁰ roundings of each make 2.4e-10.
    private const double SumError = 1e-9;

    /// <summary>Whether they may decide the next token, as far as the options tell.</summary>
    /// <param name="options">How to choose.</param>
    /// <param name="count">How many they are.</param>
    public static bool MayDecide(GenerationOptions options, int count) =>
        options.LogitBias.Values.All(bias => bias <= 0) && options.RepetitionPenalty >= 1 && options.PresencePenalty >= 0 && options.FrequencyPenalty >= 0
            && (options.Temperature == 0 || options.TopK < count);

    /// <summary>The next token.</summary>
    /// <param name="row">The likeliest tokens, with the others' weight at the temperature of the options.</param>
    /// <param name="logits">Their logits, some of them masked; overwritten.</param>
    /// <param name="isMasked">Whether there is a mask, so that others may not come either.</param>
    /// <param name="context">The tokens that the repetition penalty is for.</param>
    /// <param name="generated">The tokens that presence and frequency penalty are for.</param>
    /// <param name="options">How to choose, of those that <see cref="MayDecide"/>.</param>
    /// <param name="random">The random state; the same numbers are drawn as from the whole row, none where that is needed.</param>
    /// <returns>Its place in the row; null where the whole row is needed, or has an error to tell.</returns>
    public static int? Next(
        TopLogitsRow row, Span<float> logits, bool isMasked, ReadOnlySpan<int> context, ReadOnlySpan<int> generated, GenerationOptions options,
        ref SplitMix64 random)
    {
        (float largest, float bound) = (float.NegativeInfinity, float.PositiveInfinity);
        foreach (float logit in row.Logits)
        {
            if (float.IsNaN(logit) || float.IsPositiveInfinity(logit))
            {
                return null;
            }

            (largest, bound) = (Math.Max(largest, logit), Math.Min(bound, logit));
        }

        Sampler.Adjust(logits, row.Columns, context, generated, options);
        int likeliest = 0;
        for (int place = 1; place < logits.Length; place++)
        {
            likeliest = logits[place] > logits[likeliest] ? place : likeliest;
        }

        float largestLeft = logits[likeliest];
        if (largestLeft <= bound || options.Temperature == 0)
        {
            return largestLeft <= bound ? null : likeliest;
        }

        // The device's weights are relative to the largest logit before it was made smaller.
        double factor = Math.Exp(((double)largest - largestLeft) / options.Temperature);
        bool isLowered = isMasked || options.LogitBias.Count > 0 || options.RepetitionPenalty != 1 || options.PresencePenalty != 0 || options.FrequencyPenalty != 0;
        var others = new Others(isLowered ? 0 : 1 - TopLogitsRow.OthersError, factor * (1 + TopLogitsRow.OthersError));
        if (!double.IsFinite(others.Most * row.Others))
        {
            return null;
        }

        float lightest = (float)Math.Exp(((double)bound - largestLeft) / options.Temperature);
        double sum = Sampler.Weigh(logits, largestLeft, options.Temperature, out _);
        return options.TopK > 0 || options.TopP < 1 || options.MinP > 0
            ? DrawOfCut(logits, lightest, others.Bounds(sum, row.Others), options, ref random)
            : Draw(logits, sum, row, others, ref random);
    }

    private static int? DrawOfCut(
        Span<float> weights, float lightest, (double Least, double Most) sum, GenerationOptions options, ref SplitMix64 random)
    {
        Span<ulong> ranked = stackalloc ulong[weights.Length];
        int known = 0;
        for (int place = 0; place < weights.Length; place++)
        {
            if (weights[place] > lightest)
            {
                ranked[known++] = Sampler.Entry(weights[place], place);
            }
        }

        ranked = ranked[..known];
        ranked.Sort();
        if (options.TopK >= known)
        {
            return null;
        }

        int kept = Sampler.Keep(ranked, options, sum.Least);
        return kept < known && kept == Sampler.Keep(ranked, options, sum.Most)
            ? Sampler.Draw(weights, Sampler.Leave(weights, ranked[..kept]), ref random)
            : null;
    }

    private static int? Draw(ReadOnlySpan<float> weights, double sum, TopLogitsRow row, Others others, ref SplitMix64 random)
    {
        SplitMix64 next = random;
        double share = next.NextUniform();
        (double least, double most) = others.Bounds(sum, row.Others);
        double before = 0;
        for (int place = 0; place < weights.Length; place++)
        {
            if (others.Bounds(before + weights[place], row.OthersBefore(place)).Least > share * most)
            {
                if (others.Bounds(before, row.OthersBefore(place)).Most >= share * least)
                {
                    return null;
                }

                random = next;
                return place;
            }

            before += weights[place];
        }

        return null;
    }

    // What a device's sum of other weights is multiplied by for the bounds of the exact one.
    private readonly record struct Others(double Least, double Most)
    {
        /// <summary>The bounds of a sum of known and other weights, in whatever order it is made.</summary>
        public (double Least, double Most) Bounds(double known, double others) =>
            ((1 - SumError) * (known + (Least * others)), (1 + SumError) * (known + (Most * others)));
    }
}
