using System.Buffers.Binary;
using System.Diagnostics;
using TinyLlama.Compute;

namespace TinyLlama.Checkpoints;

/// <summary>How a GGUF tensor stores its elements: in blocks along a row, which decode independently.</summary>
/// <param name="Name">ggml's name, such as <c>Q4_K</c>.</param>
/// <param name="BlockElements">Elements of a block; 1 where each stands alone.</param>
/// <param name="BlockBytes">Bytes of a block.</param>
/// <param name="ElementType">The element type where the elements are not quantized.</param>
internal sealed record GgufType(string Name, int BlockElements, int BlockBytes, DType? ElementType = null)
{
    /// <summary>The most elements that a block has.</summary>
    public const int MaximumBlockElements = 256;

    /// <summary>The type of ggml's number, or null where it is not supported.</summary>
    public static GgufType? Find(uint number) => number switch
    {
        0 => new GgufType("F32", 1, 4, DType.F32),
        1 => new GgufType("F16", 1, 2, DType.F16),
        2 => new GgufType("Q4_0", 32, 18),
        8 => new GgufType("Q8_0", 32, 34),
        12 => new GgufType("Q4_K", 256, 144),
        14 => new GgufType("Q6_K", 256, 210),
        30 => new GgufType("BF16", 1, 2, DType.BF16),
        _ => null,
    };

    /// <summary>ggml's name of a number, for messages.</summary>
    public static string NameOf(uint number) => Find(number)?.Name ?? number switch
    {
        3 => "Q4_1",
        6 => "Q5_0",
        7 => "Q5_1",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        13 => "Q5_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => $"number {number}",
    };

    /// <summary>Widens one quantized block to singles, as ggml's reference does.</summary>
    /// <param name="block"><see cref="BlockBytes"/> bytes.</param>
    /// <param name="values"><see cref="BlockElements"/> values.</param>
    public void DecodeBlock(ReadOnlySpan<byte> block, Span<float> values)
    {
        switch (Name)
        {
            case "Q4_0":
                DecodeQ4(block, values);
                break;
            case "Q8_0":
                DecodeQ8(block, values);
                break;
            case "Q4_K":
                DecodeQ4K(block, values);
                break;
            case "Q6_K":
                DecodeQ6K(block, values);
                break;
            default:
                throw new UnreachableException($"{Name} is not quantized");
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
