using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Runtime.Intrinsics.X86;
using V = TinyLlama.Compute.Cpu.Lanes512;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// The tile of <see cref="PairTile{V, P}"/> of pairs of bfloat16 over 512-bit registers, whose panels may be compact, four at a time: 13 bits
/// a number, without loss. One row alone waits for memory, and so takes little more than 13/16 of the time.
/// </summary>
/// <remarks>
/// A number from 2⁻²⁹ to 4 (exclusive) in amount, as nearly all weights are, or zero has five bits of exponent once 2⁹⁷ has divided it; with
/// its sign and mantissa where bfloat16 has them, three bits between these are free. Of 16 steps (a unit) 13 lie in their dwords so, and the
/// three others in the free bits of those. The left operand is multiplied by 2⁹⁷ instead: products are exactly the same, unless an input
/// becomes infinite. Four panels of one block of k with any other number stay as they are.
/// Steps of the four lie side by side, so that one row reads one line after the other, which processors see coming. What is compact begins
/// where the first panel began, and leaves the rest of their room.
/// </remarks>
internal readonly unsafe struct CompactTile : ITile
{
    private const int Panels = 4;
    private const int UnitSteps = 16;
    private const int DirectSteps = 13;

    // What numbers are divided by, as a power of two.
    private const int Power = 97;

    // The bits of a number in the high half of a dword; in both halves those that are free, and the signs.
    private const uint Number = 0x8FFF_0000;
    private const uint Free = 0x7000_7000;
    private const int FreeBits = 3;
    private const uint Signs = 0x8000_8000;

    // Dwords from one step of a panel to the next.
    private const int CompactStep = Panels * 2 * 16;

    // The bytes of a line of a cache.
    private const int Line = ITile.Line * sizeof(float);

    // Steps whose free bits hold a pair without its signs.
    private const int Parts = 4;

    // Dwords from what one row multiplies to the line that it asks for, one a step: what processors do not see coming, as a page ends before.
    private const int Ahead = 2048;

    /// <inheritdoc/>
    public static DType Type => DType.BF16;

    /// <inheritdoc/>
    public static int LeftDwords => 2;

    /// <inheritdoc/>
    public static int Rows => PairTile<V, BFloat16Pairs<V>>.Rows;

    /// <inheritdoc/>
    public static int Columns => PairTile<V, BFloat16Pairs<V>>.Columns;

    /// <inheritdoc/>
    public static int FetchedOfStep => PairTile<V, BFloat16Pairs<V>>.FetchedOfStep;

    /// <inheritdoc/>
    public static int FewRows => PairTile<V, BFloat16Pairs<V>>.FewRows;

    /// <inheritdoc/>
    public static int StepUnit => UnitSteps;

    /// <inheritdoc/>
    public static bool HasCompactPanels => true;

    /// <inheritdoc/>
    public static nint CompactSize(nint steps) => ((steps / UnitSteps * DirectSteps) + (steps % UnitSteps)) * Columns;

    /// <inheritdoc/>
    public static void Multiply(
        float* sums, nint sumsRow, float* left, nint leftRow, nint leftStep, float* panel, nint steps, float* ahead, bool accumulate) =>
        PairTile<V, BFloat16Pairs<V>>.Multiply(sums, sumsRow, left, leftRow, leftStep, panel, steps, ahead, accumulate);

    /// <inheritdoc/>
    public static void MultiplyFew(float* sums, nint sumsRow, float* left, nint leftRow, nint leftStep, float* panel, nint steps, float* ahead) =>
        PairTile<V, BFloat16Pairs<V>>.MultiplyFew(sums, sumsRow, left, leftRow, leftStep, panel, steps, ahead);

    /// <inheritdoc/>
    public static void MultiplyRow(float* sums, float* left, float* panels, nint nextPanel, nint steps, bool accumulate) =>
        PairTile<V, BFloat16Pairs<V>>.MultiplyRow(sums, left, panels, nextPanel, steps, accumulate);

    /// <inheritdoc/>
    public static void CopyRow(float* row, float* source, nint depth) =>
        PairTile<V, BFloat16Pairs<V>>.CopyRow(row, source, depth);

    /// <inheritdoc/>
    public static bool TryScaleRow(float* scaled, float* row, nint depth)
    {
        float scale = MathF.ScaleB(1, Power);
        V largest = default;
        nint i = 0;
        for (; i <= depth - V.Count; i += V.Count)
        {
            V values = V.Load(row + i) * V.Create(scale);
            values.Store(scaled + i);
            largest = V.Max(V.And(values, V.CreateDword(int.MaxValue)), largest);
        }

        bool isInfinite = float.IsInfinity(largest.Max());
        for (; i < depth; i++)
        {
            scaled[i] = row[i] * scale;
            isInfinite |= float.IsInfinity(scaled[i]);
        }

        return !isInfinite;
    }

    /// <inheritdoc/>
    public static bool TryCompact(float* panels, nint steps, float* scratch)
    {
        float* pairs = stackalloc float[UnitSteps * Columns];
        float* destination = scratch;
        for (nint step = 0; step < steps; step += UnitSteps)
        {
            int count = (int)Math.Min(UnitSteps, steps - step);
            for (int panel = 0; panel < Panels; panel++)
            {
                float* source = panels + (((panel * steps) + step) * Columns);
                CompactUnit(destination + (panel * Columns), source, count);
                CompactUnit(destination + (panel * Columns) + V.Count, source + V.Count, count);
                ExpandUnit(pairs, destination + (panel * Columns), count);
                if (!new ReadOnlySpan<int>(pairs, count * Columns).SequenceEqual(new ReadOnlySpan<int>(source, count * Columns)))
                {
                    return false;
                }
            }

            destination += Direct(count) * CompactStep;
        }

        NativeMemory.Copy(scratch, panels, (nuint)((destination - scratch) * sizeof(float)));
        return true;
    }

    /// <inheritdoc/>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static void Expand(float* panel, float* compact, nint steps)
    {
        for (; steps > 0; steps -= UnitSteps, panel += UnitSteps * Columns)
        {
            ExpandUnit(panel, compact, (int)Math.Min(UnitSteps, steps));
            compact += Direct(steps) * CompactStep;
        }
    }

    /// <inheritdoc/>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static void MultiplyCompactRow(float* sums, float* left, float* panels, nint steps, float* after, bool accumulate)
    {
        V s00 = default, s01 = default, s10 = default, s11 = default;
        V s20 = default, s21 = default, s30 = default, s31 = default;
        float* last = panels + (Panels * CompactSize(steps)) - Ahead;
        for (; steps > 0; steps -= UnitSteps)
        {
            float* end = panels + (Direct(steps) * CompactStep);
            float* ahead = panels < last ? panels + Ahead : after + (panels - last);
            do
            {
                Fetch(ahead);
                ahead += CompactStep;
                V second = V.Create(left[1]), first = V.Create(left[0]);
                AddPair(ref s00, second, first, V.Load(panels));
                AddPair(ref s01, second, first, V.Load(panels + V.Count));
                AddPair(ref s10, second, first, V.Load(panels + (2 * V.Count)));
                AddPair(ref s11, second, first, V.Load(panels + (3 * V.Count)));
                AddPair(ref s20, second, first, V.Load(panels + (4 * V.Count)));
                AddPair(ref s21, second, first, V.Load(panels + (5 * V.Count)));
                AddPair(ref s30, second, first, V.Load(panels + (6 * V.Count)));
                AddPair(ref s31, second, first, V.Load(panels + (7 * V.Count)));
                panels += CompactStep;
                left += 2;
            }
            while (panels != end);

            for (int number = 0; number < UnitSteps - DirectSteps && steps >= UnitSteps; number++, left += 2)
            {
                V second = V.Create(left[1]), first = V.Create(left[0]);
                AddPair(ref s00, second, first, Between(panels, number));
                AddPair(ref s01, second, first, Between(panels + V.Count, number));
                AddPair(ref s10, second, first, Between(panels + (2 * V.Count), number));
                AddPair(ref s11, second, first, Between(panels + (3 * V.Count), number));
                AddPair(ref s20, second, first, Between(panels + (4 * V.Count), number));
                AddPair(ref s21, second, first, Between(panels + (5 * V.Count), number));
                AddPair(ref s30, second, first, Between(panels + (6 * V.Count), number));
                AddPair(ref s31, second, first, Between(panels + (7 * V.Count), number));
            }
        }

        Tile<V>.Put(sums, s00, s01, accumulate);
        Tile<V>.Put(sums + Columns, s10, s11, accumulate);
        Tile<V>.Put(sums + (2 * Columns), s20, s21, accumulate);
        Tile<V>.Put(sums + (3 * Columns), s30, s31, accumulate);
    }

    /// <inheritdoc/>
    public static void MultiplyCompact(
        float* sums, nint sumsRow, int rows, float* left, nint leftRow, float* compact, nint steps, float* ahead, bool accumulate)
    {
        Tile<V>.Prefetch(sums, sumsRow, rows);
        for (int half = 0; half < 2; half++)
        {
            if (rows <= FewRows)
            {
                Multiply4(sums, sumsRow, left, leftRow, compact, steps, ahead, accumulate);
            }
            else
            {
                Multiply8(sums, sumsRow, left, leftRow, compact, steps, ahead, accumulate);
            }

            sums += V.Count;
            compact += V.Count;
            ahead += CompactSize(steps) / 2;
        }
    }

    // Of a tile the sums of one register: a panel has two. The pairs between of a unit are put together first, and then lie side by side.
    // Each factor is read by its own multiplication.
    [SkipLocalsInit]
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Multiply8(float* sums, nint sumsRow, float* left, nint leftRow, float* compact, nint steps, float* ahead, bool accumulate)
    {
        float* between = stackalloc float[((UnitSteps - DirectSteps) * V.Count) + ITile.Line];
        between = (float*)(((nint)between | (Line - 1)) + 1);
        V s0 = default, s1 = default, s2 = default, s3 = default, s4 = default, s5 = default, s6 = default, s7 = default;
        float* left3 = left + (3 * leftRow);
        float* left6 = left3 + (3 * leftRow);
        nint leftRow2 = 2 * leftRow;
        for (; steps > 0; steps -= UnitSteps)
        {
            float* pairs = compact;
            compact += Direct(steps) * CompactStep;
            float* end = compact;
            nint next = CompactStep;
            if (steps >= UnitSteps)
            {
                for (int number = 0; number < UnitSteps - DirectSteps; number++)
                {
                    Between(compact, number).Store(between + (number * V.Count));
                }
            }

            while (true)
            {
                do
                {
                    Fetch(ahead);
                    V second = Second(V.Load(pairs));
                    V.AddProduct(ref s0, left + 1, second);
                    V.AddProduct(ref s1, left + leftRow + 1, second);
                    V.AddProduct(ref s2, left + leftRow2 + 1, second);
                    V.AddProduct(ref s3, left3 + 1, second);
                    V.AddProduct(ref s4, left3 + leftRow + 1, second);
                    V.AddProduct(ref s5, left3 + leftRow2 + 1, second);
                    V.AddProduct(ref s6, left6 + 1, second);
                    V.AddProduct(ref s7, left6 + leftRow + 1, second);
                    V first = First(V.Load(pairs));
                    V.AddProduct(ref s0, left, first);
                    V.AddProduct(ref s1, left + leftRow, first);
                    V.AddProduct(ref s2, left + leftRow2, first);
                    V.AddProduct(ref s3, left3, first);
                    V.AddProduct(ref s4, left3 + leftRow, first);
                    V.AddProduct(ref s5, left3 + leftRow2, first);
                    V.AddProduct(ref s6, left6, first);
                    V.AddProduct(ref s7, left6 + leftRow, first);
                    left += 2;
                    left3 += 2;
                    left6 += 2;
                    pairs += next;
                    ahead += ITile.Line;
                }
                while (pairs != end);

                if (next != CompactStep || steps < UnitSteps)
                {
                    break;
                }

                pairs = between;
                end = between + ((UnitSteps - DirectSteps) * V.Count);
                next = V.Count;
                ahead -= (UnitSteps - DirectSteps) * ITile.Line;
            }
        }

        Put(sums, s0, accumulate);
        Put(sums += sumsRow, s1, accumulate);
        Put(sums += sumsRow, s2, accumulate);
        Put(sums += sumsRow, s3, accumulate);
        Put(sums += sumsRow, s4, accumulate);
        Put(sums += sumsRow, s5, accumulate);
        Put(sums += sumsRow, s6, accumulate);
        Put(sums + sumsRow, s7, accumulate);
    }

    // The same of four rows.
    [SkipLocalsInit]
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Multiply4(float* sums, nint sumsRow, float* left, nint leftRow, float* compact, nint steps, float* ahead, bool accumulate)
    {
        float* between = stackalloc float[((UnitSteps - DirectSteps) * V.Count) + ITile.Line];
        between = (float*)(((nint)between | (Line - 1)) + 1);
        V s0 = default, s1 = default, s2 = default, s3 = default;
        float* left3 = left + (3 * leftRow);
        nint leftRow2 = 2 * leftRow;
        for (; steps > 0; steps -= UnitSteps)
        {
            float* pairs = compact;
            compact += Direct(steps) * CompactStep;
            float* end = compact;
            nint next = CompactStep;
            if (steps >= UnitSteps)
            {
                for (int number = 0; number < UnitSteps - DirectSteps; number++)
                {
                    Between(compact, number).Store(between + (number * V.Count));
                }
            }

            while (true)
            {
                do
                {
                    Fetch(ahead);
                    V second = Second(V.Load(pairs));
                    V.AddProduct(ref s0, left + 1, second);
                    V.AddProduct(ref s1, left + leftRow + 1, second);
                    V.AddProduct(ref s2, left + leftRow2 + 1, second);
                    V.AddProduct(ref s3, left3 + 1, second);
                    V first = First(V.Load(pairs));
                    V.AddProduct(ref s0, left, first);
                    V.AddProduct(ref s1, left + leftRow, first);
                    V.AddProduct(ref s2, left + leftRow2, first);
                    V.AddProduct(ref s3, left3, first);
                    left += 2;
                    left3 += 2;
                    pairs += next;
                    ahead += ITile.Line;
                }
                while (pairs != end);

                if (next != CompactStep || steps < UnitSteps)
                {
                    break;
                }

                pairs = between;
                end = between + ((UnitSteps - DirectSteps) * V.Count);
                next = V.Count;
                ahead -= (UnitSteps - DirectSteps) * ITile.Line;
            }
        }

        Put(sums, s0, accumulate);
        Put(sums += sumsRow, s1, accumulate);
        Put(sums += sumsRow, s2, accumulate);
        Put(sums + sumsRow, s3, accumulate);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Put(float* sums, V sum, bool accumulate) => (accumulate ? V.Load(sums) + sum : sum).Store(sums);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Fetch(float* ahead)
    {
        if (Sse.IsSupported)
        {
            Sse.Prefetch1(ahead);
        }
    }

    // The steps of a unit that have dwords of their own: all, where it is not whole.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static nint Direct(nint steps) => steps < UnitSteps ? steps : DirectSteps;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void AddPair(ref V sum, V second, V first, V pairs)
    {
        V.AddProduct(ref sum, second, Second(pairs));
        V.AddProduct(ref sum, first, First(pairs));
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static V Second(V pairs) => V.And(pairs, V.CreateDword(Number));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static V First(V pairs) => V.And(V.ShiftLeft(pairs, 16), V.CreateDword(Number));

    // A pair in the free bits before the end of the unit: those of four steps have its exponents and mantissas, from the highest bits on,
    // and those of the last step the signs of all.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static V Between(float* end, int number)
    {
        float* dwords = end - ((DirectSteps - (Parts * number)) * CompactStep);
        V pair = V.And(V.ShiftRight(V.Load(dwords), FreeBits), V.CreateDword(Free >> FreeBits));
        pair = V.Or(pair, V.And(V.ShiftRight(V.Load(dwords + CompactStep), 2 * FreeBits), V.CreateDword(Free >> (2 * FreeBits))));
        pair = V.Or(pair, V.And(V.ShiftRight(V.Load(dwords + (2 * CompactStep)), 3 * FreeBits), V.CreateDword(Free >> (3 * FreeBits))));
        pair = V.Or(pair, V.And(V.ShiftRight(V.Load(dwords + (3 * CompactStep)), 4 * FreeBits), V.CreateDword(Free >> (4 * FreeBits))));
        return V.Or(pair, V.And(V.ShiftLeft(V.Load(end - CompactStep), 1 + number), V.CreateDword(Signs)));
    }

    // One register of each step of a panel.
    private static void CompactUnit(float* unit, float* pairs, int steps)
    {
        int direct = (int)Direct(steps);
        for (int step = 0; step < direct; step++)
        {
            Divided(pairs + (step * Columns)).Store(unit + (step * CompactStep));
        }

        for (int number = 0; number < steps - direct; number++)
        {
            V pair = Divided(pairs + ((direct + number) * Columns));
            for (int part = 0; part < Parts; part++)
            {
                Add(unit + (((Parts * number) + part) * CompactStep), V.And(V.ShiftLeft(pair, (1 + part) * FreeBits), V.CreateDword(Free)));
            }

            Add(unit + ((direct - 1) * CompactStep), V.ShiftRight(V.And(pair, V.CreateDword(Signs)), 1 + number));
        }

        static void Add(float* dwords, V bits) => V.Or(V.Load(dwords), bits).Store(dwords);

        static V Divided(float* pairs) => Both(V.Second(V.Load(pairs)), V.First(V.Load(pairs)), MathF.ScaleB(1, -Power));
    }

    // A pair of numbers times a factor, whose bits beside theirs are lost.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static V Both(V second, V first, float factor)
    {
        V bits = V.CreateDword(0xFFFF_0000);
        return V.Or(V.And(second * V.Create(factor), bits), V.ShiftRight(V.And(first * V.Create(factor), bits), 16));
    }

    // A panel's part of a unit.
    private static void ExpandUnit(float* pairs, float* unit, int steps)
    {
        int direct = (int)Direct(steps);
        for (int step = 0; step < direct; step++, pairs += Columns, unit += CompactStep)
        {
            Whole(V.Load(unit)).Store(pairs);
            Whole(V.Load(unit + V.Count)).Store(pairs + V.Count);
        }

        for (int number = 0; number < steps - direct; number++, pairs += Columns)
        {
            Whole(Between(unit, number)).Store(pairs);
            Whole(Between(unit + V.Count, number)).Store(pairs + V.Count);
        }

        static V Whole(V pairs) => Both(Second(pairs), First(pairs), MathF.ScaleB(1, Power));
    }
}
