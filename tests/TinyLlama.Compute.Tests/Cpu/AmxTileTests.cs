using System.Runtime.InteropServices;
using Iced.Intel;
using TinyLlama.Compute.Cpu;

namespace TinyLlama.Compute.Tests.Cpu;

/// <summary>The emitted code, run by an interpreter of its instructions, so that any machine can test it, and by the processor if it can.</summary>
public sealed unsafe class AmxTileTests
{
    public static TheoryData<int, bool, bool, int> Products =>
        [.. from depth in (int[])[1, 2, 31, 32, 33, 300]
            from accumulate in (bool[])[false, true]
            from packed in (bool[])[false, true]
            from sumsRow in (int[])[32, 45]
            select (depth, accumulate, packed, sumsRow)];

    [Theory]
    [MemberData(nameof(Products))]
    public void The_processor_gives_the_bits_of_the_tile_that_stands_for_the_code(int depth, bool accumulate, bool packed, int sumsRow)
    {
        Assert.SkipWhen(Amx.Fault is not null, Amx.Fault ?? "");
        Operands operands = new(depth, packed);
        float[] expected = Numbers((31 * sumsRow) + 32, 3), actual = [.. expected];
        fixed (float* e = expected, a = actual, left = operands.Left, panel = operands.Panel)
        {
            AmxPairTile.Multiply(e, sumsRow, left, operands.LeftRow, operands.LeftStep, panel, operands.Steps, panel, accumulate);
            AmxTile.Begin();
            AmxTile.Multiply(a, sumsRow, left, operands.LeftRow, operands.LeftStep, panel, operands.Steps, panel, accumulate);
            AmxTile.End();
        }

        Assert.Equal(Bits(expected), Bits(actual));
    }

    [Theory]
    [InlineData(1, 0, false)]
    [InlineData(3, 0, true)]
    [InlineData(0, 1, true)]
    [InlineData(2, 1, false)]
    public void The_code_gives_the_bits_of_the_tile_that_stands_for_it(int chunks, int rest, bool accumulate)
    {
        foreach (bool packed in (bool[])[false, true])
        {
            const int SumsRow = 45;
            const ulong Ahead = 0x5000_0000;
            Operands operands = new(32 * (chunks + rest), packed);
            float[] expected = Numbers((31 * SumsRow) + 32, 3), actual = [.. expected];
            fixed (float* e = expected, left = operands.Left, panel = operands.Panel)
            {
                AmxPairTile.Multiply(e, SumsRow, left, operands.LeftRow, operands.LeftStep, panel, operands.Steps, panel, accumulate);
            }

            // The last chunk as it lies among the others, or by itself.
            Operands last = new(32 * (chunks + rest), packed: true);
            MachineCode code = new(AmxTile.Emit());
            ulong sums = code.Memory(Bits(actual), writable: true);
            ulong leftAt = code.Memory(Bits(operands.Left)), panelAt = code.Memory(Bits(operands.Panel)), lastAt = code.Memory(Bits(last.Left));
            ulong whole = code.Memory(new uint[32 * 32], writable: true);
            ulong chunk = (ulong)(operands.LeftStep * 64), done = (ulong)chunks * 2048;
            ulong[] product =
            [
                sums, SumsRow * 4, leftAt, (ulong)operands.LeftRow * 4, chunk, panelAt, (ulong)chunks, Ahead, accumulate ? whole : 0,
                rest > 0 ? lastAt + done : 0, rest > 0 ? panelAt + done : 0,
            ];
            ulong at = code.Memory([.. product.SelectMany(word => new[] { (uint)word, (uint)(word >> 32) })]);
            Assert.Equal(Bits(expected), code.Call(at));
            Assert.Equal(Enumerable.Range(0, 16 * chunks * AmxTile.FetchedOfStep / ITile.Line).Select(static line => Ahead + ((ulong)line * 64)), code.Fetched);
        }
    }

    [Fact]
    public void The_code_needs_no_other_instructions_than_those_that_are_asked_for()
    {
        CpuidFeature[] features = [CpuidFeature.INTEL8086, CpuidFeature.INTEL386, CpuidFeature.X64, CpuidFeature.SSE, CpuidFeature.AVX,
            CpuidFeature.AVX512F, CpuidFeature.AMX_TILE, CpuidFeature.AMX_BF16];
        Assert.All(MachineCode.Decode(AmxTile.Emit()), instruction => Assert.Empty(instruction.CpuidFeatures.Except(features)));
    }

    [Fact]
    public void A_machine_without_the_instructions_says_so_and_uses_another_path()
    {
        Assert.SkipWhen(Amx.Fault is null, "this machine has AMX");
        using CpuBackend backend = CpuBackend.Create(1, CpuPath.Vector512Amx, DType.BF16);
        Assert.Equal((CpuPath.Vector512, "cpu Vector512 with products in bf16"), (backend.Path, backend.Arithmetic));
    }

    private static float[] Numbers(int count, int seed)
    {
        Random random = new(seed);
        return [.. Enumerable.Range(0, count).Select(_ => (random.NextSingle() * 2) - 1)];
    }

    private static uint[] Bits(float[] values) => MemoryMarshal.Cast<float, uint>(values).ToArray();

    /// <summary>32 rows and 32 columns of so many numbers; what lies behind the last step is no number.</summary>
    private sealed class Operands
    {
        public Operands(int depth, bool packed)
        {
            Steps = (depth + 1) / 2;
            (LeftRow, LeftStep) = packed ? (AmxTile.PackedRow, 32) : (Steps + 3, 1);
            Left = [.. Enumerable.Repeat(float.NaN, 32 * (Steps + 3))];
            Panel = [.. Enumerable.Repeat(float.NaN, 32 * (Steps + 3))];
            float[] rows = Numbers(32 * depth, 1), columns = Numbers(32 * depth, 2);
            float[] turned = [.. Enumerable.Range(0, 32 * depth).Select(at => rows[(at % 32 * depth) + (at / 32)])];
            fixed (float* left = Left, panel = Panel, fromRows = rows, fromTurned = turned, fromColumns = columns)
            {
                AmxTile.Pack(panel, fromColumns, column: 1, step: 32, columns: 32, depth);
                if (packed)
                {
                    AmxTile.PackRows(left, fromTurned, step: 32, rows: 32, depth);
                    return;
                }

                for (int row = 0; row < 32; row++)
                {
                    AmxTile.CopyRow(left + (row * LeftRow), fromRows + (row * depth), depth);
                }
            }
        }

        public int Steps { get; }

        public int LeftRow { get; }

        public int LeftStep { get; }

        public float[] Left { get; }

        public float[] Panel { get; }
    }
}
