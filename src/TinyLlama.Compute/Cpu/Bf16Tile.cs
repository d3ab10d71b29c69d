using System.Runtime.CompilerServices;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// A <see cref="PairTile{V, P}"/> of operands that are rounded to bfloat16: panels are rounded when they are packed, the
/// left operand is when it is copied, as floats.
/// </summary>
/// <remarks>
/// A product of two bfloat16 is exact in fp32, and the order of a step is that of the instruction vdpbf16ps, so that but for
/// subnormal numbers the bits are the same.
/// Widening the left operand in registers too costs a third of the rate: it takes two instructions where a float takes
/// none, as its load broadcasts it.
/// </remarks>
/// <typeparam name="V">The register.</typeparam>
internal readonly unsafe struct Bf16Tile<V> : IPackingTile
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
    public static int FetchedOfStep => PairTile<V, BFloat16Pairs<V>>.FetchedOfStep;

    /// <inheritdoc/>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Multiply(
        float* sums, nint sumsRow, float* left, nint leftRow, nint leftStep, float* panel, nint steps, float* ahead, bool accumulate) =>
        PairTile<V, BFloat16Pairs<V>>.Multiply(sums, sumsRow, left, leftRow, leftStep, panel, steps, ahead, accumulate);

    /// <inheritdoc/>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void MultiplyRow(float* sums, float* left, float* panels, nint nextPanel, nint steps, bool accumulate) =>
        PairTile<V, BFloat16Pairs<V>>.MultiplyRow(sums, left, panels, nextPanel, steps, accumulate);

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
}
