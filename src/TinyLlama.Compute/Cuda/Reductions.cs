namespace TinyLlama.Compute.Cuda;

/// <summary>Sums over many values, in fp64 over fixed chunks and in one fixed tree.</summary>
/// <remarks>Squares add up in fp32 by eights. Memory-bound: 4 bytes an element.</remarks>
internal static class Reductions
{
    private const int Threads = 256;

    /// <summary>total += Σ values, on one multiprocessor: for values of tokens, not of parameters.</summary>
    public static void Sum(CudaDevice device, Tensor total, Tensor values)
    {
        total.Require(1, 1, DType.F64);
        values.Require(values.Rows, values.Columns, DType.F32);
        if (!values.IsEmpty)
        {
            device.Launch("sum", (1, 1, 1), Threads, 0, total, values, (long)values.Stride, values.Rows, values.Columns);
        }
    }

    /// <summary>total = Σ values², one partial sum for each chunk of each tensor, then a tree over them all.</summary>
    public static void SumOfSquares(CudaDevice device, Tensor total, Tensor partials, ReadOnlySpan<Tensor> values)
    {
        int count = Backend.SumOfSquaresPartials(values);
        total.Require(1, 1, DType.F64);
        Shape.Require(
            partials.Type == DType.F64 && partials.IsContiguous && partials.Count >= count, "a partial sum for each chunk");
        int next = 0;
        foreach (Tensor tensor in values)
        {
            tensor.Require(tensor.Rows, tensor.Columns, DType.F32);
            Shape.Require(tensor.IsContiguous, "contiguous tensors");
            int chunks = Operands.Blocks(tensor.Count, Backend.SumChunk);
            device.Launch(
                "sum_of_squares", (chunks, 1, 1), Threads, 0, partials with { Address = partials.Address + (next * sizeof(double)) }, tensor,
                tensor.Count, Backend.SumChunk);
            next += chunks;
        }

        device.Launch("sum_of_partials", (1, 1, 1), Threads, 0, total, partials, count);
    }
}
