namespace TinyLlama.Compute.Cuda;

/// <summary>Rows picked by index: the embedding, its backward, and the gathering of rows.</summary>
/// <remarks>
/// Shapes: output, dOutput (N, C) of BF16; table (V, C) of F32, BF16, F16 or blocks (<see cref="WeightBlocks"/>); dTable (V, C) of F32; tokens (N, 1). Memory-bound:
/// 6 · N · C bytes forward, 10 · N · C backward.
/// </remarks>
internal static class Embedding
{
    private const int Threads = 256;

    /// <summary>output row n = table row tokens[n].</summary>
    public static void Forward(CudaDevice device, Tensor output, Tensor table, Tensor tokens)
    {
        output.RequireEights(tokens.Rows, table.Columns);
        table.RequireEights(table.Rows, table.Columns, table.Type);
        tokens.RequireIndices(output.Rows);
        if (table.Type.IsQuantized())
        {
            WeightBlocks.Gather(device, output, table, tokens);
            return;
        }

        string kernel = table.Type switch
        {
            DType.F32 => "embedding_f32",
            DType.BF16 => "embedding_bf16",
            _ => "embedding_f16",
        };
        device.Launch(
            kernel, (output.Rows, 1, 1), Operands.RowThreads(table.Columns), 0, output, (long)output.Stride, table, (long)table.Stride, tokens,
            table.Columns);
    }

    /// <summary>dTable row tokens[n] += dOutput row n, n ascending.</summary>
    public static void Backward(CudaDevice device, Tensor dTable, Tensor dOutput, Tensor tokens)
    {
        dTable.RequireEights(dTable.Rows, dOutput.Columns, DType.F32);
        dOutput.RequireEights(tokens.Rows, dOutput.Columns);
        tokens.RequireIndices(dOutput.Rows);
        device.Launch(
            "embedding_backward", (dOutput.Rows, Operands.Blocks(dOutput.Columns, Operands.Eight * Threads), 1), Threads, 0, dTable,
            (long)dTable.Stride, dOutput, (long)dOutput.Stride, tokens, dOutput.Rows, dOutput.Columns);
    }

    /// <summary>destination row n = source row rows[n]; both of one type, whatever it is.</summary>
    public static void Gather(CudaDevice device, Tensor destination, Tensor source, Tensor rows)
    {
        destination.Require(rows.Rows, source.Columns, source.Type);
        rows.RequireIndices(destination.Rows);
        const int Bytes = sizeof(ushort);
        device.Launch(
            "gather_rows", (destination.Rows, 1, 1), Threads, 0, destination, destination.Type.RowBytes(destination.Stride) / Bytes, source,
            source.Type.RowBytes(source.Stride) / Bytes, rows, (int)(source.Type.RowBytes(source.Columns) / Bytes));
    }
}
