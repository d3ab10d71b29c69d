namespace TinyLlama.Compute.Cuda;

/// <summary>The largest logits of each row, and the weight of the others: <see cref="TopLogitsRow"/>.</summary>
/// <remarks>
/// Shapes: top (N, <see cref="TopLogitsRow.Width"/>), logits (N, V), inverse temperatures (N, 1), all of F32. A block is a row. The
/// smallest of the largest is found bit by bit: at most 52 passes over the row, which then lies in the caches.
/// </remarks>
internal static class TopLogits
{
    /// <summary>Writes a row of top for each row of logits.</summary>
    public static void Run(CudaDevice device, Tensor top, Tensor logits, Tensor inverseTemperatures, int count)
    {
        (int rows, int vocabulary) = (logits.Rows, logits.Columns);
        logits.Require(rows, vocabulary, DType.F32);
        top.Require(rows, TopLogitsRow.Width(count), DType.F32);
        inverseTemperatures.Require(rows, 1, DType.F32);
        Shape.Require(top.IsContiguous && inverseTemperatures.IsContiguous, "a contiguous result and contiguous temperatures");
        Shape.Require(
            count >= 1 && count <= vocabulary && vocabulary <= TopLogitsRow.MostColumns, "1 to V largest logits and a vocabulary of at most 2²⁰");
        device.Launch(
            "top_logits", (rows, 1, 1), Math.Max(32, Operands.RowThreads(vocabulary, most: 1024)), 0, top, logits, (long)logits.Stride,
            inverseTemperatures, vocabulary, count);
    }
}
