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
            case DType.Q4_1:
                DecodeQ41(block, values);
                break;
            case DType.Q5_0:
                DecodeQ5(block, values);
                break;
            case DType.Q5_1:
                DecodeQ51(block, values);
                break;
            case DType.Q8_0:
                DecodeQ8(block, values);
                break;
            case DType.Q4_K:
                DecodeQ4K(block, values);
                break;
            case DType.Q5_K:
                DecodeQ5K(block, values);
                break;
            case DType.Q6_K:
                DecodeQ6K(block, values);
                break;
            default:
                throw new ArgumentOutOfRangeException(nameof(type), type, "not a quantized type");
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

    // A scale, a minimum, nibbles as in Q4_0.
    private static void DecodeQ41(ReadOnlySpan<byte> block, Span<float> values)
    {
        float scale = (float)BinaryPrimitives.ReadHalfLittleEndian(block);
        float minimum = (float)BinaryPrimitives.ReadHalfLittleEndian(block[2..]);
        for (int i = 0; i < 16; i++)
        {
            values[i] = ((block[4 + i] & 15) * scale) + minimum;
            values[16 + i] = ((block[4 + i] >> 4) * scale) + minimum;
        }
    }

    // A scale, the fifth bits of all 32 in one word, nibbles as in Q4_0; each 16 too large.
    private static void DecodeQ5(ReadOnlySpan<byte> block, Span<float> values)
    {
        float scale = (float)BinaryPrimitives.ReadHalfLittleEndian(block);
        for (int i = 0; i < 32; i++)
        {
            values[i] = (FiveBits(block[2..], i) - 16) * scale;
        }
    }

    // A scale and a minimum, then as in Q5_0.
    private static void DecodeQ51(ReadOnlySpan<byte> block, Span<float> values)
    {
        float scale = (float)BinaryPrimitives.ReadHalfLittleEndian(block);
        float minimum = (float)BinaryPrimitives.ReadHalfLittleEndian(block[2..]);
        for (int i = 0; i < 32; i++)
        {
            values[i] = (FiveBits(block[4..], i) * scale) + minimum;
        }
    }

    private static int FiveBits(ReadOnlySpan<byte> quants, int i)
    {
        uint highBits = BinaryPrimitives.ReadUInt32LittleEndian(quants);
        int low = (quants[4 + (i % 16)] >> (i / 16 * 4)) & 15;
        return low | ((int)((highBits >> i) & 1) << 4);
    }

    private static void DecodeQ8(ReadOnlySpan<byte> block, Span<float> values)
    {
        float scale = (float)BinaryPrimitives.ReadHalfLittleEndian(block);
        for (int i = 0; i < 32; i++)
        {
            values[i] = (sbyte)block[2 + i] * scale;
        }
    }

    // Two units, 8 scales and 8 minima of 6 bits in 12 bytes, then four times 32 bytes: low nibbles, then high ones.
    private static void DecodeQ4K(ReadOnlySpan<byte> block, Span<float> values)
    {
        for (int group = 0; group < 8; group++)
        {
            (float scale, float minimum) = ScaleAndMinimum(block, group);
            ReadOnlySpan<byte> quants = block.Slice(16 + (group / 2 * 32), 32);
            for (int i = 0; i < 32; i++)
            {
                values[(group * 32) + i] = (scale * ((quants[i] >> (group % 2 * 4)) & 15)) - minimum;
            }
        }
    }

    // As Q4_K, with 32 bytes before the nibbles whose bit g is the fifth of group g.
    private static void DecodeQ5K(ReadOnlySpan<byte> block, Span<float> values)
    {
        ReadOnlySpan<byte> highBits = block.Slice(16, 32);
        for (int group = 0; group < 8; group++)
        {
            (float scale, float minimum) = ScaleAndMinimum(block, group);
            ReadOnlySpan<byte> quants = block.Slice(48 + (group / 2 * 32), 32);
            for (int i = 0; i < 32; i++)
            {
                int quant = ((quants[i] >> (group % 2 * 4)) & 15) | (((highBits[i] >> group) & 1) << 4);
                values[(group * 32) + i] = (scale * quant) - minimum;
            }
        }
    }

    // Of the last four groups, the two high bits of each number lie above the first four's.
    private static (float Scale, float Minimum) ScaleAndMinimum(ReadOnlySpan<byte> block, int group)
    {
        ReadOnlySpan<byte> packed = block.Slice(4, 12);
        int scale = group < 4 ? packed[group] & 63 : (packed[group + 4] & 15) | ((packed[group - 4] >> 6) << 4);
        int minimum = group < 4 ? packed[group + 4] & 63 : (packed[group + 4] >> 4) | ((packed[group] >> 6) << 4);
        return (
            (float)BinaryPrimitives.ReadHalfLittleEndian(block) * scale,
            (float)BinaryPrimitives.ReadHalfLittleEndian(block[2..]) * minimum);
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
