using System.Runtime.InteropServices;
using Iced.Intel;
using TinyLlama.Compute.Cpu;

namespace TinyLlama.Compute.Tests.Cpu;

/// <summary>The emitted code, run by an interpreter of its instructions, so that any machine can test it, and by the processor if it can.</summary>
public sealed unsafe class AmxBytesTests
{
    public static TheoryData<int, int, bool> Products =>
        [.. from blocks in (int[])[1, 2] from groups in (int[])[1, 2, 3, 4, 7, 8] from hasOffsets in (bool[])[false, true] select (blocks, groups, hasOffsets)];

    [Theory]
    [MemberData(nameof(Products))]
    public void The_code_gives_the_bits_of_the_definition(int blocks, int groups, bool hasOffsets)
    {
        Operands operands = new(blocks, groups);
        MachineCode code = new(AmxBytes.Emit(blocks, hasOffsets), AmxBytes.TileSize);
        ulong sums = code.Memory(MemoryMarshal.Cast<float, uint>(operands.Sums).ToArray(), writable: true);
        ulong inputs = code.Memory(MemoryMarshal.Cast<byte, uint>(operands.Inputs).ToArray());
        ulong weights = code.Memory(MemoryMarshal.Cast<byte, uint>(operands.Weights).ToArray());
        ulong waiting = code.Memory(new uint[AmxBytes.WaitingBytes / 4], writable: true);
        uint[] actual = code.Call(sums, inputs, weights, (ulong)groups, waiting, (ulong)operands.NextBlock);
        Assert.Equal(operands.Expected(hasOffsets), MemoryMarshal.Cast<uint, float>(actual).ToArray());
    }

    [Theory]
    [MemberData(nameof(Products))]
    public void The_processor_gives_the_bits_of_the_definition(int blocks, int groups, bool hasOffsets)
    {
        Assert.SkipWhen(AmxBytes.Fault is not null, AmxBytes.Fault ?? "");
        Operands operands = new(blocks, groups);
        float[] actual = [.. operands.Sums];
        fixed (float* sums = actual)
        fixed (byte* inputs = operands.Inputs, weights = operands.Weights, waiting = new byte[AmxBytes.WaitingBytes])
        {
            AmxBytes.Configure();
            AmxBytes.Multiply(sums, inputs, blocks == 1 ? 0 : operands.NextBlock, weights, groups, waiting, hasOffsets);
            Amx.Release();
        }

        Assert.Equal(operands.Expected(hasOffsets), actual);
    }

    [Theory]
    [InlineData(1, false)]
    [InlineData(1, true)]
    [InlineData(2, false)]
    [InlineData(2, true)]
    public void The_code_needs_no_other_instructions_than_those_that_are_asked_for(int blocks, bool hasOffsets)
    {
        CpuidFeature[] features = [CpuidFeature.INTEL8086, CpuidFeature.INTEL386, CpuidFeature.X64, CpuidFeature.AVX,
            CpuidFeature.AVX512F, CpuidFeature.AMX_TILE, CpuidFeature.AMX_INT8];
        Assert.All(MachineCode.Decode(AmxBytes.Emit(blocks, hasOffsets)), instruction => Assert.Empty(instruction.CpuidFeatures.Except(features)));
    }

    /// <summary>Random groups: any bytes, scales and offsets of which no two products are alike.</summary>
    private sealed class Operands
    {
        private readonly int _blocks;
        private readonly int _groups;

        public Operands(int blocks, int groups)
        {
            (_blocks, _groups) = (blocks, groups);
            Random random = new(groups);
            Sums = [.. Enumerable.Range(0, AmxBytes.Tiles * AmxBytes.Rows * AmxBytes.Rows).Select(_ => random.NextSingle() - 0.5f)];
            Inputs = Filled(blocks, groups * AmxBytes.InputBytes, AmxBytes.InputBytes);

            // No more than is read: the last panel ends with its last group.
            int panels = AmxBytes.Tiles / blocks;
            Weights = Filled(panels, AmxBytes.PanelBytes, AmxBytes.WeightBytes)[..(((panels - 1) * AmxBytes.PanelBytes) + (groups * AmxBytes.WeightBytes))];

            byte[] Filled(int parts, int partBytes, int groupBytes)
            {
                byte[] bytes = new byte[parts * partBytes];
                random.NextBytes(bytes);
                for (int start = 0; start < bytes.Length; start += groupBytes)
                {
                    foreach (ref float scale in MemoryMarshal.Cast<byte, float>(bytes.AsSpan((start + AmxBytes.BytesOfGroup)..(start + groupBytes))))
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

        public int NextBlock => _groups * AmxBytes.InputBytes;

        public float[] Expected(bool hasOffsets)
        {
            float[] sums = [.. Sums];
            int panels = AmxBytes.Tiles / _blocks;
            for (int i = 0; i < sums.Length; i++)
            {
                (int tile, int row, int output) = (i / (AmxBytes.Rows * AmxBytes.Rows), i / AmxBytes.Rows % AmxBytes.Rows, i % AmxBytes.Rows);
                for (int group = 0; group < _groups; group++)
                {
                    ReadOnlySpan<byte> inputs = Inputs.AsSpan((tile / panels * NextBlock) + (group * AmxBytes.InputBytes), AmxBytes.InputBytes);
                    ReadOnlySpan<byte> weights = Weights.AsSpan((tile % panels * AmxBytes.PanelBytes) + (group * AmxBytes.WeightBytes), AmxBytes.WeightBytes);
                    ReadOnlySpan<float> ofRows = MemoryMarshal.Cast<byte, float>(inputs[AmxBytes.BytesOfGroup..]);
                    ReadOnlySpan<float> ofOutputs = MemoryMarshal.Cast<byte, float>(weights[AmxBytes.BytesOfGroup..]);
                    int products = 0;
                    for (int k = 0; k < RoundedInputs.Group; k++)
                    {
                        products += (sbyte)inputs[(row * RoundedInputs.Group) + k] * (sbyte)weights[(k / 4 * 64) + (output * 4) + (k % 4)];
                    }

                    // The third of a row is its scaled sum, the second of an output its offset.
                    ref float sum = ref sums[i];
                    sum = hasOffsets ? MathF.FusedMultiplyAdd(ofOutputs[AmxBytes.Rows + output], ofRows[(2 * AmxBytes.Rows) + row], sum) : sum;
                    sum = MathF.FusedMultiplyAdd(products, ofOutputs[output] * ofRows[row], sum);
                }
            }

            return sums;
        }
    }
}
