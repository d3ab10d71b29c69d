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
    /// <summary>Panels that one row is multiplied by in turns, block after block: memory is read faster in several places at once.</summary>
    public const int PanelsTogether = 4;

    // How far ahead panels are fetched: some memory latency at the rate of a core.
    private const int PrefetchBytes = 2048;

    // Rows that a task multiplies by a panel while their bytes of a block are in the first cache.
    private const int MostRows = 32;

    /// <summary>How many blocks ahead panels are fetched: to the second cache, as more lines can be on their way there than to the first.</summary>
    /// <param name="blockBytes">Bytes of a block of a panel.</param>
    public static int BlocksAhead(int blockBytes) => (PrefetchBytes + blockBytes - 1) / blockBytes;

    /// <summary>Whether rows may be multiplied where they lie: each task turns its panels into the scratch.</summary>
    public static bool Reads<V>(DType type, int inputs, StoredRows rows)
        where V : struct, ILanes<V> =>
        type == DType.Q4_0 && rows.IsRegular(V.Count) && type.RowBytes(inputs) * V.Count <= Q8MatMul.ThreadBytes;

    /// <summary>output (N, O) = or += input (N, I) · weightᵀ; by <see cref="VnniBytes"/> where its code is given, which Q8_0 needs here.</summary>
    public static void Forward<V>(ThreadTeam team, Scratch scratch, Tensor output, Tensor input, Weight weight, bool accumulate, nint code = 0)
        where V : struct, ILanes<V>
    {
        Tensor panels = weight.IsInPlace ? new Tensor(0, weight.Outputs, weight.Inputs, weight.Inputs, weight.Type) : weight.PackedForward;
        Forward<V>(team, scratch, output, input, panels, accumulate, code, weight.IsInPlace ? weight.Rows : []);
    }

    /// <summary>The same, of rows in place where there are any, else of panels.</summary>
    public static void Forward<V>(
        ThreadTeam team, Scratch scratch, Tensor output, Tensor input, Tensor panels, bool accumulate, nint code, StoredRows[] rows)
        where V : struct, ILanes<V>
    {
        Shape.Require(input.Columns <= RoundedInputs.MaxElements, "rows of inputs that fit the scratch");
        int rowsAtOnce = RoundedInputs.MaxElements / input.Columns;
        for (int row = 0; row < input.Rows; row += rowsAtOnce)
        {
            int count = Math.Min(rowsAtOnce, input.Rows - row);
            Multiply<V>(team, scratch, output.RowRange(row, count), input.RowRange(row, count), panels, accumulate, code, rows);
        }
    }

    private static void Multiply<V>(
        ThreadTeam team, Scratch scratch, Tensor output, Tensor input, Tensor panels, bool accumulate, nint code, StoredRows[] rows)
        where V : struct, ILanes<V>
    {
        switch (panels.Type)
        {
            case DType.Q8_0 when code != 0:
                Multiply<V, Q8Format<V>>(team, scratch, output, input, panels, accumulate, code, rows);
                break;
            case DType.Q4_0:
                Multiply<V, Q4Format<V>>(team, scratch, output, input, panels, accumulate, code, rows);
                break;
            case DType.Q4_1:
                Multiply<V, Q41Format<V>>(team, scratch, output, input, panels, accumulate, code, rows);
                break;
            case DType.Q5_0:
                Multiply<V, Q5Format<V>>(team, scratch, output, input, panels, accumulate, code, rows);
                break;
            case DType.Q5_1:
                Multiply<V, Q51Format<V>>(team, scratch, output, input, panels, accumulate, code, rows);
                break;
            case DType.Q4_K:
                Multiply<V, Q4KFormat<V>>(team, scratch, output, input, panels, accumulate, code, rows);
                break;
            case DType.Q5_K:
                Multiply<V, Q5KFormat<V>>(team, scratch, output, input, panels, accumulate, code, rows);
                break;
            case DType.Q6_K:
                Multiply<V, Q6KFormat<V>>(team, scratch, output, input, panels, accumulate, code, rows);
                break;
            default:
                throw new ArgumentOutOfRangeException(nameof(panels), panels.Type, "not a quantized type");
        }
    }

    private static void Multiply<V, F>(
        ThreadTeam team, Scratch scratch, Tensor output, Tensor input, Tensor panels, bool accumulate, nint code, StoredRows[] rows)
        where V : struct, ILanes<V>
        where F : struct, IBlockFormat<V>
    {
        RoundedInputs.Round<V>(team, (byte*)scratch.Shared, input, MostRows, inWords: false);
        long panelBytes = panels.Type.RowBytes(panels.Columns) * V.Count;
        int panelCount = (panels.Rows + V.Count - 1) / V.Count;

        // What a task turns fits the scratch only if it is the fewest panels.
        int panelsTogether = rows.Length == 0 && (code != 0 || input.Rows == 1) ? PanelsTogether : 1;
        int panelsPerTask = WeightPanels.OfTask(panelBytes, panelCount, panelsTogether);
        MultiplyWork<V, F> work = new()
        {
            Scratch = scratch,
            Output = output,
            Rounded = (byte*)scratch.Shared,
            Rows = rows,
            Panels = (byte*)panels.Address,
            PanelBytes = (nint)panelBytes,
            PanelCount = panelCount,
            PanelsPerTask = panelsPerTask,
            PanelsTogether = panelsTogether,
            NextTask = team.Threads,
            Groups = panels.Columns / RoundedInputs.Group,
            Accumulate = accumulate,
            Code = code,
        };
        team.Run(ref work, (panelCount + panelsPerTask - 1) / panelsPerTask);
    }

    private struct MultiplyWork<V, F> : IWork
        where V : struct, ILanes<V>
        where F : struct, IBlockFormat<V>
    {
        public Scratch Scratch;
        public Tensor Output;
        public byte* Rounded;

        // In place of panels.
        public StoredRows[] Rows;
        public byte* Panels;
        public nint PanelBytes;
        public int PanelCount;
        public int PanelsPerTask;
        public int PanelsTogether;

        // The tasks from one that a thread begins to the next that it is likely to.
        public int NextTask;
        public int Groups;
        public bool Accumulate;

        // Of VnniBytes, or zero.
        public nint Code;

        [SkipLocalsInit]
        public readonly void Run(int task, int thread)
        {
            float* sums = stackalloc float[(Code == 0 ? 1 : PanelsTogether) * MostRows * V.Count];
            int first = task * PanelsPerTask;
            int end = Math.Min(PanelCount, first + PanelsPerTask);
            byte* ofTask = Rows.Length == 0 ? Panels + (first * PanelBytes) : Turned((byte*)Scratch.Of(thread), first, end);
            for (int row = 0; row < Output.Rows; row += MostRows)
            {
                int rows = Math.Min(MostRows, Output.Rows - row);
                byte* rounded = Rounded + ((nint)row * Groups * RoundedInputs.GroupBytes);
                int panels;
                for (int panel = first; panel < end; panel += panels)
                {
                    panels = Math.Min(PanelsTogether, end - panel);
                    byte* weights = ofTask + ((panel - first) * PanelBytes);
                    for (int p = 0; p < panels; p++)
                    {
                        Begin(sums + (p * rows * V.Count), row, rows, panel + p);
                    }

                    // What is read next: panels of this task, or of the next one that the thread is likely to claim.
                    int nextPanel = panel + panels < end || Rows.Length > 0 ? panel + panels : (task + NextTask) * PanelsPerTask;
                    nint next = (nextPanel - panel - 1) * PanelBytes;
                    if (Code != 0)
                    {
                        VnniBytes.Multiply(Code, sums, weights, PanelBytes, panels, rounded, Groups / F.Groups, rows, next);
                    }
                    else if (F.HasHalfScales)
                    {
                        Multiply<Halves>(sums, weights, panels, next, rounded, rows, rows > 1 ? rows : 0);
                    }
                    else if (F.FitsWords)
                    {
                        Multiply<Pairs>(sums, weights, panels, next, rounded, rows, rows & ~1);
                    }
                    else
                    {
                        Multiply<Singles>(sums, weights, panels, next, rounded, rows, rows > 1 ? rows : 0);
                    }

                    for (int p = 0; p < panels; p++)
                    {
                        Store(sums + (p * rows * V.Count), row, rows, panel + p);
                    }
                }
            }
        }

        // The panels of the task, once for all rows of inputs.
        private readonly byte* Turned(byte* turned, int first, int end)
        {
            for (int panel = first; panel < end; panel++)
            {
                byte* rows = WeightPanels.Rows<V>(Rows, PanelBytes / V.Count, panel, out nint step);
                WeightPanels.Turn<V>(turned + ((panel - first) * PanelBytes), rows, step, Groups / F.Groups, F.BlockBytes);
            }

            return turned;
        }

        // One row by panels, whose sums follow each other; or a panel by rows of a block, so many together and a last one.
        private readonly void Multiply<TRows>(float* sums, byte* weights, int panels, nint next, byte* rounded, int rows, int together)
        {
            if (together > 0)
            {
                MultiplyRows<TRows>(sums, weights, rounded, Groups, rows, together);
            }

            if (together < rows)
            {
                byte* last = rounded + (together * RoundedInputs.GroupBytes);
                MultiplyRow<TRows>(sums + (together * V.Count), weights, PanelBytes, panels, next, last, Groups, rows);
            }
        }

        // What products are added to; the panel may stick out.
        private readonly void Begin(float* sums, int row, int rows, int panel)
        {
            int column = panel * V.Count;
            int columns = Math.Min(V.Count, Output.Columns - column);
            for (int r = 0; r < rows; r++)
            {
                V.Create(0).Store(sums + (r * V.Count));
                if (Accumulate)
                {
                    Copy(sums + (r * V.Count), Output.F32(row + r) + column, columns);
                }
            }
        }

        private readonly void Store(float* sums, int row, int rows, int panel)
        {
            int column = panel * V.Count;
            int columns = Math.Min(V.Count, Output.Columns - column);
            for (int r = 0; r < rows; r++)
            {
                Copy(Output.F32(row + r) + column, sums + (r * V.Count), columns);
            }
        }

        private static void Copy(float* destination, float* source, int count) =>
            new ReadOnlySpan<float>(source, count).CopyTo(new Span<float>(destination, count));

        // One of so many rows that lie in a block, and panels: the bits of MultiplyRows.
        [SkipLocalsInit]
        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private static void MultiplyRow<TRows>(float* sums, byte* weights, nint panelBytes, int panels, nint next, byte* rounded, int groups, int rows)
        {
            byte* scales = stackalloc byte[4 * sizeof(float) * V.Count];
            nint nextGroup = rows * RoundedInputs.GroupBytes;
            int ahead = BlocksAhead(F.BlockBytes * V.Count);
            for (int done = 0; done < groups; done += F.Groups)
            {
                byte* block = weights;
                byte* fetched = weights + (ahead * F.BlockBytes * V.Count) + (groups - done > ahead * F.Groups ? 0 : next);
                float* sumOfPanel = sums;
                for (int p = 0; p < panels; p++, block += panelBytes, sumOfPanel += rows * V.Count)
                {
                    V sum = V.Load(sumOfPanel);
                    byte* x = rounded;
                    F.Units(block, scales, out V unit, out V offsetUnit);
                    for (int group = 0; group < F.Groups; group++, x += nextGroup)
                    {
                        Prefetch(fetched, (p * F.Groups) + group, panelBytes, panels);
                        V w0 = F.Bytes(block, group, 0);
                        V w1 = F.Bytes(block, group, 1);
                        V w2 = F.Bytes(block, group, 2);
                        V w3 = F.Bytes(block, group, 3);
                        if (typeof(TRows) == typeof(Halves))
                        {
                            F.HalfScales(block, group, out V first, out V second, out V both);
                            V a = AddHalf(Offset(both, x), w0, w1, w2, w3, x, first);
                            w0 = F.Bytes(block, group, 4);
                            w1 = F.Bytes(block, group, 5);
                            w2 = F.Bytes(block, group, 6);
                            w3 = F.Bytes(block, group, 7);
                            a = AddHalf(a, w0, w1, w2, w3, x + 16, second);
                            sum = AddScaled(sum, a, unit, x);
                        }
                        else
                        {
                            V a = Add(Add(default, w0, w1, x), w2, w3, x + 8);
                            w0 = F.Bytes(block, group, 4);
                            w1 = F.Bytes(block, group, 5);
                            w2 = F.Bytes(block, group, 6);
                            w3 = F.Bytes(block, group, 7);
                            a = Add(Add(a, w0, w1, x + 16), w2, w3, x + 24);
                            (V scale, V offset) = (unit, offsetUnit);
                            F.Scale(block, scales, group, ref scale, ref offset);
                            sum = AddScaled(sum, a, scale, offset, x);
                        }
                    }

                    sum.Store(sumOfPanel);
                }

                rounded += F.Groups * nextGroup;
                weights += F.BlockBytes * V.Count;
            }
        }

        // The first of so many rows, and one panel. Small enough for the JIT to inline all that it calls.
        [SkipLocalsInit]
        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private static void MultiplyRows<TRows>(float* sums, byte* weights, byte* rounded, int groups, int rows, int together)
        {
            byte* scales = stackalloc byte[4 * sizeof(float) * V.Count];
            nint lanes = V.Count;
            float* end = sums + (together * lanes);
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
                    (V scale, V offset) = (unit, offsetUnit);
                    F.Scale(weights, scales, group, ref scale, ref offset);
                    byte* x = rounded;
                    if (typeof(TRows) == typeof(Pairs))
                    {
                        for (float* sum = sums; sum < end; sum += 2 * lanes)
                        {
                            byte* y = x + RoundedInputs.GroupBytes;
                            V a = Add(default, w0, w1, x);
                            V b = Add(default, w0, w1, y);
                            a = Add(a, w2, w3, x + 8);
                            b = Add(b, w2, w3, y + 8);
                            a = Add(a, w4, w5, x + 16);
                            b = Add(b, w4, w5, y + 16);
                            a = Add(a, w6, w7, x + 24);
                            b = Add(b, w6, w7, y + 24);
                            AddScaled(V.Load(sum), a, scale, offset, x).Store(sum);
                            AddScaled(V.Load(sum + lanes), b, scale, offset, y).Store(sum + lanes);
                            x = y + RoundedInputs.GroupBytes;
                        }
                    }
                    else if (typeof(TRows) == typeof(Halves))
                    {
                        F.HalfScales(weights, group, out V first, out V second, out V both);
                        for (float* sum = sums; sum < end; sum += lanes)
                        {
                            V a = AddHalf(Offset(both, x), w0, w1, w2, w3, x, first);
                            a = AddHalf(a, w4, w5, w6, w7, x + 16, second);
                            AddScaled(V.Load(sum), a, unit, x).Store(sum);
                            x += RoundedInputs.GroupBytes;
                        }
                    }
                    else
                    {
                        for (float* sum = sums; sum < end; sum += lanes)
                        {
                            V a = Add(Add(default, w0, w1, x), w2, w3, x + 8);
                            a = Add(Add(a, w4, w5, x + 16), w6, w7, x + 24);
                            AddScaled(V.Load(sum), a, scale, offset, x).Store(sum);
                            x += RoundedInputs.GroupBytes;
                        }
                    }

                    rounded += rows * RoundedInputs.GroupBytes;
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

        // sum + scale · products + offset · Σ rounded, in units of the rounded inputs.
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static V AddScaled(V sum, V products, V scale, V offset, byte* rounded)
        {
            if (F.HasOffsets)
            {
                sum = V.Fma(offset, V.Create(((float*)(rounded + RoundedInputs.Group))[2]), sum);
            }

            V integers = F.FitsWords ? V.AddNeighbours(products) : products;
            if (F.Excess == 8)
            {
                integers = V.AddDwords(integers, Input(rounded + RoundedInputs.Group + (3 * sizeof(int))));
            }

            return AddScaled(sum, integers, scale, rounded);
        }

        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static V AddScaled(V sum, V products, V scale, byte* rounded) =>
            V.Fma(V.FromInt32(products), scale * V.Create(*(float*)(rounded + RoundedInputs.Group)), sum);

        // What bytes that are 32 too large have too much, times both scales of the group.
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static V Offset(V both, byte* rounded) => V.DwordProducts(Input(rounded + RoundedInputs.Group + sizeof(float)), both);

        // a plus the products of 16 elements by their scale: sums of eight fit int16, their multiples int32.
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static V AddHalf(V a, V w0, V w1, V w2, V w3, byte* x, V scale)
        {
            V b = V.AddWords(V.WordProducts(w0, Input(x)), V.WordProducts(w1, Input(x + 4)));
            V c = V.AddWords(V.WordProducts(w2, Input(x + 8)), V.WordProducts(w3, Input(x + 12)));
            return V.AddDwords(a, V.AddDwords(V.DwordProducts(b, scale), V.DwordProducts(c, scale)));
        }

        // What the kernels are compiled for: rows one after the other; by two in turns, so that one multiplies while the other adds
        // up, which needs products that add up in int16 or runs out of registers; scales of halves.
        private readonly struct Singles;

        private readonly struct Pairs;

        private readonly struct Halves;

        // What a task reads next lies in all its panels: a few bytes of each for each group that it multiplies.
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static void Prefetch(byte* fetched, int groupOfPanels, nint panelBytes, int panels)
        {
            if (Sse.IsSupported)
            {
                int bytes = F.BlockBytes / F.Groups * V.Count / QuantizedMatMul.PanelsTogether;
                fetched += groupOfPanels * bytes;
                for (int p = 0; p < panels; p++, fetched += panelBytes)
                {
                    Sse.Prefetch1(fetched);
                    if (bytes > 64)
                    {
                        Sse.Prefetch1(fetched + 64);
                    }
                }
            }
        }
    }
}
