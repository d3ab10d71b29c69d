using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics.X86;
using Iced.Intel;
using TinyLlama.Compute.Native;
using static Iced.Intel.AssemblerRegisters;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// The tile of <see cref="Bf16Tile{V}"/> over 512-bit registers with vdpbf16ps, which multiplies and adds 32 pairs at
/// once: twice the rate of fp32. .NET has no intrinsic for it, so the product is emitted when it is first asked for.
/// Panels are packed by the same code; the left operand is in pairs too.
/// </summary>
/// <remarks>
/// The code follows the calling convention of System V (Linux), writes the tile's sums and nothing else, and is checked
/// against <see cref="Bf16Tile{V}"/> before its first use. vdpbf16ps reads subnormal numbers as zero, and gives zero for them.
/// </remarks>
internal readonly unsafe struct Avx512Bf16Tile : IPackingTile
{
    private static readonly (nint Address, string? Fault) s_code = ExecutableMemory.Load(
        "AVX512-BF16", IsSupported ? null : "no AVX512-BF16 here, or not Linux on x64", static () => ExecutableMemory.Map(Emit()), IsRight);

    /// <summary>Gets a value indicating whether the processor has the instruction and the system the calling convention.</summary>
    public static bool IsSupported =>
        Avx512F.X64.IsSupported && OperatingSystem.IsLinux() && X86Base.CpuId(7, 0).Eax >= 1 && (X86Base.CpuId(7, 1).Eax & 1 << 5) != 0;

    /// <summary>Gets why the code cannot be used here, or null. The first use of it emits, loads and checks the code.</summary>
    public static string? Fault => s_code.Fault;

    /// <inheritdoc/>
    public static DType Type => DType.BF16;

    /// <inheritdoc/>
    public static int LeftDwords => 1;

    /// <inheritdoc/>
    public static int Rows => 8;

    /// <inheritdoc/>
    public static int Columns => 32;

    /// <inheritdoc/>
    public static int FetchedOfStep => ITile.Line / 4;

    /// <inheritdoc/>
    public static void Multiply(
        float* sums, nint sumsRow, float* left, nint leftRow, nint leftStep, float* panel, nint steps, float* ahead, bool accumulate) =>
        Call(s_code.Address, sums, sumsRow, left, leftRow, leftStep, panel, steps, ahead, accumulate);

    /// <inheritdoc/>
    public static void MultiplyRow(float* sums, float* left, float* panels, nint nextPanel, nint steps, bool accumulate) =>
        MultiplyRow<Avx512Bf16Tile>(sums, left, panels, nextPanel, steps, accumulate);

    /// <summary>The same by any tile: all its rows are the one row.</summary>
    [SkipLocalsInit]
    internal static void MultiplyRow<T>(float* sums, float* left, float* panels, nint nextPanel, nint steps, bool accumulate)
        where T : struct, ITile
    {
        float* tile = stackalloc float[T.Rows * T.Columns];
        for (int panel = 0; panel < 4; panel++, panels += nextPanel, sums += T.Columns)
        {
            T.Multiply(tile, T.Columns, left, leftRow: 0, leftStep: 1, panels, steps, panels, accumulate: false);
            for (int j = 0; j < T.Columns; j++)
            {
                sums[j] = accumulate ? sums[j] + tile[j] : tile[j];
            }
        }
    }

    /// <inheritdoc/>
    public static void Pack(float* panel, float* source, nint column, nint step, int columns, nint depth) =>
        Bf16Tile<Lanes512>.Pack(panel, source, column, step, columns, depth);

    /// <inheritdoc/>
    public static void PackRows(float* tile, float* source, nint step, int rows, nint depth)
    {
        for (nint k = 0; k < depth; k += 2, source += 2 * step, tile += Rows)
        {
            if (rows == Rows && k + 1 < depth)
            {
                Lanes256.Pairs(Lanes256.Load(source), Lanes256.Load(source + step)).Store(tile);
                continue;
            }

            for (int r = 0; r < rows; r++)
            {
                Bf16Tile<Lanes512>.Pair(source[r], k + 1 < depth ? source[step + r] : 0).Store(tile + r);
            }
        }
    }

    /// <inheritdoc/>
    public static void CopyRow(float* row, float* source, nint depth) =>
        Bf16Tile<Lanes512>.CopyPairs(row, source, depth);

    /// <summary>The machine code of <see cref="ITile.Multiply"/> for tiles of 8 × 32; position-independent, without data.</summary>
    internal static byte[] Emit() => ExecutableMemory.Assemble(code =>
    {
        // On entry: rdi sums, rsi sumsRow, rdx left, rcx leftRow, r8 leftStep, r9 panel; once rbx is kept, [rsp + 16] steps, [rsp + 24] ahead,
        // [rsp + 32] accumulate.
        Label loop = code.CreateLabel();
        Label store = code.CreateLabel();
        code.push(rbx);
        code.shl(rsi, 2);
        code.shl(rcx, 2);
        code.shl(r8, 2);

        // The sums are needed when the loop ends; asked for now, they arrive meanwhile.
        code.mov(rax, rdi);
        for (int row = 0; row < 8; row++)
        {
            code.prefetcht0(__byte_ptr[rax]);
            code.prefetcht0(__byte_ptr[rax + 124]);
            code.add(rax, rsi);
        }

        for (int sum = 0; sum < 16; sum++)
        {
            code.vpxord(Register512(sum), Register512(sum), Register512(sum));
        }

        // Rows 0 to 2 from rdx, 3 to 5 from rax, 6 and 7 from r11. Sums in zmm0 to 15, the panel in 16 and 17, rows in 18 to 25.
        code.mov(r10, __qword_ptr[rsp + 16]);
        code.lea(rax, __[rdx + (rcx * 2)]);
        code.add(rax, rcx);
        code.lea(r11, __[rax + (rcx * 2)]);
        code.add(r11, rcx);
        code.mov(rbx, __qword_ptr[rsp + 24]);
        code.Label(ref loop);
        code.prefetcht1(__byte_ptr[rbx]);
        code.add(rbx, FetchedOfStep * sizeof(float));
        code.vmovups(zmm16, __zmmword_ptr[r9]);
        code.vmovups(zmm17, __zmmword_ptr[r9 + 64]);
        for (int row = 0; row < 8; row++)
        {
            AssemblerRegister64 third = row < 3 ? rdx : row < 6 ? rax : r11;
            code.vbroadcastss(Register512(18 + row), (row % 3) switch
            {
                0 => __dword_ptr[third],
                1 => __dword_ptr[third + rcx],
                _ => __dword_ptr[third + (rcx * 2)],
            });
            code.vdpbf16ps(Register512(2 * row), zmm16, Register512(18 + row));
            code.vdpbf16ps(Register512((2 * row) + 1), zmm17, Register512(18 + row));
        }

        code.add(rdx, r8);
        code.add(rax, r8);
        code.add(r11, r8);
        code.add(r9, 128);
        code.dec(r10);
        code.jne(loop);

        code.cmp(__dword_ptr[rsp + 32], 0);
        code.je(store);
        code.mov(rax, rdi);
        for (int row = 0; row < 8; row++)
        {
            code.vaddps(Register512(2 * row), Register512(2 * row), __zmmword_ptr[rax]);
            code.vaddps(Register512((2 * row) + 1), Register512((2 * row) + 1), __zmmword_ptr[rax + 64]);
            code.add(rax, rsi);
        }

        code.Label(ref store);
        for (int row = 0; row < 8; row++)
        {
            code.vmovups(__zmmword_ptr[rdi], Register512(2 * row));
            code.vmovups(__zmmword_ptr[rdi + 64], Register512((2 * row) + 1));
            code.add(rdi, rsi);
        }

        code.pop(rbx);
        code.vzeroupper();
        code.ret();
    });

    /// <summary>Calls code as <see cref="Emit"/> makes it.</summary>
    internal static void Call(
        nint code, float* sums, nint sumsRow, float* left, nint leftRow, nint leftStep, float* panel, nint steps, float* ahead, bool accumulate) =>
        ((delegate* unmanaged<float*, nint, float*, nint, nint, float*, nint, float*, int, void>)code)(
            sums, sumsRow, left, leftRow, leftStep, panel, steps, ahead, accumulate ? 1 : 0);

    private static AssemblerRegisterZMM Register512(int number) => new(Register.ZMM0 + number);


    // Whole numbers so small that every order of adding them gives the same bits.
    private static bool IsRight(nint code)
    {
        const int Depth = 9, Steps = 5, SumsRow = 40;
        float[] numbers = [.. Enumerable.Range(0, 512).Select(i => (float)((i * 37 % 17) - 8))];
        float[] panel = new float[Steps * 32], pairs = new float[Steps * 8], floats = new float[2 * Steps * 8];
        float[] expected = numbers[..(8 * SumsRow)], actual = numbers[..(8 * SumsRow)];
        bool same = true;
        fixed (float* from = numbers, p = panel, left = pairs, wide = floats, e = expected, a = actual)
        {
            Pack(p, from, column: 1, step: 32, columns: 32, Depth);
            PackRows(left, from + 100, step: 11, rows: 8, Depth);
            Bf16Tile<Lanes512>.PackRows(wide, from + 100, step: 11, rows: 8, Depth);
            foreach (bool accumulate in (bool[])[false, true])
            {
                Call(code, a, SumsRow, left, leftRow: 1, leftStep: 8, p, Steps, p, accumulate);
                Bf16Tile<Lanes512>.Multiply(e, SumsRow, wide, leftRow: 1, leftStep: 8, p, Steps, p, accumulate);
                same &= expected.AsSpan().SequenceEqual(actual);
            }
        }

        return same;
    }
}
