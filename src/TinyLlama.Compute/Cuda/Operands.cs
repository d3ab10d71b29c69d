namespace TinyLlama.Compute.Cuda;

/// <summary>What kernels demand of tensors.</summary>
internal static class Operands
{
    /// <summary>Elements that a kernel loads and stores at once: 16 bytes of BF16.</summary>
    public const int Eight = 8;

    /// <summary>Throws unless a tensor has this shape and type.</summary>
    public static void Require(this Tensor tensor, int rows, int columns, DType type) =>
        Shape.Require(
            tensor.Rows == rows && tensor.Columns == columns && tensor.Type == type && tensor.Stride >= columns,
            "tensors of the shapes and types in its summary");

    /// <summary>Throws unless a tensor has this shape and type and its rows are whole eights that begin at multiples of 16 bytes.</summary>
    public static void RequireEights(this Tensor tensor, int rows, int columns, DType type = DType.BF16)
    {
        tensor.Require(rows, columns, type);
        Shape.Require(columns % Eight == 0 && tensor.HasEights(), "rows of multiples of 8 elements, each at a multiple of 16 bytes");
    }

    /// <summary>Throws unless a tensor is a column of indices without gaps.</summary>
    public static void RequireIndices(this Tensor tensor, int rows)
    {
        tensor.Require(rows, 1, DType.I32);
        Shape.Require(tensor.IsContiguous, "contiguous indices");
    }

    /// <summary>Whether every row begins at a multiple of 16 bytes.</summary>
    public static bool HasEights(this Tensor tensor) => tensor.Address % 16 == 0 && (tensor.Rows <= 1 || tensor.Stride % Eight == 0);

    /// <summary>Threads of a block whose threads share a row: a whole number of warps, no more than there are eights or <paramref name="most"/>.</summary>
    public static int RowThreads(int columns, int most = 256) => Math.Min(most, ((columns / Eight) + 31) / 32 * 32);

    /// <summary>Blocks that cover so many elements.</summary>
    public static int Blocks(long elements, int perBlock) => checked((int)((elements + perBlock - 1) / perBlock));
}
