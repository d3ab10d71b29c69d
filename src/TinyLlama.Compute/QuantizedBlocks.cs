using System.Buffers.Binary;

namespace TinyLlama.Compute;

/// <summary>
/// ggml's quantized blocks, as GGUF files store them: some elements of a row share scales, and each block decodes alone.
/// The definitions that kernels are tested against.
/// </summary>
public static class QuantizedBlocks
{
    /// <summary>The most elements that a block has.</summary>
    public const int MaximumElements = 256;

    /// <summary>Widens one block to singles, to the bits of ggml's reference.</summary>
    /// <param name="type">A quantized type.</param>
    /// <param name="block"><see cref="DTypes.BlockBytes"/> bytes.</param>
    /// <param name="values"><see cref="DTypes.BlockElements"/> values.</param>
    public static void Decode(DType type, ReadOnlySpan<byte> block, Span<float> values)
    {
        switch (type)
        {
            case DType.Q4_0:
                DecodeQ4(block, values);
                break;
            case DType.Q8_0:
                DecodeQ8(block, values);
                break;
            case DType.Q4_K:
                DecodeQ4K(block, values);
                break;
            case DType.Q6_K:
                DecodeQ6K(block, values);
                break;
            default:
                throw new ArgumentOutOfRangeException(nameof(type), type, "not a quantized type that is supported");
        }
    }

    // A scale, then the low nibbles of 16 bytes and the high ones, each 8 too large.
    private static void DecodeQ4(ReadOnlySpan<byte> block, Span<float> values)
    {
        float scale = (float)BinaryPrimitives.ReadHalfLittleEndian(block);
        for (int i = 0; i < 16; i++)
        {
            values[i] = ((block[2 + i] & 15) - 8) * scale;
            values[16 + i] = ((block[2 + i] >> 4) - 8) * scale;
        }
    }

    private static void DecodeQ8(ReadOnlySpan<byte> block, Span<float> values)
    {
        float scale = (float)BinaryPrimitives.ReadHalfLittleEndian(block);
        for (int i = 0; i < 32; i++)
        {
            values[i] = (sbyte)block[2 + i] * scale;
        }
    }

    // Two scales, 8 scales and 8 minima of 6 bits in 12 bytes, then four times 32 bytes: low nibbles, then high ones.
    private static void DecodeQ4K(ReadOnlySpan<byte> block, Span<float> values)
    {
        float scaleUnit = (float)BinaryPrimitives.ReadHalfLittleEndian(block);
        float minimumUnit = (float)BinaryPrimitives.ReadHalfLittleEndian(block[2..]);
        ReadOnlySpan<byte> packed = block.Slice(4, 12);
        for (int group = 0; group < 8; group++)
        {
            int scale = group < 4 ? packed[group] & 63 : (packed[group + 4] & 15) | ((packed[group - 4] >> 6) << 4);
            int minimum = group < 4 ? packed[group + 4] & 63 : (packed[group + 4] >> 4) | ((packed[group] >> 6) << 4);
            ReadOnlySpan<byte> quants = block.Slice(16 + (group / 2 * 32), 32);
            for (int i = 0; i < 32; i++)
            {
                int quant = group % 2 == 0 ? quants[i] & 15 : quants[i] >> 4;
                values[(group * 32) + i] = (scaleUnit * scale * quant) - (minimumUnit * minimum);
            }
        }
    }

    // 128 bytes of low nibbles, 64 bytes of two high bits, 16 signed scales, the scale of scales; values 32 too large.
    private static void DecodeQ6K(ReadOnlySpan<byte> block, Span<float> values)
    {
        float unit = (float)BinaryPrimitives.ReadHalfLittleEndian(block[208..]);
        for (int i = 0; i < 256; i++)
        {
            (int half, int place) = Math.DivRem(i, 128);
            (int quarter, int column) = Math.DivRem(place, 32);
            int low = (block[(half * 64) + (quarter % 2 * 32) + column] >> (quarter / 2 * 4)) & 15;
            int high = (block[128 + (half * 32) + column] >> (quarter * 2)) & 3;
            values[i] = unit * (sbyte)block[192 + (i / 16)] * ((low | (high << 4)) - 32);
        }
    }
}
