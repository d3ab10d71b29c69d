namespace TinyLlama.Model;

/// <summary>The shape of a Llama and what its arithmetic needs: what <c>config.json</c> says.</summary>
public sealed record ModelConfig
{
    /// <summary>Gets V, the number of token ids.</summary>
    public required int VocabularySize { get; init; }

    /// <summary>Gets T, the context length that the model is trained for.</summary>
    public required int ContextLength { get; init; }

    /// <summary>Gets L, the number of transformer blocks.</summary>
    public required int Layers { get; init; }

    /// <summary>Gets the number of query heads.</summary>
    public required int Heads { get; init; }

    /// <summary>Gets the number of key/value heads; query head h reads head h / (Heads / KeyValueHeads).</summary>
    public required int KeyValueHeads { get; init; }

    /// <summary>Gets C, the width of the residual stream.</summary>
    public required int Channels { get; init; }

    /// <summary>Gets H, the width inside the feed-forward.</summary>
    public required int Hidden { get; init; }

    /// <summary>Gets ε of RMSNorm.</summary>
    public float NormEpsilon { get; init; } = 1e-5f;

    /// <summary>Gets θ of the rotary embedding.</summary>
    public float RopeTheta { get; init; } = 10_000;

    /// <summary>Gets the factor that positions are divided by (linear interpolation); 1 for none.</summary>
    public float RopeFactor { get; init; } = 1;

    /// <summary>Gets how the frequencies of the rotary embedding are stretched one by one; null for not.</summary>
    public RopeScaling? RopeScaling { get; init; }

    /// <summary>Gets a value indicating whether the head is the embedding table.</summary>
    public bool TiedEmbeddings { get; init; }

    /// <summary>Gets D, the width of a head.</summary>
    public int HeadDim => Channels / Heads;

    /// <summary>Gets the width of all key (or value) heads.</summary>
    public int KeyValueChannels => KeyValueHeads * HeadDim;

    /// <summary>Gets N, the number of parameters: what all matrices and norms hold, a tied head counted once.</summary>
    public long ParameterCount
    {
        get
        {
            long attention = 2L * Channels * (Channels + KeyValueChannels);
            long feedForward = 3L * Channels * Hidden;
            long block = attention + feedForward + (2L * Channels);
            long embeddings = (TiedEmbeddings ? 1L : 2L) * VocabularySize * Channels;
            return (Layers * block) + embeddings + Channels;
        }
    }

    /// <summary>The angle by which a pair of a head turns from one position to the next, in radians: θ^(-2i/D), scaled.</summary>
    /// <param name="pair">i, from 0 to D/2 - 1.</param>
    public double RopeFrequency(int pair)
    {
        double frequency = Math.Pow(RopeTheta, -2.0 * pair / HeadDim);
        return frequency / (RopeScaling?.Divisor(frequency) ?? RopeFactor);
    }

    /// <summary>What keeps these numbers from being a model, one sentence each; empty if nothing does.</summary>
    public IEnumerable<string> Problems()
    {
        (string Name, long Value, long Most)[] dimensions =
        [
            ("vocabulary", VocabularySize, 1 << 24),
            ("context", ContextLength, 1 << 24),
            ("layers", Layers, 1 << 12),
            ("heads", Heads, 1 << 12),
            ("key_value_heads", KeyValueHeads, 1 << 12),
            ("channels", Channels, 1 << 18),
            ("hidden", Hidden, 1 << 20),
        ];
        bool positive = true;
        foreach ((string name, long value, long most) in dimensions)
        {
            if (value < 1 || value > most)
            {
                positive = false;
                yield return $"{name} is {value:N0}, which is not from 1 to {most:N0}";
            }
        }

        if (!positive)
        {
            yield break;
        }

        if (Channels % Heads != 0)
        {
            yield return $"channels {Channels:N0} is not a multiple of heads {Heads:N0}";
        }
        else if (HeadDim % 2 != 0)
        {
            yield return $"channels {Channels:N0} / heads {Heads:N0} = {HeadDim:N0} is odd, but rotary embedding turns pairs";
        }

        if (Heads % KeyValueHeads != 0)
        {
            yield return $"heads {Heads:N0} is not a multiple of key_value_heads {KeyValueHeads:N0}";
        }

        long largest = Math.Max(VocabularySize, Hidden) * (long)Channels;
        if (largest > int.MaxValue)
        {
            yield return $"a matrix of {largest:N0} elements is larger than {int.MaxValue:N0}";
        }

        if (!(NormEpsilon > 0 && float.IsFinite(NormEpsilon)))
        {
            yield return $"norm_epsilon is {NormEpsilon}, which is not a positive number";
        }

        if (!(RopeTheta > 0 && float.IsFinite(RopeTheta)))
        {
            yield return $"rope_theta is {RopeTheta}, which is not a positive number";
        }

        if (!(RopeFactor > 0 && float.IsFinite(RopeFactor)))
        {
            yield return $"rope_factor is {RopeFactor}, which is not a positive number";
        }

        if (RopeScaling?.Problem() is { } problem)
        {
            yield return problem;
        }
    }
}
