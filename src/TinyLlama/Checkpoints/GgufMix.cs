using TinyLlama.Compute;
using TinyLlama.Model;

namespace TinyLlama.Checkpoints;

/// <summary>
/// Which type each tensor of a GGUF file is stored in, under llama.cpp's names: <c>q4_k_m</c> is Q4_K with more bits where they
/// help most. The rules are those of llama.cpp's <c>llama_model_quantize</c>, without an importance matrix.
/// </summary>
public sealed class GgufMix
{
    private readonly DType _type;

    private GgufMix(string name, int fileType, DType type) => (Name, FileType, _type) = (name, fileType, type);

    /// <summary>Gets every mix that is written.</summary>
    public static IReadOnlyList<GgufMix> All { get; } =
    [
        new("f32", 0, DType.F32), new("f16", 1, DType.F16), new("bf16", 32, DType.BF16), new("q8_0", 7, DType.Q8_0), new("q4_0", 2, DType.Q4_0),
        new("q4_k_s", 14, DType.Q4_K), new("q4_k_m", 15, DType.Q4_K), new("q5_k_m", 17, DType.Q5_K), new("q6_k", 18, DType.Q6_K),
    ];

    /// <summary>Gets the name.</summary>
    public string Name { get; }

    /// <summary>Gets llama.cpp's number of the mix, <c>general.file_type</c>.</summary>
    internal int FileType { get; }

    private bool IsMedium => Name.EndsWith("_k_m", StringComparison.Ordinal);

    private bool IsSmall => Name.EndsWith("_k_s", StringComparison.Ordinal);

    /// <summary>The mix of a name.</summary>
    /// <exception cref="ArgumentException">There is none.</exception>
    public static GgufMix Find(string name) =>
        All.FirstOrDefault(mix => mix.Name == name) ?? throw new ArgumentException($"no mix is named '{name}'", nameof(name));

    /// <summary>The type of a tensor: the one that is due, or, where its rows are no multiple of that one's blocks, the next that fits.</summary>
    /// <param name="tensor">A tensor of the model.</param>
    /// <param name="config">The model's shape.</param>
    internal DType TypeOf(ModelTensor tensor, ModelConfig config)
    {
        DType type = DueTypeOf(tensor, config);
        while (tensor.Columns % type.BlockElements() != 0)
        {
            type = type switch
            {
                DType.Q4_K => DType.Q5_0,
                DType.Q5_K => DType.Q5_1,
                DType.Q6_K => DType.Q8_0,
                _ => DType.F16,
            };
        }

        return type;
    }

    /// <summary>The type that the mix gives a tensor whose rows are long enough.</summary>
    internal DType DueTypeOf(ModelTensor tensor, ModelConfig config)
    {
        if (tensor.IsVector)
        {
            return DType.F32;
        }

        if (!_type.IsQuantized())
        {
            return _type;
        }

        // The table that makes logits.
        if (tensor.Name == ModelTensors.Head || (tensor.Name == ModelTensors.Embedding && config.TiedEmbeddings))
        {
            return _type == DType.Q8_0 ? DType.Q8_0 : DType.Q6_K;
        }

        bool isValue = tensor.Name.EndsWith("self_attn.v_proj.weight", StringComparison.Ordinal);
        if (!isValue && !tensor.Name.EndsWith("mlp.down_proj.weight", StringComparison.Ordinal))
        {
            return _type;
        }

        int layer = ModelTensors.LayerOf(tensor.Name);
        return IsMedium && GetsMoreBits(layer, config.Layers) ? DType.Q6_K
            : IsSmall && layer < (isValue ? 4 : config.Layers / 8) ? DType.Q5_K
            : _type;
    }

    // The first and the last eighth, and every third between them.
    private static bool GetsMoreBits(int layer, int layers) =>
        layer < layers / 8 || layer >= 7 * layers / 8 || (layer - (layers / 8)) % 3 == 2;
}
