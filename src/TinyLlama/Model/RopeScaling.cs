namespace TinyLlama.Model;

/// <summary>
/// How Llama 3.1 stretches its rotary embedding to a longer context (Grattafiori et al. 2024, arXiv 2407.21783): waves that
/// are short beside the old context stay, long ones are slowed down by a factor, those between by a part of it.
/// </summary>
public sealed record RopeScaling
{
    private const double Tolerance = 1e-4;

    /// <summary>Gets what the frequencies of long waves are divided by.</summary>
    public required float Factor { get; init; }

    /// <summary>Gets the number of turns in the old context below which a wave is long.</summary>
    public required float LowFrequencyFactor { get; init; }

    /// <summary>Gets the number of turns in the old context above which a wave is short.</summary>
    public required float HighFrequencyFactor { get; init; }

    /// <summary>Gets the context length that the model had before, in tokens.</summary>
    public required int OriginalContextLength { get; init; }

    /// <summary>Finds the scaling that divides frequencies by given factors.</summary>
    /// <param name="divisors">D/2 of them, as GGUF files store them.</param>
    /// <param name="theta">θ of the rotary embedding.</param>
    /// <returns>Null where there is none. Of all that do the same, the one with a low-frequency factor of 1.</returns>
    public static RopeScaling? Fit(ReadOnlySpan<float> divisors, double theta)
    {
        // Turns and original context together mean the same times any number, so one of them may be chosen. The share that
        // a wave keeps grows linearly with its frequency: two waves between long and short tell the line.
        float factor = divisors[^1];
        int first = divisors.IndexOfAnyExcept(1);
        int last = divisors.IndexOf(factor) - 1;
        if (first < 0 || last <= first)
        {
            return null;
        }

        int pairs = divisors.Length;
        double FrequencyOf(int pair) => Math.Pow(theta, -(double)pair / pairs) / (2 * Math.PI);
        double KeptBy(float divisor) => ((1.0 / divisor) - (1.0 / factor)) / (1 - (1.0 / factor));
        (double fast, double slow) = (KeptBy(divisors[first]), KeptBy(divisors[last]));
        double slope = (fast - slow) / (FrequencyOf(first) - FrequencyOf(last));
        double range = slope / ((slope * FrequencyOf(last)) - slow);
        var scaling = new RopeScaling
        {
            Factor = factor,
            LowFrequencyFactor = 1,
            HighFrequencyFactor = (float)Math.Round(1 + (range / slope), 3),
            OriginalContextLength = (int)Math.Clamp(Math.Round(range), 1, int.MaxValue),
        };
        bool fits = scaling.Problem() is null;
        for (int pair = 0; pair < pairs; pair++)
        {
            fits &= Math.Abs(scaling.Divisor(2 * Math.PI * FrequencyOf(pair)) - divisors[pair]) <= Tolerance * divisors[pair];
        }

        return fits ? scaling : null;
    }

    /// <summary>What the frequency of a pair is divided by.</summary>
    /// <param name="frequency">Radians per position.</param>
    public double Divisor(double frequency)
    {
        double turns = OriginalContextLength * frequency / (2 * Math.PI);
        if (turns > HighFrequencyFactor)
        {
            return 1;
        }

        double kept = (turns - LowFrequencyFactor) / (HighFrequencyFactor - LowFrequencyFactor);
        return turns < LowFrequencyFactor ? Factor : 1 / (((1 - kept) / Factor) + kept);
    }

    /// <summary>What keeps these numbers from being a scaling, or null.</summary>
    public string? Problem() =>
        !(Factor >= 1 && float.IsFinite(Factor)) ? $"the factor of its rotary embedding is {Factor}, which is less than 1"
        : !(LowFrequencyFactor > 0 && HighFrequencyFactor > LowFrequencyFactor && float.IsFinite(HighFrequencyFactor))
            ? $"the frequency factors of its rotary embedding are {LowFrequencyFactor} and {HighFrequencyFactor}, which are not two rising positive numbers"
        : OriginalContextLength < 1 ? $"the original context of its rotary embedding is {OriginalContextLength}"
        : null;
}
