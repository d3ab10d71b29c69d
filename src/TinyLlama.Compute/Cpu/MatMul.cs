using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// The matrix products of a linear layer: output = input · weightᵀ, and backward dInput = dOutput · weight and
/// dWeight += dOutputᵀ · input. One driver with three ways to read its operands.
/// </summary>
/// <remarks>
/// After Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), and BLIS: the right operand
/// lies in panels (see <see cref="Tile{V}"/>), panel after panel, each with all of its steps; a task owns a block of the
/// result and walks k in blocks: it copies a block of the left operand next to each other, which stays in the second
/// cache, and multiplies it by panel after panel, each of which stays in the first cache while the rows pass by.
/// Blocks depend on the shape alone, and blocks of k on k alone: neither the number of threads nor the number of rows
/// changes a bit of a row, nor does it matter who packed the right operand, when.
/// </remarks>
internal static unsafe class MatMul
{
    /// <summary>Floats of the right operand that <see cref="Scratch.Shared"/> must hold, packed: 16 MiB.</summary>
    public const int SharedCount = 4 << 20;

    /// <summary>Floats of the left operand that <see cref="Scratch.Of"/> must hold.</summary>
    public const int ThreadCount = MaxBlockRows * (MaxBlockDepth + RowPadding);

    // A panel of this depth takes 24 of 32 KiB of a first cache (AVX2), a block of the left operand a quarter of 512 KiB.
    private const int MaxBlockDepth = 384;
    private const int MaxBlockRows = 88;

    // Rows of the copied block start at different places of the first cache.
    private const int RowPadding = 16;

    // Panels for one sweep over the rows: their share of the last cache.
    private const long MaxSweepBytes = 8 << 20;

    // Tasks to aim at, so that many threads have some each, and products below which a task is not worth its claim.
    private const int FewestTasks = 16;
    private const long FewestProducts = 32768;

    /// <summary>Elements of a right operand in panels.</summary>
    public static int PackedCount<V>(int columns, int depth)
        where V : struct, ILanes<V> => checked((columns + Tile<V>.Columns - 1) / Tile<V>.Columns * Tile<V>.Columns * depth);

    /// <summary>Fills the packed forms of a weight that have room.</summary>
    public static void Pack<V>(ThreadTeam team, Weight weight)
        where V : struct, ILanes<V>
    {
        Tensor values = weight.Values;
        if (!weight.PackedForward.IsEmpty)
        {
            Pack<V>(team, weight.PackedForward.F32(), Matrix.Transposed(values), values.Rows, values.Columns);
        }

        if (!weight.PackedBackward.IsEmpty)
        {
            Pack<V>(team, weight.PackedBackward.F32(), Matrix.Of(values), values.Columns, values.Rows);
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
        if (sums.IsEmpty || depth == 0)
        {
            Shape.Require(sums.IsEmpty, "at least one product for each sum");
            return;
        }

        int blockDepth = BlockDepth(depth);
        if (!packed.IsEmpty)
        {
            Multiply<V>(team, scratch, sums, left, packed.F32(), depth, blockDepth, accumulate);
            return;
        }

        // What fits at once: all steps of some columns, or where not even one panel fits, whole blocks of its steps.
        int depthAtOnce = Math.Min(depth, SharedCount / Tile<V>.Columns / blockDepth * blockDepth);
        int columnsAtOnce = SharedCount / depthAtOnce / Tile<V>.Columns * Tile<V>.Columns;
        for (int column = 0; column < sums.Columns; column += columnsAtOnce)
        {
            Tensor range = sums.ColumnRange(column, Math.Min(columnsAtOnce, sums.Columns - column));
            for (int step = 0; step < depth; step += depthAtOnce)
            {
                int steps = Math.Min(depthAtOnce, depth - step);
                Pack<V>(team, scratch.Shared, right.From(step, column), range.Columns, steps);
                Multiply<V>(team, scratch, range, left.From(0, step), scratch.Shared, steps, blockDepth, accumulate || step > 0);
            }
        }
    }

    // Blocks of equal depth, so that the last is not a sliver.
    private static int BlockDepth(int depth)
    {
        int blocks = (depth + MaxBlockDepth - 1) / MaxBlockDepth;
        return Math.Min(MaxBlockDepth, ((depth + blocks - 1) / blocks + 7) & -8);
    }

    private static void Pack<V>(ThreadTeam team, float* panels, Matrix right, int columns, int depth)
        where V : struct, ILanes<V>
    {
        int panelCount = (columns + Tile<V>.Columns - 1) / Tile<V>.Columns;

        // Columns side by side are read row by row, some rows a task; columns that are rows are read panel by panel.
        int stepsPerTask = right.Column == 1 ? Math.Max(8, 32768 / columns) : depth;
        PackWork<V> work = new()
        {
            Panels = panels,
            Right = right,
            Columns = columns,
            Depth = depth,
            StepsPerTask = stepsPerTask,
            PanelsPerTask = right.Column == 1 ? panelCount : 1,
            PanelTasks = right.Column == 1 ? 1 : panelCount,
        };
        team.Run(ref work, work.PanelTasks * ((depth + stepsPerTask - 1) / stepsPerTask));
    }

    private static void Multiply<V>(
        ThreadTeam team, Scratch scratch, Tensor sums, Matrix left, float* panels, int depth, int blockDepth, bool accumulate)
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

        public Matrix From(int row, int column) => new(At(row, column), Row, Column);

        public float* At(int row, int column) => First + (row * Row) + (column * Column);
    }

    private struct PackWork<V> : IWork
        where V : struct, ILanes<V>
    {
        public float* Panels;
        public Matrix Right;
        public int Columns;
        public int Depth;
        public int StepsPerTask;
        public int PanelsPerTask;
        public int PanelTasks;

        public readonly void Run(int task, int thread)
        {
            int firstStep = task / PanelTasks * StepsPerTask;
            int endStep = Math.Min(Depth, firstStep + StepsPerTask);
            int firstPanel = task % PanelTasks * PanelsPerTask;

            // A few steps of all panels, then the next: rows of the source are read while they are at hand.
            const int StepsAtOnce = 8;
            int stepsAtOnce = Right.Column == 1 ? StepsAtOnce : Depth;
            for (int step = firstStep; step < endStep; step += stepsAtOnce)
            {
                int steps = Math.Min(stepsAtOnce, endStep - step);
                for (int panel = firstPanel; panel < firstPanel + PanelsPerTask; panel++)
                {
                    int column = panel * Tile<V>.Columns;
                    float* destination = Panels + (((nint)panel * Depth) + step) * Tile<V>.Columns;
                    int columns = Math.Min(Tile<V>.Columns, Columns - column);
                    Tile<V>.Pack(destination, Right.At(step, column), Right.Column, Right.Row, columns, steps);
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
                if (Rows == 1 && Left.Column == 1)
                {
                    MultiplyRow(step, steps, firstPanel, endPanel, accumulate);
                }
                else if (Left.Column == 1)
                {
                    CopyRows(block, firstRow, endRow, step, steps);
                    Multiply(firstRow, endRow, firstPanel, endPanel, step, steps, block, steps + RowPadding, 1, accumulate);
                }
                else
                {
                    CopyColumns(block, firstRow, endRow, step, steps);
                    Multiply(firstRow, endRow, firstPanel, endPanel, step, steps, block, 1, Tile<V>.Rows, accumulate);
                }
            }
        }

        // The block's tiles start Tile.Rows · leftRow apart, or, where a step holds the rows of one tile, after all steps of it.
        private readonly void Multiply(
            int firstRow, int endRow, int firstPanel, int endPanel, int step, int steps, float* block, nint leftRow, nint leftStep, bool accumulate)
        {
            nint nextTile = leftStep == 1 ? Tile<V>.Rows * leftRow : Tile<V>.Rows * (nint)steps;
            for (int panel = firstPanel; panel < endPanel; panel++)
            {
                float* right = Panels + (((nint)panel * Depth) + step) * Tile<V>.Columns;
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
                    left += nextTile;
                }
            }
        }

        [SkipLocalsInit]
        private readonly void MultiplyRow(int step, int steps, int firstPanel, int endPanel, bool accumulate)
        {
            const int Together = 4;
            float* left = Left.At(0, step);
            nint nextPanel = (nint)Depth * Tile<V>.Columns;
            float* right = Panels + (firstPanel * nextPanel) + (step * Tile<V>.Columns);
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

        // Rows are side by side in the source: as many as a tile has, step after step, then the next tile's.
        private readonly void CopyColumns(float* block, int firstRow, int endRow, int step, int steps)
        {
            float* source = Left.At(firstRow, step);
            nint nextTile = (nint)steps * Tile<V>.Rows;
            for (int k = 0; k < steps; k++, source += Left.Column, block += Tile<V>.Rows)
            {
                float* from = source;
                float* to = block;
                int rows = endRow - firstRow;
                for (; rows >= Tile<V>.Rows; rows -= Tile<V>.Rows, from += Tile<V>.Rows, to += nextTile)
                {
                    Vector128.Load(from).Store(to);
                    if (Tile<V>.Rows == 8)
                    {
                        Vector128.Load(from + 4).Store(to + 4);
                    }
                    else
                    {
                        Vector64.Load(from + 4).Store(to + 4);
                    }
                }

                for (int r = 0; r < rows; r++)
                {
                    to[r] = from[r];
                }
            }
        }
    }

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
