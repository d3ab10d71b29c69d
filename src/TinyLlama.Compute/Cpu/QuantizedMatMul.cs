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
    // Elements that share a scale in the rounded inputs; their bytes are followed by four floats.
    private const int Group = 32;
    private const int GroupBytes = Group + (4 * sizeof(float));

    // Rows that a task multiplies by a panel while their bytes of a block are in the first cache.
    private const int BlockRows = 16;

    // Bytes of panels of a task: they stay in the second cache while blocks of rows pass by.
    private const long TaskBytes = 96 << 10;

    // How far ahead panels are fetched: some memory latency at the rate of a core.
    private const int PrefetchBytes = 2048;

    /// <summary>Inputs that rounded rows may have in all, so that they fit <see cref="Scratch.Shared"/>.</summary>
    private const int MaxElements = MatMul.SharedCount * sizeof(float) / GroupBytes * Group;

    /// <summary>output (N, O) = or += input (N, I) · weightᵀ.</summary>
    public static void Forward<V>(ThreadTeam team, Scratch scratch, Tensor output, Tensor input, Tensor panels, bool accumulate)
        where V : struct, ILanes<V>
    {
        Shape.Require(input.Columns <= MaxElements, "rows of inputs that fit the scratch");
        int rowsAtOnce = MaxElements / input.Columns;
        for (int row = 0; row < input.Rows; row += rowsAtOnce)
        {
            int count = Math.Min(rowsAtOnce, input.Rows - row);
            byte* rounded = (byte*)scratch.Shared;
            Round<V>(team, rounded, input.RowRange(row, count));
            Multiply<V>(team, output.RowRange(row, count), rounded, panels, accumulate);
        }
    }

    private static void Round<V>(ThreadTeam team, byte* rounded, Tensor input)
        where V : struct, ILanes<V>
    {
        Rows rows = Rows.Of(input);
        RoundWork<V> work = new() { Rounded = rounded, Input = input, Rows = rows };
        team.Run(ref work, rows.Tasks);
    }

    private static void Multiply<V>(ThreadTeam team, Tensor output, byte* rounded, Tensor panels, bool accumulate)
        where V : struct, ILanes<V>
    {
        switch (panels.Type)
        {
            case DType.Q8_0:
                Multiply<V, Q8Format<V>>(team, output, rounded, panels, accumulate);
                break;
            case DType.Q4_0:
                Multiply<V, Q4Format<V>>(team, output, rounded, panels, accumulate);
                break;
            case DType.Q4_1:
                Multiply<V, Q41Format<V>>(team, output, rounded, panels, accumulate);
                break;
            case DType.Q5_0:
                Multiply<V, Q5Format<V>>(team, output, rounded, panels, accumulate);
                break;
            case DType.Q5_1:
                Multiply<V, Q51Format<V>>(team, output, rounded, panels, accumulate);
                break;
            case DType.Q4_K:
                Multiply<V, Q4KFormat<V>>(team, output, rounded, panels, accumulate);
                break;
            case DType.Q5_K:
                Multiply<V, Q5KFormat<V>>(team, output, rounded, panels, accumulate);
                break;
            case DType.Q6_K:
                Multiply<V, Q6KFormat<V>>(team, output, rounded, panels, accumulate);
                break;
            default:
                throw new ArgumentOutOfRangeException(nameof(panels), panels.Type, "not a quantized type");
        }
    }

    private static void Multiply<V, F>(ThreadTeam team, Tensor output, byte* rounded, Tensor panels, bool accumulate)
        where V : struct, ILanes<V>
        where F : struct, IBlockFormat<V>
    {
        long panelBytes = F.Type.RowBytes(panels.Columns) * V.Count;
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

    // Rows in blocks; in a block, group after group, the bytes of all rows of it.
    private static byte* RowBlock(byte* rounded, int row, int groups) => rounded + ((nint)row * groups * GroupBytes);

    private struct RoundWork<V> : IWork
        where V : struct, ILanes<V>
    {
        public byte* Rounded;
        public Tensor Input;
        public Rows Rows;

        public readonly void Run(int task, int thread)
        {
            int groups = Input.Columns / Group;
            for (int row = Rows.First(task); row < Rows.End(task); row++)
            {
                int inBlock = row % BlockRows;
                int blockRows = Math.Min(BlockRows, Input.Rows - (row - inBlock));
                byte* destination = RowBlock(Rounded, row - inBlock, groups) + (inBlock * GroupBytes);
                float* source = Input.F32(row);
                for (int group = 0; group < groups; group++)
                {
                    RoundGroup(destination, source);
                    source += Group;
                    destination += blockRows * GroupBytes;
                }
            }
        }

        // 32 bytes, then their scale, the scaled sums of both halves and of all.
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static void RoundGroup(byte* destination, float* x)
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
            float* scales = (float*)(destination + Group);
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
            float* sums = stackalloc float[BlockRows * V.Count];
            int first = task * PanelsPerTask;
            int end = Math.Min(PanelCount, first + PanelsPerTask);
            for (int row = 0; row < Output.Rows; row += BlockRows)
            {
                int rows = Math.Min(BlockRows, Output.Rows - row);
                byte* rounded = RowBlock(Rounded, row, Groups);
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

                    Store(sums, row, rows, panel * V.Count);
                }
            }
        }

        private readonly void Store(float* sums, int row, int rows, int column)
        {
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

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private static V MultiplyRow(byte* weights, byte* rounded, int groups)
        {
            V sum = V.Create(0);
            int groupsPerBlock = F.Type.BlockElements() / Group;
            nint blockBytes = (nint)F.Type.BlockBytes() * V.Count;
            for (int done = 0; done < groups; done += groupsPerBlock)
            {
                for (int group = 0; group < groupsPerBlock; group++)
                {
                    Prefetch(weights + PrefetchBytes + (group * (blockBytes / groupsPerBlock)), blockBytes / groupsPerBlock);
                    F.Load(weights, group, out V w0, out V w1, out V w2, out V w3, out V w4, out V w5, out V w6, out V w7);
                    Scales(weights, group, out V scale0, out V scale1, out V offset0, out V offset1);
                    Add(ref sum, rounded, w0, w1, w2, w3, w4, w5, w6, w7, scale0, scale1, offset0, offset1);
                    rounded += GroupBytes;
                }

                weights += blockBytes;
            }

            return sum;
        }

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private static void MultiplyRows(float* sums, byte* weights, byte* rounded, int groups, int rows)
        {
            for (int row = 0; row < rows; row++)
            {
                V.Create(0).Store(sums + (row * V.Count));
            }

            int groupsPerBlock = F.Type.BlockElements() / Group;
            nint blockBytes = (nint)F.Type.BlockBytes() * V.Count;
            for (int done = 0; done < groups; done += groupsPerBlock)
            {
                for (int group = 0; group < groupsPerBlock; group++)
                {
                    F.Load(weights, group, out V w0, out V w1, out V w2, out V w3, out V w4, out V w5, out V w6, out V w7);
                    Scales(weights, group, out V scale0, out V scale1, out V offset0, out V offset1);
                    for (int row = 0; row < rows; row++)
                    {
                        V sum = V.Load(sums + (row * V.Count));
                        Add(ref sum, rounded, w0, w1, w2, w3, w4, w5, w6, w7, scale0, scale1, offset0, offset1);
                        sum.Store(sums + (row * V.Count));
                        rounded += GroupBytes;
                    }
                }

                weights += blockBytes;
            }
        }

        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static void Scales(byte* block, int group, out V scale0, out V scale1, out V offset0, out V offset1)
        {
            scale0 = F.Scale(block, group, 0);
            scale1 = F.HasHalfScales ? F.Scale(block, group, 1) : scale0;
            offset0 = F.HasOffsets ? F.Offset(block, group, 0) : default;
            offset1 = F.HasOffsets && F.HasHalfScales ? F.Offset(block, group, 1) : offset0;
        }

        // sum += scale · (weights · rounded) + offset · Σ rounded, all in units of the rounded inputs.
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static void Add(
            ref V sum, byte* rounded, V w0, V w1, V w2, V w3, V w4, V w5, V w6, V w7, V scale0, V scale1, V offset0, V offset1)
        {
            V first, second;
            if (F.ProductsPerWord == 0)
            {
                first = V.AddDwords(
                    V.AddDwords(Signed(w0, rounded), Signed(w1, rounded + 4)), V.AddDwords(Signed(w2, rounded + 8), Signed(w3, rounded + 12)));
                second = V.AddDwords(
                    V.AddDwords(Signed(w4, rounded + 16), Signed(w5, rounded + 20)), V.AddDwords(Signed(w6, rounded + 24), Signed(w7, rounded + 28)));
            }
            else
            {
                V p0 = V.AddWords(Products(w0, rounded), Products(w1, rounded + 4));
                V p1 = V.AddWords(Products(w2, rounded + 8), Products(w3, rounded + 12));
                V p2 = V.AddWords(Products(w4, rounded + 16), Products(w5, rounded + 20));
                V p3 = V.AddWords(Products(w6, rounded + 24), Products(w7, rounded + 28));
                if (F.ProductsPerWord == 2)
                {
                    first = V.AddDwords(V.AddNeighbours(p0), V.AddNeighbours(p1));
                    second = V.AddDwords(V.AddNeighbours(p2), V.AddNeighbours(p3));
                }
                else if (F.ProductsPerWord == 4)
                {
                    first = V.AddNeighbours(V.AddWords(p0, p1));
                    second = V.AddNeighbours(V.AddWords(p2, p3));
                }
                else
                {
                    first = V.AddNeighbours(V.AddWords(V.AddWords(p0, p1), V.AddWords(p2, p3)));
                    second = default;
                }
            }

            float* scales = (float*)(rounded + Group);
            V scale = V.Create(scales[0]);
            if (F.HasHalfScales)
            {
                V.AddProduct(ref sum, V.FromInt32(first), scale0 * scale);
                V.AddProduct(ref sum, V.FromInt32(second), scale1 * scale);
                V.AddProduct(ref sum, offset0, V.Create(scales[1]));
                V.AddProduct(ref sum, offset1, V.Create(scales[2]));
                return;
            }

            V.AddProduct(ref sum, V.FromInt32(F.ProductsPerWord == 8 ? first : V.AddDwords(first, second)), scale0 * scale);
            if (F.HasOffsets)
            {
                V.AddProduct(ref sum, offset0, V.Create(scales[3]));
            }
        }

        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static V Products(V weights, byte* rounded) => V.ByteProducts(weights, V.BroadcastDword(rounded));

        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static V Signed(V weights, byte* rounded) => V.AddNeighbours(V.SignedByteProducts(weights, V.BroadcastDword(rounded)));

        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static void Prefetch(byte* p, nint bytes)
        {
            if (Sse.IsSupported)
            {
                for (nint i = 0; i < bytes; i += 64)
                {
                    Sse.Prefetch0(p + i);
                }
            }
        }
    }
}
