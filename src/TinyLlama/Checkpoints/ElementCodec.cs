using System.Runtime.InteropServices;
using TinyLlama.Compute;
using TinyLlama.Data;

namespace TinyLlama.Checkpoints;

/// <summary>Elements as little-endian bytes in files, and as singles in memory.</summary>
internal static class ElementCodec
{
    /// <summary>Whether elements of this type convert to and from singles.</summary>
    public static bool IsFloatingPoint(DType type) => type is DType.F32 or DType.BF16 or DType.F16 or DType.F64;

    /// <summary>Widens stored elements to singles. Exact, except that doubles are rounded to nearest.</summary>
    public static void Decode(ReadOnlySpan<byte> source, DType type, Span<float> destination)
    {
        switch (type)
        {
            case DType.F32:
                MemoryMarshal.Cast<byte, float>(source).CopyTo(destination);
                break;
            case DType.BF16:
                ReadOnlySpan<ushort> words = MemoryMarshal.Cast<byte, ushort>(source);
                for (int i = 0; i < words.Length; i++)
                {
                    destination[i] = BitConverter.UInt32BitsToSingle((uint)words[i] << 16);
                }

                break;
            case DType.F16:
                ReadOnlySpan<Half> halves = MemoryMarshal.Cast<byte, Half>(source);
                for (int i = 0; i < halves.Length; i++)
                {
                    destination[i] = (float)halves[i];
                }

                break;
            case DType.F64:
                ReadOnlySpan<double> doubles = MemoryMarshal.Cast<byte, double>(source);
                for (int i = 0; i < doubles.Length; i++)
                {
                    destination[i] = (float)doubles[i];
                }

                break;
            default:
                throw new ArgumentOutOfRangeException(nameof(type), type, "not a floating-point type");
        }
    }

    /// <summary>Narrows singles to stored elements: round to nearest, ties to even; quantized types by <see cref="BlockQuantizer"/>.</summary>
    /// <exception cref="UserErrorException">A value is beyond the type.</exception>
    public static void Encode(ReadOnlySpan<float> source, DType type, Span<byte> destination)
    {
        switch (type)
        {
            case DType.F32:
                MemoryMarshal.AsBytes(source).CopyTo(destination);
                break;
            case DType.BF16:
                Span<ushort> words = MemoryMarshal.Cast<byte, ushort>(destination);
                for (int i = 0; i < source.Length; i++)
                {
                    words[i] = ToBFloat16(source[i]);
                }

                break;
            case DType.F16:
                Span<Half> halves = MemoryMarshal.Cast<byte, Half>(destination);
                for (int i = 0; i < source.Length; i++)
                {
                    halves[i] = (Half)source[i];
                    if (Half.IsInfinity(halves[i]) && float.IsFinite(source[i]))
                    {
                        throw new UserErrorException($"a weight of {source[i]} is beyond f16, whose largest is 65504; store it as bf16 or f32");
                    }
                }

                break;
            case DType.F64:
                Span<double> doubles = MemoryMarshal.Cast<byte, double>(destination);
                for (int i = 0; i < source.Length; i++)
                {
                    doubles[i] = source[i];
                }

                break;
            default:
                EncodeBlocks(source, type, destination);
                break;
        }
    }

    private static void EncodeBlocks(ReadOnlySpan<float> source, DType type, Span<byte> destination)
    {
        foreach (float value in source)
        {
            // Scales are halves. A weight that is no number fails the comparison too.
            if (!(Math.Abs(value) <= (float)Half.MaxValue))
            {
                throw new UserErrorException($"a weight of {value} is beyond {type}; store it as bf16 or f32");
            }
        }

        (int elements, int bytes) = (type.BlockElements(), type.BlockBytes());
        for (int block = 0; block < source.Length / elements; block++)
        {
            BlockQuantizer.Encode(type, source.Slice(block * elements, elements), destination.Slice(block * bytes, bytes));
        }
    }

    private static ushort ToBFloat16(float value)
    {
        uint bits = BitConverter.SingleToUInt32Bits(value);
        if (float.IsNaN(value))
        {
            // Rounding could carry a NaN into infinity; the quiet bit keeps it one.
            return (ushort)((bits >> 16) | 0x40);
        }

        return (ushort)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    }
}
