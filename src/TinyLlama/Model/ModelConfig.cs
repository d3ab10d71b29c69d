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

    /// <summary>Gets a value indicating whether the head is the embedding table.</summary>
    public bool TiedEmbeddings { get; init; }

    /// <summary>Gets D, the width of a head.</summary>
    public int HeadDim => Channels / Heads;

    /// <summary>Gets the width of all key (or value) heads.</summary>
    public int KeyValueChannels => KeyValueHeads * HeadDim;
}
