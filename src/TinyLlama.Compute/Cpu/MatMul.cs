using System.Runtime.CompilerServices;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// The matrix products of a linear layer: output = input · weightᵀ, and backward dInput = dOutput · weight and
/// dWeight += dOutputᵀ · input. One driver with three ways to read its operands.
/// </summary>
/// <remarks>
/// After Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), and BLIS: the right operand
/// lies in panels (see <see cref="Tile{V}"/>), block of k after block of k, panel after panel; a task owns a block of the
/// result and walks k in blocks: it copies a block of the left operand next to each other, which stays in the second
/// cache, and multiplies it by panel after panel, each of which stays in the first cache while the rows pass by. Where
/// the left operand is the transpose of a tensor, it is packed like the right one, in tiles of rows.
/// Blocks depend on the shape alone, and blocks of k on k alone: neither the number of threads nor the number of rows
/// changes a bit of a row, nor does it matter who packed the right operand, when.
/// </remarks>
internal static unsafe class MatMul
{
    /// <summary>Floats of packed operands that <see cref="Scratch.Shared"/> must hold: 32 MiB.</summary>
    public const int SharedCount = 8 << 20;

    /// <summary>Floats of a block of the left operand that <see cref="Scratch.Of"/> must hold.</summary>
    public const int ThreadCount = MaxBlockRows * (MaxBlockDepth + RowPadding);

    // A panel of this depth takes 24 of 32 KiB of a first cache (AVX2), a block of the left operand a quarter of 512 KiB.
    private const int MaxBlockDepth = 384;
    private const int MaxBlockRows = 88;

    // Steps that are packed together; blocks of k are multiples of it.
    private const int StepUnit = 8;

    // Rows of the copied block start at different places of the first cache.
    private const int RowPadding = 16;

    // Panels for one sweep over the rows: their share of the last cache.
    private const long MaxSweepBytes = 8 << 20;

    // Tasks to aim at, so that many threads have some each, and products below which a task is not worth its claim.
    private const int FewestTasks = 16;
    private const long FewestProducts = 32768;

    /// <summary>Elements of a right operand in panels.</summary>
    public static int PackedCount<V>(int columns, int depth)
        where V : struct, ILanes<V> => checked(RoundUp(columns, Tile<V>.Columns) * depth);

    /// <summary>Fills the packed forms of a weight that have room.</summary>
    public static void Pack<V>(ThreadTeam team, Weight weight)
        where V : struct, ILanes<V>
    {
        Tensor values = weight.Values;
        if (!weight.PackedForward.IsEmpty)
        {
            Pack<V>(team, weight.PackedForward.F32(), Matrix.Transposed(values), values.Rows, values.Columns, BlockDepth(values.Columns), Tile<V>.Columns);
        }

        if (!weight.PackedBackward.IsEmpty)
        {
            Pack<V>(team, weight.PackedBackward.F32(), Matrix.Of(values), values.Columns, values.Rows, BlockDepth(values.Rows), Tile<V>.Columns);
        }
    }

    /// <summary>output (N, O) = or += input (N, I) · weightᵀ.</summary>
    public static void Forward<V>(ThreadTeam team, Scratch scratch, Tensor output, Tensor input, Weight weight, bool accumulate)
        where V : struct, ILanes<V> =>
        Run<V>(team, scratch, output, Matrix.Of(input), Matrix.Transposed(weight.Values), weight.PackedForward, input.Columns, accumulate);

    /// <summary>dInput (N, I) = or += dOutput (N, O) · weight.</summary>
    public static void BackwardInput<V>(ThreadTeam team, Scratch scratch, Tensor dInput, Tensor dOutput, Weight weight, bool accumulate)
        where V : struct, ILanes<V> =>
        Run<V>(team, scratch, dInput, Matrix.Of(dOutput), Matrix.Of(weight.Values), weight.PackedBackward, dOutput.Columns, accumulate);

    /// <summary>dWeight (O, I) += dOutputᵀ · input, dOutput (N, O), input (N, I).</summary>
    public static void BackwardWeight<V>(ThreadTeam team, Scratch scratch, Tensor dWeight, Tensor dOutput, Tensor input)
        where V : struct, ILanes<V> =>
        Run<V>(team, scratch, dWeight, Matrix.Transposed(dOutput), Matrix.Of(input), default, input.Rows, accumulate: true);

    private static void Run<V>(
        ThreadTeam team, Scratch scratch, Tensor sums, Matrix left, Matrix right, Tensor packed, int depth, bool accumulate)
        where V : struct, ILanes<V>
    {
        if (sums.IsEmpty || (depth == 0 && accumulate))
        {
            return;
        }

        Shape.Require(depth > 0, "at least one product for each sum");
        int blockDepth = BlockDepth(depth);
        if (!packed.IsEmpty)
        {
            Multiply<V>(team, scratch, sums, left, null, packed.F32(), depth, blockDepth, accumulate);
            return;
        }

        // What fits at once: whole blocks of k of as many columns, and of rows where they must be packed too.
        bool packLeft = left.Column != 1;
        int columnsAtOnce = AtOnce(sums.Columns, Tile<V>.Columns, blockDepth);
        int rowsAtOnce = packLeft ? AtOnce(sums.Rows, Tile<V>.Rows, blockDepth) : sums.Rows;
        int width = RoundUp(columnsAtOnce, Tile<V>.Columns) + (packLeft ? RoundUp(rowsAtOnce, Tile<V>.Rows) : 0);
        int depthAtOnce = Math.Min(depth, SharedCount / width / blockDepth * blockDepth);
        for (int column = 0; column < sums.Columns; column += columnsAtOnce)
        {
            Tensor columns = sums.ColumnRange(column, Math.Min(columnsAtOnce, sums.Columns - column));
            for (int step = 0; step < depth; step += depthAtOnce)
            {
                int steps = Math.Min(depthAtOnce, depth - step);
                float* panels = scratch.Shared;
                Pack<V>(team, panels, right.From(step, column), columns.Columns, steps, blockDepth, Tile<V>.Columns);
                float* tiles = packLeft ? panels + ((nint)steps * RoundUp(columns.Columns, Tile<V>.Columns)) : null;
                for (int row = 0; row < sums.Rows; row += rowsAtOnce)
                {
                    Tensor range = columns.RowRange(row, Math.Min(rowsAtOnce, sums.Rows - row));
                    if (packLeft)
                    {
                        Pack<V>(team, tiles, left.From(row, step).Transposed(), range.Rows, steps, blockDepth, Tile<V>.Rows);
                    }

                    Multiply<V>(team, scratch, range, left.From(row, step), tiles, panels, steps, blockDepth, accumulate || step > 0);
                }
            }
        }
    }

    private static int RoundUp(int count, int unit) => checked(count + unit - 1) / unit * unit;

    // Each operand may take half of the room.
    private static int AtOnce(int count, int unit, int blockDepth) => Math.Min(count, SharedCount / 2 / blockDepth / unit * unit);

    // Blocks of equal depth, so that the last is not a sliver.
    private static int BlockDepth(int depth)
    {
        int blocks = (depth + MaxBlockDepth - 1) / MaxBlockDepth;
        return Math.Min(MaxBlockDepth, RoundUp((depth + blocks - 1) / blocks, StepUnit));
    }

    // For each block of k, panel after panel of the given width: far strides would meet in the same few lines of a cache.
    private static void Pack<V>(ThreadTeam team, float* panels, Matrix source, int columns, int depth, int blockDepth, int width)
        where V : struct, ILanes<V>
    {
        int panelCount = (columns + width - 1) / width;

        // Columns side by side are read row by row, some rows a task; columns that are rows are read panel by panel.
        bool sideBySide = source.Column == 1;
        int stepsPerTask = sideBySide ? RoundUp(Math.Max(1, 32768 / columns), StepUnit) : depth;
        PackWork<V> work = new()
        {
            Panels = panels,
            Source = source,
            Columns = columns,
            Depth = depth,
            Width = width,
            StepsPerTask = stepsPerTask,
            BlockDepth = blockDepth,
            StepsAtOnce = sideBySide ? StepUnit : blockDepth,
            PanelsPerTask = sideBySide ? panelCount : 1,
            PanelTasks = sideBySide ? 1 : panelCount,
        };
        team.Run(ref work, work.PanelTasks * ((depth + stepsPerTask - 1) / stepsPerTask));
    }

    private static void Multiply<V>(
        ThreadTeam team, Scratch scratch, Tensor sums, Matrix left, float* tiles, float* panels, int depth, int blockDepth, bool accumulate)
        where V : struct, ILanes<V>
    {
        int tileRows = (sums.Rows + Tile<V>.Rows - 1) / Tile<V>.Rows;
        int panelCount = (sums.Columns + Tile<V>.Columns - 1) / Tile<V>.Columns;

        // Multiples of four: two, four and more threads get equal shares.
        int tilesPerBlock = MaxBlockRows / Tile<V>.Rows;
        int rowBlocks = (tileRows + tilesPerBlock - 1) / tilesPerBlock;
        rowBlocks = rowBlocks > 4 ? Math.Min(tileRows, (rowBlocks + 3) & -4) : rowBlocks;

        long products = (long)sums.Rows * sums.Columns * depth;
        long sweeps = (((long)panelCount * Tile<V>.Columns * depth * sizeof(float)) + MaxSweepBytes - 1) / MaxSweepBytes;
        long shares = Math.Min((FewestTasks + rowBlocks - 1) / rowBlocks, Math.Min(panelCount / 4, products / FewestProducts / rowBlocks));
        int columnBlocks = (int)Math.Min(panelCount, Math.Max(1, Math.Max(sweeps, shares)));

        MultiplyWork<V> work = new()
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
            BlockDepth = blockDepth,
            Accumulate = accumulate,
            RowBlocks = rowBlocks,
            ColumnBlocks = columnBlocks,
            TileRows = tileRows,
            PanelCount = panelCount,
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

        public static Matrix Transposed(Tensor tensor) => new(tensor.F32(), 1, tensor.Stride);

        public Matrix Transposed() => new(First, Column, Row);

        public Matrix From(int row, int column) => new(At(row, column), Row, Column);

        public float* At(int row, int column) => First + (row * Row) + (column * Column);
    }

    private struct PackWork<V> : IWork
        where V : struct, ILanes<V>
    {
        public float* Panels;
        public Matrix Source;
        public int Columns;
        public int Depth;
        public int Width;
        public int BlockDepth;
        public int StepsPerTask;
        public int StepsAtOnce;
        public int PanelsPerTask;
        public int PanelTasks;

        public readonly void Run(int task, int thread)
        {
            int firstStep = task / PanelTasks * StepsPerTask;
            int endStep = Math.Min(Depth, firstStep + StepsPerTask);
            int firstPanel = task % PanelTasks * PanelsPerTask;

            // A few steps of all panels, then the next: rows of the source are read while they are at hand.
            for (int step = firstStep; step < endStep; step += StepsAtOnce)
            {
                int steps = Math.Min(StepsAtOnce, endStep - step);
                int inBlock = step % BlockDepth;
                int blockSteps = Math.Min(BlockDepth, Depth - (step - inBlock));
                float* block = Panels + ((nint)(step - inBlock) * RoundUp(Columns, Width));
                for (int panel = firstPanel; panel < firstPanel + PanelsPerTask; panel++)
                {
                    int column = panel * Width;
                    float* destination = block + ((((nint)panel * blockSteps) + inBlock) * Width);
                    float* source = Source.At(step, column);
                    int columns = Math.Min(Width, Columns - column);
                    if (Width == Tile<V>.Columns)
                    {
                        Tile<V>.Pack(destination, source, Source.Column, Source.Row, columns, steps);
                    }
                    else
                    {
                        Tile<V>.PackRows(destination, source, Source.Row, columns, steps);
                    }
                }
            }
        }
    }

    private struct MultiplyWork<V> : IWork
        where V : struct, ILanes<V>
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
        public int BlockDepth;
        public bool Accumulate;
        public int RowBlocks;
        public int ColumnBlocks;
        public int TileRows;
        public int PanelCount;

        public readonly void Run(int task, int thread)
        {
            // Row blocks in turn, so that threads read the same panels at about the same time.
            int rowBlock = task % RowBlocks;
            int columnBlock = task / RowBlocks;
            int firstRow = (int)((long)TileRows * rowBlock / RowBlocks) * Tile<V>.Rows;
            int endRow = Math.Min(Rows, (int)((long)TileRows * (rowBlock + 1) / RowBlocks) * Tile<V>.Rows);
            int firstPanel = (int)((long)PanelCount * columnBlock / ColumnBlocks);
            int endPanel = (int)((long)PanelCount * (columnBlock + 1) / ColumnBlocks);
            float* block = Scratch.Of(thread);
            for (int step = 0; step < Depth; step += BlockDepth)
            {
                int steps = Math.Min(BlockDepth, Depth - step);
                bool accumulate = Accumulate || step > 0;
                if (Tiles != null)
                {
                    float* tiles = Tiles + ((nint)step * TileRows * Tile<V>.Rows) + ((nint)firstRow * steps);
                    Multiply(firstRow, endRow, firstPanel, endPanel, step, steps, tiles, 1, Tile<V>.Rows, steps, accumulate);
                }
                else if (Rows == 1)
                {
                    MultiplyRow(step, steps, firstPanel, endPanel, accumulate);
                }
                else
                {
                    CopyRows(block, firstRow, endRow, step, steps);
                    Multiply(firstRow, endRow, firstPanel, endPanel, step, steps, block, steps + RowPadding, 1, steps + RowPadding, accumulate);
                }
            }
        }

        private readonly float* Panel(int panel, int step, int steps) =>
            Panels + ((((nint)step * PanelCount) + ((nint)panel * steps)) * Tile<V>.Columns);

        // All tiles of the task for one block of k. A tile of the left operand starts Tile.Rows · perRow elements after the one before.
        private readonly void Multiply(
            int firstRow, int endRow, int firstPanel, int endPanel, int step, int steps, float* block, nint leftRow, nint leftStep, nint perRow, bool accumulate)
        {
            for (int panel = firstPanel; panel < endPanel; panel++)
            {
                float* right = Panel(panel, step, steps);
                int column = panel * Tile<V>.Columns;
                float* sums = Sums + (firstRow * SumsRow) + column;
                float* left = block;
                int columns = Columns - column;
                for (int row = firstRow; row < endRow; row += Tile<V>.Rows)
                {
                    int rows = endRow - row;
                    if (rows >= Tile<V>.Rows && columns >= Tile<V>.Columns)
                    {
                        Tile<V>.Multiply(sums, SumsRow, left, leftRow, leftStep, right, steps, accumulate);
                    }
                    else
                    {
                        Tile<V>.MultiplyEdge(
                            sums, SumsRow, Math.Min(rows, Tile<V>.Rows), Math.Min(columns, Tile<V>.Columns), left, leftRow, leftStep, right, steps, accumulate);
                    }

                    sums += Tile<V>.Rows * SumsRow;
                    left += Tile<V>.Rows * perRow;
                }
            }
        }

        [SkipLocalsInit]
        private readonly void MultiplyRow(int step, int steps, int firstPanel, int endPanel, bool accumulate)
        {
            const int Together = 4;
            float* left = Left.At(0, step);
            nint nextPanel = (nint)steps * Tile<V>.Columns;
            float* right = Panel(firstPanel, step, steps);
            float* edge = stackalloc float[Tile<V>.MaxCount];
            for (int panel = firstPanel; panel < endPanel; panel += Together, right += Together * nextPanel)
            {
                int column = panel * Tile<V>.Columns;
                int columns = Math.Min(endPanel * Tile<V>.Columns, Columns) - column;
                float* sums = Sums + column;
                if (columns >= Together * Tile<V>.Columns)
                {
                    Tile<V>.MultiplyRow(sums, left, right, nextPanel, steps, accumulate);
                    continue;
                }

                // The panels that are left; those that are not there are the last one again.
                for (int p = panel; p < endPanel; p++)
                {
                    int here = Math.Min(Tile<V>.Columns, Columns - (p * Tile<V>.Columns));
                    Tile<V>.MultiplyRow(edge, left, right + ((p - panel) * nextPanel), 0, steps, accumulate: false);
                    for (int j = 0; j < here; j++)
                    {
                        float* sum = Sums + (p * Tile<V>.Columns) + j;
                        *sum = accumulate ? *sum + edge[j] : edge[j];
                    }
                }
            }
        }

        // Rows below the last keep what an earlier block left there; their sums are thrown away.
        private readonly void CopyRows(float* block, int firstRow, int endRow, int step, int steps)
        {
            float* source = Left.At(firstRow, step);
            for (int row = firstRow; row < endRow; row++, source += Left.Row, block += steps + RowPadding)
            {
                Unsafe.CopyBlockUnaligned(block, source, (uint)steps * sizeof(float));
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
