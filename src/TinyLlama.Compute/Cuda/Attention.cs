using System.Numerics;

namespace TinyLlama.Compute.Cuda;

/// <summary>
/// Causal grouped-query attention by tiles of keys with a running softmax (FlashAttention-2, Dao 2023): softmax(q · kᵀ / √D) · v
/// without the (T, T) matrix.
/// </summary>
/// <remarks>
/// Shapes as in <see cref="Cpu.Attention"/>; head dims are multiples of 16 up to 128, which tiles round up to a power of two.
/// The heads of a group are more rows of the same matrices: a block takes 64 or 128 rows, or in backward 64 keys, of one segment
/// and one key head, and finds them from its index; the grid follows from the numbers of tokens and segments. Key tiles start at multiples of <see cref="TokenLayout.KeyBlock"/>,
/// and keys in a cache are summed by spans of <see cref="Span"/> positions, so a row has the same bits alone and in a batch.
/// Where few rows see many cached keys, spans are spread over blocks (flash decoding, Dao et al. 2023), with the same bits.
/// Products in BF16 on tensor cores, sums and the softmax in F32. Bound by multiply-adds: forward 4 · D of FLOPs, backward 10 · D
/// with atomics, 14 · D without them (scores and dProbabilities twice), for each pair of a query row and a key that it sees.
/// </remarks>
internal static class Attention
{
    /// <summary>Bytes of the partial sums that spans on several blocks may leave.</summary>
    public const int PartialsBytes = 16 << 20;

    /// <summary>Positions whose keys are summed on their own, in a cache; Attention.cuh has the same.</summary>
    private const int Span = 256;

    private const int Threads = 128;

    // Head rows of a block, where keys are cached; otherwise see RowsOfBlock.
    private const int Rows = 64;
    private const int Keys = TokenLayout.KeyBlock;

    // Blocks for each multiprocessor, at least: what hides the latency of the others.
    private const int BlocksPerProcessor = 2;

    private static readonly string[] s_forward = Names("attention_forward");
    private static readonly string[] s_cached = Names("attention_cached");
    private static readonly string[] s_cachedQ80 = Names("attention_cached_q8_0");
    private static readonly string[] s_merge = Names("attention_merge");
    private static readonly string[] s_dQuery = Names("attention_d_query");
    private static readonly string[] s_dKeyValue = Names("attention_d_key_value");
    private static readonly string[] s_gradients = Names("attention_gradients");

    /// <summary>Writes output and logSumExp.</summary>
    /// <param name="device">The GPU.</param>
    /// <param name="partials">Scratch of <see cref="PartialsBytes"/>.</param>
    /// <param name="output">As in <see cref="Backend.Attention"/>, as all that follow.</param>
    /// <param name="logSumExp">Without gaps between rows.</param>
    /// <param name="query">In BF16, as all but logSumExp and a quantized cache.</param>
    /// <param name="keys">Rows of the batch, or a <see cref="KeyValueCache"/>.</param>
    /// <param name="values">As keys.</param>
    /// <param name="layout">Which keys each query row sees.</param>
    /// <param name="headDim">D.</param>
    public static void Forward(
        CudaDevice device, nint partials, Tensor output, Tensor logSumExp, Tensor query, Tensor keys, Tensor values, TokenLayout layout,
        int headDim)
    {
        RequireHeadDim(headDim);
        bool cached = !layout.BlockTable.IsEmpty;
        int keyHeads = keys.Columns / (cached ? KeyValueCache.HeadElements(headDim, keys.Type) : headDim);
        int group = Group(query, keyHeads, headDim);
        RequireRows(query, query.Rows, query.Columns);
        RequireRows(output, query.Rows, query.Columns);
        RequireStatistics(logSumExp, query.Rows, keyHeads * group);
        Shape.Require(
            layout.TokenCount <= query.Rows && layout.KeyRows <= keys.Rows, "a query row for each token of the layout, and the keys it sees");
        float scale = 1f / MathF.Sqrt(headDim);
        if (!cached)
        {
            RequireRows(keys, keys.Rows, keys.Columns);
            RequireRows(values, keys.Rows, keys.Columns);
            int rows = RowsOfBlock(headDim);
            device.Launch(
                s_forward[Index(headDim)], (Slots(layout, group, rows), keyHeads, 1), Threads, TileBytes(headDim, rows + (4 * Keys)), output,
                logSumExp, query, keys, values, layout.Segments, layout.SegmentCount, keyHeads, group, headDim, output.Stride, query.Stride,
                keys.Stride, values.Stride, scale);
            return;
        }

        KeyValueCache.RequireBlocks(keys, keys, keyHeads, headDim);
        KeyValueCache.RequireBlocks(values, keys, keyHeads, headDim);
        int slots = Slots(layout, group, Rows);
        int depth = Depth(device, layout, slots * keyHeads, keyHeads * group, headDim);
        bool quantized = keys.Type == DType.Q8_0; // its bytes have room beside the tiles
        device.Launch(
            (quantized ? s_cachedQ80 : s_cached)[Index(headDim)], (slots, keyHeads, depth), Threads,
            TileBytes(headDim, Rows + ((quantized ? 5 : 4) * Keys)), output, logSumExp, (long)partials,
            query, keys, values, layout.Segments, layout.BlockTable, layout.SegmentCount, layout.TokenCount, keyHeads, group, headDim, output.Stride,
            query.Stride, scale);
        if (depth > 1)
        {
            int threads = layout.TokenCount * keyHeads * group * (TileColumns(headDim) / 4);
            device.Launch(
                s_merge[Index(headDim)], ((threads + Threads - 1) / Threads, 1, 1), Threads, 0, output, logSumExp, (long)partials,
                layout.Positions, layout.TokenCount, keyHeads * group, headDim, output.Stride, scale);
        }
    }

    /// <summary>Writes dQuery, dKeys and dValues.</summary>
    /// <param name="device">The GPU.</param>
    /// <param name="deterministic">Whether dQuery has a kernel of its own; else the one of dKeys and dValues adds to it by atomics.</param>
    /// <param name="dQuery">As in <see cref="Backend.AttentionBackward"/>, as all that follow.</param>
    /// <param name="dKeys">(N, Hkv · D).</param>
    /// <param name="dValues">(N, Hkv · D).</param>
    /// <param name="scratch">(N, <see cref="ScratchColumns"/>).</param>
    /// <param name="dOutput">(N, Hq · D).</param>
    /// <param name="output">(N, Hq · D).</param>
    /// <param name="logSumExp">(N, Hq).</param>
    /// <param name="query">(N, Hq · D).</param>
    /// <param name="keys">(N, Hkv · D).</param>
    /// <param name="values">(N, Hkv · D).</param>
    /// <param name="layout">Which keys each query row sees.</param>
    /// <param name="headDim">D.</param>
    public static void Backward(
        CudaDevice device, bool deterministic, Tensor dQuery, Tensor dKeys, Tensor dValues, Tensor scratch, Tensor dOutput, Tensor output,
        Tensor logSumExp, Tensor query, Tensor keys, Tensor values, TokenLayout layout, int headDim)
    {
        RequireHeadDim(headDim);
        int keyHeads = keys.Columns / headDim;
        int group = Group(query, keyHeads, headDim);
        (int tokens, int heads) = (query.Rows, keyHeads * group);
        foreach (Tensor rows in (ReadOnlySpan<Tensor>)[query, dQuery, dOutput, output])
        {
            RequireRows(rows, tokens, query.Columns);
        }

        foreach (Tensor rows in (ReadOnlySpan<Tensor>)[keys, values, dKeys, dValues])
        {
            RequireRows(rows, tokens, keyHeads * headDim);
        }

        RequireStatistics(logSumExp, tokens, heads);
        RequireStatistics(scratch, tokens, ScratchColumns(heads, headDim, deterministic));
        Shape.Require(
            layout.TokenCount == tokens && layout.HasWholeSequences, "a layout of all rows: whole sequences, whose keys are their own rows");
        float scale = 1f / MathF.Sqrt(headDim);

        // With atomics the scratch holds the sums of dQuery, then delta.
        Tensor sums = deterministic ? default : scratch with { Columns = query.Columns, Stride = query.Columns };
        Tensor delta = new(scratch.Address + (nint)DType.F32.RowBytes(sums.Count), tokens, heads, heads, DType.F32);
        if (deterministic)
        {
            int rowsAtOnce = RowsOfBlock(headDim);
            device.Launch(
                s_dQuery[Index(headDim)], (Slots(layout, group, rowsAtOnce), keyHeads, 1), Threads, TileBytes(headDim, (2 * rowsAtOnce) + (4 * Keys)),
                dQuery, delta, dOutput, output, logSumExp, query, keys, values, layout.Segments, layout.SegmentCount, keyHeads, group,
                headDim, dQuery.Stride, dOutput.Stride, output.Stride, query.Stride, keys.Stride, values.Stride, scale);
        }
        else
        {
            device.Launch(
                "attention_delta", (Operands.Blocks((long)tokens * heads, Threads / Operands.Eight), 1, 1), Threads, 0, delta, sums, dOutput, output,
                tokens * heads, heads, headDim, dOutput.Stride, output.Stride);
        }

        int queryRows = headDim <= 64 ? 64 : 32;
        int bytes = TileBytes(headDim, (2 * Keys) + (4 * queryRows)) + (4 * queryRows * sizeof(float));
        int scoreBytes = deterministic ? 0 : Keys * queryRows * sizeof(ushort);
        device.Launch(
            (deterministic ? s_dKeyValue : s_gradients)[Index(headDim)], (Slots(layout, 1, Keys), keyHeads, 1), Threads, bytes + scoreBytes,
            dKeys, dValues, sums, delta, dOutput, logSumExp, query, keys, values, layout.Segments, layout.SegmentCount, keyHeads, group, headDim,
            dKeys.Stride, dValues.Stride, dOutput.Stride, query.Stride, keys.Stride, values.Stride, scale);
        if (!deterministic)
        {
            Copy.Convert(device, dQuery, sums);
        }
    }

    /// <summary>Columns of the scratch of <see cref="Backward"/>: delta of each query head and, where atomics add dQuery up, its sums.</summary>
    public static int ScratchColumns(int heads, int headDim, bool deterministic) => deterministic ? heads : heads * (headDim + 1);

    /// <summary>Whether there are kernels for a head dim.</summary>
    public static bool HasKernels(int headDim) => headDim is > 0 and <= 128 && headDim % 16 == 0;

    /// <summary>Throws if there are no kernels for a head dim.</summary>
    public static void RequireHeadDim(int headDim) => Shape.Require(HasKernels(headDim), "a head dim that is a multiple of 16, up to 128");

    /// <summary>Throws if rows of heads are not of this shape, or not where loads of 16 bytes can begin.</summary>
    public static void RequireRows(Tensor tensor, int rows, int columns) => Shape.Require(
        tensor.Type == DType.BF16 && tensor.Rows == rows && tensor.Columns == columns && tensor.Stride % 8 == 0 && tensor.Address % 16 == 0,
        "rows of heads in BF16 at multiples of 16 bytes");

    private static void RequireStatistics(Tensor tensor, int tokens, int heads) => Shape.Require(
        tensor.Type == DType.F32 && tensor.Rows == tokens && tensor.Columns == heads && tensor.IsContiguous, "a number in F32 for each query head");

    private static int Group(Tensor query, int keyHeads, int headDim)
    {
        int queryHeads = query.Columns / headDim;
        Shape.Require(
            queryHeads * headDim == query.Columns && keyHeads > 0 && queryHeads % keyHeads == 0,
            "whole groups of query heads for each key head");
        return queryHeads / keyHeads;
    }

    // How many blocks share the keys of a tile of rows: more where few rows would leave the device idle.
    private static int Depth(CudaDevice device, TokenLayout layout, int blocks, int heads, int headDim)
    {
        int spans = (layout.MostKeys + Span - 1) / Span;
        long bytes = (long)spans * layout.TokenCount * heads * (TileColumns(headDim) + 4) * sizeof(float);
        int wanted = BlocksPerProcessor * device.Multiprocessors;
        return bytes > PartialsBytes ? 1 : Math.Clamp(wanted / Math.Max(1, blocks), 1, Math.Max(1, spans));
    }

    // Tiles of head rows of all segments, with those that may be left over: see find_work in Attention.cuh.
    private static int Slots(TokenLayout layout, int group, int rows) =>
        layout.TokenCount == 0 ? 0 : checked((int)((long)layout.TokenCount * group / rows) + layout.SegmentCount);

    private static int RowsOfBlock(int headDim) => headDim <= 64 ? 128 : 64;

    private static int TileBytes(int headDim, int rows) => rows * TileColumns(headDim) * sizeof(ushort);

    private static int TileColumns(int headDim) => (int)BitOperations.RoundUpToPowerOf2((uint)headDim);

    private static int Index(int headDim) => int.Log2(TileColumns(headDim)) - 4;

    private static string[] Names(string kernel) => [.. from columns in (int[])[16, 32, 64, 128] select $"{kernel}_{columns}"];
}
