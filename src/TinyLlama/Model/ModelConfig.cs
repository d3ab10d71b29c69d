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
    public int HeadDim => Channels / (Heads * TensorRanks);

    /// <summary>Gets the width of all query heads.</summary>
    public int QueryChannels => Heads * HeadDim;

    /// <summary>Gets the width of all key (or value) heads.</summary>
    public int KeyValueChannels => KeyValueHeads * HeadDim;

    /// <summary>Gets the number of ranks that have the heads and the hidden channels between them; these numbers are one rank's (<see cref="Part"/>).</summary>
    public int TensorRanks { get; private init; } = 1;

    /// <summary>Gets the number of the first block, where these are some blocks of a model (<see cref="Stage"/>).</summary>
    public int FirstLayer { get; private init; }

    /// <summary>Gets a value indicating whether the embedding is part of this: not of later stages.</summary>
    public bool HasEmbedding => FirstLayer == 0;

    /// <summary>Gets a value indicating whether the final norm and the head are part of this: not of earlier stages.</summary>
    public bool HasHead { get; private init; } = true;

    /// <summary>The shape of one of some stages that have the blocks between them, the first the embedding too, the last the head.</summary>
    /// <param name="stage">0 … stages-1.</param>
    /// <param name="stages">No more than there are blocks.</param>
    public ModelConfig Stage(int stage, int stages)
    {
        int first = Layers * stage / stages;
        return this with { Layers = (Layers * (stage + 1) / stages) - first, FirstLayer = FirstLayer + first, HasHead = HasHead && stage == stages - 1 };
    }

    /// <summary>The shape of what one of some ranks has of this model: its share of the heads and of the hidden channels, and all else.</summary>
    /// <param name="ranks">They divide heads, key/value heads and hidden channels.</param>
    public ModelConfig Part(int ranks) => this with
    {
        Heads = Heads / ranks,
        KeyValueHeads = KeyValueHeads / ranks,
        Hidden = Hidden / ranks,
        TensorRanks = TensorRanks * ranks,
    };

    /// <summary>Gets N, the number of parameters: what all matrices and norms hold, a tied head counted once.</summary>
    public long ParameterCount
    {
        get
        {
            long attention = 2L * Channels * (QueryChannels + KeyValueChannels);
            long feedForward = 3L * Channels * Hidden;
            long block = attention + feedForward + (2L * Channels);
            long table = (long)VocabularySize * Channels;
            return (Layers * block) + (HasEmbedding ? table : 0) + (HasHead ? Channels + (TiedEmbeddings ? 0 : table) : 0);
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
