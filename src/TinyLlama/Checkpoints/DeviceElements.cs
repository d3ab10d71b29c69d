using System.Buffers;
using System.Runtime.InteropServices;
using TinyLlama.Compute;

namespace TinyLlama.Checkpoints;

/// <summary>Elements of a contiguous tensor to and from host memory, as they are or as singles.</summary>
internal static class DeviceElements
{
    /// <summary>Copies little-endian elements of the tensor's own type to it.</summary>
    public static void WriteBytes(Backend backend, Tensor destination, ReadOnlySpan<byte> source)
    {
        destination = Words(destination);
        switch (destination.Type.ByteCount())
        {
            case 2:
                backend.Write(destination, MemoryMarshal.Cast<byte, ushort>(source));
                break;
            case 4:
                backend.Write(destination, MemoryMarshal.Cast<byte, uint>(source));
                break;
            default:
                backend.Write(destination, MemoryMarshal.Cast<byte, ulong>(source));
                break;
        }
    }

    /// <summary>Copies the tensor's elements to little-endian bytes.</summary>
    /// <param name="destination">What is filled.</param>
    /// <param name="backend">The device of the tensor; null for host memory.</param>
    /// <param name="source">The tensor.</param>
    public static void ReadBytes(Span<byte> destination, Backend? backend, Tensor source)
    {
        source = Words(source);
        if (backend is null)
        {
            HostBytes(source).CopyTo(destination);
            return;
        }

        switch (source.Type.ByteCount())
        {
            case 2:
                backend.Read(MemoryMarshal.Cast<byte, ushort>(destination), source);
                break;
            case 4:
                backend.Read(MemoryMarshal.Cast<byte, uint>(destination), source);
                break;
            default:
                backend.Read(MemoryMarshal.Cast<byte, ulong>(destination), source);
                break;
        }
    }

    /// <summary>The bytes of a tensor in host memory.</summary>
    public static Span<byte> HostBytes(Tensor tensor) => tensor.Type.ByteCount() switch
    {
        2 => MemoryMarshal.AsBytes(tensor.HostSpan<ushort>()),
        4 => MemoryMarshal.AsBytes(tensor.HostSpan<uint>()),
        _ => MemoryMarshal.AsBytes(tensor.HostSpan<ulong>()),
    };

    /// <summary>Copies singles to a tensor of any floating-point type, rounding to nearest.</summary>
    public static void Write(Backend backend, Tensor destination, ReadOnlySpan<float> source)
    {
        byte[] bytes = ArrayPool<byte>.Shared.Rent(source.Length * destination.Type.ByteCount());
        Span<byte> used = bytes.AsSpan(0, source.Length * destination.Type.ByteCount());
        ElementCodec.Encode(source, destination.Type, used);
        WriteBytes(backend, destination, used);
        ArrayPool<byte>.Shared.Return(bytes);
    }

    /// <summary>Copies a tensor of any floating-point type to singles.</summary>
    public static void Read(Span<float> destination, Backend? backend, Tensor source)
    {
        byte[] bytes = ArrayPool<byte>.Shared.Rent(destination.Length * source.Type.ByteCount());
        Span<byte> used = bytes.AsSpan(0, destination.Length * source.Type.ByteCount());
        ReadBytes(used, backend, source);
        ElementCodec.Decode(used, source.Type, destination);
        ArrayPool<byte>.Shared.Return(bytes);
    }

    // Blocks of quantized types are whole words of 16 bits.
    private static Tensor Words(Tensor tensor)
    {
        if (!tensor.Type.IsQuantized())
        {
            return tensor;
        }

        const DType Word = DType.F16;
        int Count(int elements) => checked((int)(tensor.Type.RowBytes(elements) / Word.ByteCount()));
        return new Tensor(tensor.Address, tensor.Rows, Count(tensor.Columns), Count(tensor.Stride), Word);
    }
}
