using System.Runtime.InteropServices;
using Iced.Intel;
using TinyLlama.Compute.Cpu;

namespace TinyLlama.Compute.Tests.Cpu;

/// <summary>The emitted code, run by an interpreter of its instructions, so that any machine can test it, and by the processor if it can.</summary>
public sealed unsafe class AmxBytesTests
{
    private static readonly AmxBytes.Kind[] s_kinds = Enum.GetValues<AmxBytes.Kind>();

    public static TheoryData<int, int, int> Products =>
        [.. from blocks in (int[])[1, 2] from groups in (int[])[1, 2, 3, 4, 7, 8] from kind in s_kinds select (blocks, groups, (int)kind)];

    [Theory]
    [MemberData(nameof(Products))]
    public void The_code_gives_the_bits_of_the_definition(int blocks, int groups, int kind)
    {
        Operands operands = new(blocks, groups, (AmxBytes.Kind)kind);
        uint[] actual = Interpret(operands, blocks, groups, (AmxBytes.Kind)kind, default, out _);
        Assert.Equal(operands.Expected(), MemoryMarshal.Cast<uint, float>(actual).ToArray());
    }

    [Theory]
    [MemberData(nameof(Products))]
    public void For_each_group_a_group_of_each_panel_is_fetched(int blocks, int groups, int kind)
    {
        AmxBytes.Ahead ahead = new(0x7000_0000, 0x10_0000, 0x1000);
        Operands operands = new(blocks, groups, (AmxBytes.Kind)kind);
        uint[] actual = Interpret(operands, blocks, groups, (AmxBytes.Kind)kind, ahead, out IReadOnlyList<ulong> fetched);
        Assert.Equal(operands.Expected(), MemoryMarshal.Cast<uint, float>(actual).ToArray());
        IEnumerable<ulong> expected =
            from ofGroup in Enumerable.Range(0, groups)
            from line in Enumerable.Range(0, AmxBytes.LinesAhead((AmxBytes.Kind)kind))
            from panel in Enumerable.Range(0, AmxBytes.Tiles / blocks)
            select (ulong)(ahead.First + (panel * ahead.NextPanel) + (ofGroup * ahead.GroupBytes) + (line * 64));
        Assert.Equal(expected, fetched);
        Interpret(new(blocks, groups, (AmxBytes.Kind)kind), blocks, groups, (AmxBytes.Kind)kind, default, out fetched);
        Assert.Empty(fetched);
    }

    [Theory]
    [MemberData(nameof(Products))]
    public void The_processor_gives_the_bits_of_the_definition(int blocks, int groups, int kind)
    {
        Assert.SkipWhen(AmxBytes.Fault is not null, AmxBytes.Fault ?? "");
        Operands operands = new(blocks, groups, (AmxBytes.Kind)kind);
        float[] actual = [.. operands.Sums];
        fixed (float* sums = actual)
        fixed (byte* inputs = operands.Inputs, weights = operands.Weights, waiting = new byte[AmxBytes.WaitingBytes])
        {
            AmxBytes.Configure((AmxBytes.Kind)kind);
            AmxBytes.Ahead ahead = new(groups % 2 == 0 ? 0 : (nint)weights, operands.NextPanel, 64);
            AmxBytes.Multiply((AmxBytes.Kind)kind, sums, inputs, blocks == 1 ? 0 : operands.NextBlock, weights, operands.NextPanel, groups, waiting, ahead);
            Amx.Release();
        }

        Assert.Equal(operands.Expected(), actual);
    }

    [Fact]
    public void The_code_needs_no_other_instructions_than_those_that_are_asked_for()
    {
        CpuidFeature[] features = [CpuidFeature.INTEL8086, CpuidFeature.INTEL386, CpuidFeature.X64, CpuidFeature.SSE, CpuidFeature.AVX,
            CpuidFeature.AVX512F, CpuidFeature.AMX_TILE, CpuidFeature.AMX_INT8, CpuidFeature.GFNI];
        foreach (AmxBytes.Kind kind in s_kinds)
        {
            Assert.All(MachineCode.Decode(AmxBytes.Emit(1, kind, fetches: true)), instruction => Assert.Empty(instruction.CpuidFeatures.Except(features)));
            Assert.All(MachineCode.Decode(AmxBytes.Emit(2, kind, fetches: true)), instruction => Assert.Empty(instruction.CpuidFeatures.Except(features)));
        }
    }

    private static uint[] Interpret(Operands operands, int blocks, int groups, AmxBytes.Kind kind, AmxBytes.Ahead ahead, out IReadOnlyList<ulong> fetched)
    {
        MachineCode code = new(AmxBytes.Emit(blocks, kind, fetches: ahead.First != 0), tile => AmxBytes.TileSize(kind, tile));
        ulong sums = code.Memory(MemoryMarshal.Cast<float, uint>(operands.Sums).ToArray(), writable: true);
        ulong inputs = code.Memory(MemoryMarshal.Cast<byte, uint>(operands.Inputs).ToArray());
        ulong weights = code.Memory(MemoryMarshal.Cast<byte, uint>(operands.Weights).ToArray());
        ulong waiting = code.Memory(new uint[AmxBytes.WaitingBytes / 4], writable: true);
        fetched = code.Fetched;
        return code.Call(sums, inputs, weights, (ulong)groups, waiting, (ulong)operands.NextPanel, (ulong)operands.NextBlock,
            (ulong)ahead.First, (ulong)ahead.NextPanel, (ulong)ahead.GroupBytes);
    }

    /// <summary>Random groups: any bytes, scales and offsets of which no two products are alike.</summary>
    private sealed class Operands
    {
        private readonly int _blocks;
        private readonly int _groups;
        private readonly AmxBytes.Kind _kind;

        public Operands(int blocks, int groups, AmxBytes.Kind kind)
        {
            (_blocks, _groups, _kind) = (blocks, groups, kind);
            Random random = new(groups);
            Sums = [.. Enumerable.Range(0, AmxBytes.Tiles * AmxBytes.Rows * AmxBytes.Rows).Select(_ => random.NextSingle() - 0.5f)];
            Inputs = Filled(blocks, groups * AmxBytes.InputBytes, AmxBytes.InputBytes);

            // No more than is read: the last panel ends with its last group.
            int panels = AmxBytes.Tiles / blocks;
            Weights = Filled(panels, NextPanel, GroupBytes)[..(((panels - 1) * NextPanel) + (groups * GroupBytes))];
            for (int start = 0; start < Weights.Length; start += GroupBytes)
            {
                foreach (ref Half scale in MemoryMarshal.Cast<byte, Half>(Weights.AsSpan(start, ScaleBytes)))
                {
                    scale = (Half)(random.NextSingle() - 0.5f);
                }

                foreach (ref float scale in MemoryMarshal.Cast<byte, float>(Weights.AsSpan((start + GroupBytes - WholeScaleBytes)..(start + GroupBytes))))
                {
                    scale = random.Next(-128, 128);
                }
            }

            byte[] Filled(int parts, int partBytes, int groupBytes)
            {
                byte[] bytes = new byte[parts * partBytes];
                random.NextBytes(bytes);
                for (int start = 0; start < bytes.Length; start += groupBytes)
                {
                    foreach (ref float scale in MemoryMarshal.Cast<byte, float>(bytes.AsSpan((start + Math.Min(AmxBytes.BytesOfGroup, groupBytes))..(start + groupBytes))))
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

        // Whole groups, and what lies between the panels.
        public int NextPanel => 8 * GroupBytes;

        private int GroupBytes => AmxBytes.WeightBytes(_kind);

        private bool IsStored => _kind is AmxBytes.Kind.Stored or AmxBytes.Kind.Nibbles;

        private int ScaleBytes => IsStored ? sizeof(ushort) * AmxBytes.Rows : 0;

        private int WholeScaleBytes => _kind == AmxBytes.Kind.Halves ? 2 * sizeof(float) * AmxBytes.Rows : 0;

        public float[] Expected()
        {
            float[] sums = [.. Sums];
            int panels = AmxBytes.Tiles / _blocks;
            for (int i = 0; i < sums.Length; i++)
            {
                (int tile, int row, int output) = (i / (AmxBytes.Rows * AmxBytes.Rows), i / AmxBytes.Rows % AmxBytes.Rows, i % AmxBytes.Rows);
                for (int group = 0; group < _groups; group++)
                {
                    ReadOnlySpan<byte> inputs = Inputs.AsSpan((tile / panels * NextBlock) + (group * AmxBytes.InputBytes), AmxBytes.InputBytes);
                    ReadOnlySpan<byte> weights = Weights.AsSpan((tile % panels * NextPanel) + (group * GroupBytes), GroupBytes);
                    ReadOnlySpan<byte> bytes = weights[ScaleBytes..];
                    ReadOnlySpan<float> ofRows = MemoryMarshal.Cast<byte, float>(inputs[AmxBytes.BytesOfGroup..]);
                    ReadOnlySpan<float> ofOutputs = IsStored
                        ? [.. MemoryMarshal.Cast<byte, Half>(weights[..ScaleBytes]).ToArray().Select(scale => (float)scale)]
                        : MemoryMarshal.Cast<byte, float>(weights[AmxBytes.BytesOfGroup..]);
                    int products = 0;
                    for (int k = 0; k < RoundedInputs.Group; k++)
                    {
                        int place = (output * 4) + (k % 4);
                        int weight = _kind == AmxBytes.Kind.Nibbles
                            ? ((bytes[(k / 4 % 4 * 64) + place] >> (k < 16 ? 0 : 4)) & 0xF) - 8
                            : (sbyte)bytes[(k / 4 * 64) + place];
                        int product = (sbyte)inputs[(row * RoundedInputs.Group) + k] * weight;
                        products += _kind == AmxBytes.Kind.Halves ? product * (int)ofOutputs[((1 + (k / 16)) * AmxBytes.Rows) + output] : product;
                    }

                    // The second of a row is its scaled sum, that of an output its offset.
                    ref float sum = ref sums[i];
                    sum = _kind == AmxBytes.Kind.Offsets ? MathF.FusedMultiplyAdd(ofOutputs[AmxBytes.Rows + output], ofRows[AmxBytes.Rows + row], sum) : sum;
                    sum = MathF.FusedMultiplyAdd(products, ofOutputs[output] * ofRows[row], sum);
                }
            }

            return sums;
        }
    }
}
