using System.Buffers;
using System.Runtime.InteropServices;
using TinyLlama.Data;

namespace TinyLlama.Inference;

/// <summary>From logits to the next token: functions of (logits, options, random state) and nothing else.</summary>
/// <remarks>
/// The order is that of Hugging Face's transformers: logit bias, repetition penalty, presence and frequency penalty,
/// temperature, top-k, top-p, min-p, each on what the ones before left, then one draw. (llama.cpp divides by the temperature last, so that its top-p and min-p see the
/// probabilities at temperature 1.) Of equal logits the smaller id comes first.
/// </remarks>
public static class Sampler
{
    /// <summary>The next token.</summary>
    /// <param name="logits">(V) logits; overwritten.</param>
    /// <param name="context">The tokens that the repetition penalty is for.</param>
    /// <param name="generated">The tokens that presence and frequency penalty are for.</param>
    /// <param name="options">How to choose.</param>
    /// <param name="random">The random state; one number is drawn, none where the choice is greedy.</param>
    /// <exception cref="UserErrorException">A logit is not a number or plus infinity, or all are minus infinity.</exception>
    public static int Next(
        Span<float> logits, ReadOnlySpan<int> context, ReadOnlySpan<int> generated, GenerationOptions options, ref SplitMix64 random)
    {
        Adjust(logits, columns: [], context, generated, options);
        int likeliest = Greedy(logits);
        return options.Temperature == 0 ? likeliest : Draw(logits, Weigh(logits, logits[likeliest], options), ref random);
    }

    /// <summary>Turns logits into the distribution that <see cref="Next"/> draws from.</summary>
    /// <param name="logits">(V) logits; receives probabilities, 0 for a token that cannot come.</param>
    /// <param name="context">The tokens that the repetition penalty is for.</param>
    /// <param name="generated">The tokens that presence and frequency penalty are for.</param>
    /// <param name="options">How to choose; greedily, one token has probability 1.</param>
    /// <exception cref="UserErrorException">A logit is not a number or plus infinity, or all are minus infinity.</exception>
    public static void Distribution(
        Span<float> logits, ReadOnlySpan<int> context, ReadOnlySpan<int> generated, GenerationOptions options)
    {
        Adjust(logits, columns: [], context, generated, options);
        int likeliest = Greedy(logits);
        if (options.Temperature == 0)
        {
            logits.Clear();
            logits[likeliest] = 1;
            return;
        }

        double sum = Weigh(logits, logits[likeliest], options);
        foreach (ref float weight in logits)
        {
            weight = (float)(weight / sum);
        }
    }

    /// <summary>A token of a distribution.</summary>
    /// <param name="distribution">(V) probabilities.</param>
    /// <param name="random">The random state; one number is drawn.</param>
    public static int Draw(ReadOnlySpan<float> distribution, ref SplitMix64 random) => Draw(distribution, Sum(distribution), ref random);

    /// <summary>
    /// Draws a token where another distribution proposed one: the proposal with probability min(1, p / q), else one in
    /// proportion to max(0, p - q). So the token is one of p, whatever q is.
    /// </summary>
    /// <remarks>Leviathan et al. 2023, algorithm 1.</remarks>
    /// <param name="target">(V) p, a distribution; overwritten.</param>
    /// <param name="draft">(V) q, the distribution that the proposal was drawn from; empty where it was certain.</param>
    /// <param name="proposal">The proposed token.</param>
    /// <param name="random">The random state; one or two numbers are drawn.</param>
    public static int Verify(Span<float> target, ReadOnlySpan<float> draft, int proposal, ref SplitMix64 random)
    {
        if (random.NextUniform() * draft[proposal] < target[proposal])
        {
            return proposal;
        }

        for (int id = 0; id < draft.Length; id++)
        {
            target[id] = Math.Max(0, target[id] - draft[id]);
        }

        target[proposal] = 0;
        double rest = Sum(target);

        // Nothing is left where p and q differ by rounding alone.
        return rest > 0 ? Draw(target, rest, ref random) : proposal;
    }

    /// <summary>The token with the largest logit.</summary>
    /// <exception cref="UserErrorException">A logit is not a number or plus infinity, or all are minus infinity.</exception>
    public static int Greedy(ReadOnlySpan<float> logits)
    {
        int best = -1;
        for (int id = 0; id < logits.Length; id++)
        {
            if (float.IsNaN(logits[id]) || float.IsPositiveInfinity(logits[id]))
            {
                throw new UserErrorException($"the model's logit of token {id} is {logits[id]}: its weights are damaged, or its training diverged");
            }

            if (logits[id] > (best < 0 ? float.NegativeInfinity : logits[best]))
            {
                best = id;
            }
        }

        return best >= 0 ? best : throw new UserErrorException("no token has a finite logit: the model's weights are damaged");
    }

    /// <summary>
    /// Makes tokens of the context less likely, each once: positive logits are divided by the penalty, negative ones
    /// multiplied (Keskar et al. 2019).
    /// </summary>
    public static void Penalize(Span<float> logits, ReadOnlySpan<int> context, double penalty) => Penalize(logits, columns: [], context, penalty);

    /// <summary>
    /// Makes tokens that were generated already less likely: from the logit of each, presence is subtracted once and
    /// frequency as often as the token came. Negative ones make them likelier.
    /// </summary>
    public static void Penalize(Span<float> logits, ReadOnlySpan<int> generated, double presence, double frequency) =>
        Penalize(logits, columns: [], generated, presence, frequency);

    /// <summary>Bias and penalties, in this order.</summary>
    /// <param name="logits">Logits of all tokens, or of some.</param>
    /// <param name="columns">Which, rising; empty for all.</param>
    /// <param name="context">The tokens that the repetition penalty is for.</param>
    /// <param name="generated">The tokens that presence and frequency penalty are for.</param>
    /// <param name="options">How large they are.</param>
    internal static void Adjust(
        Span<float> logits, ReadOnlySpan<float> columns, ReadOnlySpan<int> context, ReadOnlySpan<int> generated, GenerationOptions options)
    {
        foreach ((int id, double bias) in options.LogitBias)
        {
            if (PlaceOf(id, columns) is >= 0 and int place)
            {
                logits[place] = (float)(logits[place] + bias);
            }
        }

        if (options.RepetitionPenalty != 1)
        {
            Penalize(logits, columns, context, options.RepetitionPenalty);
        }

        if (options.PresencePenalty != 0 || options.FrequencyPenalty != 0)
        {
            Penalize(logits, columns, generated, options.PresencePenalty, options.FrequencyPenalty);
        }
    }

    /// <summary>Where the logit of a token is; negative where it is not.</summary>
    /// <param name="id">The token.</param>
    /// <param name="columns">As in <see cref="Adjust"/>.</param>
    internal static int PlaceOf(int id, ReadOnlySpan<float> columns) => columns.IsEmpty ? id : columns.BinarySearch((float)id);

    private static void Penalize(Span<float> logits, ReadOnlySpan<float> columns, ReadOnlySpan<int> context, double penalty)
    {
        foreach ((int id, _) in Counts(context))
        {
            if (PlaceOf(id, columns) is >= 0 and int place)
            {
                logits[place] = (float)(logits[place] > 0 ? logits[place] / penalty : logits[place] * penalty);
            }
        }
    }

    private static void Penalize(Span<float> logits, ReadOnlySpan<float> columns, ReadOnlySpan<int> generated, double presence, double frequency)
    {
        foreach ((int id, int count) in Counts(generated))
        {
            if (PlaceOf(id, columns) is >= 0 and int place)
            {
                logits[place] = (float)(logits[place] - presence - (count * frequency));
            }
        }
    }

    private static Dictionary<int, int> Counts(ReadOnlySpan<int> tokens)
    {
        var counts = new Dictionary<int, int>();
        foreach (int id in tokens)
        {
            CollectionsMarshal.GetValueRefOrAddDefault(counts, id, out _)++;
        }

        return counts;
    }

    // Logits become probabilities up to a common factor, by which the likeliest token has 1; 0 where a cut falls. Returns their sum.
    private static double Weigh(Span<float> logits, float largest, GenerationOptions options)
    {
        double sum = Weigh(logits, largest, options.Temperature, out int possible);
        bool cuts = (options.TopK > 0 && options.TopK < possible) || options.TopP < 1 || options.MinP > 0;
        return cuts ? Cut(logits, options, sum, possible) : sum;
    }

    // The same without a cut; how many tokens have a weight above 0.
    internal static double Weigh(Span<float> logits, float largest, double temperature, out int possible)
    {
        double sum = 0;
        possible = 0;
        foreach (ref float weight in logits)
        {
            weight = (float)Math.Exp(((double)weight - largest) / temperature);
            sum += weight;
            possible += weight > 0 ? 1 : 0;
        }

        return sum;
    }

    private static double Cut(Span<float> weights, GenerationOptions options, double sum, int possible)
    {
        ulong[] rented = ArrayPool<ulong>.Shared.Rent(weights.Length);
        Span<ulong> ranked = Rank(rented, weights, options, sum, possible);
        double left = Leave(weights, ranked[..Keep(ranked, options, sum)]);
        ArrayPool<ulong>.Shared.Return(rented);
        return left;
    }

    // Leaves the weights of some tokens alone; returns their sum.
    internal static double Leave(Span<float> weights, ReadOnlySpan<ulong> kept)
    {
        weights.Clear();
        double left = 0;
        foreach (ulong entry in kept)
        {
            weights[IdOf(entry)] = WeightOf(entry);
            left += WeightOf(entry);
        }

        return left;
    }

    internal static int Draw(ReadOnlySpan<float> weights, double sum, ref SplitMix64 random)
    {
        double point = random.NextUniform() * sum;
        int last = 0;
        for (int id = 0; id < weights.Length; id++)
        {
            if (weights[id] > 0)
            {
                last = id;
                point -= weights[id];
                if (point < 0)
                {
                    break;
                }
            }
        }

        return last;
    }

    private static double Sum(ReadOnlySpan<float> weights)
    {
        double sum = 0;
        foreach (float weight in weights)
        {
            sum += weight;
        }

        return sum;
    }

    // Tokens from the likeliest on. Those that no cut can leave are not even sorted.
    private static Span<ulong> Rank(ulong[] rented, ReadOnlySpan<float> weights, GenerationOptions options, double sum, int possible)
    {
        // n-1 tokens below (1 - p) / (n-1) cannot reach 1 - p: the others reach p without them. With top-k the sum is
        // that of fewer tokens, which is not known yet.
        bool byShare = options.TopK == 0 && possible > 1;
        double least = byShare ? Math.Max(options.MinP, (1 - options.TopP) * sum / (possible - 1)) : 0;

        // With top-k there is room for twice as many; when it is full the likelier half stays, and what follows must be likelier than its last.
        int room = options.TopK > 0 ? (int)Math.Min(2L * options.TopK, weights.Length) : weights.Length;
        ulong last = ulong.MaxValue;
        int count = 0;
        for (int id = 0; id < weights.Length; id++)
        {
            if (weights[id] <= 0 || (weights[id] < least && weights[id] < 1))
            {
                continue;
            }

            if (count == room)
            {
                rented.AsSpan(0, count).Sort();
                count = options.TopK;
                last = rented[count - 1];
            }

            ulong entry = Entry(weights[id], id);
            if (entry < last)
            {
                rented[count++] = entry;
            }
        }

        Span<ulong> ranked = rented.AsSpan(0, count);
        ranked.Sort();
        return ranked;
    }

    // How many of the ranked tokens may be drawn; at least one.
    internal static int Keep(ReadOnlySpan<ulong> ranked, GenerationOptions options, double sum)
    {
        int kept = ranked.Length;
        if (options.TopK > 0 && options.TopK < kept)
        {
            kept = options.TopK;
        }

        if (options.TopK > 0)
        {
            sum = 0;
            foreach (ulong entry in ranked[..kept])
            {
                sum += WeightOf(entry);
            }
        }

        if (options.TopP < 1)
        {
            double reached = 0;
            int count = 0;
            while (count < kept && reached < options.TopP * sum)
            {
                reached += WeightOf(ranked[count++]);
            }

            kept = Math.Max(count, 1);
        }

        while (kept > 1 && WeightOf(ranked[kept - 1]) < options.MinP)
        {
            kept--;
        }

        return kept;
    }

    // A number that sorts by falling weight, then by rising id: bits of a positive float order as the float does.
    internal static ulong Entry(float weight, int id) => ((ulong)~BitConverter.SingleToUInt32Bits(weight) << 32) | (uint)id;

    private static float WeightOf(ulong entry) => BitConverter.UInt32BitsToSingle(~(uint)(entry >> 32));

    private static int IdOf(ulong entry) => (int)(uint)entry;
}
