using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics.X86;
using Iced.Intel;
using TinyLlama.Compute.Native;
using static Iced.Intel.AssemblerRegisters;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// The tile of <see cref="PairTile{V, P}"/> of pairs in half precision over 512-bit registers. One row alone, which widens as much as it
/// multiplies, is multiplied with vcvtph2ps: one instruction where <see cref="Halves{V}"/> takes seven. .NET has no intrinsic for it, so
/// that the code is emitted when it is first asked for.
/// </summary>
/// <remarks>The code follows the calling convention of System V (Linux) and is checked against the tile before its first use: the bits are the same.</remarks>
internal readonly unsafe struct HalfTile : ITile
{
    private const int Panels = 4;
    private const int Registers = 2;
    private const int RegisterBytes = 64;

    // Emitted, loaded and checked when first asked for.
    private static readonly Lazy<(nint Address, string? Fault)> s_code = new(static () => ExecutableMemory.Load(
        "half precision", IsSupported ? null : "no AVX-512 here, or not Linux on x64", static () => ExecutableMemory.Map(Emit()), IsRight));

    /// <summary>Gets a value indicating whether the processor has the instructions and the system the calling convention.</summary>
    public static bool IsSupported => Avx512F.X64.IsSupported && OperatingSystem.IsLinux();

    /// <summary>Gets why the code cannot be used here, or null.</summary>
    public static string? Fault => s_code.Value.Fault;

    /// <inheritdoc/>
    public static DType Type => DType.F16;

    /// <inheritdoc/>
    public static int LeftDwords => 2;

    /// <inheritdoc/>
    public static int Rows => PairTile<Lanes512, Float16Pairs<Lanes512>>.Rows;

    /// <inheritdoc/>
    public static int Columns => PairTile<Lanes512, Float16Pairs<Lanes512>>.Columns;

    /// <inheritdoc/>
    public static int FetchedOfStep => PairTile<Lanes512, Float16Pairs<Lanes512>>.FetchedOfStep;

    /// <inheritdoc/>
    public static void Multiply(
        float* sums, nint sumsRow, float* left, nint leftRow, nint leftStep, float* panel, nint steps, float* ahead, bool accumulate) =>
        PairTile<Lanes512, Float16Pairs<Lanes512>>.Multiply(sums, sumsRow, left, leftRow, leftStep, panel, steps, ahead, accumulate);

    /// <inheritdoc/>
    public static void MultiplyRow(float* sums, float* left, float* panels, nint nextPanel, nint steps, bool accumulate) =>
        MultiplyRow(s_code.Value.Address, sums, left, panels, nextPanel, steps, accumulate);

    /// <inheritdoc/>
    public static void CopyRow(float* row, float* source, nint depth) =>
        PairTile<Lanes512, Float16Pairs<Lanes512>>.CopyRow(row, source, depth);

    /// <summary>The machine code: writes the products of a row and four panels; position-independent, without data.</summary>
    internal static byte[] Emit() => ExecutableMemory.Assemble(code =>
    {
        // On entry: rdi products, rsi left, rdx panels, rcx bytes from one panel to the next, r8 steps. Three panels' bytes in r9; the inputs
        // of a step in zmm16 and 17, its weights in 18 and 19, products from 0.
        AssemblerRegisterZMM first = zmm16, second = zmm17, low = zmm18, high = zmm19;
        AssemblerMemoryOperand[] panels = [rdx + 0, rdx + rcx, rdx + (rcx * 2), rdx + r9];
        Label step = code.CreateLabel();
        code.lea(r9, __[rcx + (rcx * 2)]);
        for (int i = 0; i < Panels * Registers; i++)
        {
            code.vpxord(Products(i), Products(i), Products(i));
        }

        code.Label(ref step);
        code.vbroadcastss(first, __dword_ptr[rsi]);
        code.vbroadcastss(second, __dword_ptr[rsi + sizeof(float)]);
        for (int i = 0; i < Panels * Registers; i++)
        {
            code.vmovups(low, __zmmword_ptr[panels[i / Registers] + (i % Registers * RegisterBytes)]);
            code.vpsrld(high, low, 16);
            code.vpmovdw(ymm18, low);
            code.vpmovdw(ymm19, high);
            code.vcvtph2ps(low, ymm18);
            code.vcvtph2ps(high, ymm19);
            code.vfmadd231ps(Products(i), second, high);
            code.vfmadd231ps(Products(i), first, low);
        }

        code.add(rsi, 2 * sizeof(float));
        code.add(rdx, Registers * RegisterBytes);
        code.dec(r8);
        code.jne(step);
        for (int i = 0; i < Panels * Registers; i++)
        {
            code.vmovups(__zmmword_ptr[rdi + (i * RegisterBytes)], Products(i));
        }

        code.vzeroupper();
        code.ret();

        static AssemblerRegisterZMM Products(int number) => new(Register.ZMM0 + number);
    });

    [SkipLocalsInit]
    private static void MultiplyRow(nint code, float* sums, float* left, float* panels, nint nextPanel, nint steps, bool accumulate)
    {
        float* products = stackalloc float[Panels * Registers * Lanes512.Count];
        ((delegate* unmanaged[SuppressGCTransition]<float*, float*, float*, nint, nint, void>)code)(
            products, left, panels, nextPanel * sizeof(float), steps);
        for (int panel = 0; panel < Panels; panel++, sums += Columns, products += Columns)
        {
            Tile<Lanes512>.Put(sums, Lanes512.Load(products), Lanes512.Load(products + Lanes512.Count), accumulate);
        }
    }


    // All finite halves.
    private static bool IsRight(nint code)
    {
        const int Steps = 256;
        uint[] panels = new uint[Panels * Steps * Columns];
        float[] left = new float[2 * Steps], actual = new float[Panels * Columns], expected = new float[Panels * Columns];
        for (int i = 0; i < panels.Length; i++)
        {
            panels[i] = Finite(2 * i) | Finite((2 * i) + 1) << 16;
        }

        for (int i = 0; i < left.Length; i++)
        {
            left[i] = 1f / (i + 1);
        }

        fixed (uint* dwords = panels)
        fixed (float* row = left, ours = actual, theirs = expected)
        {
            MultiplyRow(code, ours, row, (float*)dwords, Steps * Columns, Steps, accumulate: false);
            PairTile<Lanes512, Float16Pairs<Lanes512>>.MultiplyRow(theirs, row, (float*)dwords, Steps * Columns, Steps, accumulate: false);
        }

        return actual.AsSpan().SequenceEqual(expected);

        static uint Finite(int number) => (uint)number & 0xFFFF & ((number & 0x7C00) == 0x7C00 ? 0xBFFFu : 0xFFFF);
    }
}
