using System.Runtime.CompilerServices;
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
    // Rows that a task multiplies by a panel while their bytes of a block are in the first cache.
    private const int MostRows = 32;

    // Bytes of panels of a task: they stay in the second cache while blocks of rows pass by.
    private const long TaskBytes = 96 << 10;

    // How far ahead panels are fetched: some memory latency at the rate of a core.
    private const int PrefetchBytes = 2048;

    /// <summary>output (N, O) = or += input (N, I) · weightᵀ.</summary>
    public static void Forward<V>(ThreadTeam team, Scratch scratch, Tensor output, Tensor input, Tensor panels, bool accumulate)
        where V : struct, ILanes<V>
    {
        Shape.Require(input.Columns <= RoundedInputs.MaxElements, "rows of inputs that fit the scratch");
        int rowsAtOnce = RoundedInputs.MaxElements / input.Columns;
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
        RoundedInputs.Round<V>(team, rounded, input, MostRows, inWords: false);
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
            Groups = panels.Columns / RoundedInputs.Group,
            Accumulate = accumulate,
        };
        team.Run(ref work, (panelCount + panelsPerTask - 1) / panelsPerTask);
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
            for (int row = 0; row < Output.Rows; row += MostRows)
            {
                int rows = Math.Min(MostRows, Output.Rows - row);
                byte* rounded = Rounded + ((nint)row * Groups * RoundedInputs.GroupBytes);
                for (int panel = first; panel < end; panel++)
                {
                    byte* weights = Panels + (panel * PanelBytes);
                    if (rows == 1)
                    {
                        MultiplyRow(weights, rounded, Groups).Store(sums);
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
                    rounded += RoundedInputs.GroupBytes;
                }

                weights += F.BlockBytes * V.Count;
            }

            return sum;
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
                        rounded += RoundedInputs.GroupBytes;
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
            float* scales = (float*)(rounded + RoundedInputs.Group);
            if (F.HasOffsets)
            {
                sum = V.Fma(offset, V.Create(scales[part]), sum);
            }

            return V.Fma(V.FromInt32(F.FitsWords ? V.AddNeighbours(products) : products), scale * V.Create(scales[0]), sum);
        }

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
