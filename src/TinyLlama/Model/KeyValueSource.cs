using TinyLlama.Compute;

namespace TinyLlama.Model;

/// <summary>Where attention finds its keys and values: the batch itself in training, a cache in inference.</summary>
public abstract class KeyValueSource
{
    /// <summary>Gets the source for training: the rows of the batch.</summary>
    public static KeyValueSource Batch { get; } = new BatchRows();

    /// <summary>Takes one layer's new keys and values and returns the tensors that attention is to read.</summary>
    /// <param name="backend">The device.</param>
    /// <param name="layer">0 … L-1.</param>
    /// <param name="keys">(N, Hkv · D), rotated.</param>
    /// <param name="values">(N, Hkv · D).</param>
    /// <param name="layout">The positions of the packed tokens.</param>
    public abstract (Tensor Keys, Tensor Values) Append(Backend backend, int layer, Tensor keys, Tensor values, TokenLayout layout);

    private sealed class BatchRows : KeyValueSource
    {
        public override (Tensor Keys, Tensor Values) Append(
            Backend backend, int layer, Tensor keys, Tensor values, TokenLayout layout) => (keys, values);
    }
}
