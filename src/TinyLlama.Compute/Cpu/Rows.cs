namespace TinyLlama.Compute.Cpu;

/// <summary>Rows of a tensor, split into tasks by shape alone.</summary>
/// <param name="count">Number of rows.</param>
/// <param name="perTask">Rows of a task; the last may have fewer.</param>
internal readonly struct Rows(int count, int perTask)
{
    /// <summary>Elements of a task: long enough to hide the claiming of it, short enough to balance.</summary>
    private const int ElementsPerTask = 16384;

    /// <summary>Gets the number of tasks.</summary>
    public int Tasks => (count + perTask - 1) / perTask;

    /// <summary>The split of a tensor.</summary>
    public static Rows Of(Tensor tensor) => new(tensor.Rows, Math.Max(1, ElementsPerTask / Math.Max(1, tensor.Columns)));

    /// <summary>The first row of a task.</summary>
    public int First(int task) => task * perTask;

    /// <summary>The row after the last of a task.</summary>
    public int End(int task) => Math.Min(count, (task + 1) * perTask);
}

/// <summary>Host tensors as kernels see them.</summary>
internal static unsafe class Pointers
{
    /// <summary>The address of a row of F32.</summary>
    public static float* F32(this Tensor tensor, int row = 0) => (float*)tensor.Address + ((nint)row * tensor.Stride);

    /// <summary>The address of a row of I32.</summary>
    public static int* I32(this Tensor tensor, int row = 0) => (int*)tensor.Address + ((nint)row * tensor.Stride);

    /// <summary>The address of a row of F64.</summary>
    public static double* F64(this Tensor tensor, int row = 0) => (double*)tensor.Address + ((nint)row * tensor.Stride);

    /// <summary>Throws unless a tensor has this shape and type.</summary>
    public static void Require(this Tensor tensor, int rows, int columns, DType type = DType.F32) =>
        Shape.Require(
            tensor.Rows == rows && tensor.Columns == columns && tensor.Type == type && tensor.Stride >= columns,
            "tensors of the shapes and types in its summary");

    /// <summary>Throws unless a tensor is a column of <paramref name="rows"/> indices, each in 0 … bound-1.</summary>
    public static void RequireIndices(this Tensor tensor, int rows, int bound, bool allowNegative = false)
    {
        tensor.Require(rows, 1, DType.I32);
        bool inside = true;
        for (int row = 0; row < rows; row++)
        {
            int index = *tensor.I32(row);
            inside &= (uint)index < (uint)bound || (allowNegative && index < 0);
        }

        Shape.Require(inside, "indices within the rows they point to");
    }
}
