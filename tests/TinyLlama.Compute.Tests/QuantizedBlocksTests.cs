using System.Buffers.Binary;
using System.Collections;

namespace TinyLlama.Compute.Tests;

/// <summary>ggml's blocks against their specification and against ggml itself.</summary>
public sealed class QuantizedBlocksTests
{
    private static readonly DType[] s_types = [.. Enum.GetValues<DType>().Where(type => type.IsQuantized())];

    public static TheoryData<DType> Types => [.. s_types];

    public static TheoryData<DType> Encoded => [.. s_types.Where(BlockQuantizer.CanEncode)];

    [Theory]
    [MemberData(nameof(Types))]
    public void A_block_decodes_to_what_its_fields_say(DType type)
    {
        var random = new Random(3);
        for (int trial = 0; trial < 50; trial++)
        {
            byte[] block = RandomBlock(type, random);
            float[] values = new float[type.BlockElements()];
            QuantizedBlocks.Decode(type, block, values);
            Assert.Equal(Enumerable.Range(0, values.Length).Select(i => Element(type, block, i)), values);
        }
    }

    [Theory]
    [MemberData(nameof(Types))]
    public void Blocks_decode_to_the_bits_of_ggml(DType type)
    {
        var random = new Random(4);
        byte[] blocks = [.. Enumerable.Range(0, 500).SelectMany(_ => RandomBlock(type, random))];
        Assert.Equal(Bits(Ggml.Dequantize(type, blocks)), Bits(Decode(type, blocks)));
    }

    [Theory]
    [InlineData(DType.Q8_0)]
    [InlineData(DType.Q4_0)]
    [InlineData(DType.Q5_0)]
    [InlineData(DType.Q5_1)]
    public void Simple_types_are_encoded_to_the_bytes_of_ggml(DType type)
    {
        foreach (float[] values in Samples(256 * 64))
        {
            Assert.Equal(Ggml.Quantize(type, values), Encode(type, values));
        }
    }

    [Theory]
    [InlineData(DType.Q4_K)]
    [InlineData(DType.Q5_K)]
    [InlineData(DType.Q6_K)]
    public void Types_that_are_searched_are_nearer_to_the_values_than_those_of_ggml(DType type)
    {
        foreach (float[] values in Samples(256 * 64))
        {
            double ours = Error(values, Decode(type, Encode(type, values)));
            double theirs = Error(values, Decode(type, Ggml.Quantize(type, values)));
            Assert.True(ours <= theirs, $"root mean square error {ours:E3}, {theirs:E3} of ggml");
        }
    }

    /// <summary>The step of a group that spans all its levels evenly bounds the error of rounding; six-bit scales add to it.</summary>
    [Theory]
    [InlineData(DType.Q8_0, 32, 254, 1.01)]
    [InlineData(DType.Q4_0, 32, 16, 2.01)]
    [InlineData(DType.Q5_0, 32, 32, 1.3)]
    [InlineData(DType.Q5_1, 32, 31, 1.02)]
    [InlineData(DType.Q4_K, 32, 15, 1)]
    [InlineData(DType.Q5_K, 32, 31, 1)]
    [InlineData(DType.Q6_K, 16, 63, 1)]
    public void The_root_mean_square_error_is_a_fraction_of_an_even_step(DType type, int group, int levels, double share)
    {
        float[] values = Normal(256 * 64, 0.02f);
        double bound = 0;
        foreach (float[] part in values.Chunk(group))
        {
            double range = type is DType.Q5_1 or DType.Q4_K or DType.Q5_K ? part.Max() - part.Min() : 2 * part.Max(Math.Abs);
            bound += range / levels * (range / levels) / 12 * part.Length;
        }

        double error = Error(values, Decode(type, Encode(type, values)));
        Assert.InRange(error, 0.3 * Math.Sqrt(bound / values.Length), share * Math.Sqrt(bound / values.Length));
    }

    [Theory]
    [MemberData(nameof(Encoded))]
    public void Every_element_comes_back_within_a_step_of_its_block(DType type)
    {
        foreach (float[] values in Samples(256 * 16))
        {
            float[] decoded = Decode(type, Encode(type, values));
            for (int i = 0; i < values.Length; i++)
            {
                ReadOnlySpan<float> block = values.AsSpan(i / type.BlockElements() * type.BlockElements(), type.BlockElements());
                float largest = 0;
                foreach (float value in block)
                {
                    largest = Math.Max(largest, Math.Abs(value));
                }

                float step = type switch { DType.Q8_0 => 1f / 127, DType.Q6_K => 1f / 16, _ => 1f / 4 };
                Assert.InRange(decoded[i], values[i] - (step * largest), values[i] + (step * largest));
            }
        }
    }

    [Theory]
    [MemberData(nameof(Encoded))]
    public void Zeros_stay_zeros(DType type)
    {
        byte[] blocks = Encode(type, new float[256]);
        Assert.All(Decode(type, blocks), value => Assert.Equal(0, value));
    }

    [Theory]
    [InlineData(DType.Q4_1)]
    [InlineData(DType.F16)]
    public void A_type_that_is_not_written_is_refused(DType type)
    {
        Assert.False(BlockQuantizer.CanEncode(type));
        Assert.Throws<ArgumentOutOfRangeException>(() => BlockQuantizer.Encode(type, new float[256], new byte[1024]));
    }

    // The value of one element, bit by bit as the format's specification has it.
    private static float Element(DType type, byte[] block, int i)
    {
        var bits = new BitArray(block);
        float Half(int at) => (float)BinaryPrimitives.ReadHalfLittleEndian(block.AsSpan(at));
        int Number(int first, int count) => Enumerable.Range(0, count).Sum(b => bits[first + b] ? 1 << b : 0);

        // Nibbles come in runs: first the low ones of all bytes of a run, then the high ones.
        int Nibble(int firstByte, int run) => Number((8 * (firstByte + (i / (2 * run) * run) + (i % run))) + (i / run % 2 * 4), 4);
        int group = i / 32;
        switch (type)
        {
            case DType.Q4_0:
                return Half(0) * (Nibble(2, 16) - 8);
            case DType.Q4_1:
                return (Half(0) * Nibble(4, 16)) + Half(2);
            case DType.Q5_0:
                return Half(0) * (Nibble(6, 16) + (16 * Number(16 + i, 1)) - 16);
            case DType.Q5_1:
                return (Half(0) * (Nibble(8, 16) + (16 * Number(32 + i, 1)))) + Half(2);
            case DType.Q8_0:
                return Half(0) * (sbyte)block[2 + i];
            case DType.Q6_K:
                int low = Number((8 * ((i / 128 * 64) + (i % 64))) + (i / 64 % 2 * 4), 4);
                int high = Number((8 * (128 + (i / 128 * 32) + (i % 32))) + (i / 32 % 4 * 2), 2);
                return Half(208) * (sbyte)block[192 + (i / 16)] * (low + (16 * high) - 32);
            default:
                int scale = group < 4 ? Number(32 + (8 * group), 6) : Number(64 + (8 * group), 4) + (16 * Number(8 * group + 6, 2));
                int minimum = group < 4 ? Number(64 + (8 * group), 6) : Number(68 + (8 * group), 4) + (16 * Number(32 + (8 * group) + 6, 2));
                int quant = type == DType.Q4_K ? Nibble(16, 32) : Nibble(48, 32) + (16 * Number((8 * (16 + (i % 32))) + group, 1));
                return (Half(0) * scale * quant) - (Half(2) * minimum);
        }
    }

    // Any bytes, but for the halves, which are finite.
    private static byte[] RandomBlock(DType type, Random random)
    {
        byte[] block = new byte[type.BlockBytes()];
        random.NextBytes(block);
        int first = type == DType.Q6_K ? 208 : 0;
        BinaryPrimitives.WriteHalfLittleEndian(block.AsSpan(first), (Half)(random.NextDouble() - 0.5));
        if (type is DType.Q4_1 or DType.Q5_1 or DType.Q4_K or DType.Q5_K)
        {
            BinaryPrimitives.WriteHalfLittleEndian(block.AsSpan(2), (Half)(random.NextDouble() - 0.5));
        }

        return block;
    }

    private static IEnumerable<float[]> Samples(int count)
    {
        yield return Normal(count, 0.02f);
        yield return [.. Normal(count, 1).Select(value => value * value * value)];
        yield return [.. Normal(count, 1).Select(value => MathF.Abs(value) + 0.5f)];
        yield return [.. Normal(count, 1).Select((value, i) => i % 32 == 7 ? 30 * value : value)];
        yield return [.. Normal(count, 1).Select((value, i) => i / 256 % 2 == 0 ? MathF.Round(value) : -3)];
        yield return [.. Normal(count, 0.01f).Select((value, i) => i / 32 % 3 == 0 ? 0 : value)];
    }

    private static float[] Normal(int count, float deviation)
    {
        var random = new Random(5);
        float[] values = new float[count];
        for (int i = 0; i < count; i++)
        {
            double radius = Math.Sqrt(-2 * Math.Log(1 - random.NextDouble()));
            values[i] = deviation * (float)(radius * Math.Cos(2 * Math.PI * random.NextDouble()));
        }

        return values;
    }

    private static byte[] Encode(DType type, float[] values)
    {
        byte[] blocks = new byte[type.RowBytes(values.Length)];
        for (int b = 0; b < values.Length / type.BlockElements(); b++)
        {
            BlockQuantizer.Encode(
                type, values.AsSpan(b * type.BlockElements(), type.BlockElements()), blocks.AsSpan(b * type.BlockBytes(), type.BlockBytes()));
        }

        return blocks;
    }

    private static float[] Decode(DType type, byte[] blocks)
    {
        float[] values = new float[blocks.Length / type.BlockBytes() * type.BlockElements()];
        for (int b = 0; b < blocks.Length / type.BlockBytes(); b++)
        {
            QuantizedBlocks.Decode(
                type, blocks.AsSpan(b * type.BlockBytes(), type.BlockBytes()), values.AsSpan(b * type.BlockElements(), type.BlockElements()));
        }

        return values;
    }

    private static double Error(float[] values, float[] decoded) =>
        Math.Sqrt(values.Zip(decoded, (a, b) => ((double)a - b) * ((double)a - b)).Average());

    private static uint[] Bits(float[] values) => [.. values.Select(BitConverter.SingleToUInt32Bits)];
}
