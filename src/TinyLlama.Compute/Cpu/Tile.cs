using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;

namespace TinyLlama.Compute.Cpu;

/// <summary>A tile of fp32 operands: a step is one k.</summary>
/// <remarks>
/// The sizes: 6 × 2 sums, two registers of the panel and one of the left operand fill 15 of the 16 registers of AVX2
/// and SSE; AVX-512 has 32. Two loads and six broadcasts a step leave the load ports idle a third of the time.
/// </remarks>
/// <typeparam name="V">The register.</typeparam>
internal readonly unsafe struct Tile<V> : IPackingTile
    where V : struct, ILanes<V>
{
    /// <inheritdoc/>
    public static DType Type => DType.F32;

    /// <inheritdoc/>
    public static int LeftDwords => 1;

    /// <inheritdoc/>
    public static int Rows
    {
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        get => V.Count == 16 ? 8 : 6;
    }

    /// <inheritdoc/>
    public static int Columns
    {
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        get => 2 * V.Count;
    }

    /// <inheritdoc/>
    public static int FetchedOfStep
    {
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        get => ITile.Line / (V.Count == 16 ? 4 : 8);
    }

    /// <inheritdoc/>
    public static void Multiply(
        float* sums, nint sumsRow, float* left, nint leftRow, nint leftStep, float* panel, nint depth, float* ahead, bool accumulate)
    {
        if (V.Count == 16)
        {
            Multiply8(sums, sumsRow, left, leftRow, leftStep, panel, depth, ahead, accumulate);
        }
        else
        {
            Multiply6(sums, sumsRow, left, leftRow, leftStep, panel, depth, ahead, accumulate);
        }
    }

    /// <inheritdoc/>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static void MultiplyRow(float* sums, float* left, float* panels, nint nextPanel, nint depth, bool accumulate)
    {
        V s00 = default, s01 = default, s10 = default, s11 = default;
        V s20 = default, s21 = default, s30 = default, s31 = default;
        float* p0 = panels;
        float* p1 = p0 + nextPanel;
        float* p2 = p1 + nextPanel;
        float* p3 = p2 + nextPanel;
        for (nint k = 0; k < depth; k++)
        {
            V x = V.Create(left[k]);
            V.AddProduct(ref s00, x, V.Load(p0));
            V.AddProduct(ref s01, x, V.Load(p0 + V.Count));
            V.AddProduct(ref s10, x, V.Load(p1));
            V.AddProduct(ref s11, x, V.Load(p1 + V.Count));
            V.AddProduct(ref s20, x, V.Load(p2));
            V.AddProduct(ref s21, x, V.Load(p2 + V.Count));
            V.AddProduct(ref s30, x, V.Load(p3));
            V.AddProduct(ref s31, x, V.Load(p3 + V.Count));
            p0 += Columns;
            p1 += Columns;
            p2 += Columns;
            p3 += Columns;
        }

        Put(sums, s00, s01, accumulate);
        Put(sums + Columns, s10, s11, accumulate);
        Put(sums + (2 * Columns), s20, s21, accumulate);
        Put(sums + (3 * Columns), s30, s31, accumulate);
    }

    /// <inheritdoc/>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static void Pack(float* panel, float* source, nint column, nint step, int columns, nint depth)
    {
        if (columns < Columns)
        {
            new Span<float>(panel, checked((int)depth * Columns)).Clear();
        }

        if (columns == Columns && column == 1)
        {
            for (nint k = 0; k < depth; k++, source += step, panel += Columns)
            {
                V.Load(source).Store(panel);
                V.Load(source + V.Count).Store(panel + V.Count);
            }

            return;
        }

        int j = 0;
        nint done = step == 1 ? depth & -4 : 0;
        for (; done > 0 && j + V.Count <= columns; j += V.Count)
        {
            float* destination = panel + j;
            for (nint k = 0; k < done; k += 4, destination += 4 * Columns)
            {
                V.LoadTurned((byte*)(source + (j * column) + k), column * sizeof(float), out V w0, out V w1, out V w2, out V w3);
                w0.Store(destination);
                w1.Store(destination + Columns);
                w2.Store(destination + (2 * Columns));
                w3.Store(destination + (3 * Columns));
            }

            Copy(panel + (done * Columns) + j, source + (j * column) + done, column, step, V.Count, depth - done);
        }

        Copy(panel + j, source + (j * column), column, step, columns - j, depth);
    }

    /// <inheritdoc/>
    public static void PackRows(float* tile, float* source, nint step, int rows, nint depth)
    {
        if (rows < Rows)
        {
            for (nint k = 0; k < depth; k++, source += step, tile += Rows)
            {
                for (int r = 0; r < rows; r++)
                {
                    tile[r] = source[r];
                }
            }

            return;
        }

        // Eight rows, of which the next step overwrites those that are not the tile's; the last step has no next.
        for (; depth > 1; depth--, source += step, tile += Rows)
        {
            Vector256.Load(source).Store(tile);
        }

        Vector128.Load(source).Store(tile);
        Vector128.Load(source + Rows - 4).Store(tile + Rows - 4);
    }

    /// <inheritdoc/>
    public static void CopyRow(float* row, float* source, nint depth) =>
        Unsafe.CopyBlockUnaligned(row, source, (uint)depth * sizeof(float));

    private static void Copy(float* panel, float* source, nint column, nint step, int columns, nint depth)
    {
        for (nint k = 0; k < depth; k++, source += step, panel += Columns)
        {
            for (int j = 0; j < columns; j++)
            {
                panel[j] = source[j * column];
            }
        }
    }

    // One local for each sum, else the JIT keeps them in memory. Straight to full optimization: the first calls of a
    // program would otherwise spend seconds in the unoptimized form.
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Multiply6(
        float* sums, nint sumsRow, float* left, nint leftRow, nint leftStep, float* panel, nint depth, float* ahead, bool accumulate)
    {
        Prefetch(sums, sumsRow, 6);
        V s00 = default, s01 = default, s10 = default, s11 = default, s20 = default, s21 = default;
        V s30 = default, s31 = default, s40 = default, s41 = default, s50 = default, s51 = default;
        float* left3 = left + (3 * leftRow);
        nint leftRow2 = 2 * leftRow;
        leftStep *= sizeof(float);
        float* end = panel + (depth * Columns);
        while (panel != end)
        {
            float* pause = Fetch(ref ahead, panel, end);
            do
            {
                V p0 = V.Load(panel), p1 = V.Load(panel + V.Count);
                V x = V.Create(left[0]);
                V.AddProduct(ref s00, x, p0);
                V.AddProduct(ref s01, x, p1);
                x = V.Create(left[leftRow]);
                V.AddProduct(ref s10, x, p0);
                V.AddProduct(ref s11, x, p1);
                x = V.Create(left[leftRow2]);
                V.AddProduct(ref s20, x, p0);
                V.AddProduct(ref s21, x, p1);
                x = V.Create(left3[0]);
                V.AddProduct(ref s30, x, p0);
                V.AddProduct(ref s31, x, p1);
                x = V.Create(left3[leftRow]);
                V.AddProduct(ref s40, x, p0);
                V.AddProduct(ref s41, x, p1);
                x = V.Create(left3[leftRow2]);
                V.AddProduct(ref s50, x, p0);
                V.AddProduct(ref s51, x, p1);
                left = (float*)((byte*)left + leftStep);
                left3 = (float*)((byte*)left3 + leftStep);
                panel += Columns;
            }
            while (panel != pause);
        }

        Put(sums, s00, s01, accumulate);
        Put(sums += sumsRow, s10, s11, accumulate);
        Put(sums += sumsRow, s20, s21, accumulate);
        Put(sums += sumsRow, s30, s31, accumulate);
        Put(sums += sumsRow, s40, s41, accumulate);
        Put(sums + sumsRow, s50, s51, accumulate);
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Multiply8(
        float* sums, nint sumsRow, float* left, nint leftRow, nint leftStep, float* panel, nint depth, float* ahead, bool accumulate)
    {
        Prefetch(sums, sumsRow, 8);
        V s00 = default, s01 = default, s10 = default, s11 = default, s20 = default, s21 = default, s30 = default, s31 = default;
        V s40 = default, s41 = default, s50 = default, s51 = default, s60 = default, s61 = default, s70 = default, s71 = default;
        float* left3 = left + (3 * leftRow);
        float* left6 = left3 + (3 * leftRow);
        nint leftRow2 = 2 * leftRow;
        leftStep *= sizeof(float);
        float* end = panel + (depth * Columns);
        while (panel != end)
        {
            float* pause = Fetch(ref ahead, panel, end);
            do
            {
                V p0 = V.Load(panel), p1 = V.Load(panel + V.Count);
                V x = V.Create(left[0]);
                V.AddProduct(ref s00, x, p0);
                V.AddProduct(ref s01, x, p1);
                x = V.Create(left[leftRow]);
                V.AddProduct(ref s10, x, p0);
                V.AddProduct(ref s11, x, p1);
                x = V.Create(left[leftRow2]);
                V.AddProduct(ref s20, x, p0);
                V.AddProduct(ref s21, x, p1);
                x = V.Create(left3[0]);
                V.AddProduct(ref s30, x, p0);
                V.AddProduct(ref s31, x, p1);
                x = V.Create(left3[leftRow]);
                V.AddProduct(ref s40, x, p0);
                V.AddProduct(ref s41, x, p1);
                x = V.Create(left3[leftRow2]);
                V.AddProduct(ref s50, x, p0);
                V.AddProduct(ref s51, x, p1);
                x = V.Create(left6[0]);
                V.AddProduct(ref s60, x, p0);
                V.AddProduct(ref s61, x, p1);
                x = V.Create(left6[leftRow]);
                V.AddProduct(ref s70, x, p0);
                V.AddProduct(ref s71, x, p1);
                left = (float*)((byte*)left + leftStep);
                left3 = (float*)((byte*)left3 + leftStep);
                left6 = (float*)((byte*)left6 + leftStep);
                panel += Columns;
            }
            while (panel != pause);
        }

        Put(sums, s00, s01, accumulate);
        Put(sums += sumsRow, s10, s11, accumulate);
        Put(sums += sumsRow, s20, s21, accumulate);
        Put(sums += sumsRow, s30, s31, accumulate);
        Put(sums += sumsRow, s40, s41, accumulate);
        Put(sums += sumsRow, s50, s51, accumulate);
        Put(sums += sumsRow, s60, s61, accumulate);
        Put(sums + sumsRow, s70, s71, accumulate);
    }

    /// <summary>sums = or += two registers side by side.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Put(float* sums, V left, V right, bool accumulate)
    {
        if (accumulate)
        {
            left = V.Load(sums) + left;
            right = V.Load(sums + V.Count) + right;
        }

        left.Store(sums);
        right.Store(sums + V.Count);
    }

    /// <summary>Asks for the next line of what is read later; returns where in the panel to ask for one more.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static float* Fetch(ref float* ahead, float* panel, float* end)
    {
        if (Sse.IsSupported)
        {
            Sse.Prefetch1(ahead);
        }

        ahead += ITile.Line;
        return panel + Math.Min(ITile.Line / FetchedOfStep * Columns, (nint)(end - panel));
    }

    /// <summary>Asks for the lines of a tile's sums: needed when its loop over k ends, they arrive meanwhile.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Prefetch(float* sums, nint sumsRow, int rows)
    {
        if (Sse.IsSupported)
        {
            for (int r = 0; r < rows; r++, sums += sumsRow)
            {
                Sse.Prefetch0(sums);
                Sse.Prefetch0(sums + Columns - 1);
            }
        }
    }
}
