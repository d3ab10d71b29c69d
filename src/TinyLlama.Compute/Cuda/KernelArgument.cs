using System.Runtime.InteropServices;

namespace TinyLlama.Compute.Cuda;

/// <summary>An argument of a kernel: the address of a tensor, or a number of up to 8 bytes.</summary>
[StructLayout(LayoutKind.Explicit, Size = 8)]
internal readonly struct KernelArgument
{
    [FieldOffset(0)]
    private readonly long _bits;

    [FieldOffset(0)]
    private readonly float _single;

    private KernelArgument(long bits) => _bits = bits;

    private KernelArgument(float value) => _single = value;

    public static implicit operator KernelArgument(Tensor tensor) => new(tensor.Address);

    /// <summary>Widened, so that a kernel may take it as 32 or 64 bits.</summary>
    public static implicit operator KernelArgument(int value) => new((long)value);

    public static implicit operator KernelArgument(long value) => new(value);

    public static implicit operator KernelArgument(float value) => new(value);
}
