using System.Runtime.InteropServices;
using Iced.Intel;
using TinyLlama.Compute.Cpu;
using TinyLlama.Compute.Native;
using static Iced.Intel.AssemblerRegisters;

namespace TinyLlama.Compute.Tests.Cpu;

/// <summary>The emitted code, run by an interpreter of its instructions, so that any machine can test it.</summary>
public sealed unsafe class Avx512Bf16TileTests
{
    [Theory]
    [InlineData(1, false)]
    [InlineData(1, true)]
    [InlineData(2, true)]
    [InlineData(7, false)]
    [InlineData(300, true)]
    public void The_code_gives_the_bits_of_the_tile_that_it_stands_for(int depth, bool accumulate)
    {
        const ulong Ahead = 0x5000_0000;
        foreach (bool packed in (bool[])[false, true])
        {
            foreach (int sumsRow in (int[])[32, 45])
            {
                int steps = (depth + 1) / 2;
                float[] panel = new float[steps * 32], pairs = new float[8 * (steps + 3)], floats = new float[8 * ((2 * steps) + 3)];
                float[] left = Numbers(8 * depth, 1), right = Numbers(32 * depth, 2);
                float[] expected = Numbers((7 * sumsRow) + 32, 3), actual = [.. expected];
                (int leftRow, int leftStep) = packed ? (1, 8) : (steps + 3, 1);
                fixed (float* p = panel, l = pairs, wide = floats, e = expected, fromLeft = left, fromRight = right)
                {
                    Avx512Bf16Tile.Pack(p, fromRight, column: 1, step: 32, columns: 32, depth);
                    if (packed)
                    {
                        Avx512Bf16Tile.PackRows(l, fromLeft, step: 8, rows: 8, depth);
                        Bf16Tile<Lanes512>.PackRows(wide, fromLeft, step: 8, rows: 8, depth);
                    }
                    else
                    {
                        for (int row = 0; row < 8; row++)
                        {
                            Avx512Bf16Tile.CopyRow(l + (row * leftRow), fromLeft + (row * depth), depth);
                            Bf16Tile<Lanes512>.CopyRow(wide + (row * ((2 * steps) + 3)), fromLeft + (row * depth), depth);
                        }
                    }

                    Bf16Tile<Lanes512>.Multiply(e, sumsRow, wide, packed ? 1 : (2 * steps) + 3, leftStep, p, steps, p, accumulate);
                }

                MachineCode code = new(Avx512Bf16Tile.Emit());
                ulong sums = code.Memory(Bits(actual), writable: true);
                ulong leftAt = code.Memory(Bits(pairs)), panelAt = code.Memory(Bits(panel));
                uint[] result = code.Call(
                    sums, (ulong)sumsRow, leftAt, (ulong)leftRow, (ulong)leftStep, panelAt, (ulong)steps, Ahead, accumulate ? 1u : 0u);
                Assert.Equal(Bits(expected), result);
                Assert.Equal(
                    Enumerable.Range(0, ((steps * Avx512Bf16Tile.FetchedOfStep) + ITile.Line - 1) / ITile.Line).Select(static line => Ahead + ((ulong)line * 64)),
                    code.Fetched.Where(static address => address >= Ahead).Select(static address => address & ~63ul).Distinct());
            }
        }
    }

    [Fact]
    public void Code_is_called_with_the_arguments_where_it_looks_for_them()
    {
        Assert.SkipUnless(OperatingSystem.IsLinux() && RuntimeInformation.ProcessArchitecture == Architecture.X64, "Linux on x64 only");
        Assembler code = new(64);
        AssemblerRegister64[] registers = [rdi, rsi, rdx, rcx, r8, r9];
        for (int i = 0; i < registers.Length; i++)
        {
            code.mov(__qword_ptr[rdi + (8 * i)], registers[i]);
        }

        code.mov(rax, __qword_ptr[rsp + 8]);
        code.mov(__qword_ptr[rdi + 48], rax);
        code.mov(rax, __qword_ptr[rsp + 16]);
        code.mov(__qword_ptr[rdi + 56], rax);
        code.mov(eax, __dword_ptr[rsp + 24]);
        code.mov(__qword_ptr[rdi + 64], rax);
        code.ret();
        using MemoryStream bytes = new();
        code.Assemble(new StreamCodeWriter(bytes), rip: 0);
        nint address = ExecutableMemory.Map(bytes.ToArray());
        long* seen = stackalloc long[9];
        foreach (bool accumulate in (bool[])[false, true])
        {
            Avx512Bf16Tile.Call(address, (float*)seen, -2, (float*)3, nint.MaxValue, 5, (float*)6, nint.MinValue, (float*)7, accumulate);
            Assert.Equal([(long)seen, -2, 3, nint.MaxValue, 5, 6, nint.MinValue, 7, accumulate ? 1 : 0], new ReadOnlySpan<long>(seen, 9).ToArray());
        }
    }

    [Fact]
    public void The_code_needs_no_other_instructions_than_those_that_are_asked_for()
    {
        CpuidFeature[] features = [CpuidFeature.INTEL8086, CpuidFeature.INTEL386, CpuidFeature.X64, CpuidFeature.SSE, CpuidFeature.AVX,
            CpuidFeature.AVX512F, CpuidFeature.AVX512_BF16];
        Assert.All(MachineCode.Decode(Avx512Bf16Tile.Emit()), instruction => Assert.Empty(instruction.CpuidFeatures.Except(features)));
    }

    [Fact]
    public void A_machine_without_the_instruction_says_so_and_uses_another_path()
    {
        Assert.SkipWhen(CpuPaths.Bf16FaultOf(CpuPath.Vector512Bf16) is null, "this machine has AVX512-BF16");
        using CpuBackend backend = CpuBackend.Create(1, CpuPath.Vector512Bf16, DType.BF16);
        Assert.Equal((CpuPath.Vector512, "cpu Vector512 with products in bf16"), (backend.Path, backend.Arithmetic));
    }

    private static float[] Numbers(int count, int seed)
    {
        Random random = new(seed);
        return [.. Enumerable.Range(0, count).Select(_ => (random.NextSingle() * 2) - 1)];
    }

    private static uint[] Bits(float[] values) => MemoryMarshal.Cast<float, uint>(values).ToArray();
}
