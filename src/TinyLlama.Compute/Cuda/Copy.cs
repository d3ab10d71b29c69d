namespace TinyLlama.Compute.Cuda;

/// <summary>Copies and conversions between F32, BF16 and F16, rounded to nearest, ties to even. Memory-bound.</summary>
internal static class Copy
{
    private const int Threads = 256;

    /// <summary>destination = source, of one shape; of any type where both have the same.</summary>
    public static void Convert(CudaDevice device, Tensor destination, Tensor source)
    {
        Shape.Require(destination.Rows == source.Rows && destination.Columns == source.Columns, "tensors of one shape");
        if (source.IsEmpty)
        {
            return;
        }

        if (destination.Type == source.Type)
        {
            device.Copy(
                destination.Address, destination.Type.RowBytes(destination.Stride), source.Address, source.Type.RowBytes(source.Stride),
                source.Type.RowBytes(source.Columns), source.Rows);
            return;
        }

        bool eights = source.Columns % Operands.Eight == 0 && source.HasEights() && destination.HasEights();
        string kernel = (destination.Type, source.Type) switch
        {
            (DType.F32, DType.BF16) => "copy_f32_bf16",
            (DType.F32, DType.F16) => "copy_f32_f16",
            (DType.BF16, DType.F32) => eights ? "copy_bf16_f32_by_8" : "copy_bf16_f32",
            (DType.BF16, DType.F16) => "copy_bf16_f16",
            (DType.F16, DType.F32) => "copy_f16_f32",
            (DType.F16, DType.BF16) => "copy_f16_bf16",
            _ => throw new ArgumentException("the operation needs types that convert into each other"),
        };
        int blocks = Operands.Blocks(source.Columns, Threads * (eights ? Operands.Eight : 1));
        device.Launch(
            kernel, (blocks, Math.Min(source.Rows, ushort.MaxValue), 1), Threads, 0, destination, (long)destination.Stride, source,
            (long)source.Stride, source.Rows, source.Columns);
    }

    /// <summary>destination = 0.</summary>
    public static void Zero(CudaDevice device, Tensor destination)
    {
        if (!destination.IsEmpty)
        {
            DType type = destination.Type;
            device.Zero(destination.Address, type.RowBytes(destination.Stride), type.RowBytes(destination.Columns), destination.Rows);
        }
    }

    /// <summary>destination += addend, of one shape and of F32 or BF16.</summary>
    public static void Add(CudaDevice device, Tensor destination, Tensor addend)
    {
        Shape.Require(
            destination.Type == addend.Type && addend.Type is DType.F32 or DType.BF16 && destination.Rows == addend.Rows
                && destination.Columns == addend.Columns && destination.IsContiguous && addend.IsContiguous,
            "contiguous tensors of F32 or BF16, of one shape");
        if (!addend.IsEmpty)
        {
            device.Launch(addend.Type == DType.F32 ? "add_f32" : "add_bf16", (Operands.Blocks(addend.Count, Threads), 1, 1), Threads, 0, destination, addend, addend.Count);
        }
    }
}
