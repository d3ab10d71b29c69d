using System.Runtime.CompilerServices;

namespace TinyLlama.Compute.Cpu;

/// <summary>Products of small matrices that lie in the first-level cache: the inner loop of attention.</summary>
/// <remarks>
/// Each element of the result is one chain of multiply-adds with k ascending, so its bits depend neither on the size of
/// the matrices around it nor on where in a register it lies.
/// </remarks>
internal static unsafe class TileProduct
{
    /// <summary>Rows of a register tile. With two registers a row, 12 chains hide the latency of two multiply-adds a cycle.</summary>
    public const int Rows = 6;

    /// <summary>Columns of a register tile.</summary>
    public static int Columns<V>()
        where V : struct, ILanes<V> => 2 * V.Count;

    /// <summary>c = a · b, or += with <paramref name="accumulate"/>.</summary>
    /// <param name="c">(rows, columns), <paramref name="cRow"/> apart.</param>
    /// <param name="cRow">Elements from one row of c to the next.</param>
    /// <param name="a">(rows, depth): element (i, k) at i · aRow + k · aStep, so it may be a transposed view.</param>
    /// <param name="aRow">Elements from one row of a to the next.</param>
    /// <param name="aStep">Elements from one column of a to the next.</param>
    /// <param name="b">(depth, columns).</param>
    /// <param name="bRow">Elements from one row of b to the next.</param>
    /// <param name="rows">A multiple of <see cref="Rows"/>.</param>
    /// <param name="columns">A multiple of <see cref="Columns{V}"/>.</param>
    /// <param name="depth">Length of the sums.</param>
    /// <param name="accumulate">Whether to add to c.</param>
    public static void Multiply<V>(
        float* c, int cRow, float* a, int aRow, int aStep, float* b, int bRow, int rows, int columns, int depth, bool accumulate)
        where V : struct, ILanes<V>
    {
        for (int j = 0; j < columns; j += 2 * V.Count)
        {
            for (int i = 0; i < rows; i += Rows)
            {
                RegisterTile<V>(c + ((nint)i * cRow) + j, cRow, a + ((nint)i * aRow), aRow, aStep, b + j, bRow, depth, accumulate);
            }
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void RegisterTile<V>(
        float* c, nint cRow, float* a, nint aRow, nint aStep, float* b, nint bRow, int depth, bool accumulate)
        where V : struct, ILanes<V>
    {
        V c00 = default, c01 = default, c10 = default, c11 = default, c20 = default, c21 = default;
        V c30 = default, c31 = default, c40 = default, c41 = default, c50 = default, c51 = default;
        if (accumulate)
        {
            (c00, c01) = (V.Load(c), V.Load(c + V.Count));
            (c10, c11) = (V.Load(c + cRow), V.Load(c + cRow + V.Count));
            (c20, c21) = (V.Load(c + (2 * cRow)), V.Load(c + (2 * cRow) + V.Count));
            (c30, c31) = (V.Load(c + (3 * cRow)), V.Load(c + (3 * cRow) + V.Count));
            (c40, c41) = (V.Load(c + (4 * cRow)), V.Load(c + (4 * cRow) + V.Count));
            (c50, c51) = (V.Load(c + (5 * cRow)), V.Load(c + (5 * cRow) + V.Count));
        }

        nint row3 = 3 * aRow;
        nint row5 = 5 * aRow;
        for (int k = 0; k < depth; k++)
        {
            V b0 = V.Load(b), b1 = V.Load(b + V.Count);
            V x = V.Create(*a);
            c00 = V.Fma(x, b0, c00);
            c01 = V.Fma(x, b1, c01);
            x = V.Create(a[aRow]);
            c10 = V.Fma(x, b0, c10);
            c11 = V.Fma(x, b1, c11);
            x = V.Create(a[2 * aRow]);
            c20 = V.Fma(x, b0, c20);
            c21 = V.Fma(x, b1, c21);
            x = V.Create(a[row3]);
            c30 = V.Fma(x, b0, c30);
            c31 = V.Fma(x, b1, c31);
            x = V.Create(a[4 * aRow]);
            c40 = V.Fma(x, b0, c40);
            c41 = V.Fma(x, b1, c41);
            x = V.Create(a[row5]);
            c50 = V.Fma(x, b0, c50);
            c51 = V.Fma(x, b1, c51);
            a += aStep;
            b += bRow;
        }

        c00.Store(c);
        c01.Store(c + V.Count);
        c10.Store(c + cRow);
        c11.Store(c + cRow + V.Count);
        c20.Store(c + (2 * cRow));
        c21.Store(c + (2 * cRow) + V.Count);
        c30.Store(c + (3 * cRow));
        c31.Store(c + (3 * cRow) + V.Count);
        c40.Store(c + (4 * cRow));
        c41.Store(c + (4 * cRow) + V.Count);
        c50.Store(c + (5 * cRow));
        c51.Store(c + (5 * cRow) + V.Count);
    }
}
