namespace TinyLlama.Compute.Cuda;

/// <summary>
/// Keys and values in blocks of <see cref="TokenLayout.KeyBlock"/> positions, head after head of each block: (position,
/// channel) in BF16, as they are; or in Q8_0 bytes and then, for each position, a scale in F16 for each run of 32 channels, the
/// largest of them / 127. Attention reads them by tiles of whole blocks. Memory-bound.
/// </summary>
internal static class KeyValueCache
{
    private const int GroupChannels = 32;
    private const int Threads = 128;

    /// <summary>Room for keys, or values.</summary>
    public static Tensor Take(Arena arena, int blocks, int keyHeads, int headDim, DType type)
    {
        Attention.RequireHeadDim(headDim);
        return type is DType.BF16 or DType.Q8_0
            ? arena.Take(blocks, checked(keyHeads * HeadElements(headDim, type)), type)
            : throw new DeviceException($"a GPU keeps keys and values in BF16 or Q8_0, not in {type}: choose another cache type");
    }

    /// <summary>The elements of a block that a head takes.</summary>
    public static int HeadElements(int headDim, DType type) =>
        TokenLayout.KeyBlock * (type == DType.Q8_0 ? (headDim + GroupChannels - 1) / GroupChannels * GroupChannels : headDim);

    /// <summary>Copies the keys and values of each token to its position.</summary>
    public static void Append(
        CudaDevice device, Tensor cacheKeys, Tensor cacheValues, Tensor keys, Tensor values, TokenLayout layout, int headDim)
    {
        Attention.RequireHeadDim(headDim);
        Shape.Require(
            !layout.BlockTable.IsEmpty && layout.KeyRows <= cacheKeys.Rows && keys.Columns % headDim == 0,
            "a layout with a block table of blocks in the cache, and whole heads");
        int keyHeads = keys.Columns / headDim;
        Attention.RequireRows(keys, layout.TokenCount, keys.Columns);
        Attention.RequireRows(values, layout.TokenCount, keys.Columns);
        RequireBlocks(cacheKeys, cacheKeys, keyHeads, headDim);
        RequireBlocks(cacheValues, cacheKeys, keyHeads, headDim);
        device.Launch(
            cacheKeys.Type == DType.Q8_0 ? "append_q8_0" : "append_bf16", (layout.TokenCount, 2, 1), Threads, 0, cacheKeys, cacheValues,
            keys, values, layout.Segments, layout.BlockTable, layout.SegmentCount, keyHeads, headDim, keys.Stride, values.Stride);
    }

    /// <summary>Throws if a tensor is not a cache of these heads, like another one.</summary>
    public static void RequireBlocks(Tensor cache, Tensor like, int keyHeads, int headDim) => Shape.Require(
        cache.Type is DType.BF16 or DType.Q8_0 && cache.Type == like.Type && cache.Rows == like.Rows && cache.IsContiguous
            && cache.Columns == keyHeads * HeadElements(headDim, cache.Type),
        "the blocks of a cache of these heads");
}
