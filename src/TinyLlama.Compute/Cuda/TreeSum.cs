using System.Numerics;

namespace TinyLlama.Compute.Cuda;

/// <summary>Sums of vectors in a pairwise tree, in the order of the CPU's: the same bits. Memory-bound.</summary>
internal static class TreeSum
{
    private const int Threads = 256;
    private const int MostParts = 1 << 10;

    /// <summary>destination = the tree over parts that lie one after the other.</summary>
    /// <param name="device">The GPU.</param>
    /// <param name="stream">The stream that it is queued on.</param>
    /// <param name="destination">(rows, C) of F32.</param>
    /// <param name="parts">(number · rows, C) of F32 or BF16, other memory.</param>
    /// <param name="number">How many; a power of two, at most 1,024.</param>
    public static void Run(CudaDevice device, nint stream, Tensor destination, Tensor parts, int number)
    {
        Shape.Require(BitOperations.IsPow2(number) && number <= MostParts, "parts whose number is a power of two, at most 1,024");
        string kernel = parts.Type == DType.F32 ? "tree_sum_f32" : "tree_sum_bf16";
        device.LaunchOn(stream, kernel, (Operands.Blocks(destination.Count, Threads), 1, 1), Threads, 0, destination, parts, destination.Count, number);
    }
}
