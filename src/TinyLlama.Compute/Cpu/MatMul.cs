using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Runtime.Intrinsics.X86;
using TinyLlama.Compute.Native;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// The matrix products of a linear layer: output = input · weightᵀ, and backward dInput = dOutput · weight and
/// dWeight += dOutputᵀ · input. One driver with three ways to read its operands, for operands in fp32 or rounded to bfloat16.
/// </summary>
/// <remarks>
/// After Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), and BLIS: the right operand
/// lies in panels (see <see cref="ITile"/>), block of k after block of k, panel after panel; a task owns a block of the
/// result and walks k in blocks: it copies a block of the left operand next to each other, which stays in the second
/// cache, and multiplies it by panel after panel, each of which stays in the first cache while the rows pass by; they
/// fetch the next one meanwhile. Where the left operand is the transpose of a tensor, it is packed like the right one,
/// in tiles of rows.
/// Blocks depend on the shape alone, and blocks of k on k alone: neither the number of threads nor the number of rows
/// changes a bit of a row, nor does it matter who packed the right operand, when.
/// Blocks, panels and tiles count steps: the dwords that a tile reads at once, one k of fp32 or a pair of k of bfloat16.
/// Operands are rounded where they are packed or copied; sums are fp32 throughout.
/// </remarks>
internal static unsafe class MatMul
{
    /// <summary>Dwords of packed operands that <see cref="Scratch.Shared"/> must hold.</summary>
    public const int SharedCount = MaxPanels + MaxTiles;

    /// <summary>Dwords of a block of the left operand and of panels that <see cref="Scratch.Of"/> must hold.</summary>
    public const int ThreadCount = MaxBlock + (PanelsTogether * MaxBlockSteps * MaxColumns);

    // Dwords of each operand that are packed at once: 31 MiB and 1 MiB.
    private const int MaxPanels = 31 << 18;
    private const int MaxTiles = 1 << 18;

    // A panel of so many steps takes 24 of 32 KiB of a first cache (AVX2), a block of the left operand a quarter of 512 KiB
    // of a second; half of it where a step has two dwords.
    private const int MaxBlockSteps = 384;
    private const int MaxBlockRows = 88;

    // Dwords of a block of the left operand.
    private const int MaxBlock = MaxBlockRows * ((2 * MaxBlockSteps) + RowPadding);

    // Panels that one row is multiplied by together.
    private const int PanelsTogether = 4;

    // The widest panel, and the largest tile, of any width.
    private const int MaxColumns = 32;
    private const int MaxTileCount = 32 * 32;

    // Rows of the copied block start at different places of the first cache.
    private const int RowPadding = 16;

    // Panels for one sweep over the rows: their share of the last cache.
    private const long MaxSweepBytes = 8 << 20;

    // Sums that are added to in several sweeps, not in one: they cost less than the panels of a sweep.
    private const long FewSumsBytes = MaxSweepBytes / 4;

    // Tasks to aim at, so that many threads have some each, and products below which a task is not worth its claim.
    private const int FewestTasks = 16;
    private const long FewestProducts = 32768;

    /// <summary>Room for a right operand in panels.</summary>
    public static Tensor TakePacked<T>(Arena arena, int columns, int depth)
        where T : struct, ITile =>
        arena.Take(1, checked(RoundUp(columns, T.Columns) * Steps<T>(depth) * StepDepth<T>()), T.Type);

    /// <summary>Room for a right operand of 16-bit floats in panels of pairs.</summary>
    public static Tensor TakePairs<V>(Arena arena, int columns, int depth)
        where V : struct, ILanes<V> =>
        TakePacked<Tile<V>>(arena, columns, depth / 2);

    /// <summary>Fills the packed forms of a weight that have room.</summary>
    public static void Pack<T>(ThreadTeam team, Weight weight)
        where T : struct, IPackingTile
    {
        Tensor values = weight.Values;
        if (!weight.PackedForward.IsEmpty)
        {
            Pack<T>(team, Panels(weight.PackedForward), Matrix.Transposed(values), values.Rows, values.Columns, BlockSteps<T>(values.Columns), tiles: false);
        }

        if (!weight.PackedBackward.IsEmpty)
        {
            Pack<T>(team, Panels(weight.PackedBackward), Matrix.Of(values), values.Columns, values.Rows, BlockSteps<T>(values.Rows), tiles: false);
        }
    }

    /// <summary>Packs rows of a frozen weight for the forward.</summary>
    /// <param name="team">The threads.</param>
    /// <param name="weight">The weight.</param>
    /// <param name="firstRow">The first row: it begins a panel.</param>
    /// <param name="rows">Rows in the weight's type; they end a panel, or the weight.</param>
    public static void PackRows<T>(ThreadTeam team, Weight weight, int firstRow, ReadOnlySpan<byte> rows)
        where T : struct, IPackingTile
    {
        int inputs = weight.Inputs;
        int count = RequireRows<T>(weight, firstRow, rows);
        float* values = (float*)NativeMemory.Alloc((nuint)count * (nuint)inputs, sizeof(float));
        try
        {
            fixed (byte* source = rows)
            {
                WidenWork widen = new() { Values = values, Source = source, Type = weight.Type, Inputs = inputs, RowBytes = rows.Length / Math.Max(1, count) };
                team.Run(ref widen, count);
            }

            Matrix matrix = new(values, 1, inputs);
            Pack<T>(team, Panels(weight.PackedForward), matrix, count, inputs, BlockSteps<T>(inputs), tiles: false, firstRow, weight.Outputs);
        }
        finally
        {
            NativeMemory.Free(values);
        }
    }

    /// <summary>Packs rows of a frozen weight of 16-bit floats for the forward: their pairs are dwords, moved as they are.</summary>
    /// <param name="team">The threads.</param>
    /// <param name="scratch">Room for the panels of a thread.</param>
    /// <param name="weight">The weight; its inputs are even.</param>
    /// <param name="firstRow">The first row: it begins a panel.</param>
    /// <param name="rows">Rows in the weight's type; they end a panel, or the weight. What may be compact by now cannot be packed again.</param>
    public static void PackPairs<V, T>(ThreadTeam team, Scratch scratch, Weight weight, int firstRow, ReadOnlySpan<byte> rows)
        where V : struct, ILanes<V>
        where T : struct, ITile
    {
        int pairs = weight.Inputs / 2;
        int count = RequireRows<Tile<V>>(weight, firstRow, rows);
        int before = weight.RowsInOrder;
        Shape.Require(!T.HasCompactPanels || firstRow >= before, "rows that have not been packed");
        fixed (byte* source = rows)
        {
            Matrix matrix = new((float*)source, 1, pairs);
            Pack<Tile<V>>(team, Panels(weight.PackedForward), matrix, count, pairs, BlockSteps<T>(weight.Inputs), tiles: false, firstRow, weight.Outputs);
        }

        // Rows come one after the other; panels of others stay as they are.
        weight.RowsInOrder += firstRow == before ? count : 0;
        Compact<T>(team, scratch, weight, before, weight.RowsInOrder);
    }

    /// <summary>Whether <see cref="ForwardPairs"/> reads rows where they lie.</summary>
    public static bool ReadsPairs<V>(StoredRows rows)
        where V : struct, ILanes<V> => rows.IsRegular(Tile<V>.Columns);

    /// <summary>Packs a weight of 16-bit floats in place for the forward, and drops its pages.</summary>
    public static void PackPairs<V, T>(ThreadTeam team, Scratch scratch, Weight weight)
        where V : struct, ILanes<V>
        where T : struct, ITile
    {
        int pairs = weight.Inputs / 2;
        int firstRow = 0;
        foreach (StoredRows rows in weight.Rows)
        {
            // Rows that are equally far from each other: all, or half a head.
            int together = rows.HeadDim == 0 ? rows.Count : rows.HeadDim / 2;
            for (int row = 0; row < rows.Count; row += together)
            {
                Pack<Tile<V>>(
                    team, Panels(weight.PackedForward), Matrix.Stored(rows, row, pairs), together, pairs, BlockSteps<T>(weight.Inputs), tiles: false,
                    firstRow + row, weight.Outputs);
            }

            PageMemory.DropFilePages(rows.Address, rows.Count * (long)pairs * sizeof(float));
            firstRow += rows.Count;
        }

        Compact<T>(team, scratch, weight, 0, weight.Outputs);
    }

    /// <summary>output (N, O) = or += input (N, I) · weightᵀ of a weight in pairs, by a tile of panels of such registers.</summary>
    public static void ForwardPairs<V, T>(ThreadTeam team, Scratch scratch, Tensor output, Tensor input, Weight weight, bool accumulate)
        where V : struct, ILanes<V>
        where T : struct, ITile
    {
        if (!output.IsEmpty)
        {
            Multiply<T>(
                team, scratch, output, Matrix.Of(input), null, Panels(weight.PackedForward), input.Columns, BlockSteps<T>(input.Columns), accumulate,
                weight.IsInPlace ? weight.Rows : null, &Tile<V>.Pack, weight.IsInPlace ? null : weight.CompactPanels);
        }
    }

    /// <summary>output (N, O) = or += input (N, I) · weightᵀ.</summary>
    public static void Forward<T>(ThreadTeam team, Scratch scratch, Tensor output, Tensor input, Weight weight, bool accumulate)
        where T : struct, IPackingTile =>
        Run<T>(team, scratch, output, Matrix.Of(input), Matrix.Transposed(weight.Values), weight.PackedForward, input.Columns, accumulate);

    /// <summary>dInput (N, I) = or += dOutput (N, O) · weight.</summary>
    public static void BackwardInput<T>(ThreadTeam team, Scratch scratch, Tensor dInput, Tensor dOutput, Weight weight, bool accumulate)
        where T : struct, IPackingTile =>
        Run<T>(team, scratch, dInput, Matrix.Of(dOutput), Matrix.Of(weight.Values), weight.PackedBackward, dOutput.Columns, accumulate);

    /// <summary>dWeight (O, I) += dOutputᵀ · input, dOutput (N, O), input (N, I).</summary>
    public static void BackwardWeight<T>(ThreadTeam team, Scratch scratch, Tensor dWeight, Tensor dOutput, Tensor input)
        where T : struct, IPackingTile =>
        Run<T>(team, scratch, dWeight, Matrix.Transposed(dOutput), Matrix.Of(input), default, input.Rows, accumulate: true);

    // Makes panels compact whose last row is among those, if their numbers allow it.
    private static void Compact<T>(ThreadTeam team, Scratch scratch, Weight weight, int firstRow, int endRow)
        where T : struct, ITile
    {
        int first = firstRow / (PanelsTogether * T.Columns);
        int end = endRow / (PanelsTogether * T.Columns);
        if (!T.HasCompactPanels || first >= end)
        {
            return;
        }

        CompactWork<T> work = new()
        {
            Scratch = scratch,
            Panels = Panels(weight.PackedForward),
            PanelCount = (weight.Outputs + T.Columns - 1) / T.Columns,
            FirstGroup = first,
            Steps = Steps<T>(weight.Inputs),
            BlockSteps = BlockSteps<T>(weight.Inputs),
        };
        int groups = work.PanelCount / PanelsTogether;
        work.AreCompact = weight.CompactPanels ??= new bool[(work.Steps + work.BlockSteps - 1) / work.BlockSteps * groups];
        team.Run(ref work, end - first);
        weight.UnreadBytes = 0;
        for (int step = 0; step < work.Steps; step += work.BlockSteps)
        {
            int steps = Math.Min(work.BlockSteps, work.Steps - step);
            nint unread = PanelsTogether * (((nint)steps * T.Columns) - T.CompactSize(steps)) * sizeof(float);
            weight.UnreadBytes += work.AreCompact.AsSpan(step / work.BlockSteps * groups, groups).Count(true) * unread;
        }
    }

    // The number of rows.
    private static int RequireRows<T>(Weight weight, int firstRow, ReadOnlySpan<byte> rows)
        where T : struct, ITile
    {
        int rowBytes = checked((int)weight.Type.RowBytes(weight.Inputs));
        int count = rows.Length / rowBytes;
        Shape.Require(
            rows.Length % rowBytes == 0 && count <= weight.Outputs - firstRow && (count % T.Columns == 0 || firstRow + count == weight.Outputs),
            "whole rows of the weight that fill panels");
        return count;
    }

    private static void Run<T>(
        ThreadTeam team, Scratch scratch, Tensor sums, Matrix left, Matrix right, Tensor packed, int depth, bool accumulate)
        where T : struct, IPackingTile
    {
        if (sums.IsEmpty || (depth == 0 && accumulate))
        {
            return;
        }

        Shape.Require(depth > 0, "at least one product for each sum");
        int blockSteps = BlockSteps<T>(depth);
        if (!packed.IsEmpty)
        {
            // Few sums of many products: some blocks of k at once, so that tasks of other columns still find their rows in a cache.
            int width = RoundUp(sums.Columns, T.Columns);
            int stepsAtOnce = (long)sums.Count * sizeof(float) > FewSumsBytes ? Steps<T>(depth)
                : Math.Max(1, (int)(MaxSweepBytes / sizeof(float) / width) / blockSteps) * blockSteps;
            for (int step = 0; step < Steps<T>(depth); step += stepsAtOnce)
            {
                int first = step * StepDepth<T>();
                int count = Math.Min(stepsAtOnce * StepDepth<T>(), depth - first);
                Multiply<T>(
                    team, scratch, sums, left.From(0, first), null, Panels(packed) + ((nint)step * width), count, blockSteps, accumulate || step > 0);
            }

            return;
        }

        // Whole blocks of k of as many columns as fit. Where rows must be packed too, few blocks of few rows: what is packed
        // should still be in a cache when it is multiplied.
        bool packLeft = left.Column != 1;
        int columnsAtOnce = Math.Min(sums.Columns, MaxPanels / blockSteps / T.Columns * T.Columns);
        int rowsAtOnce = packLeft ? Math.Min(sums.Rows, MaxTiles / (blockSteps * T.LeftDwords) / T.Rows * T.Rows) : sums.Rows;
        int blocksAtOnce = MaxPanels / RoundUp(columnsAtOnce, T.Columns) / blockSteps;
        if (packLeft)
        {
            blocksAtOnce = Math.Clamp(MaxTiles / (RoundUp(rowsAtOnce, T.Rows) * T.LeftDwords) / blockSteps, 1, blocksAtOnce);
        }

        int depthAtOnce = checked(blocksAtOnce * blockSteps * StepDepth<T>());
        float* panels = scratch.Shared;
        float* tiles = packLeft ? panels + MaxPanels : null;
        for (int column = 0; column < sums.Columns; column += columnsAtOnce)
        {
            Tensor columns = sums.ColumnRange(column, Math.Min(columnsAtOnce, sums.Columns - column));
            for (int first = 0; first < depth; first += depthAtOnce)
            {
                int count = Math.Min(depthAtOnce, depth - first);
                Pack<T>(team, panels, right.From(first, column), columns.Columns, count, blockSteps, tiles: false);
                for (int row = 0; row < sums.Rows; row += rowsAtOnce)
                {
                    Tensor range = columns.RowRange(row, Math.Min(rowsAtOnce, sums.Rows - row));
                    if (packLeft)
                    {
                        Pack<T>(team, tiles, left.From(row, first).Transposed(), range.Rows, count, blockSteps, tiles: true);
                    }

                    Multiply<T>(team, scratch, range, left.From(row, first), tiles, panels, count, blockSteps, accumulate || first > 0);
                }
            }
        }
    }

    private static int RoundUp(int count, int unit) => checked(count + unit - 1) / unit * unit;

    private static float* Panels(Tensor packed) => (float*)packed.Address;

    /// <summary>The k of a step.</summary>
    public static int StepDepth<T>()
        where T : struct, ITile => sizeof(float) / T.Type.ByteCount();

    /// <summary>The steps of so many k.</summary>
    public static int Steps<T>(int depth)
        where T : struct, ITile => (depth + StepDepth<T>() - 1) / StepDepth<T>();

    // Blocks of as many steps each, so that the last is not a sliver.
    private static int BlockSteps<T>(int depth)
        where T : struct, ITile
    {
        int steps = Steps<T>(depth);
        int blocks = (steps + MaxBlockSteps - 1) / MaxBlockSteps;
        return Math.Min(MaxBlockSteps, RoundUp((steps + blocks - 1) / blocks, T.StepUnit));
    }

    // For each block of k, panel after panel, or tile after tile of the left operand, whose rows are then the columns of
    // the source: far strides would meet in the same few lines of a cache.
    // The columns may be some of more, from the first of a panel on.
    private static void Pack<T>(
        ThreadTeam team, float* panels, Matrix source, int columns, int depth, int blockSteps, bool tiles, int firstColumn = 0, int allColumns = 0)
        where T : struct, IPackingTile
    {
        int width = tiles ? T.Rows : T.Columns;
        int panelCount = (columns + width - 1) / width;
        int panelsPerBlock = (Math.Max(columns, allColumns) + width - 1) / width;

        // Columns side by side are read row by row, some rows a task; columns that are rows are read panel by panel.
        bool sideBySide = source.Column == 1;
        int steps = Steps<T>(depth);
        int stepsPerTask = sideBySide ? RoundUp(Math.Max(1, 8192 / columns), T.StepUnit) : steps;
        PackWork<T> work = new()
        {
            Panels = panels,
            Source = source,
            Columns = columns,
            Depth = depth,
            Steps = steps,
            Tiles = tiles,
            Width = width,
            PanelStep = tiles ? width * T.LeftDwords : width,
            FirstPanel = firstColumn / width,
            PanelsPerBlock = panelsPerBlock,
            StepsPerTask = stepsPerTask,
            BlockSteps = blockSteps,
            StepsAtOnce = sideBySide ? T.StepUnit : blockSteps,
            PanelsPerTask = sideBySide ? panelCount : 1,
            PanelTasks = sideBySide ? 1 : panelCount,
        };
        team.Run(ref work, work.PanelTasks * ((steps + stepsPerTask - 1) / stepsPerTask));
    }

    private static void Multiply<T>(
        ThreadTeam team, Scratch scratch, Tensor sums, Matrix left, float* tiles, float* panels, int depth, int blockSteps, bool accumulate,
        StoredRows[]? rows = null, delegate*<float*, float*, nint, nint, int, nint, void> pack = null, bool[]? areCompact = null)
        where T : struct, ITile
    {
        int tileRows = (sums.Rows + T.Rows - 1) / T.Rows;
        int panelCount = (sums.Columns + T.Columns - 1) / T.Columns;

        // Multiples of four: two, four and more threads get equal shares.
        int tilesPerBlock = MaxBlockRows / T.Rows;
        int rowBlocks = (tileRows + tilesPerBlock - 1) / tilesPerBlock;
        rowBlocks = rowBlocks > 4 ? Math.Min(tileRows, (rowBlocks + 3) & -4) : rowBlocks;

        int steps = Steps<T>(depth);
        long products = (long)sums.Rows * sums.Columns * depth;
        long sweeps = (((long)panelCount * T.Columns * steps * sizeof(float)) + MaxSweepBytes - 1) / MaxSweepBytes;
        long shares = Math.Min((FewestTasks + rowBlocks - 1) / rowBlocks, Math.Min(panelCount / 4, products / FewestProducts / rowBlocks));
        int columnBlocks = (int)Math.Min(panelCount, Math.Max(1, Math.Max(sweeps, shares)));

        MultiplyWork<T> work = new()
        {
            Scratch = scratch,
            Sums = sums.F32(),
            SumsRow = sums.Stride,
            Left = left,
            Tiles = tiles,
            Panels = panels,
            Rows = sums.Rows,
            Columns = sums.Columns,
            Depth = depth,
            Steps = steps,
            BlockSteps = blockSteps,
            Accumulate = accumulate,
            RowBlocks = rowBlocks,
            ColumnBlocks = columnBlocks,
            TileRows = tileRows,
            PanelCount = panelCount,
            NextTask = team.Threads,
            StoredRows = rows,
            Pack = pack,
            AreCompact = areCompact,
        };
        team.Run(ref work, rowBlocks * columnBlocks);
    }

    /// <summary>An operand as (row, column) of the product: element (i, j) at <c>First[i · Row + j · Column]</c>.</summary>
    private readonly struct Matrix(float* first, nint row, nint column)
    {
        public readonly float* First = first;
        public readonly nint Row = row;
        public readonly nint Column = column;

        public static Matrix Of(Tensor tensor) => new(tensor.F32(), tensor.Stride, 1);

        // Rows in place of so many dwords, from a row on, as columns.
        public static Matrix Stored(StoredRows rows, int row, int dwords)
        {
            (nint address, nint step) = rows.At(row, (nint)dwords * sizeof(float));
            return new((float*)address, 1, step / sizeof(float));
        }

        public static Matrix Transposed(Tensor tensor) => new(tensor.F32(), 1, tensor.Stride);

        public Matrix Transposed() => new(First, Column, Row);

        public Matrix From(int row, int column) => new(At(row, column), Row, Column);

        public float* At(int row, int column) => First + (row * Row) + (column * Column);
    }

    private struct WidenWork : IWork
    {
        public float* Values;
        public byte* Source;
        public DType Type;
        public int Inputs;
        public int RowBytes;

        public readonly void Run(int task, int thread) =>
            Copy.Widen(Values + ((nint)task * Inputs), Source + ((nint)task * RowBytes), Type, Inputs);
    }

    private struct PackWork<T> : IWork
        where T : struct, IPackingTile
    {
        public float* Panels;
        public Matrix Source;
        public int Columns;
        public int Depth;
        public int Steps;
        public bool Tiles;
        public int Width;
        public int PanelStep;
        public int FirstPanel;
        public int PanelsPerBlock;
        public int BlockSteps;
        public int StepsPerTask;
        public int StepsAtOnce;
        public int PanelsPerTask;
        public int PanelTasks;

        public readonly void Run(int task, int thread)
        {
            int firstStep = task / PanelTasks * StepsPerTask;
            int endStep = Math.Min(Steps, firstStep + StepsPerTask);
            int firstPanel = task % PanelTasks * PanelsPerTask;

            // A few steps of all panels, then the next: rows of the source are read while they are at hand.
            for (int step = firstStep; step < endStep; step += StepsAtOnce)
            {
                int steps = Math.Min(StepsAtOnce, endStep - step);
                int first = step * StepDepth<T>();
                int depth = Math.Min(steps * StepDepth<T>(), Depth - first);
                int inBlock = step % BlockSteps;
                int blockSteps = Math.Min(BlockSteps, Steps - (step - inBlock));
                float* block = Panels + ((nint)(step - inBlock) * PanelsPerBlock * PanelStep);
                for (int panel = firstPanel; panel < firstPanel + PanelsPerTask; panel++)
                {
                    int column = panel * Width;
                    float* destination = block + ((((nint)(FirstPanel + panel) * blockSteps) + inBlock) * PanelStep);
                    float* source = Source.At(first, column);
                    int columns = Math.Min(Width, Columns - column);
                    if (Tiles)
                    {
                        T.PackRows(destination, source, Source.Row, columns, depth);
                    }
                    else
                    {
                        T.Pack(destination, source, Source.Column, Source.Row, columns, depth);
                    }
                }
            }
        }
    }

    private struct CompactWork<T> : IWork
        where T : struct, ITile
    {
        public Scratch Scratch;
        public float* Panels;
        public bool[] AreCompact;
        public int PanelCount;
        public int FirstGroup;
        public int Steps;
        public int BlockSteps;

        public readonly void Run(int task, int thread)
        {
            int group = FirstGroup + task;
            for (int step = 0; step < Steps; step += BlockSteps)
            {
                int steps = Math.Min(BlockSteps, Steps - step);
                float* panels = Panels + ((((nint)step * PanelCount) + ((nint)group * PanelsTogether * steps)) * T.Columns);
                AreCompact[(step / BlockSteps * (PanelCount / PanelsTogether)) + group] = T.TryCompact(panels, steps, Scratch.Of(thread));
            }
        }
    }

    private struct MultiplyWork<T> : IWork
        where T : struct, ITile
    {
        public Scratch Scratch;
        public float* Sums;
        public nint SumsRow;
        public Matrix Left;
        public float* Tiles;
        public float* Panels;
        public int Rows;
        public int Columns;
        public int Depth;
        public int Steps;
        public int BlockSteps;
        public bool Accumulate;
        public int RowBlocks;
        public int ColumnBlocks;
        public int TileRows;
        public int PanelCount;

        // How many tasks further this thread's next one will be, most likely.
        public int NextTask;

        // In place of panels; Pack turns those of a panel.
        public StoredRows[]? StoredRows;
        public delegate*<float*, float*, nint, nint, int, nint, void> Pack;

        // Of each four panels, block of k after block; null where none are.
        public bool[]? AreCompact;

        public readonly void Run(int task, int thread)
        {
            // Row blocks in turn, so that threads read the same panels at about the same time.
            int rowBlock = task % RowBlocks;
            int columnBlock = task / RowBlocks;
            int firstRow = (int)((long)TileRows * rowBlock / RowBlocks) * T.Rows;
            int endRow = Math.Min(Rows, (int)((long)TileRows * (rowBlock + 1) / RowBlocks) * T.Rows);

            int firstPanel = FirstPanel(columnBlock);
            int endPanel = Math.Min(PanelCount, FirstPanel(columnBlock + 1));
            float* block = Scratch.Of(thread);
            T.Begin();
            for (int step = 0; step < Steps; step += BlockSteps)
            {
                int steps = Math.Min(BlockSteps, Steps - step);
                int next = step + steps;
                bool accumulate = Accumulate || step > 0;
                float* after = StoredRows is not null ? null
                    : next < Steps ? Panel(firstPanel, next, Math.Min(BlockSteps, Steps - next)) : NextTaskPanels(task);
                if (Tiles != null)
                {
                    nint perRow = steps * T.LeftDwords;
                    float* tiles = Tiles + ((nint)step * TileRows * T.Rows * T.LeftDwords) + (firstRow * perRow);
                    Multiply(firstRow, endRow, firstPanel, endPanel, step, steps, tiles, T.PackedRow, T.Rows, perRow, after, accumulate);
                }
                else
                {
                    CopyRows(block, firstRow, endRow, step, steps);
                    if (Rows == 1)
                    {
                        MultiplyRow(block, step, steps, firstPanel, endPanel, after, accumulate);
                        continue;
                    }

                    nint row = BlockRow(steps);
                    Multiply(firstRow, endRow, firstPanel, endPanel, step, steps, block, row, 1, row, after, accumulate);
                    if (AreCompact is not null)
                    {
                        bool isScaled = TryScaleRows(block, endRow - firstRow, step, steps);
                        if (!isScaled)
                        {
                            CopyRows(block, firstRow, endRow, step, steps);
                        }

                        Multiply(firstRow, endRow, firstPanel, endPanel, step, steps, block, row, 1, row, after, accumulate, areCompact: true, isScaled);
                    }
                }
            }

            T.End();
        }

        // One row goes through some panels together, as do all rows where they are compact: only the last task has what is left of them.
        private readonly int FirstPanel(int columnBlock)
        {
            int together = Rows == 1 || AreCompact is not null ? PanelsTogether : 1;
            int groups = (PanelCount + together - 1) / together;
            return (int)((long)groups * columnBlock / ColumnBlocks) * together;
        }

        // The first panels of the task that this thread will take next, most likely; null if there is none.
        private readonly float* NextTaskPanels(int task) =>
            task + NextTask < RowBlocks * ColumnBlocks ? Panel(FirstPanel((task + NextTask) / RowBlocks), 0, Math.Min(BlockSteps, Steps)) : null;

        // Dwords from one row of the copied block to the next.
        private static nint BlockRow(int steps) => (steps * T.LeftDwords) + RowPadding;

        private readonly float* Panel(int panel, int step, int steps) =>
            Panels + ((((nint)step * PanelCount) + ((nint)panel * steps)) * T.Columns);

        // The first of the four panels that this one is compact with, or null.
        private readonly float* CompactWith(int panel, int step, int steps)
        {
            int group = panel / PanelsTogether;
            int groups = PanelCount / PanelsTogether;
            return T.HasCompactPanels && AreCompact is not null && group < groups && AreCompact[(step / BlockSteps * groups) + group]
                ? Panel(group * PanelsTogether, step, steps) : null;
        }

        // Some panels, one after the other: those that are compact, or rows in place, are written behind the block of the left operand.
        private readonly float* PanelsFrom(float* block, int panel, int count, int step, int steps)
        {
            float* turned = block + MaxBlock;
            float* compact = CompactWith(panel, step, steps);
            if (compact != null)
            {
                for (int p = 0; p < count; p++)
                {
                    T.Expand(turned + ((nint)p * steps * T.Columns), compact + (((panel + p) % PanelsTogether) * T.Columns), steps);
                }

                return turned;
            }

            if (StoredRows is null)
            {
                return Panel(panel, step, steps);
            }

            for (int p = 0; p < count; p++, turned += (nint)steps * T.Columns)
            {
                int row = (panel + p) * T.Columns;
                int i = 0;
                for (; row >= StoredRows[i].Count; i++)
                {
                    row -= StoredRows[i].Count;
                }

                Matrix source = Matrix.Stored(StoredRows[i], row, Steps).From(step, 0);
                Pack(turned, source.First, source.Column, source.Row, T.Columns, steps);
            }

            return block + MaxBlock;
        }

        // All tiles of the task for one block of k, of the panels that are compact or of the others. A tile of the left operand starts
        // Tile.Rows · perRow elements after the one before; if it is not scaled, compact panels are expanded.
        private readonly void Multiply(
            int firstRow, int endRow, int firstPanel, int endPanel, int step, int steps, float* block, nint leftRow, nint leftStep, nint perRow, float* after,
            bool accumulate, bool areCompact = false, bool isScaled = false)
        {
            // While a panel is multiplied by the tiles of the first rows, they fetch the next one, or their part of the next four; what comes
            // after the last is the next block or task.
            int fetched = steps * T.FetchedOfStep / ITile.Line * ITile.Line;
            nint size = (nint)steps * T.Columns;
            for (int panel = firstPanel; panel < endPanel; panel++)
            {
                float* compact = CompactWith(panel, step, steps);
                if (compact != null != areCompact)
                {
                    continue;
                }

                int inGroup = panel % PanelsTogether;
                float* right = isScaled ? compact + (inGroup * T.Columns) : PanelsFrom(block, panel, 1, step, steps);
                nint sizeAhead = compact == null ? size : T.CompactSize(steps);
                float* ahead = panel + (compact == null ? 1 : PanelsTogether - inGroup) >= endPanel && after != null ? after
                    : compact == null ? right + size : compact + (PanelsTogether * size);
                ahead += compact == null ? 0 : inGroup * sizeAhead;
                float* endAhead = ahead + sizeAhead;
                int column = panel * T.Columns;
                float* sums = Sums + (firstRow * SumsRow) + column;
                float* left = block;
                int columns = Columns - column;
                for (int row = firstRow; row < endRow; row += T.Rows)
                {
                    int rows = endRow - row;
                    if (rows < T.Rows || columns < T.Columns)
                    {
                        MultiplyEdge(
                            sums, Math.Min(rows, T.Rows), Math.Min(columns, T.Columns), left, leftRow, leftStep, right, steps, ahead, accumulate, isScaled);
                    }
                    else if (isScaled)
                    {
                        T.MultiplyCompact(sums, SumsRow, rows: T.Rows, left, leftRow, right, steps, ahead, accumulate);
                    }
                    else
                    {
                        T.Multiply(sums, SumsRow, left, leftRow, leftStep, right, steps, ahead, accumulate);
                    }

                    sums += T.Rows * SumsRow;
                    left += T.Rows * perRow;
                    ahead = ahead + fetched < endAhead ? ahead + fetched : right;
                }
            }
        }

        // A tile that sticks out: only the first rows and columns of its sums exist. All rows of the left operand are read,
        // of the panel all columns; what sticks out may hold anything.
        [SkipLocalsInit]
        private readonly void MultiplyEdge(
            float* sums, int rows, int columns, float* left, nint leftRow, nint leftStep, float* panel, int steps, float* ahead, bool accumulate, bool isScaled)
        {
            float* whole = stackalloc float[MaxTileCount];
            if (isScaled)
            {
                T.MultiplyCompact(whole, T.Columns, rows, left, leftRow, panel, steps, ahead, accumulate: false);
            }
            else if (rows <= T.FewRows)
            {
                T.MultiplyFew(whole, T.Columns, left, leftRow, leftStep, panel, steps, ahead);
            }
            else
            {
                T.Multiply(whole, T.Columns, left, leftRow, leftStep, panel, steps, ahead, accumulate: false);
            }

            for (int r = 0; r < rows; r++, sums += SumsRow, whole += T.Columns)
            {
                for (int j = 0; j < columns; j++)
                {
                    sums[j] = accumulate ? sums[j] + whole[j] : whole[j];
                }
            }
        }

        [SkipLocalsInit]
        private readonly void MultiplyRow(float* left, int step, int steps, int firstPanel, int endPanel, float* after, bool accumulate)
        {
            nint nextPanel = (nint)steps * T.Columns;
            float* edge = stackalloc float[MaxTileCount];
            float* scaled = AreCompact is null ? null : ScaledRow(left, step, steps);
            for (int panel = firstPanel; panel < endPanel; panel += PanelsTogether)
            {
                float* compact = scaled == null ? null : CompactWith(panel, step, steps);
                if (compact != null)
                {
                    float* next = panel + PanelsTogether < endPanel ? compact + (PanelsTogether * nextPanel) : after;
                    T.MultiplyCompactRow(Sums + (panel * T.Columns), scaled, compact, steps, next, accumulate);
                    continue;
                }

                float* right = PanelsFrom(left, panel, Math.Min(PanelsTogether, endPanel - panel), step, steps);
                int column = panel * T.Columns;
                int columns = Math.Min(endPanel * T.Columns, Columns) - column;
                float* sums = Sums + column;
                if (columns >= PanelsTogether * T.Columns)
                {
                    T.MultiplyRow(sums, left, right, nextPanel, steps, accumulate);
                    continue;
                }

                // The panels that are left; those that are not there are the last one again.
                for (int p = panel; p < endPanel; p++)
                {
                    int here = Math.Min(T.Columns, Columns - (p * T.Columns));
                    T.MultiplyRow(edge, left, right + ((p - panel) * nextPanel), 0, steps, accumulate: false);
                    for (int j = 0; j < here; j++)
                    {
                        float* sum = Sums + (p * T.Columns) + j;
                        *sum = accumulate ? *sum + edge[j] : edge[j];
                    }
                }
            }
        }

        // Makes of the rows of the block what compact panels are multiplied by; else, if their numbers are too large, they are of no use.
        private readonly bool TryScaleRows(float* block, int rows, int step, int steps)
        {
            int depth = Math.Min(steps * StepDepth<T>(), Depth - (step * StepDepth<T>()));
            for (int row = 0; row < rows; row++, block += BlockRow(steps))
            {
                if (!T.TryScaleRow(block, block, depth))
                {
                    return false;
                }
            }

            return true;
        }

        // What compact panels are multiplied by, behind the one row of the block; null if its numbers are too large for that.
        private readonly float* ScaledRow(float* row, int step, int steps)
        {
            int depth = Math.Min(steps * StepDepth<T>(), Depth - (step * StepDepth<T>()));
            float* scaled = row + BlockRow(steps);
            return T.TryScaleRow(scaled, row, depth) ? scaled : null;
        }

        // Rows below the last keep what an earlier block left there; their sums are thrown away.
        private readonly void CopyRows(float* block, int firstRow, int endRow, int step, int steps)
        {
            int first = step * StepDepth<T>();
            int depth = Math.Min(steps * StepDepth<T>(), Depth - first);
            float* source = Left.At(firstRow, first);
            for (int row = firstRow; row < endRow; row++, source += Left.Row, block += BlockRow(steps))
            {
                if (Sse.IsSupported && row + 1 < endRow)
                {
                    float* next = source + Left.Row;
                    for (int k = 0; k < depth; k += ITile.Line)
                    {
                        Sse.Prefetch1(next + k);
                    }
                }

                T.CopyRow(block, source, depth);
            }
        }
    }

    /// <summary>The definition. Slow, obvious, and what every other version is tested against; sums in double precision.</summary>
    internal static class Scalar
    {
        /// <summary>output (N, O) = or += input (N, I) · weightᵀ, weight (O, I).</summary>
        public static void Forward(Tensor output, Tensor input, Tensor weight, bool accumulate)
        {
            for (int n = 0; n < output.Rows; n++)
            {
                for (int o = 0; o < output.Columns; o++)
                {
                    double sum = accumulate ? *At(output, n, o) : 0;
                    for (int i = 0; i < input.Columns; i++)
                    {
                        sum += (double)*At(input, n, i) * *At(weight, o, i);
                    }

                    *At(output, n, o) = (float)sum;
                }
            }
        }

        /// <summary>dInput (N, I) = or += dOutput (N, O) · weight, weight (O, I).</summary>
        public static void BackwardInput(Tensor dInput, Tensor dOutput, Tensor weight, bool accumulate)
        {
            for (int n = 0; n < dInput.Rows; n++)
            {
                for (int i = 0; i < dInput.Columns; i++)
                {
                    double sum = accumulate ? *At(dInput, n, i) : 0;
                    for (int o = 0; o < dOutput.Columns; o++)
                    {
                        sum += (double)*At(dOutput, n, o) * *At(weight, o, i);
                    }

                    *At(dInput, n, i) = (float)sum;
                }
            }
        }

        /// <summary>dWeight (O, I) += dOutputᵀ · input, dOutput (N, O), input (N, I).</summary>
        public static void BackwardWeight(Tensor dWeight, Tensor dOutput, Tensor input)
        {
            for (int o = 0; o < dWeight.Rows; o++)
            {
                for (int i = 0; i < dWeight.Columns; i++)
                {
                    double sum = *At(dWeight, o, i);
                    for (int n = 0; n < dOutput.Rows; n++)
                    {
                        sum += (double)*At(dOutput, n, o) * *At(input, n, i);
                    }

                    *At(dWeight, o, i) = (float)sum;
                }
            }
        }

        private static float* At(Tensor tensor, int row, int column) =>
            (float*)tensor.Address + ((nint)row * tensor.Stride) + column;
    }
}
