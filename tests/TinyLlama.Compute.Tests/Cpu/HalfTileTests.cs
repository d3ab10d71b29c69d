using System.Runtime.InteropServices;
using Iced.Intel;
using TinyLlama.Compute.Cpu;

namespace TinyLlama.Compute.Tests.Cpu;

/// <summary>The emitted code, run by an interpreter of its instructions, so that any machine can test it, and by the processor if it can.</summary>
public sealed unsafe class HalfTileTests
{
    private const int Panels = 4;
    private const int Columns = 32;

    public static TheoryData<int, int> Sizes => new() { { 1, 0 }, { 2, 64 }, { 7, 0 }, { 300, 32 } };

    [Theory]
    [MemberData(nameof(Sizes))]
    public void The_code_writes_the_products_of_the_tile_that_it_stands_for(int steps, int between)
    {
        Operands operands = new(steps, between);
        MachineCode code = new(HalfTile.Emit());
        ulong products = code.Memory(new uint[Panels * Columns], writable: true);
        ulong left = code.Memory(MemoryMarshal.Cast<float, uint>(operands.Left).ToArray()), panels = code.Memory(operands.Halves);
        uint[] actual = code.Call(products, left, panels, (ulong)operands.NextPanel * sizeof(float), (ulong)steps);
        Assert.Equal(operands.Expected(accumulate: false), MemoryMarshal.Cast<uint, float>(actual).ToArray());
    }

    [Theory]
    [MemberData(nameof(Sizes))]
    public void The_processor_gives_the_bits_of_the_tile_that_it_stands_for(int steps, int between)
    {
        Assert.SkipUnless(HalfTile.IsSupported, "no AVX-512 here, or not Linux on x64");
        Assert.Null(HalfTile.Fault);
        Operands operands = new(steps, between);
        foreach (bool accumulate in (bool[])[false, true])
        {
            float[] actual = [.. operands.Sums];
            fixed (uint* panels = operands.Halves)
            fixed (float* sums = actual, left = operands.Left)
            {
                HalfTile.MultiplyRow(sums, left, (float*)panels, operands.NextPanel, steps, accumulate);
            }

            Assert.Equal(operands.Expected(accumulate), actual);
        }
    }

    [Fact]
    public void The_code_needs_no_other_instructions_than_those_that_are_asked_for()
    {
        CpuidFeature[] features = [CpuidFeature.INTEL8086, CpuidFeature.INTEL386, CpuidFeature.X64, CpuidFeature.AVX, CpuidFeature.AVX512F];
        Assert.All(MachineCode.Decode(HalfTile.Emit()), instruction => Assert.Empty(instruction.CpuidFeatures.Except(features)));
    }

    /// <summary>Random finite halves, many of them subnormal or zero.</summary>
    private sealed class Operands
    {
        private readonly int _steps;

        public Operands(int steps, int between)
        {
            (_steps, NextPanel) = (steps, (steps * Columns) + between);
            Random random = new(steps);
            Halves = [.. Enumerable.Range(0, Panels * NextPanel).Select(_ => Half() | Half() << 16)];
            Left = [.. Enumerable.Range(0, 2 * steps).Select(_ => random.NextSingle() - 0.5f)];
            Sums = [.. Enumerable.Range(0, Panels * Columns).Select(_ => random.NextSingle() - 0.5f)];

            uint Half() => (uint)((random.Next(2) << 15) | (random.Next(4) == 0 ? random.Next(3) : random.Next(0x7C00)));
        }

        public int NextPanel { get; }

        public uint[] Halves { get; }

        public float[] Left { get; }

        public float[] Sums { get; }

        public float[] Expected(bool accumulate)
        {
            float[] expected = [.. Sums];
            for (int i = 0; i < expected.Length; i++)
            {
                (int panel, int column) = int.DivRem(i, Columns);
                float sum = 0;
                for (int step = 0; step < _steps; step++)
                {
                    uint pair = Halves[(panel * NextPanel) + (step * Columns) + column];
                    sum = MathF.FusedMultiplyAdd(Left[(2 * step) + 1], (float)BitConverter.UInt16BitsToHalf((ushort)(pair >> 16)), sum);
                    sum = MathF.FusedMultiplyAdd(Left[2 * step], (float)BitConverter.UInt16BitsToHalf((ushort)pair), sum);
                }

                expected[i] = accumulate ? expected[i] + sum : sum;
            }

            return expected;
        }
    }
}
