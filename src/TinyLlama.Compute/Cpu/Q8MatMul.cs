using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics.X86;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// output (N, O) = input (N, I) · weightᵀ with a weight of Q8_0: blocks, each a scale in half precision and 32 signed bytes, in
/// rows as files keep them or in panels (<see cref="WeightPanels"/>). Inputs are rounded to signed bytes too (<see cref="RoundedInputs"/>).
/// </summary>
/// <remarks>
/// Products of 32 are summed in integers, which are exact in any order, groups in fp32 in the order of the inputs: a row gets
/// the same bits alone and among others, from rows and from panels. In a panel a lane is an output. Alone a row is multiplied by
/// blocks as they lie, those of rows with sums across registers. Eight or four rows multiply int16, which they widen together;
/// the rows of a weight are turned for them into the second cache.
/// </remarks>
internal static unsafe class Q8MatMul
{
    /// <summary>Bytes that <see cref="Scratch.Of"/> must hold: a panel of the widest register.</summary>
    public const int ThreadBytes = MaxLanes * BlockBytes * GroupsAtOnce;

    /// <summary>Bytes of a block.</summary>
    public const int BlockBytes = sizeof(ushort) + Group;

    private const int Group = RoundedInputs.Group;
    private const int MaxLanes = 16;

    // Rows whose sums of integers fit the registers, and the least for which weights are turned.
    private const int MostRows = 8;
    private const int LeastRows = 4;

    // Groups that are turned at once.
    private const int GroupsAtOnce = 256;

    // Panels that a row is multiplied by in turns, group after group.
    private const int PanelsTogether = QuantizedMatMul.PanelsTogether;

    /// <summary>Whether the kernels read rows where they lie.</summary>
    public static bool Reads<V>(StoredRows rows)
        where V : struct, ILanes<V> => rows.IsRegular(V.Count);

    /// <summary>Copies whole rows in the order of outputs to memory of the weight's own.</summary>
    /// <param name="weight">The weight.</param>
    /// <param name="firstRow">The first row.</param>
    /// <param name="rows">Their bytes.</param>
    public static void Write(Weight weight, int firstRow, ReadOnlySpan<byte> rows)
    {
        long rowBytes = DType.Q8_0.RowBytes(weight.Inputs);
        Shape.Require(
            rows.Length % rowBytes == 0 && rows.Length / rowBytes <= weight.PackedForward.Rows - firstRow, "whole rows of a weight with memory of its own");
        rows.CopyTo(new Span<byte>((byte*)weight.PackedForward.Address + (firstRow * rowBytes), rows.Length));
    }

    /// <summary>Widens one row.</summary>
    public static void DecodeRow(float* destination, byte* row, int columns)
    {
        for (int i = 0; i < columns; i += Group, row += BlockBytes)
        {
            QuantizedBlocks.Decode(DType.Q8_0, new ReadOnlySpan<byte>(row, BlockBytes), new Span<float>(destination + i, Group));
        }
    }

    /// <summary>output (N, O) = or += input (N, I) · weightᵀ.</summary>
    public static void Forward<V>(ThreadTeam team, Scratch scratch, Tensor output, Tensor input, Weight weight, bool accumulate)
        where V : struct, ILanes<V>
    {
        Shape.Require(input.Columns <= RoundedInputs.MaxElements, "rows of inputs that fit the scratch");
        int rowsAtOnce = RoundedInputs.MaxElements / input.Columns;
        int groups = weight.Inputs / Group;
        int panelCount = (weight.Outputs + V.Count - 1) / V.Count;

        // What a task turns fits the scratch only if it is the fewest panels.
        int panelsTogether = weight.Rows.Length > 0 || input.Rows % LeastRows == 0 ? 1 : PanelsTogether;
        int panelsPerTask = WeightPanels.OfTask((long)groups * BlockBytes * V.Count, panelCount, panelsTogether);
        for (int row = 0; row < input.Rows; row += rowsAtOnce)
        {
            int count = Math.Min(rowsAtOnce, input.Rows - row);
            Round<V>(team, (byte*)scratch.Shared, input.RowRange(row, count), groups);
            MultiplyWork<V> work = new()
            {
                Scratch = scratch,
                Output = output.RowRange(row, count),
                Rounded = (byte*)scratch.Shared,
                Weight = weight.Rows,
                Panels = weight.Rows.Length == 0 ? (byte*)weight.PackedForward.Address : null,
                RowBytes = (nint)groups * BlockBytes,
                PanelCount = panelCount,
                PanelsPerTask = panelsPerTask,
                NextTask = team.Threads,
                Groups = groups,
                Accumulate = accumulate,
            };
            team.Run(ref work, (panelCount + panelsPerTask - 1) / panelsPerTask);
        }
    }

    // In blocks of eight rows, then of four, in int16; then rows by themselves, in bytes.
    private static void Round<V>(ThreadTeam team, byte* rounded, Tensor input, int groups)
        where V : struct, ILanes<V>
    {
        int row = 0;
        for (int rows = MostRows; row < input.Rows; rows = rows == MostRows ? LeastRows : 1)
        {
            int count = (input.Rows - row) / rows * rows;
            bool inWords = rows > 1;
            RoundedInputs.Round<V>(team, rounded, input.RowRange(row, count), rows, inWords);
            row += count;
            rounded += (nint)count * groups * (inWords ? RoundedInputs.WordGroupBytes : RoundedInputs.GroupBytes);
        }
    }

    private struct MultiplyWork<V> : IWork
        where V : struct, ILanes<V>
    {
        public Scratch Scratch;
        public Tensor Output;
        public byte* Rounded;
        public StoredRows[] Weight;

        // In place of rows.
        public byte* Panels;
        public nint RowBytes;
        public int PanelCount;
        public int PanelsPerTask;

        // The tasks from one that a thread begins to the next that it is likely to.
        public int NextTask;
        public int Groups;
        public bool Accumulate;

        public readonly void Run(int task, int thread)
        {
            int first = task * PanelsPerTask;
            int end = Math.Min(PanelCount, first + PanelsPerTask);
            int together = Output.Rows / LeastRows * LeastRows;
            if (Panels is not null)
            {
                MultiplyPanels(first, end, together);
            }
            else if (together > 0)
            {
                MultiplyTogether((byte*)Scratch.Of(thread), first, end, together);
            }

            byte* rounded = Rounded + ((nint)together * Groups * RoundedInputs.WordGroupBytes);
            for (int row = together; row < Output.Rows; row++, rounded += (nint)Groups * RoundedInputs.GroupBytes)
            {
                int panels = Panels is null ? 1 : PanelsTogether;
                for (int panel = first; panel < end; panel += panels)
                {
                    int next = panel + panels < end ? panel + panels : (task + NextTask) * PanelsPerTask;
                    MultiplyAlone(row, panel, Math.Min(panels, end - panel), next, rounded);
                }
            }
        }

        private readonly void MultiplyPanels(int first, int end, int allRows)
        {
            int rows;
            for (int row = 0; row < allRows; row += rows)
            {
                rows = allRows - row >= MostRows ? MostRows : LeastRows;
                byte* rounded = Rounded + ((nint)row * Groups * RoundedInputs.WordGroupBytes);
                for (int panel = first; panel < end; panel++)
                {
                    MultiplyRows(row, rows, panel, Panels + (panel * RowBytes * V.Count), rounded, Groups, Accumulate);
                }
            }
        }

        private readonly void MultiplyTogether(byte* turned, int first, int end, int allRows)
        {
            for (int group = 0; group < Groups; group += GroupsAtOnce)
            {
                int groups = Math.Min(GroupsAtOnce, Groups - group);
                int panelBytes = groups * BlockBytes * V.Count;
                for (int panel = first; panel < end; panel++)
                {
                    byte* source = WeightPanels.Rows<V>(Weight, RowBytes, panel, out nint step);
                    WeightPanels.Turn<V>(turned + ((panel - first) * panelBytes), source + (group * BlockBytes), step, groups, BlockBytes);
                }

                int rows;
                for (int row = 0; row < allRows; row += rows)
                {
                    rows = allRows - row >= MostRows ? MostRows : LeastRows;
                    byte* rounded = Rounded + ((((nint)row * Groups) + (group * rows)) * RoundedInputs.WordGroupBytes);
                    for (int panel = first; panel < end; panel++)
                    {
                        MultiplyRows(row, rows, panel, turned + ((panel - first) * panelBytes), rounded, groups, Accumulate || group > 0);
                    }
                }
            }
        }

        [SkipLocalsInit]
        private readonly void MultiplyRows(int row, int rows, int panel, byte* weights, byte* rounded, int groups, bool accumulate)
        {
            float* sums = stackalloc float[MostRows * MaxLanes];
            int column = panel * V.Count;
            int columns = Math.Min(V.Count, Output.Columns - column);
            for (int r = 0; r < rows; r++)
            {
                Begin(sums + (r * V.Count), 1, Output.F32(row + r) + column, columns, accumulate);
            }

            if (rows == MostRows)
            {
                MultiplyWords<Eight>(sums, weights, rounded, groups);
            }
            else
            {
                MultiplyWords<Four>(sums, weights, rounded, groups);
            }

            for (int r = 0; r < rows; r++)
            {
                Copy(Output.F32(row + r) + column, sums + (r * V.Count), columns);
            }
        }

        [SkipLocalsInit]
        private readonly void MultiplyAlone(int row, int panel, int panels, int next, byte* rounded)
        {
            float* sums = stackalloc float[PanelsTogether * MaxLanes];
            int column = panel * V.Count;
            int columns = Math.Min(panels * V.Count, Output.Columns - column);
            Begin(sums, panels, Output.F32(row) + column, columns, Accumulate);
            if (Panels is not null)
            {
                nint panelBytes = RowBytes * V.Count;
                MultiplyPanels(sums, Panels + (panel * panelBytes), panelBytes, panels, (next - panel - 1) * panelBytes, rounded, Groups);
            }
            else
            {
                byte* rows = WeightPanels.Rows<V>(Weight, RowBytes, panel, out nint step);
                MultiplyRow(V.Load(sums), rows, step, rounded, Groups).Store(sums);
            }

            Copy(Output.F32(row) + column, sums, columns);
        }

        // What products are added to; the last panel may stick out.
        private static void Begin(float* sums, int panels, float* output, int columns, bool accumulate)
        {
            for (int p = 0; p < panels; p++)
            {
                V.Create(0).Store(sums + (p * V.Count));
            }

            if (accumulate)
            {
                Copy(sums, output, columns);
            }
        }

        private static void Copy(float* destination, float* source, int count) =>
            new ReadOnlySpan<float>(source, count).CopyTo(new Span<float>(destination, count));

        // Eight or four rows and one panel, integers in registers: the bits of MultiplyPanel and of MultiplyRow.
        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private static void MultiplyWords<TRows>(float* sums, byte* panel, byte* rounded, int groups)
        {
            for (int group = 0; group < groups; group++)
            {
                V scale = Halves<V>.Load(panel);
                panel += sizeof(ushort) * V.Count;
                V a0 = default, a1 = default, a2 = default, a3 = default, a4 = default, a5 = default, a6 = default, a7 = default;
                byte* x = rounded;
                for (int i = 0; i < Group / 4; i++)
                {
                    V bytes = V.LoadDwords(panel);
                    V even = V.EvenWords(bytes);
                    a0 = V.AddDwords(a0, V.DwordProducts(even, Input(x, 0)));
                    a1 = V.AddDwords(a1, V.DwordProducts(even, Input(x, 1)));
                    a2 = V.AddDwords(a2, V.DwordProducts(even, Input(x, 2)));
                    a3 = V.AddDwords(a3, V.DwordProducts(even, Input(x, 3)));
                    if (typeof(TRows) == typeof(Eight))
                    {
                        a4 = V.AddDwords(a4, V.DwordProducts(even, Input(x, 4)));
                        a5 = V.AddDwords(a5, V.DwordProducts(even, Input(x, 5)));
                        a6 = V.AddDwords(a6, V.DwordProducts(even, Input(x, 6)));
                        a7 = V.AddDwords(a7, V.DwordProducts(even, Input(x, 7)));
                    }

                    V odd = V.OddWords(bytes);
                    a0 = V.AddDwords(a0, V.DwordProducts(odd, Input(x + Group, 0)));
                    a1 = V.AddDwords(a1, V.DwordProducts(odd, Input(x + Group, 1)));
                    a2 = V.AddDwords(a2, V.DwordProducts(odd, Input(x + Group, 2)));
                    a3 = V.AddDwords(a3, V.DwordProducts(odd, Input(x + Group, 3)));
                    if (typeof(TRows) == typeof(Eight))
                    {
                        a4 = V.AddDwords(a4, V.DwordProducts(odd, Input(x + Group, 4)));
                        a5 = V.AddDwords(a5, V.DwordProducts(odd, Input(x + Group, 5)));
                        a6 = V.AddDwords(a6, V.DwordProducts(odd, Input(x + Group, 6)));
                        a7 = V.AddDwords(a7, V.DwordProducts(odd, Input(x + Group, 7)));
                    }

                    panel += sizeof(float) * V.Count;
                    x += sizeof(float);
                }

                float* sum = sums;
                x = rounded + RoundedInputs.WordsBytes;
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

                rounded += (typeof(TRows) == typeof(Eight) ? MostRows : LeastRows) * RoundedInputs.WordGroupBytes;
            }
        }

        // The next row's sum += scale · products.
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static void AddScaled(ref float* sum, V products, V scale, ref byte* rowScale)
        {
            V.Fma(V.FromInt32(products), scale * V.Create(*(float*)rowScale), V.Load(sum)).Store(sum);
            sum += V.Count;
            rowScale += RoundedInputs.WordGroupBytes;
        }

        // One row and one panel, whose rows lie as in the file.
        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private static V MultiplyRow(V sum, byte* rows, nint step, byte* rounded, int groups)
        {
            byte* next = rows + (V.Count * step);
            for (int group = 0; group < groups; group++)
            {
                Prefetch(next);
                V scale = Halves<V>.FromLow(V.LoadWords(rows, step)) * V.Create(*(float*)(rounded + Group));
                sum = V.Fma(V.FromInt32(V.ByteProducts(rows + sizeof(ushort), step, rounded)), scale, sum);
                rows += BlockBytes;
                next += BlockBytes * V.Count;
                rounded += RoundedInputs.GroupBytes;
            }

            return sum;
        }

        // One row and panels.
        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private static void MultiplyPanels(float* sums, byte* weights, nint panelBytes, int panels, nint next, byte* rounded, int groups)
        {
            int ahead = QuantizedMatMul.BlocksAhead(BlockBytes * V.Count);
            for (int group = 0; group < groups; group++)
            {
                byte* panel = weights;
                nint fetched = (ahead * BlockBytes * V.Count) + (groups - group > ahead ? 0 : next);
                float* sum = sums;
                for (int p = 0; p < panels; p++, panel += panelBytes, sum += V.Count)
                {
                    Prefetch(panel + fetched);
                    V scale = Halves<V>.Load(panel) * V.Create(*(float*)(rounded + Group));
                    byte* bytes = panel + (sizeof(ushort) * V.Count);
                    V a = V.AddDwords(Products(bytes, 0, rounded), Products(bytes, 1, rounded));
                    a = V.AddDwords(a, V.AddDwords(Products(bytes, 2, rounded), Products(bytes, 3, rounded)));
                    a = V.AddDwords(a, V.AddDwords(Products(bytes, 4, rounded), Products(bytes, 5, rounded)));
                    a = V.AddDwords(a, V.AddDwords(Products(bytes, 6, rounded), Products(bytes, 7, rounded)));
                    V.Fma(V.FromInt32(a), scale, V.Load(sum)).Store(sum);
                }

                weights += BlockBytes * V.Count;
                rounded += RoundedInputs.GroupBytes;
            }
        }

        // Four bytes of each output by four of the inputs.
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static V Products(byte* bytes, int i, byte* rounded)
        {
            V w = V.LoadDwords(bytes + (i * sizeof(float) * V.Count));
            return V.AddNeighbours(V.WordProducts(V.Magnitudes(w), V.WithSigns(V.CreateDword(*(uint*)(rounded + (4 * i))), w)));
        }

        // Two int16 of a row of inputs, the same in each lane.
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static V Input(byte* x, int row) => V.CreateDword(*(uint*)(x + (row * RoundedInputs.WordGroupBytes)));

        // What MultiplyWords is compiled for.
        private readonly struct Four;

        private readonly struct Eight;

        // A group of a panel.
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static void Prefetch(byte* p)
        {
            if (Sse.IsSupported)
            {
                Sse.Prefetch1(p);
                Sse.Prefetch1(p + 64);
                Sse.Prefetch1(p + 128);
                if (V.Count > 4)
                {
                    Sse.Prefetch1(p + 192);
                    Sse.Prefetch1(p + 256);
                }

                if (V.Count > 8)
                {
                    Sse.Prefetch1(p + 320);
                    Sse.Prefetch1(p + 384);
                    Sse.Prefetch1(p + 448);
                    Sse.Prefetch1(p + 512);
                }
            }
        }
    }
}
