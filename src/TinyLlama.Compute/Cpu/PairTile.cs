using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics.X86;

namespace TinyLlama.Compute.Cpu;

/// <summary>How the two 16-bit floats of a dword are widened.</summary>
/// <typeparam name="V">The register.</typeparam>
internal interface IPairs<V>
{
    /// <summary>Gets the type of both.</summary>
    static abstract DType Type { get; }

    /// <summary>The floats that the low halves are.</summary>
    static abstract V First(V pairs);

    /// <summary>The floats that the high halves are.</summary>
    static abstract V Second(V pairs);
}

/// <summary>Pairs of bfloat16.</summary>
/// <typeparam name="V">The register.</typeparam>
internal readonly struct BFloat16Pairs<V> : IPairs<V>
    where V : struct, ILanes<V>
{
    /// <inheritdoc/>
    public static DType Type => DType.BF16;

    /// <inheritdoc/>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V First(V pairs) => V.First(pairs);

    /// <inheritdoc/>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Second(V pairs) => V.Second(pairs);
}

/// <summary>Pairs of finite numbers in half precision.</summary>
/// <typeparam name="V">The register.</typeparam>
internal readonly struct Float16Pairs<V> : IPairs<V>
    where V : struct, ILanes<V>
{
    /// <inheritdoc/>
    public static DType Type => DType.F16;

    /// <inheritdoc/>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V First(V pairs) => Halves<V>.FromLow(pairs);

    /// <inheritdoc/>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Second(V pairs) => Halves<V>.FromHigh(pairs);
}

/// <summary>
/// A tile whose panels hold pairs of 16-bit floats, which are widened in registers: a step is a pair of k. The left operand
/// is fp32, and products are of fp32, at its rate at best.
/// </summary>
/// <remarks>
/// Each step adds the product of the second k, then that of the first, each rounded once.
/// A row of 16-bit floats is a row of such pairs, if their number is even: dwords that are packed as if they were floats.
/// </remarks>
/// <typeparam name="V">The register.</typeparam>
/// <typeparam name="P">The pairs.</typeparam>
internal readonly unsafe struct PairTile<V, P> : ITile
    where V : struct, ILanes<V>
    where P : struct, IPairs<V>
{
    /// <inheritdoc/>
    public static DType Type => P.Type;

    /// <inheritdoc/>
    public static int LeftDwords => 2;

    /// <inheritdoc/>
    public static int Rows
    {
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        get => Tile<V>.Rows;
    }

    /// <inheritdoc/>
    public static int Columns
    {
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        get => Tile<V>.Columns;
    }

    /// <inheritdoc/>
    public static int FetchedOfStep
    {
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        get => Columns;
    }

    /// <inheritdoc/>
    public static void Multiply(
        float* sums, nint sumsRow, float* left, nint leftRow, nint leftStep, float* panel, nint steps, float* ahead, bool accumulate)
    {
        if (V.Count == 16)
        {
            Multiply8(sums, sumsRow, left, leftRow, leftStep, panel, steps, ahead, accumulate);
        }
        else
        {
            Multiply6(sums, sumsRow, left, leftRow, leftStep, panel, steps, ahead, accumulate);
        }
    }

    /// <inheritdoc/>
    public static int FewRows => 4;

    /// <inheritdoc/>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static void MultiplyFew(float* sums, nint sumsRow, float* left, nint leftRow, nint leftStep, float* panel, nint steps, float* ahead)
    {
        V s00 = default, s01 = default, s10 = default, s11 = default, s20 = default, s21 = default, s30 = default, s31 = default;
        float* second = left + leftStep;
        nint leftRow3 = 3 * leftRow;
        for (; steps > 0; steps--, panel += Columns, ahead += Columns, left += 2 * leftStep, second += 2 * leftStep)
        {
            Fetch(ahead);
            V p0 = P.Second(V.Load(panel)), p1 = P.Second(V.Load(panel + V.Count));
            AddProducts(ref s00, ref s01, V.Create(second[0]), p0, p1);
            AddProducts(ref s10, ref s11, V.Create(second[leftRow]), p0, p1);
            AddProducts(ref s20, ref s21, V.Create(second[2 * leftRow]), p0, p1);
            AddProducts(ref s30, ref s31, V.Create(second[leftRow3]), p0, p1);
            p0 = P.First(V.Load(panel));
            p1 = P.First(V.Load(panel + V.Count));
            AddProducts(ref s00, ref s01, V.Create(left[0]), p0, p1);
            AddProducts(ref s10, ref s11, V.Create(left[leftRow]), p0, p1);
            AddProducts(ref s20, ref s21, V.Create(left[2 * leftRow]), p0, p1);
            AddProducts(ref s30, ref s31, V.Create(left[leftRow3]), p0, p1);
        }

        Tile<V>.Put(sums, s00, s01, accumulate: false);
        Tile<V>.Put(sums += sumsRow, s10, s11, accumulate: false);
        Tile<V>.Put(sums += sumsRow, s20, s21, accumulate: false);
        Tile<V>.Put(sums + sumsRow, s30, s31, accumulate: false);
    }

    /// <inheritdoc/>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static void MultiplyRow(float* sums, float* left, float* panels, nint nextPanel, nint steps, bool accumulate)
    {
        V s00 = default, s01 = default, s10 = default, s11 = default;
        V s20 = default, s21 = default, s30 = default, s31 = default;
        float* p0 = panels;
        float* p1 = p0 + nextPanel;
        float* p2 = p1 + nextPanel;
        float* p3 = p2 + nextPanel;
        for (nint step = 0; step < steps; step++, left += 2)
        {
            V first = V.Create(left[0]), second = V.Create(left[1]);
            AddPair(ref s00, first, second, V.Load(p0));
            AddPair(ref s01, first, second, V.Load(p0 + V.Count));
            AddPair(ref s10, first, second, V.Load(p1));
            AddPair(ref s11, first, second, V.Load(p1 + V.Count));
            AddPair(ref s20, first, second, V.Load(p2));
            AddPair(ref s21, first, second, V.Load(p2 + V.Count));
            AddPair(ref s30, first, second, V.Load(p3));
            AddPair(ref s31, first, second, V.Load(p3 + V.Count));
            p0 += Columns;
            p1 += Columns;
            p2 += Columns;
            p3 += Columns;
        }

        Tile<V>.Put(sums, s00, s01, accumulate);
        Tile<V>.Put(sums + Columns, s10, s11, accumulate);
        Tile<V>.Put(sums + (2 * Columns), s20, s21, accumulate);
        Tile<V>.Put(sums + (3 * Columns), s30, s31, accumulate);
    }

    /// <inheritdoc/>
    public static void CopyRow(float* row, float* source, nint depth) =>
        new ReadOnlySpan<float>(source, checked((int)depth)).CopyTo(new Span<float>(row, checked((int)depth)));

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Multiply6(
        float* sums, nint sumsRow, float* left, nint leftRow, nint leftStep, float* panel, nint steps, float* ahead, bool accumulate)
    {
        Tile<V>.Prefetch(sums, sumsRow, 6);
        V s00 = default, s01 = default, s10 = default, s11 = default, s20 = default, s21 = default;
        V s30 = default, s31 = default, s40 = default, s41 = default, s50 = default, s51 = default;
        left += leftStep;
        float* left3 = left + (3 * leftRow);
        nint leftRow2 = 2 * leftRow;
        nint back = leftStep * sizeof(float);
        nint next = 3 * back;
        for (; steps > 0; steps--, panel += Columns, ahead += Columns)
        {
            Fetch(ahead);
            V p0 = P.Second(V.Load(panel)), p1 = P.Second(V.Load(panel + V.Count));
            AddProducts(ref s00, ref s01, V.Create(left[0]), p0, p1);
            AddProducts(ref s10, ref s11, V.Create(left[leftRow]), p0, p1);
            AddProducts(ref s20, ref s21, V.Create(left[leftRow2]), p0, p1);
            AddProducts(ref s30, ref s31, V.Create(left3[0]), p0, p1);
            AddProducts(ref s40, ref s41, V.Create(left3[leftRow]), p0, p1);
            AddProducts(ref s50, ref s51, V.Create(left3[leftRow2]), p0, p1);
            left = (float*)((byte*)left - back);
            left3 = (float*)((byte*)left3 - back);
            p0 = P.First(V.Load(panel));
            p1 = P.First(V.Load(panel + V.Count));
            AddProducts(ref s00, ref s01, V.Create(left[0]), p0, p1);
            AddProducts(ref s10, ref s11, V.Create(left[leftRow]), p0, p1);
            AddProducts(ref s20, ref s21, V.Create(left[leftRow2]), p0, p1);
            AddProducts(ref s30, ref s31, V.Create(left3[0]), p0, p1);
            AddProducts(ref s40, ref s41, V.Create(left3[leftRow]), p0, p1);
            AddProducts(ref s50, ref s51, V.Create(left3[leftRow2]), p0, p1);
            left = (float*)((byte*)left + next);
            left3 = (float*)((byte*)left3 + next);
        }

        Tile<V>.Put(sums, s00, s01, accumulate);
        Tile<V>.Put(sums += sumsRow, s10, s11, accumulate);
        Tile<V>.Put(sums += sumsRow, s20, s21, accumulate);
        Tile<V>.Put(sums += sumsRow, s30, s31, accumulate);
        Tile<V>.Put(sums += sumsRow, s40, s41, accumulate);
        Tile<V>.Put(sums + sumsRow, s50, s51, accumulate);
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Multiply8(
        float* sums, nint sumsRow, float* left, nint leftRow, nint leftStep, float* panel, nint steps, float* ahead, bool accumulate)
    {
        Tile<V>.Prefetch(sums, sumsRow, 8);
        V s00 = default, s01 = default, s10 = default, s11 = default, s20 = default, s21 = default, s30 = default, s31 = default;
        V s40 = default, s41 = default, s50 = default, s51 = default, s60 = default, s61 = default, s70 = default, s71 = default;
        left += leftStep;
        float* left3 = left + (3 * leftRow);
        float* left6 = left3 + (3 * leftRow);
        nint leftRow2 = 2 * leftRow;
        nint back = leftStep * sizeof(float);
        nint next = 3 * back;
        for (; steps > 0; steps--, panel += Columns, ahead += Columns)
        {
            Fetch(ahead);
            V p0 = P.Second(V.Load(panel)), p1 = P.Second(V.Load(panel + V.Count));
            AddProducts(ref s00, ref s01, V.Create(left[0]), p0, p1);
            AddProducts(ref s10, ref s11, V.Create(left[leftRow]), p0, p1);
            AddProducts(ref s20, ref s21, V.Create(left[leftRow2]), p0, p1);
            AddProducts(ref s30, ref s31, V.Create(left3[0]), p0, p1);
            AddProducts(ref s40, ref s41, V.Create(left3[leftRow]), p0, p1);
            AddProducts(ref s50, ref s51, V.Create(left3[leftRow2]), p0, p1);
            AddProducts(ref s60, ref s61, V.Create(left6[0]), p0, p1);
            AddProducts(ref s70, ref s71, V.Create(left6[leftRow]), p0, p1);
            left = (float*)((byte*)left - back);
            left3 = (float*)((byte*)left3 - back);
            left6 = (float*)((byte*)left6 - back);
            p0 = P.First(V.Load(panel));
            p1 = P.First(V.Load(panel + V.Count));
            AddProducts(ref s00, ref s01, V.Create(left[0]), p0, p1);
            AddProducts(ref s10, ref s11, V.Create(left[leftRow]), p0, p1);
            AddProducts(ref s20, ref s21, V.Create(left[leftRow2]), p0, p1);
            AddProducts(ref s30, ref s31, V.Create(left3[0]), p0, p1);
            AddProducts(ref s40, ref s41, V.Create(left3[leftRow]), p0, p1);
            AddProducts(ref s50, ref s51, V.Create(left3[leftRow2]), p0, p1);
            AddProducts(ref s60, ref s61, V.Create(left6[0]), p0, p1);
            AddProducts(ref s70, ref s71, V.Create(left6[leftRow]), p0, p1);
            left = (float*)((byte*)left + next);
            left3 = (float*)((byte*)left3 + next);
            left6 = (float*)((byte*)left6 + next);
        }

        Tile<V>.Put(sums, s00, s01, accumulate);
        Tile<V>.Put(sums += sumsRow, s10, s11, accumulate);
        Tile<V>.Put(sums += sumsRow, s20, s21, accumulate);
        Tile<V>.Put(sums += sumsRow, s30, s31, accumulate);
        Tile<V>.Put(sums += sumsRow, s40, s41, accumulate);
        Tile<V>.Put(sums += sumsRow, s50, s51, accumulate);
        Tile<V>.Put(sums += sumsRow, s60, s61, accumulate);
        Tile<V>.Put(sums + sumsRow, s70, s71, accumulate);
    }

    // Asks for as many lines as a step reads.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Fetch(float* ahead)
    {
        if (Sse.IsSupported)
        {
            Sse.Prefetch1(ahead);
            if (Columns > ITile.Line)
            {
                Sse.Prefetch1(ahead + ITile.Line);
            }
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void AddProducts(ref V sum0, ref V sum1, V x, V p0, V p1)
    {
        V.AddProduct(ref sum0, x, p0);
        V.AddProduct(ref sum1, x, p1);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void AddPair(ref V sum, V first, V second, V pairs)
    {
        V.AddProduct(ref sum, second, P.Second(pairs));
        V.AddProduct(ref sum, first, P.First(pairs));
    }
}
