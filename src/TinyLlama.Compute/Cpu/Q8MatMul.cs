using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics.X86;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// output (N, O) = input (N, I) · weightᵀ with a weight of Q8_0 as files keep it: rows of blocks, each a scale in half
/// precision and 32 signed bytes. Inputs are rounded to signed bytes too (<see cref="RoundedInputs"/>).
/// </summary>
/// <remarks>
/// Products of 32 are summed in integers, which are exact in any order, groups in fp32 in the order of the inputs: a row gets
/// the same bits alone and among others. Alone it is multiplied by blocks as they lie, and registers are summed across.
/// For every eight or four rows the blocks are turned so that a lane is an output, and widened to int16, into the second
/// cache, while as many rows pass by.
/// </remarks>
internal static unsafe class Q8MatMul
{
    /// <summary>Bytes that <see cref="Scratch.Of"/> must hold: a panel of the widest register.</summary>
    public const int ThreadBytes = MaxLanes * TurnedBytes * GroupsAtOnce;

    private const int Group = RoundedInputs.Group;
    private const int BlockBytes = sizeof(ushort) + Group;
    private const int MaxLanes = 16;

    // Of a turned group and lane: the scale in fp32, then the even and the odd int16 of each dword.
    private const int TurnedBytes = sizeof(float) + RoundedInputs.WordsBytes;

    // Rows whose sums of integers fit the registers, and the least for which weights are turned.
    private const int MostRows = 8;
    private const int LeastRows = 4;

    // Groups that are turned at once.
    private const int GroupsAtOnce = 128;

    // Bytes of turned panels of a task: they stay in the second cache while rows pass by.
    private const long TaskBytes = 128 << 10;

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
        int panelsPerTask = (int)Math.Clamp(TaskBytes / ((long)groups * TurnedBytes * V.Count), 1, Math.Max(1, panelCount / 8));
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
                RowBytes = (nint)groups * BlockBytes,
                PanelCount = panelCount,
                PanelsPerTask = panelsPerTask,
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
        public nint RowBytes;
        public int PanelCount;
        public int PanelsPerTask;
        public int Groups;
        public bool Accumulate;

        public readonly void Run(int task, int thread)
        {
            int first = task * PanelsPerTask;
            int end = Math.Min(PanelCount, first + PanelsPerTask);
            int together = Output.Rows / LeastRows * LeastRows;
            if (together > 0)
            {
                MultiplyTogether((byte*)Scratch.Of(thread), first, end, together);
            }

            byte* rounded = Rounded + ((nint)together * Groups * RoundedInputs.WordGroupBytes);
            for (int row = together; row < Output.Rows; row++, rounded += (nint)Groups * RoundedInputs.GroupBytes)
            {
                for (int panel = first; panel < end; panel++)
                {
                    MultiplyAlone(row, panel, rounded);
                }
            }
        }

        private readonly void MultiplyTogether(byte* turned, int first, int end, int allRows)
        {
            for (int group = 0; group < Groups; group += GroupsAtOnce)
            {
                int groups = Math.Min(GroupsAtOnce, Groups - group);
                int panelBytes = groups * TurnedBytes * V.Count;
                for (int panel = first; panel < end; panel++)
                {
                    byte* source = Panel(panel, out nint step);
                    Turn(turned + ((panel - first) * panelBytes), source + (group * BlockBytes), step, groups);
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
        private readonly void MultiplyRows(int row, int rows, int panel, byte* turned, byte* rounded, int groups, bool accumulate)
        {
            float* sums = stackalloc float[MostRows * MaxLanes];
            int column = panel * V.Count;
            int columns = Math.Min(V.Count, Output.Columns - column);
            for (int r = 0; r < rows; r++)
            {
                Begin(sums + (r * V.Count), Output.F32(row + r) + column, columns, accumulate);
            }

            if (rows == MostRows)
            {
                MultiplyWords<Eight>(sums, turned, rounded, groups);
            }
            else
            {
                MultiplyWords<Four>(sums, turned, rounded, groups);
            }

            for (int r = 0; r < rows; r++)
            {
                Copy(Output.F32(row + r) + column, sums + (r * V.Count), columns);
            }
        }

        [SkipLocalsInit]
        private readonly void MultiplyAlone(int row, int panel, byte* rounded)
        {
            float* sums = stackalloc float[MaxLanes];
            int column = panel * V.Count;
            int columns = Math.Min(V.Count, Output.Columns - column);
            byte* rows = Panel(panel, out nint step);
            Begin(sums, Output.F32(row) + column, columns, Accumulate);
            MultiplyRow(V.Load(sums), rows, step, rounded, Groups).Store(sums);
            Copy(Output.F32(row) + column, sums, columns);
        }

        // What products are added to; the panel may stick out.
        private static void Begin(float* sums, float* output, int columns, bool accumulate)
        {
            V.Create(0).Store(sums);
            if (accumulate)
            {
                Copy(sums, output, columns);
            }
        }

        private static void Copy(float* destination, float* source, int count) =>
            new ReadOnlySpan<float>(source, count).CopyTo(new Span<float>(destination, count));

        // The first row of a panel and the bytes to the next.
        private readonly byte* Panel(int panel, out nint step)
        {
            int row = panel * V.Count;
            int i = 0;
            for (; row >= Weight[i].Count; i++)
            {
                row -= Weight[i].Count;
            }

            (nint address, step) = Weight[i].At(row, RowBytes);
            return (byte*)address;
        }

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private static void Turn(byte* turned, byte* rows, nint step, int groups)
        {
            for (int group = 0; group < groups; group++)
            {
                Halves<V>.FromLow(V.LoadWords(rows, step)).Store((float*)turned);
                float* words = (float*)turned + V.Count;
                rows += sizeof(ushort);
                for (int i = 0; i < Group; i += 16)
                {
                    V.LoadTurned(rows + i, step, out V w0, out V w1, out V w2, out V w3);
                    V.EvenWords(w0).Store(words);
                    V.OddWords(w0).Store(words + V.Count);
                    V.EvenWords(w1).Store(words + (2 * V.Count));
                    V.OddWords(w1).Store(words + (3 * V.Count));
                    V.EvenWords(w2).Store(words + (4 * V.Count));
                    V.OddWords(w2).Store(words + (5 * V.Count));
                    V.EvenWords(w3).Store(words + (6 * V.Count));
                    V.OddWords(w3).Store(words + (7 * V.Count));
                    words += 8 * V.Count;
                }

                rows += Group;
                turned += TurnedBytes * V.Count;
            }
        }

        // Eight or four rows and one panel, integers in registers: the bits of MultiplyRow.
        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private static void MultiplyWords<TRows>(float* sums, byte* turned, byte* rounded, int groups)
        {
            for (int group = 0; group < groups; group++)
            {
                V scale = V.Load((float*)turned);
                turned += sizeof(float) * V.Count;
                V a0 = default, a1 = default, a2 = default, a3 = default, a4 = default, a5 = default, a6 = default, a7 = default;
                byte* x = rounded;
                for (int i = 0; i < Group / 4; i++)
                {
                    V even = V.LoadDwords(turned);
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

                    V odd = V.LoadDwords(turned + (sizeof(float) * V.Count));
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

                    turned += 2 * sizeof(float) * V.Count;
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

        // Two int16 of a row of inputs, the same in each lane.
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static V Input(byte* x, int row) => V.CreateDword(*(uint*)(x + (row * RoundedInputs.WordGroupBytes)));

        // What MultiplyWords is compiled for.
        private readonly struct Four;

        private readonly struct Eight;

        // A share of the next panel, which follows this one.
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static void Prefetch(byte* p)
        {
            if (Sse.IsSupported)
            {
                Sse.Prefetch0(p);
                Sse.Prefetch0(p + 64);
                Sse.Prefetch0(p + 128);
                if (V.Count > 4)
                {
                    Sse.Prefetch0(p + 192);
                    Sse.Prefetch0(p + 256);
                }

                if (V.Count > 8)
                {
                    Sse.Prefetch0(p + 320);
                    Sse.Prefetch0(p + 384);
                    Sse.Prefetch0(p + 448);
                    Sse.Prefetch0(p + 512);
                }
            }
        }
    }
}
