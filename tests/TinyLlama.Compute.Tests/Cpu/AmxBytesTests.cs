using System.Runtime.InteropServices;
using Iced.Intel;
using TinyLlama.Compute.Cpu;

namespace TinyLlama.Compute.Tests.Cpu;

/// <summary>The emitted code, run by an interpreter of its instructions, so that any machine can test it, and by the processor if it can.</summary>
public sealed unsafe class AmxBytesTests
{
    public static TheoryData<int, bool> Products => [.. from groups in (int[])[1, 2, 3, 4, 7] from hasOffsets in (bool[])[false, true] select (groups, hasOffsets)];

    [Theory]
    [MemberData(nameof(Products))]
    public void The_code_gives_the_bits_of_the_definition(int groups, bool hasOffsets)
    {
        Operands operands = new(groups);
        MachineCode code = new(AmxBytes.Emit(hasOffsets), AmxBytes.TileSize);
        ulong sums = code.Memory(MemoryMarshal.Cast<float, uint>(operands.Sums).ToArray(), writable: true);
        ulong inputs = code.Memory(MemoryMarshal.Cast<byte, uint>(operands.Inputs).ToArray());
        ulong weights = code.Memory(MemoryMarshal.Cast<byte, uint>(operands.Weights).ToArray());
        ulong waiting = code.Memory(new uint[AmxBytes.WaitingBytes / 4], writable: true);
        uint[] actual = code.Call(sums, inputs, weights, (ulong)groups, waiting);
        Assert.Equal(operands.Expected(hasOffsets), MemoryMarshal.Cast<uint, float>(actual).ToArray());
    }

    [Theory]
    [MemberData(nameof(Products))]
    public void The_processor_gives_the_bits_of_the_definition(int groups, bool hasOffsets)
    {
        Assert.SkipWhen(AmxBytes.Fault is not null, AmxBytes.Fault ?? "");
        Operands operands = new(groups);
        float[] actual = [.. operands.Sums];
        fixed (float* sums = actual)
        fixed (byte* inputs = operands.Inputs, weights = operands.Weights, waiting = new byte[AmxBytes.WaitingBytes])
        {
            AmxBytes.Configure();
            AmxBytes.Multiply(sums, inputs, weights, groups, waiting, hasOffsets);
            Amx.Release();
        }

        Assert.Equal(operands.Expected(hasOffsets), actual);
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void The_code_needs_no_other_instructions_than_those_that_are_asked_for(bool hasOffsets)
    {
        CpuidFeature[] features = [CpuidFeature.INTEL8086, CpuidFeature.INTEL386, CpuidFeature.X64, CpuidFeature.AVX,
            CpuidFeature.AVX512F, CpuidFeature.AMX_TILE, CpuidFeature.AMX_INT8];
        Assert.All(MachineCode.Decode(AmxBytes.Emit(hasOffsets)), instruction => Assert.Empty(instruction.CpuidFeatures.Except(features)));
    }

    /// <summary>Random groups: any bytes, scales and offsets of which no two products are alike.</summary>
    private sealed class Operands
    {
        private readonly int _groups;

        public Operands(int groups)
        {
            _groups = groups;
            Random random = new(groups);
            Sums = [.. Enumerable.Range(0, AmxBytes.Rows * AmxBytes.Rows).Select(_ => random.NextSingle() - 0.5f)];
            Inputs = Filled(AmxBytes.InputBytes);
            Weights = Filled(AmxBytes.WeightBytes);

            byte[] Filled(int groupBytes)
            {
                byte[] bytes = new byte[groups * groupBytes];
                random.NextBytes(bytes);
                for (int group = 0; group < groups; group++)
                {
                    foreach (ref float scale in MemoryMarshal.Cast<byte, float>(bytes.AsSpan(((group * groupBytes) + AmxBytes.BytesOfGroup)..((group + 1) * groupBytes))))
                    {
                        scale = random.NextSingle() - 0.5f;
                    }
                }

                return bytes;
            }
        }

        public float[] Sums { get; }

        public byte[] Inputs { get; }

        public byte[] Weights { get; }

        public float[] Expected(bool hasOffsets)
        {
            float[] sums = [.. Sums];
            for (int group = 0; group < _groups; group++)
            {
                ReadOnlySpan<byte> inputs = Inputs.AsSpan(group * AmxBytes.InputBytes, AmxBytes.InputBytes);
                ReadOnlySpan<byte> weights = Weights.AsSpan(group * AmxBytes.WeightBytes, AmxBytes.WeightBytes);
                ReadOnlySpan<float> ofRows = MemoryMarshal.Cast<byte, float>(inputs[AmxBytes.BytesOfGroup..]);
                ReadOnlySpan<float> ofOutputs = MemoryMarshal.Cast<byte, float>(weights[AmxBytes.BytesOfGroup..]);
                for (int row = 0; row < AmxBytes.Rows; row++)
                {
                    for (int output = 0; output < AmxBytes.Rows; output++)
                    {
                        int products = 0;
                        for (int i = 0; i < RoundedInputs.Group; i++)
                        {
                            products += (sbyte)inputs[(row * RoundedInputs.Group) + i] * (sbyte)weights[(i / 4 * 64) + (output * 4) + (i % 4)];
                        }

                        // The third of a row is its scaled sum, the second of an output its offset.
                        ref float sum = ref sums[(row * AmxBytes.Rows) + output];
                        sum = hasOffsets ? MathF.FusedMultiplyAdd(ofOutputs[AmxBytes.Rows + output], ofRows[(2 * AmxBytes.Rows) + row], sum) : sum;
                        sum = MathF.FusedMultiplyAdd(products, ofOutputs[output] * ofRows[row], sum);
                    }
                }
            }

            return sums;
        }
    }
}
