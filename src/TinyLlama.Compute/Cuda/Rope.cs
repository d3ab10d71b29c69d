namespace TinyLlama.Compute.Cuda;

/// <summary>Rotary position embedding (Su et al. 2021) on half-split pairs (i, i + D/2), in place.</summary>
/// <remarks>
/// Shapes: heads (N, any number · D) of BF16, D a multiple of 16; positions (N, 1); table (positions, D) of F32: D/2 cosines, then
/// D/2 sines. The backward is the rotation by the opposite angle. Memory-bound: 4 bytes an element.
/// </remarks>
internal static class Rope
{
    private const int Threads = 256;

    /// <summary>Rotates; with <paramref name="inverse"/>, back.</summary>
    public static void Rotate(CudaDevice device, Tensor heads, Tensor positions, Tensor table, bool inverse)
    {
        int headDim = table.Columns;
        Shape.Require(headDim > 0 && headDim % 16 == 0 && heads.Columns % headDim == 0, "whole heads of a multiple of 16 channels");
        heads.RequireEights(heads.Rows, heads.Columns);
        table.RequireEights(table.Rows, headDim, DType.F32);
        positions.RequireIndices(heads.Rows);
        long threads = heads.Count / (2 * Operands.Eight);
        device.Launch(
            "rope", (Operands.Blocks(threads, Threads), 1, 1), Threads, 0, heads, (long)heads.Stride, positions, table, (long)table.Stride,
            heads.Rows, heads.Columns / headDim, headDim, inverse ? -1f : 1f);
    }
}
