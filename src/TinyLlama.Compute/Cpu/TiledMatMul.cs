using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// output (N, O) = input (N, I) · weightᵀ of many rows and a quantized weight, on AMX: <see cref="AmxBytes"/> multiplies 16 rows by 16
/// outputs at a time. Q8_0 and Q4_0 are multiplied where they lie; others are first unpacked to signed bytes and scales, once for many rows.
/// </summary>
/// <remarks>The bits are those of <see cref="QuantizedMatMul"/> and <see cref="Q8MatMul"/>.</remarks>
internal static unsafe class TiledMatMul
{
    /// <summary>The rows from which on this is faster than kernels that multiply row by row: a tile takes the time of sixteen.</summary>
    public const int LeastRows = 6;

    /// <summary>The same beside <see cref="VnniBytes"/>.</summary>
    public const int LeastRowsBesideVnni = 9;

    /// <summary>Bytes that <see cref="Scratch.Of"/> must hold.</summary>
    public const int ThreadBytes = SumsBytes + WeightsBytes + AmxBytes.WaitingBytes + TurnedBytes;

    // Rows whose sums of a task stay in the second cache.
    private const int MostRows = 256;

    // Panels of a task.
    private const int MostPanels = AmxBytes.Tiles;

    // Groups that are unpacked at once, a block or more: those of the panels stay in the first cache. Few rows take half as many, as they
    // unpack as often as they multiply: stores that leave that cache, which another hyperthread may share, hold up both.
    private const int MostGroups = 8;

    // How far ahead groups are fetched that are multiplied where they lie. Those that many rows pass by wait for memory with the first rows.
    private const int GroupsAhead = 8;

    // So few wait for memory. More write so many sums that those would leave the caches before anybody reads them: they pass these by.
    private const int FewRows = 32;

    private const int TileElements = AmxBytes.TileBytes / sizeof(float);

    private const int SumsBytes = MostPanels * MostRows * AmxBytes.Rows * sizeof(float);
    private const int WeightsBytes = MostPanels * MostGroups * AmxBytes.MostWeightBytes;
    private const int TurnedBytes = MostGroups * Q8MatMul.BlockBytes * AmxBytes.Rows;

    /// <summary>output (N, O) = or += input (N, I) · weightᵀ.</summary>
    public static void Forward(ThreadTeam team, Scratch scratch, Tensor output, Tensor input, Weight weight, bool accumulate)
    {
        switch (weight.Type)
        {
            case DType.Q8_0:
                Forward<Q8Format<Lanes512>>(team, scratch, output, input, weight, accumulate);
                break;
            case DType.Q4_0:
                Forward<Q4Format<Lanes512>>(team, scratch, output, input, weight, accumulate);
                break;
            case DType.Q4_1:
                Forward<Q41Format<Lanes512>>(team, scratch, output, input, weight, accumulate);
                break;
            case DType.Q5_0:
                Forward<Q5Format<Lanes512>>(team, scratch, output, input, weight, accumulate);
                break;
            case DType.Q5_1:
                Forward<Q51Format<Lanes512>>(team, scratch, output, input, weight, accumulate);
                break;
            case DType.Q4_K:
                Forward<Q4KFormat<Lanes512>>(team, scratch, output, input, weight, accumulate);
                break;
            case DType.Q5_K:
                Forward<Q5KFormat<Lanes512>>(team, scratch, output, input, weight, accumulate);
                break;
            case DType.Q6_K:
                Forward<Q6KFormat<Lanes512>>(team, scratch, output, input, weight, accumulate);
                break;
            default:
                throw new ArgumentOutOfRangeException(nameof(weight), weight.Type, "not a quantized type");
        }
    }

    private static void Forward<F>(ThreadTeam team, Scratch scratch, Tensor output, Tensor input, Weight weight, bool accumulate)
        where F : struct, IBlockFormat<Lanes512>
    {
        Shape.Require(input.Columns <= RoundedInputs.MaxElements / MostRows, "rows of inputs that fit the scratch");
        int panelCount = (weight.Outputs + Lanes512.Count - 1) / Lanes512.Count;
        for (int row = 0; row < input.Rows; row += MostRows)
        {
            int count = Math.Min(MostRows, input.Rows - row);
            RoundedInputs.RoundTiles(team, (byte*)scratch.Shared, input.RowRange(row, count));
            MultiplyWork<F> work = new()
            {
                Scratch = scratch,
                Output = output.RowRange(row, count),
                Rounded = (byte*)scratch.Shared,
                Rows = weight.Type == DType.Q8_0 || weight.IsInPlace ? weight.Rows : [],
                Panels = (byte*)weight.PackedForward.Address,
                RowBytes = (nint)weight.Type.RowBytes(weight.Inputs),
                PanelCount = panelCount,
                Groups = weight.Inputs / RoundedInputs.Group,
                NextTask = team.Threads,
                Accumulate = accumulate,
            };
            team.Run(ref work, (panelCount + MostPanels - 1) / MostPanels);
        }
    }

    private struct MultiplyWork<F> : IWork
        where F : struct, IBlockFormat<Lanes512>
    {
        public Scratch Scratch;
        public Tensor Output;
        public byte* Rounded;

        // Until they are packed; else there are panels.
        public StoredRows[] Rows;
        public byte* Panels;
        public nint RowBytes;
        public int PanelCount;
        public int Groups;

        // How many tasks further this thread's next one will be, most likely.
        public int NextTask;
        public bool Accumulate;

        // What is multiplied where it lies, in whole tasks.
        private static AmxBytes.Kind? Stored =>
            typeof(F) == typeof(Q8Format<Lanes512>) ? AmxBytes.Kind.Stored
            : typeof(F) == typeof(Q4Format<Lanes512>) ? AmxBytes.Kind.Nibbles
            : null;

        // What weights are unpacked to.
        private static AmxBytes.Kind Unpacked =>
            F.HasHalfScales ? AmxBytes.Kind.Halves : F.HasOffsets ? AmxBytes.Kind.Offsets : AmxBytes.Kind.Unpacked;

        public readonly void Run(int task, int thread)
        {
            float* sums = Scratch.Of(thread);
            byte* weights = (byte*)sums + SumsBytes;
            byte* waiting = weights + WeightsBytes;
            byte* turned = waiting + AmxBytes.WaitingBytes;
            int first = task * MostPanels;
            int panels = Math.Min(MostPanels, PanelCount - first);
            int blocks = (Output.Rows + AmxBytes.Rows - 1) / AmxBytes.Rows;
            bool areFew = Output.Rows <= FewRows;
            AmxBytes.Kind kind = Rows.Length == 0 && panels == MostPanels ? Stored ?? Unpacked : Unpacked;
            bool areStored = kind != Unpacked;
            nint nextPanel = areStored ? RowBytes * Lanes512.Count : MostGroups * AmxBytes.WeightBytes(kind);
            int groupsAtOnce =
                areStored ? Math.Max(Groups - GroupsAhead, GroupsAhead)
                : areFew ? Math.Max(MostGroups / 2, F.Groups)
                : MostGroups;
            AmxBytes.Configure(kind);
            for (int group = 0; group < Groups; group += groupsAtOnce)
            {
                int groups = Math.Min(groupsAtOnce, Groups - group);
                byte* operands = areStored ? Blocks(turned, first, group, groups) : weights;
                for (int panel = 0; panel < panels && !areStored; panel++)
                {
                    Unpack(weights + (panel * nextPanel), Blocks(turned, first + panel, group, groups), groups);
                }

                nint blockBytes = (nint)Groups * AmxBytes.InputBytes;
                byte* inputs = Rounded + (group * AmxBytes.InputBytes);
                for (int block = 0; block < blocks; block += 2, inputs += 2 * blockBytes)
                {
                    bool isPair = block + 1 < blocks;
                    float* ofBlock = sums + (block * MostPanels * TileElements);
                    if (group == 0)
                    {
                        Begin(ofBlock, block, isPair, first, panels);
                    }

                    if (areFew && group + groups == Groups)
                    {
                        Fetch(block, first);
                    }

                    for (int panel = 0; panel < panels; panel += isPair ? 2 : MostPanels)
                    {
                        bool waits = areFew || (areStored && block == 0);
                        AmxBytes.Ahead ahead = waits ? Ahead(first + panel, group + (areStored ? GroupsAhead : groups)) : default;
                        AmxBytes.Multiply(
                            kind, ofBlock + (Tile(panel, 0, isPair) * TileElements), inputs, isPair ? blockBytes : 0,
                            operands + (panel * nextPanel), nextPanel, groups, waiting, ahead);
                    }

                    if (group + groups == Groups)
                    {
                        End(ofBlock, block, isPair, first, panels);
                    }
                }
            }

            Amx.Release();

            // What passes by the caches is visible to threads that read it next.
            Sse.StoreFence();
        }

        // Which of the tiles of a block or a pair of blocks has its sums of a panel: tiles that are multiplied at once follow each other.
        // Panels that the last task lacks have tiles too, of whatever lies there, which nobody reads.
        private static int Tile(int panel, int second, bool isPair) => isPair ? (panel / 2 * 4) + (second * 2) + (panel % 2) : panel;

        // Groups of a panel; those of rows are turned.
        private readonly byte* Blocks(byte* turned, int panel, int group, int groups)
        {
            nint offset = group / F.Groups * F.BlockBytes;
            if (Rows.Length == 0)
            {
                return Panels + (((panel * RowBytes) + offset) * Lanes512.Count);
            }

            byte* rows = WeightPanels.Rows<Lanes512>(Rows, RowBytes, panel, out nint step);
            WeightPanels.Turn<Lanes512>(turned, rows + offset, step, groups, F.BlockBytes);
            return turned;
        }

        // What is read next of panels, after their last groups those of the next task. Rows lie in too many places.
        private readonly AmxBytes.Ahead Ahead(int panel, int group)
        {
            if (group >= Groups)
            {
                (panel, group) = (panel + (NextTask * MostPanels), group - Groups);
            }

            return Rows.Length > 0 ? default : new(
                (nint)(Panels + (((panel * RowBytes) + (group / F.Groups * F.BlockBytes)) * Lanes512.Count)),
                RowBytes * Lanes512.Count,
                F.BlockBytes * Lanes512.Count / F.Groups);
        }

        [SkipLocalsInit]
        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private static void Unpack(byte* destination, byte* blocks, int groups)
        {
            byte* scales = stackalloc byte[4 * sizeof(float) * Lanes512.Count];
            nint weightBytes = AmxBytes.WeightBytes(Unpacked);
            for (int done = 0; done < groups; done += F.Groups, blocks += F.BlockBytes * Lanes512.Count)
            {
                F.Units(blocks, scales, out Lanes512 unit, out Lanes512 offsetUnit);
                for (int group = 0; group < F.Groups; group++, destination += weightBytes)
                {
                    float* place = (float*)destination;
                    Bytes(blocks, group, 0).Store(place);
                    Bytes(blocks, group, 1).Store(place + Lanes512.Count);
                    Bytes(blocks, group, 2).Store(place + (2 * Lanes512.Count));
                    Bytes(blocks, group, 3).Store(place + (3 * Lanes512.Count));
                    Bytes(blocks, group, 4).Store(place + (4 * Lanes512.Count));
                    Bytes(blocks, group, 5).Store(place + (5 * Lanes512.Count));
                    Bytes(blocks, group, 6).Store(place + (6 * Lanes512.Count));
                    Bytes(blocks, group, 7).Store(place + (7 * Lanes512.Count));
                    (Lanes512 scale, Lanes512 offset) = (unit, offsetUnit);
                    F.Scale(blocks, scales, group, ref scale, ref offset);
                    scale.Store(place + (8 * Lanes512.Count));
                    if (F.HasHalfScales)
                    {
                        F.HalfScales(blocks, group, out Lanes512 first, out Lanes512 second, out _);
                        Whole(first).Store(place + (9 * Lanes512.Count));
                        Whole(second).Store(place + (10 * Lanes512.Count));
                    }
                    else if (F.HasOffsets)
                    {
                        offset.Store(place + (9 * Lanes512.Count));
                    }
                }
            }
        }

        // As signed bytes; constants for i let the JIT fold what depends on it.
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static Lanes512 Bytes(byte* block, int group, int i)
        {
            Lanes512 bytes = F.Bytes(block, group, i);
            return F.Excess == 0 ? bytes : new((bytes.Value.AsSByte() - Vector512.Create((sbyte)F.Excess)).AsSingle());
        }

        // A scale that stands twice in its dword.
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static Lanes512 Whole(Lanes512 scales) => Lanes512.FromInt32(Lanes512.DwordProducts(scales, Lanes512.CreateDword(1)));

        // What products are added to.
        private readonly void Begin(float* sums, int block, bool isPair, int first, int panels)
        {
            new Span<float>(sums, (isPair ? 2 : 1) * MostPanels * TileElements).Clear();
            if (Accumulate)
            {
                Copy(sums, block, isPair, first, panels, isBegin: true);
            }
        }

        // Where sums will go, while the last products are added.
        private readonly void Fetch(int block, int first)
        {
            int end = Math.Min(Output.Rows, (block + 2) * AmxBytes.Rows);
            for (int row = block * AmxBytes.Rows; row < end; row++)
            {
                float* place = Output.F32(row) + (first * Lanes512.Count);
                for (int panel = 0; panel < MostPanels; panel++)
                {
                    Sse.Prefetch1(place + (panel * Lanes512.Count));
                }
            }
        }

        private readonly void End(float* sums, int block, bool isPair, int first, int panels) =>
            Copy(sums, block, isPair, first, panels, isBegin: false);

        // Between sums and output, row after row: what a row has in all panels lies together. The last panel may stick out.
        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private readonly void Copy(float* sums, int block, bool isPair, int first, int panels, bool isBegin)
        {
            int column = first * Lanes512.Count;
            int columns = Math.Min(panels * Lanes512.Count, Output.Columns - column);
            bool isStreamed = Output.Rows > FewRows && (Output.Address & 63) == 0 && Output.Stride % 16 == 0;
            for (int second = 0; second <= (isPair ? 1 : 0); second++)
            {
                int firstRow = (block + second) * AmxBytes.Rows;
                int rows = Math.Min(AmxBytes.Rows, Output.Rows - firstRow);
                for (int row = 0; row < rows; row++)
                {
                    float* place = Output.F32(firstRow + row) + column;
                    float* ofRow = sums + (row * Lanes512.Count);
                    for (int panel = 0; panel < panels; panel++)
                    {
                        float* sum = ofRow + (Tile(panel, second, isPair) * TileElements);
                        float* element = place + (panel * Lanes512.Count);
                        int count = columns - (panel * Lanes512.Count);
                        if (isBegin)
                        {
                            Copy(sum, element, count);
                        }
                        else if (isStreamed && count >= Lanes512.Count)
                        {
                            Vector512.LoadAligned(sum).StoreAlignedNonTemporal(element);
                        }
                        else
                        {
                            Copy(element, sum, count);
                        }
                    }
                }
            }
        }

        // A register, or what is left.
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static void Copy(float* destination, float* source, int count)
        {
            if (count >= Lanes512.Count)
            {
                Lanes512.Load(source).Store(destination);
            }
            else
            {
                new ReadOnlySpan<float>(source, count).CopyTo(new Span<float>(destination, count));
            }
        }
    }
}
