using System.Globalization;
using TinyLlama.Model;

namespace TinyLlama.Checkpoints;

/// <summary>A tensor that a model of some shape has.</summary>
/// <param name="Name">Its Hugging Face name.</param>
/// <param name="Rows">Outputs (O), tokens (V), or 1 for a norm.</param>
/// <param name="Columns">Inputs (I) or channels (C).</param>
public readonly record struct ModelTensor(string Name, int Rows, int Columns)
{
    /// <summary>Gets a value indicating whether files keep it with one dimension: a norm's weight.</summary>
    public bool IsVector => Rows == 1;

    /// <summary>Gets the number of elements.</summary>
    public long Count => (long)Rows * Columns;
}

/// <summary>Names and shapes of a Llama's tensors, in the order of <see cref="LlamaModel.Parameters"/>.</summary>
internal static class ModelTensors
{
    /// <summary>The embedding table, (V, C).</summary>
    public const string Embedding = LlamaModel.EmbeddingName;

    /// <summary>The weight of the last norm, (1, C).</summary>
    public const string Norm = "model.norm.weight";

    /// <summary>The head, (V, C), where it is not the embedding table.</summary>
    public const string Head = LlamaModel.HeadName;

    /// <summary>The tensors of a shape, without an allocation of any.</summary>
    public static IReadOnlyList<ModelTensor> Of(ModelConfig config)
    {
        var tensors = new List<ModelTensor>();
        if (config.HasEmbedding)
        {
            tensors.Add(new ModelTensor(Embedding, config.VocabularySize, config.Channels));
        }

        for (int layer = config.FirstLayer; layer < config.FirstLayer + config.Layers; layer++)
        {
            tensors.AddRange(
            [
                new(InLayer(layer, "input_layernorm"), 1, config.Channels),
                new(InLayer(layer, "self_attn.q_proj"), config.Channels, config.Channels),
                new(InLayer(layer, "self_attn.k_proj"), config.KeyValueChannels, config.Channels),
                new(InLayer(layer, "self_attn.v_proj"), config.KeyValueChannels, config.Channels),
                new(InLayer(layer, "self_attn.o_proj"), config.Channels, config.Channels),
                new(InLayer(layer, "post_attention_layernorm"), 1, config.Channels),
                new(InLayer(layer, "mlp.gate_proj"), config.Hidden, config.Channels),
                new(InLayer(layer, "mlp.up_proj"), config.Hidden, config.Channels),
                new(InLayer(layer, "mlp.down_proj"), config.Channels, config.Hidden),
            ]);
        }

        if (config.HasHead)
        {
            tensors.Add(new ModelTensor(Norm, 1, config.Channels));
            if (!config.TiedEmbeddings)
            {
                tensors.Add(new ModelTensor(Head, config.VocabularySize, config.Channels));
            }
        }

        return tensors;
    }

    /// <summary>The full name of a layer's tensor.</summary>
    public static string InLayer(int layer, string name) => $"model.layers.{layer}.{name}.weight";

    /// <summary>The layer in a name that <see cref="InLayer"/> made.</summary>
    public static int LayerOf(string name) => int.Parse(name.Split('.', 4)[2], CultureInfo.InvariantCulture);

    /// <summary>Whether GGUF and llama2.c store the rows in the order of <see cref="InterleavedRow"/>: a q or k weight.</summary>
    public static bool IsInterleaved(string name) =>
        name.EndsWith("self_attn.q_proj.weight", StringComparison.Ordinal) || name.EndsWith("self_attn.k_proj.weight", StringComparison.Ordinal);

    /// <summary>
    /// The row of a q or k weight in files that rotate the pairs (2i, 2i + 1) of a head, where ours rotates (i, i + D/2):
    /// of a head's D rows first the even ones, then the odd ones.
    /// </summary>
    /// <param name="row">The row here.</param>
    /// <param name="headDim">D, the width of a head.</param>
    public static long InterleavedRow(long row, int headDim)
    {
        (long head, long i) = Math.DivRem(row, headDim);
        int half = headDim / 2;
        return (head * headDim) + (i < half ? 2 * i : (2 * (i - half)) + 1);
    }

    /// <summary>The row here of a row there: the inverse of <see cref="InterleavedRow"/>.</summary>
    public static long HalfSplitRow(long row, int headDim)
    {
        (long head, long i) = Math.DivRem(row, headDim);
        return (head * headDim) + (i / 2) + (i % 2 * (headDim / 2));
    }
}
