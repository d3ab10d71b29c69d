using System.Runtime.CompilerServices;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// A tile of operands that are rounded to bfloat16: a step is a pair of k. They are multiplied by instructions of fp32, at
/// its rate at best: panels, which take half the room, are widened in registers, the left operand when it is packed.
/// </summary>
/// <remarks>
/// A product of two bfloat16 is exact in fp32. Each step adds the product of the second k, then that of the first, each
/// rounded once: the order of the instruction vdpbf16ps, so that but for subnormal numbers the bits are the same.
/// Widening the left operand in registers too costs a third of the rate: it takes two instructions where a float takes
/// none, as its load broadcasts it.
/// </remarks>
/// <typeparam name="V">The register.</typeparam>
internal readonly unsafe struct Bf16Tile<V> : ITile
    where V : struct, ILanes<V>
{
    /// <inheritdoc/>
    public static DType Type => DType.BF16;

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
    public static void Multiply(
        float* sums, nint sumsRow, float* left, nint leftRow, nint leftStep, float* panel, nint steps, bool accumulate)
    {
        if (V.Count == 16)
        {
            Multiply8(sums, sumsRow, left, leftRow, leftStep, panel, steps, accumulate);
        }
        else
        {
            Multiply6(sums, sumsRow, left, leftRow, leftStep, panel, steps, accumulate);
        }
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
    [SkipLocalsInit]
    public static void Pack(float* panel, float* source, nint column, nint step, int columns, nint depth)
    {
        if (column == 1)
        {
            PackSideBySide(panel, source, step, columns, depth);
            return;
        }

        // Each column's k lie side by side: pair some, then transpose the pairs as if they were floats.
        const int StepsAtOnce = 32;
        const int MaxColumns = 32;
        float* pairs = stackalloc float[MaxColumns * StepsAtOnce];
        for (nint k = 0; k < depth; k += 2 * StepsAtOnce)
        {
            nint count = Math.Min(2 * StepsAtOnce, depth - k);
            for (int j = 0; j < columns; j++)
            {
                CopyPairs(pairs + (j * StepsAtOnce), source + (j * column) + k, count);
            }

            Tile<V>.Pack(panel, pairs, StepsAtOnce, 1, columns, (count + 1) / 2);
            panel += StepsAtOnce * Columns;
        }
    }

    /// <inheritdoc/>
    public static void PackRows(float* tile, float* source, nint step, int rows, nint depth)
    {
        for (nint k = 0; k < depth; k++, source += step, tile += Rows)
        {
            if (rows == Rows)
            {
                // Four rows and the last four: of six rows, two are written twice.
                int last = Rows - 4;
                Lanes128.ToBFloat16(Lanes128.Load(source)).Store(tile);
                Lanes128.ToBFloat16(Lanes128.Load(source + last)).Store(tile + last);
                continue;
            }

            for (int r = 0; r < rows; r++)
            {
                Lanes1.ToBFloat16(Lanes1.Load(source + r)).Store(tile + r);
            }
        }

        if (nint.IsOddInteger(depth))
        {
            new Span<float>(tile, rows).Clear();
        }
    }

    /// <inheritdoc/>
    public static void CopyRow(float* row, float* source, nint depth)
    {
        nint k = 0;
        for (; k + V.Count <= depth; k += V.Count)
        {
            V.ToBFloat16(V.Load(source + k)).Store(row + k);
        }

        for (; k < depth; k++)
        {
            Lanes1.ToBFloat16(Lanes1.Load(source + k)).Store(row + k);
        }

        if (nint.IsOddInteger(depth))
        {
            row[depth] = 0;
        }
    }

    /// <summary>Fills a row of pairs from <paramref name="depth"/> elements.</summary>
    internal static void CopyPairs(float* pairs, float* source, nint depth)
    {
        nint k = 0;
        for (; k + (2 * V.Count) <= depth; k += 2 * V.Count, pairs += V.Count)
        {
            V.NeighbourPairs(V.Load(source + k), V.Load(source + k + V.Count)).Store(pairs);
        }

        for (; k < depth; k += 2, pairs++)
        {
            Pair(source[k], k + 1 < depth ? source[k + 1] : 0).Store(pairs);
        }
    }

    /// <summary>One pair, to be stored in a dword.</summary>
    internal static Lanes1 Pair(float first, float second) => Lanes1.Pairs(new Lanes1(first), new Lanes1(second));

    private static void PackSideBySide(float* panel, float* source, nint step, int columns, nint depth)
    {
        nint k = 0;
        if (columns == Columns)
        {
            for (; k + 2 <= depth; k += 2, source += 2 * step, panel += Columns)
            {
                V.Pairs(V.Load(source), V.Load(source + step)).Store(panel);
                V.Pairs(V.Load(source + V.Count), V.Load(source + step + V.Count)).Store(panel + V.Count);
            }
        }

        for (; k < depth; k += 2, source += 2 * step, panel += Columns)
        {
            for (int j = 0; j < Columns; j++)
            {
                bool exists = j < columns;
                Pair(exists ? source[j] : 0, exists && k + 1 < depth ? source[step + j] : 0).Store(panel + j);
            }
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Multiply6(
        float* sums, nint sumsRow, float* left, nint leftRow, nint leftStep, float* panel, nint steps, bool accumulate)
    {
        Tile<V>.Prefetch(sums, sumsRow, 6);
        V s00 = default, s01 = default, s10 = default, s11 = default, s20 = default, s21 = default;
        V s30 = default, s31 = default, s40 = default, s41 = default, s50 = default, s51 = default;
        left += leftStep;
        float* left3 = left + (3 * leftRow);
        nint leftRow2 = 2 * leftRow;
        nint back = leftStep * sizeof(float);
        nint next = 3 * back;
        float* end = panel + (steps * Columns);
        while (panel != end)
        {
            V p0 = V.Second(V.Load(panel)), p1 = V.Second(V.Load(panel + V.Count));
            AddProducts(ref s00, ref s01, V.Create(left[0]), p0, p1);
            AddProducts(ref s10, ref s11, V.Create(left[leftRow]), p0, p1);
            AddProducts(ref s20, ref s21, V.Create(left[leftRow2]), p0, p1);
            AddProducts(ref s30, ref s31, V.Create(left3[0]), p0, p1);
            AddProducts(ref s40, ref s41, V.Create(left3[leftRow]), p0, p1);
            AddProducts(ref s50, ref s51, V.Create(left3[leftRow2]), p0, p1);
            left = (float*)((byte*)left - back);
            left3 = (float*)((byte*)left3 - back);
            p0 = V.First(V.Load(panel));
            p1 = V.First(V.Load(panel + V.Count));
            AddProducts(ref s00, ref s01, V.Create(left[0]), p0, p1);
            AddProducts(ref s10, ref s11, V.Create(left[leftRow]), p0, p1);
            AddProducts(ref s20, ref s21, V.Create(left[leftRow2]), p0, p1);
            AddProducts(ref s30, ref s31, V.Create(left3[0]), p0, p1);
            AddProducts(ref s40, ref s41, V.Create(left3[leftRow]), p0, p1);
            AddProducts(ref s50, ref s51, V.Create(left3[leftRow2]), p0, p1);
            left = (float*)((byte*)left + next);
            left3 = (float*)((byte*)left3 + next);
            panel += Columns;
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
        float* sums, nint sumsRow, float* left, nint leftRow, nint leftStep, float* panel, nint steps, bool accumulate)
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
        float* end = panel + (steps * Columns);
        while (panel != end)
        {
            V p0 = V.Second(V.Load(panel)), p1 = V.Second(V.Load(panel + V.Count));
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
            p0 = V.First(V.Load(panel));
            p1 = V.First(V.Load(panel + V.Count));
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
            panel += Columns;
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

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void AddProducts(ref V sum0, ref V sum1, V x, V p0, V p1)
    {
        V.AddProduct(ref sum0, x, p0);
        V.AddProduct(ref sum1, x, p1);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void AddPair(ref V sum, V first, V second, V pairs)
    {
        V.AddProduct(ref sum, second, V.Second(pairs));
        V.AddProduct(ref sum, first, V.First(pairs));
    }
}
