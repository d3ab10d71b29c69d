using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// output (N, O) = input (N, I) · weightᵀ with a quantized weight: inputs are rounded to signed bytes, 32 at a time with
/// a scale of their own, products of 32 are summed in integers, sums of groups in fp32.
/// </summary>
/// <remarks>
/// A lane is an output (<see cref="WeightPanels"/>), so no register is summed across, and groups add up in the order of
/// the inputs whatever the number of rows: a row gets the same bits alone and among others.
/// </remarks>
internal static unsafe class QuantizedMatMul
{
    // Elements that share a scale in the rounded inputs; their bytes are followed by four floats.
    private const int Group = 32;
    private const int GroupBytes = Group + ScalesBytes;
    private const int ScalesBytes = 4 * sizeof(float);

    // The same in int16, as blocks of rows meet signed weights: even words of all dwords, odd words, the floats.
    private const int WordsBytes = Group * sizeof(short);
    private const int WordGroupBytes = WordsBytes + ScalesBytes;

    // Rows that a task multiplies by a panel while their bytes of a block are in the first cache.
    private const int MostRows = 32;

    // The same where bytes of weights are signed: rows whose sums of integers fit the registers.
    private const int SignedRows = 8;

    // Bytes of panels of a task: they stay in the second cache while blocks of rows pass by.
    private const long TaskBytes = 96 << 10;

    // How far ahead panels are fetched: some memory latency at the rate of a core.
    private const int PrefetchBytes = 2048;

    /// <summary>Inputs that rounded rows may have in all, so that they fit <see cref="Scratch.Shared"/>.</summary>
    private const int MaxElements = MatMul.SharedCount * sizeof(float) / WordGroupBytes * Group;

    /// <summary>output (N, O) = or += input (N, I) · weightᵀ.</summary>
    public static void Forward<V>(ThreadTeam team, Scratch scratch, Tensor output, Tensor input, Tensor panels, bool accumulate)
        where V : struct, ILanes<V>
    {
        Shape.Require(input.Columns <= MaxElements, "rows of inputs that fit the scratch");
        int rowsAtOnce = MaxElements / input.Columns;
        for (int row = 0; row < input.Rows; row += rowsAtOnce)
        {
            int count = Math.Min(rowsAtOnce, input.Rows - row);
            Multiply<V>(team, (byte*)scratch.Shared, output.RowRange(row, count), input.RowRange(row, count), panels, accumulate);
        }
    }

    private static void Multiply<V>(ThreadTeam team, byte* rounded, Tensor output, Tensor input, Tensor panels, bool accumulate)
        where V : struct, ILanes<V>
    {
        switch (panels.Type)
        {
            case DType.Q8_0:
                Multiply<V, Q8Format<V>>(team, rounded, output, input, panels, accumulate);
                break;
            case DType.Q4_0:
                Multiply<V, Q4Format<V>>(team, rounded, output, input, panels, accumulate);
                break;
            case DType.Q4_1:
                Multiply<V, Q41Format<V>>(team, rounded, output, input, panels, accumulate);
                break;
            case DType.Q5_0:
                Multiply<V, Q5Format<V>>(team, rounded, output, input, panels, accumulate);
                break;
            case DType.Q5_1:
                Multiply<V, Q51Format<V>>(team, rounded, output, input, panels, accumulate);
                break;
            case DType.Q4_K:
                Multiply<V, Q4KFormat<V>>(team, rounded, output, input, panels, accumulate);
                break;
            case DType.Q5_K:
                Multiply<V, Q5KFormat<V>>(team, rounded, output, input, panels, accumulate);
                break;
            case DType.Q6_K:
                Multiply<V, Q6KFormat<V>>(team, rounded, output, input, panels, accumulate);
                break;
            default:
                throw new ArgumentOutOfRangeException(nameof(panels), panels.Type, "not a quantized type");
        }
    }

    private static void Multiply<V, F>(ThreadTeam team, byte* rounded, Tensor output, Tensor input, Tensor panels, bool accumulate)
        where V : struct, ILanes<V>
        where F : struct, IBlockFormat<V>
    {
        Rows rows = Rows.Of(input);
        RoundWork<V, F> round = new() { Rounded = rounded, Input = input, Rows = rows };
        team.Run(ref round, rows.Tasks);
        long panelBytes = panels.Type.RowBytes(panels.Columns) * V.Count;
        int panelCount = (panels.Rows + V.Count - 1) / V.Count;
        int panelsPerTask = (int)Math.Clamp(TaskBytes / panelBytes, 1, Math.Max(1, panelCount / 8));
        MultiplyWork<V, F> work = new()
        {
            Output = output,
            Rounded = rounded,
            Panels = (byte*)panels.Address,
            PanelBytes = (nint)panelBytes,
            PanelCount = panelCount,
            PanelsPerTask = panelsPerTask,
            Groups = panels.Columns / Group,
            Accumulate = accumulate,
        };
        team.Run(ref work, (panelCount + panelsPerTask - 1) / panelsPerTask);
    }

    // Rows in blocks; in a block, group after group, what all rows of it have of the group.
    private static byte* RowBlock(byte* rounded, int row, int groups) => rounded + ((nint)row * groups * WordGroupBytes);

    // The rows of the block that begins at a row; for signed weights 8, then 4, then what is left.
    private static int BlockRows(int first, int rows, bool isSigned) => (rows - first) switch
    {
        int left when !isSigned => Math.Min(MostRows, left),
        >= SignedRows => SignedRows,
        >= SignedRows / 2 => SignedRows / 2,
        int left => left,
    };

    // The first row of the block that a row is in.
    private static int FirstOfBlock(int row, int rows, bool isSigned) =>
        !isSigned ? row - (row % MostRows)
        : row < rows - (rows % SignedRows) ? row - (row % SignedRows)
        : row - (row % (SignedRows / 2));

    private struct RoundWork<V, F> : IWork
        where V : struct, ILanes<V>
        where F : struct, IBlockFormat<V>
    {
        public byte* Rounded;
        public Tensor Input;
        public Rows Rows;

        public readonly void Run(int task, int thread)
        {
            int groups = Input.Columns / Group;
            for (int row = Rows.First(task); row < Rows.End(task); row++)
            {
                int first = FirstOfBlock(row, Input.Rows, F.IsSigned);
                int blockRows = BlockRows(first, Input.Rows, F.IsSigned);
                bool inWords = F.IsSigned && blockRows >= SignedRows / 2;
                int bytes = inWords ? WordGroupBytes : GroupBytes;
                byte* destination = RowBlock(Rounded, first, groups) + ((row - first) * bytes);
                float* source = Input.F32(row);
                for (int group = 0; group < groups; group++)
                {
                    if (inWords)
                    {
                        RoundGroup(destination, destination + WordsBytes, source);
                        Widen(destination);
                    }
                    else
                    {
                        RoundGroup(destination, destination + Group, source);
                    }

                    source += Group;
                    destination += blockRows * bytes;
                }
            }
        }

        // 32 bytes become the even and the odd words of their dwords.
        private static void Widen(byte* group)
        {
            for (int i = Group - Vector128<byte>.Count; i >= 0; i -= Vector128<byte>.Count)
            {
                Vector128<short> bytes = Vector128.Load((short*)(group + i));
                ((bytes << 8) >> 8).Store((short*)(group + i));
                (bytes >> 8).Store((short*)(group + Group + i));
            }
        }

        // 32 bytes; their scale, the scaled sums of both halves and of all.
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static void RoundGroup(byte* destination, byte* floats, float* x)
        {
            V largest = V.Create(0);
            V notFinite = V.Create(0);
            for (int i = 0; i < Group; i += V.Count)
            {
                V value = V.Load(x + i);
                largest = V.Max(largest, V.Max(value, V.Create(0) - value));
                notFinite += (value - value);
            }

            // Adding 1.5 · 2²³ rounds to the nearest whole number, ties to even, and leaves it in the low bits.
            float scale = largest.Max() / 127;
            V inverse = V.Create(scale > 0 ? 1 / scale : 0);
            V shift = V.Create(12_582_912f);
            V first = V.Create(0);
            V second = V.Create(0);
            for (int i = 0; i < Group; i += V.Count)
            {
                V shifted = V.Fma(V.Load(x + i), inverse, shift);
                shifted.StoreLowBytes((sbyte*)destination + i);
                if (i < Group / 2)
                {
                    first += shifted - shift;
                }
                else
                {
                    second += shifted - shift;
                }
            }

            // What is not a number stays none: the scale carries it.
            scale += notFinite.Sum();
            float* scales = (float*)floats;
            scales[0] = scale;
            scales[1] = scale * first.Sum();
            scales[2] = scale * second.Sum();
            scales[3] = scale * (first.Sum() + second.Sum());
        }
    }

    private struct MultiplyWork<V, F> : IWork
        where V : struct, ILanes<V>
        where F : struct, IBlockFormat<V>
    {
        public Tensor Output;
        public byte* Rounded;
        public byte* Panels;
        public nint PanelBytes;
        public int PanelCount;
        public int PanelsPerTask;
        public int Groups;
        public bool Accumulate;

        public readonly void Run(int task, int thread)
        {
            float* sums = stackalloc float[MostRows * V.Count];
            int first = task * PanelsPerTask;
            int end = Math.Min(PanelCount, first + PanelsPerTask);
            int rows;
            for (int row = 0; row < Output.Rows; row += rows)
            {
                rows = BlockRows(row, Output.Rows, F.IsSigned);
                byte* rounded = RowBlock(Rounded, row, Groups);
                for (int panel = first; panel < end; panel++)
                {
                    byte* weights = Panels + (panel * PanelBytes);
                    if (rows == 1)
                    {
                        MultiplyRow(weights, rounded, Groups).Store(sums);
                    }
                    else if (F.IsSigned && rows == SignedRows)
                    {
                        MultiplyWords<Eight>(sums, weights, rounded, Groups);
                    }
                    else if (F.IsSigned && rows == SignedRows / 2)
                    {
                        MultiplyWords<Four>(sums, weights, rounded, Groups);
                    }
                    else
                    {
                        MultiplyRows(sums, weights, rounded, Groups, rows);
                    }

                    Store(sums, row, rows, panel);
                }
            }
        }

        private readonly void Store(float* sums, int row, int rows, int panel)
        {
            int column = panel * V.Count;
            int columns = Math.Min(V.Count, Output.Columns - column);
            for (int r = 0; r < rows; r++)
            {
                float* destination = Output.F32(row + r) + column;
                float* source = sums + (r * V.Count);
                if (columns == V.Count)
                {
                    V sum = V.Load(source);
                    (Accumulate ? V.Load(destination) + sum : sum).Store(destination);
                    continue;
                }

                for (int lane = 0; lane < columns; lane++)
                {
                    destination[lane] = Accumulate ? destination[lane] + source[lane] : source[lane];
                }
            }
        }

        // One row and one panel: the bits of MultiplyRows.
        [SkipLocalsInit]
        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private static V MultiplyRow(byte* weights, byte* rounded, int groups)
        {
            byte* scales = stackalloc byte[4 * sizeof(float) * V.Count];
            V sum = V.Create(0);
            for (int done = 0; done < groups; done += F.Groups)
            {
                F.Units(weights, scales, out V unit, out V offsetUnit);
                for (int group = 0; group < F.Groups; group++)
                {
                    Prefetch(weights + PrefetchBytes + (group * (F.BlockBytes / F.Groups * V.Count)));
                    V a = default;
                    V u0 = F.Bytes(weights, group, 0);
                    V v0 = F.Bytes(weights, group, 1);
                    a = Add(a, u0, v0, rounded);

                    u0 = F.Bytes(weights, group, 2);
                    v0 = F.Bytes(weights, group, 3);
                    a = Add(a, u0, v0, rounded + 8);

                    if (F.HasHalfScales)
                    {
                        (V halfScale, V halfOffset) = (unit, offsetUnit);
                        F.Scale(weights, scales, group, 0, ref halfScale, ref halfOffset);
                        sum = AddScaled(sum, a, halfScale, halfOffset, rounded, 1);
                        a = default;
                    }

                    u0 = F.Bytes(weights, group, 4);
                    v0 = F.Bytes(weights, group, 5);
                    a = Add(a, u0, v0, rounded + 16);

                    u0 = F.Bytes(weights, group, 6);
                    v0 = F.Bytes(weights, group, 7);
                    a = Add(a, u0, v0, rounded + 24);

                    (V scale, V offset) = (unit, offsetUnit);
                    F.Scale(weights, scales, group, 1, ref scale, ref offset);
                    sum = AddScaled(sum, a, scale, offset, rounded, F.HasHalfScales ? 2 : 3);
                    rounded += GroupBytes;
                }

                weights += F.BlockBytes * V.Count;
            }

            return sum;
        }

        // Eight or four rows and one panel of signed bytes, integers in registers: the bits of MultiplyRow.
        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private static void MultiplyWords<TRows>(float* sums, byte* weights, byte* rounded, int groups)
        {
            nint lanes = V.Count;
            int rows = typeof(TRows) == typeof(Eight) ? SignedRows : SignedRows / 2;
            for (int r = 0; r < rows; r++)
            {
                V.Create(0).Store(sums + (r * lanes));
            }

            for (int group = 0; group < groups; group++)
            {
                V a0 = default, a1 = default, a2 = default, a3 = default, a4 = default, a5 = default, a6 = default, a7 = default;
                byte* x = rounded;
                for (int i = 0; i < Group / 4; i++)
                {
                    V w = F.Bytes(weights, 0, i);
                    V even = V.EvenWords(w);
                    a0 = V.AddDwords(a0, V.DwordProducts(even, Input(x)));
                    a1 = V.AddDwords(a1, V.DwordProducts(even, Input(x + WordGroupBytes)));
                    a2 = V.AddDwords(a2, V.DwordProducts(even, Input(x + (2 * WordGroupBytes))));
                    a3 = V.AddDwords(a3, V.DwordProducts(even, Input(x + (3 * WordGroupBytes))));
                    if (typeof(TRows) == typeof(Eight))
                    {
                        a4 = V.AddDwords(a4, V.DwordProducts(even, Input(x + (4 * WordGroupBytes))));
                        a5 = V.AddDwords(a5, V.DwordProducts(even, Input(x + (5 * WordGroupBytes))));
                        a6 = V.AddDwords(a6, V.DwordProducts(even, Input(x + (6 * WordGroupBytes))));
                        a7 = V.AddDwords(a7, V.DwordProducts(even, Input(x + (7 * WordGroupBytes))));
                    }

                    V odd = V.OddWords(w);
                    a0 = V.AddDwords(a0, V.DwordProducts(odd, Input(x + Group)));
                    a1 = V.AddDwords(a1, V.DwordProducts(odd, Input(x + Group + WordGroupBytes)));
                    a2 = V.AddDwords(a2, V.DwordProducts(odd, Input(x + Group + (2 * WordGroupBytes))));
                    a3 = V.AddDwords(a3, V.DwordProducts(odd, Input(x + Group + (3 * WordGroupBytes))));
                    if (typeof(TRows) == typeof(Eight))
                    {
                        a4 = V.AddDwords(a4, V.DwordProducts(odd, Input(x + Group + (4 * WordGroupBytes))));
                        a5 = V.AddDwords(a5, V.DwordProducts(odd, Input(x + Group + (5 * WordGroupBytes))));
                        a6 = V.AddDwords(a6, V.DwordProducts(odd, Input(x + Group + (6 * WordGroupBytes))));
                        a7 = V.AddDwords(a7, V.DwordProducts(odd, Input(x + Group + (7 * WordGroupBytes))));
                    }

                    x += 4;
                }

                F.Units(weights, null, out V scale, out _);
                float* sum = sums;
                x = rounded + WordsBytes;
                AddScaled(ref sum, a0, scale, ref x);
                AddScaled(ref sum, a1, scale, ref x);
                AddScaled(ref sum, a2, scale, ref x);
                AddScaled(ref sum, a3, scale, ref x);
                if (typeof(TRows) == typeof(Eight))
                {
                    AddScaled(ref sum, a4, scale, ref x);
                    AddScaled(ref sum, a5, scale, ref x);
                    AddScaled(ref sum, a6, scale, ref x);
                    AddScaled(ref sum, a7, scale, ref x);
                }

                weights += F.BlockBytes * lanes;
                rounded += rows * WordGroupBytes;
            }
        }

        // The next row's sum += scale · products.
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static void AddScaled(ref float* sum, V products, V scale, ref byte* rowScale)
        {
            V.Fma(V.FromInt32(products), scale * V.Create(*(float*)rowScale), V.Load(sum)).Store(sum);
            sum += V.Count;
            rowScale += WordGroupBytes;
        }

        // Some rows and one panel. Small enough for the JIT to inline all that it calls.
        [SkipLocalsInit]
        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private static void MultiplyRows(float* sums, byte* weights, byte* rounded, int groups, int rows)
        {
            byte* scales = stackalloc byte[4 * sizeof(float) * V.Count];
            nint lanes = V.Count;
            float* end = sums + (rows * lanes);
            for (float* sum = sums; sum < end; sum += lanes)
            {
                V.Create(0).Store(sum);
            }

            for (int done = 0; done < groups; done += F.Groups)
            {
                F.Units(weights, scales, out V unit, out V offsetUnit);
                for (int group = 0; group < F.Groups; group++)
                {
                    V w0 = F.Bytes(weights, group, 0);
                    V w1 = F.Bytes(weights, group, 1);
                    V w2 = F.Bytes(weights, group, 2);
                    V w3 = F.Bytes(weights, group, 3);
                    V w4 = F.Bytes(weights, group, 4);
                    V w5 = F.Bytes(weights, group, 5);
                    V w6 = F.Bytes(weights, group, 6);
                    V w7 = F.Bytes(weights, group, 7);
                    (V scale0, V offset0, V scale1, V offset1) = (unit, offsetUnit, unit, offsetUnit);
                    F.Scale(weights, scales, group, 1, ref scale1, ref offset1);
                    if (F.HasHalfScales)
                    {
                        F.Scale(weights, scales, group, 0, ref scale0, ref offset0);
                    }

                    for (float* sum = sums; sum < end; sum += lanes)
                    {
                        V total = V.Load(sum);
                        V products = Add(Add(default, w0, w1, rounded), w2, w3, rounded + 8);
                        if (F.HasHalfScales)
                        {
                            total = AddScaled(total, products, scale0, offset0, rounded, 1);
                            products = default;
                        }

                        products = Add(Add(products, w4, w5, rounded + 16), w6, w7, rounded + 24);
                        AddScaled(total, products, scale1, offset1, rounded, F.HasHalfScales ? 2 : 3).Store(sum);
                        rounded += GroupBytes;
                    }
                }

                weights += F.BlockBytes * lanes;
            }
        }

        // a plus the products of eight elements; dwords, or words where those of a whole group fit.
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static V Add(V a, V first, V second, byte* rounded)
        {
            (V x, V y) = (Input(rounded), Input(rounded + 4));
            if (F.IsSigned)
            {
                V products = V.AddNeighbours(V.WordProducts(V.Magnitudes(first), V.WithSigns(x, first)));
                return V.AddDwords(a, V.AddDwords(products, V.AddNeighbours(V.WordProducts(V.Magnitudes(second), V.WithSigns(y, second)))));
            }

            V words = V.AddWords(V.WordProducts(first, x), V.WordProducts(second, y));
            return F.FitsWords ? V.AddWords(a, words) : V.AddDwords(a, V.AddNeighbours(words));
        }

        // Four bytes of a row of inputs, the same in each lane.
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static V Input(byte* x) => V.CreateDword(*(uint*)x);

        // sum + scale · products + offset · Σ rounded, in units of the rounded inputs: of the first half, the second, or all.
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static V AddScaled(V sum, V products, V scale, V offset, byte* rounded, int part)
        {
            float* scales = (float*)(rounded + Group);
            if (F.HasOffsets)
            {
                sum = V.Fma(offset, V.Create(scales[part]), sum);
            }

            return V.Fma(V.FromInt32(F.FitsWords ? V.AddNeighbours(products) : products), scale * V.Create(scales[0]), sum);
        }

        // What MultiplyWords is compiled for.
        private readonly struct Four;

        private readonly struct Eight;

        // The lines of a group.
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static void Prefetch(byte* p)
        {
            if (Sse.IsSupported)
            {
                int bytes = F.BlockBytes / F.Groups * V.Count;
                Sse.Prefetch0(p);
                if (bytes > 64)
                {
                    Sse.Prefetch0(p + 64);
                }

                if (bytes > 128)
                {
                    Sse.Prefetch0(p + 128);
                }

                if (bytes > 192)
                {
                    Sse.Prefetch0(p + 192);
                }

                if (bytes > 256)
                {
                    Sse.Prefetch0(p + 256);
                }
            }
        }
    }
}
