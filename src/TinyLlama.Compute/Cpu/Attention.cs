using System.Runtime.CompilerServices;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// Causal grouped-query attention by tiles of keys with a running softmax (Dao et al. 2022): softmax(q · kᵀ / √D) · v
/// without the (T, T) matrix.
/// </summary>
/// <remarks>
/// Shapes: query, output and their gradients (N, Hq · D); keys, values and theirs (N, Hkv · D), or a <see cref="KeyValueCache"/>;
/// logSumExp, delta (N, Hq).
/// A task of the forward is a run of query rows of one segment with all query heads that share a key/value head: those
/// heads are more rows of the same small matrices. A task of the backward is a segment and a key/value head, which
/// sums dKeys and dValues over rows and heads in order. Key tiles start at multiples of
/// <see cref="TokenLayout.KeyBlock"/>, each row takes them in ascending order, and what is masked adds exact zeros, so a
/// row has the same bits alone, in a batch, and with its keys in a cache.
/// Products are those of a tile: of fp32, or of operands rounded to bfloat16; the softmax and all sums are fp32.
/// Bound by multiply-adds: forward 4 · D of FLOPs, backward 10 · D, for each pair of a query row and a key that it sees.
/// </remarks>
internal static unsafe class Attention
{
    /// <summary>Largest head dim: what the scratch is sized for.</summary>
    public const int MaxHeadDim = 256;

    /// <summary>Query rows of a task of the forward, times the heads of a group; also the largest group.</summary>
    public const int ForwardRows = 288;

    /// <summary>Query rows times heads whose probabilities the backward keeps at a time, up to whole tiles.</summary>
    private const int BackwardRows = 48;

    private const int Keys = TokenLayout.KeyBlock;

    /// <summary>Rows that register tiles of any width make of the keys of a tile, at most.</summary>
    private const int MostKeyRows = Keys + 8;

    /// <summary>Rows of a register tile of any width, at most.</summary>
    private const int MostTileRows = 32;

    /// <summary>Floats from one row of probabilities to the next: at least <see cref="MostKeyRows"/>, whole cache lines.</summary>
    private const int ProbabilityRow = 80;

    /// <summary>Floats of scratch that a thread needs: the larger, backward.</summary>
    public const int ScratchCount =
        (3 * MaxHeadDim * Keys) + (2 * MostKeyRows * MaxHeadDim) + (ForwardRows * ((5 * MaxHeadDim) + (2 * ProbabilityRow) + 3 + MostTileRows))
        + (MostTileRows * (Keys + 1)) + 64;

    /// <summary>Writes output and logSumExp.</summary>
    public static void Forward<V, T>(
        ThreadTeam team, Scratch scratch, Tensor output, Tensor logSumExp, Tensor query, Tensor keys, Tensor values,
        TokenLayout layout, int headDim)
        where V : struct, ILanes<V>
        where T : struct, IPackingTile
    {
        bool cached = !layout.BlockTable.IsEmpty;
        int headColumns = cached ? KeyValueCache.HeadElements(headDim) : headDim;
        int keyHeads = headDim <= 0 ? 0 : keys.Columns / headColumns;
        Geometry geometry = new(query, keyHeads, headDim, ForwardRows);
        keys.Require(keys.Rows, keyHeads * headColumns, cached ? keys.Type : DType.F32);
        output.Require(query.Rows, query.Columns);
        logSumExp.Require(query.Rows, geometry.QueryHeads);
        values.Require(keys.Rows, keys.Columns, keys.Type);
        Shape.Require(layout.TokenCount <= query.Rows, "a query row for each token of the layout");
        int tasks = 0;
        for (int s = 0; s < layout.SegmentCount; s++)
        {
            Segment segment = layout.SegmentAt(s);
            RequireKeys(layout, segment, keys.Rows, cached);
            tasks += geometry.Blocks(segment.RowCount);
        }

        ForwardWork<V, T> work = new(scratch, output, logSumExp, query, keys, values, layout, geometry);
        team.Run(ref work, tasks * geometry.KeyHeads);
    }

    /// <summary>Writes dQuery, dKeys, dValues and the scratch delta.</summary>
    public static void Backward<V, T>(
        ThreadTeam team, Scratch scratch, Tensor dQuery, Tensor dKeys, Tensor dValues, Tensor delta, Tensor dOutput, Tensor output,
        Tensor logSumExp, Tensor query, Tensor keys, Tensor values, TokenLayout layout, int headDim)
        where V : struct, ILanes<V>
        where T : struct, IPackingTile
    {
        Geometry geometry = new(query, headDim <= 0 ? 0 : keys.Columns / headDim, headDim, RoundUp(BackwardRows, T.Rows));
        (int tokens, int queryColumns, int keyColumns) = (query.Rows, query.Columns, keys.Columns);
        dQuery.Require(tokens, queryColumns);
        dOutput.Require(tokens, queryColumns);
        output.Require(tokens, queryColumns);
        logSumExp.Require(tokens, geometry.QueryHeads);
        delta.Require(tokens, geometry.QueryHeads);
        keys.Require(tokens, keyColumns);
        values.Require(tokens, keyColumns);
        dKeys.Require(tokens, keyColumns);
        dValues.Require(tokens, keyColumns);
        Shape.Require(layout.BlockTable.IsEmpty, "keys that are rows of the batch");
        Shape.Require(layout.TokenCount == tokens, "a layout of all rows");
        for (int s = 0; s < layout.SegmentCount; s++)
        {
            Segment segment = layout.SegmentAt(s);
            Shape.Require(
                segment.FirstPosition == 0 && segment.FirstKey == segment.FirstRow, "whole sequences, whose keys are their own rows");
        }

        BackwardWork<V, T> work = new(
            scratch, dQuery, dKeys, dValues, delta, dOutput, output, logSumExp, query, keys, values, layout, geometry);
        team.Run(ref work, layout.SegmentCount * geometry.KeyHeads);
    }

    private static void RequireKeys(TokenLayout layout, Segment segment, int keyRows, bool cached)
    {
        Shape.Require(segment.FirstPosition >= 0, "positions from 0 on");
        if (!cached)
        {
            Shape.Require(segment.FirstKey >= 0 && segment.FirstKey <= keyRows - segment.KeyCount, "a key row for each position of the layout");
            return;
        }

        for (int position = 0; position < segment.KeyCount; position += Keys)
        {
            _ = layout.KeyBlockOf(segment, position, keyRows);
        }
    }

    /// <summary>Copies rows of F32 side by side, times <paramref name="scale"/>, zeros up to the width.</summary>
    private static void PackRow<V>(float* y, float* x, float scale, int count, int width)
        where V : struct, ILanes<V>
    {
        int i = 0;
        for (; i <= count - V.Count; i += V.Count)
        {
            (V.Load(x + i) * V.Create(scale)).Store(y + i);
        }

        for (; i < count; i++)
        {
            y[i] = x[i] * scale;
        }

        for (; i < width; i++)
        {
            y[i] = 0;
        }
    }

    /// <summary>
    /// The heads of a group of some tokens as rows of a small matrix, width apart, times <paramref name="scale"/>; rows of
    /// zeros up to whole register tiles.
    /// </summary>
    private static void PackHeads<V, T>(float* y, int width, Tensor source, int firstRow, int tokens, int firstHead, float scale, Geometry geometry)
        where V : struct, ILanes<V>
        where T : struct, ITile
    {
        // Without padding the heads lie side by side in both.
        int step = width == geometry.HeadDim ? geometry.Group : 1;
        for (int t = 0; t < tokens; t++)
        {
            float* x = source.F32(firstRow + t) + (firstHead * geometry.HeadDim);
            for (int head = 0; head < geometry.Group; head += step)
            {
                PackRow<V>(y, x + (head * geometry.HeadDim), scale, step * geometry.HeadDim, step * width);
                y += step * width;
            }
        }

        int rows = tokens * geometry.Group;
        new Span<float>(y, (RoundUp(rows, T.Rows) - rows) * width).Clear();
    }

    /// <summary>Rows of floats as rows of a left operand, in their place.</summary>
    private static void ToLeft<T>(float* y, nint yRow, int rows, int depth)
        where T : struct, ITile
    {
        for (int r = 0; r < rows && T.Type != DType.F32; r++, y += yRow)
        {
            T.CopyRow(y, y, depth);
        }
    }

    /// <summary>
    /// The k of a product with the first <paramref name="seen"/> keys: where the tile takes several steps at once, all of them. What is beyond is zero in both operands.
    /// </summary>
    private static int Depth<T>(int seen)
        where T : struct, ITile => T.Type == DType.F32 ? seen : RoundUp(seen, MatMul.StepDepth<T>() * T.StepUnit);

    /// <summary>Rows of a tensor, (count, D), as panels of a product whose columns they are: one panel after the other.</summary>
    private static void PackColumns<T>(float* panels, Tensor source, int firstRow, int column, int count, int headDim)
        where T : struct, IPackingTile
    {
        for (int j = 0; j < count; j += T.Columns, panels += MatMul.Steps<T>(headDim) * T.Columns)
        {
            T.Pack(panels, source.F32(firstRow + j) + column, source.Stride, 1, Math.Min(T.Columns, count - j), headDim);
        }
    }

    /// <summary>Rows, (count, D), as panels of a product whose steps they are, with zeros up to <paramref name="most"/> rows.</summary>
    private static void PackSteps<T>(float* panels, int most, float* x, nint xRow, int count, int headDim)
        where T : struct, IPackingTile
    {
        int steps = MatMul.Steps<T>(count);
        int mostSteps = MatMul.Steps<T>(most);
        for (int d = 0; d < headDim; d += T.Columns, panels += mostSteps * T.Columns)
        {
            new Span<float>(panels + (steps * T.Columns), (mostSteps - steps) * T.Columns).Clear();
            T.Pack(panels, x + d, 1, xRow, Math.Min(T.Columns, headDim - d), count);
        }
    }

    /// <summary>One tile of rows by panel after panel: c = a · b, or += with <paramref name="accumulate"/>.</summary>
    private static void Multiply<T>(
        float* c, nint cRow, float* a, nint aRow, nint aStep, float* panels, nint nextPanel, int columns, int steps, bool accumulate)
        where T : struct, ITile
    {
        for (int j = 0; j < columns; j += T.Columns, panels += nextPanel)
        {
            T.Multiply(c + j, cRow, a, aRow, aStep, panels, steps, panels, accumulate);
        }
    }

    /// <summary>
    /// A sum of products in the order and with the roundings of <see cref="Tile{V}"/>: where a row has all its weight
    /// on one key, delta cancels the gradient of that weight exactly.
    /// </summary>
    private static float Dot<V>(float* a, float* b, int count)
        where V : struct, ILanes<V>
    {
        V sum = default;
        for (int i = 0; i < count; i++)
        {
            sum = V.Fma(V.Create(a[i]), V.Create(b[i]), sum);
        }

        return sum.Max();
    }

    private static int RoundUp(int count, int multiple) => (count + multiple - 1) / multiple * multiple;

    /// <summary>Which rows form the small matrices: row r of a block is token r / Group of it, head r mod Group of the group.</summary>
    private readonly struct Geometry
    {
        public Geometry(Tensor query, int keyHeads, int headDim, int rowsPerBlock)
        {
            Shape.Require(headDim is > 0 and <= MaxHeadDim, "a head dim of at most 256");
            query.Require(query.Rows, query.Columns);
            Shape.Require(query.Columns % headDim == 0 && keyHeads > 0, "whole heads");
            (HeadDim, QueryHeads, KeyHeads) = (headDim, query.Columns / headDim, keyHeads);
            Group = QueryHeads / KeyHeads;
            Shape.Require(Group * KeyHeads == QueryHeads && Group is > 0 and <= ForwardRows, "1 to 288 query heads for each key head");
            TokensPerBlock = Math.Max(1, rowsPerBlock / Group);
            Scale = 1f / MathF.Sqrt(headDim);
        }

        public int HeadDim { get; }

        public int QueryHeads { get; }

        public int KeyHeads { get; }

        public int Group { get; }

        public int TokensPerBlock { get; }

        public float Scale { get; }

        public int Blocks(int rowCount) => (rowCount + TokensPerBlock - 1) / TokensPerBlock;
    }

    private readonly struct ForwardWork<V, T>(
        Scratch scratch, Tensor output, Tensor logSumExp, Tensor query, Tensor keys, Tensor values, TokenLayout layout,
        Geometry geometry) : IWork
        where V : struct, ILanes<V>
        where T : struct, IPackingTile
    {
        public void Run(int task, int thread)
        {
            int keyHead = task % geometry.KeyHeads;
            int block = task / geometry.KeyHeads;
            int s = 0;
            Segment segment = layout.SegmentAt(0);
            for (int blocks; block >= (blocks = geometry.Blocks(segment.RowCount)); block -= blocks)
            {
                segment = layout.SegmentAt(++s);
            }

            int firstToken = block * geometry.TokensPerBlock;
            T.Begin();
            Block(segment, firstToken, Math.Min(geometry.TokensPerBlock, segment.RowCount - firstToken), keyHead, thread);
            T.End();
        }

        private void Block(Segment segment, int firstToken, int tokens, int keyHead, int thread)
        {
            (int headDim, int group) = (geometry.HeadDim, geometry.Group);
            int width = RoundUp(headDim, T.Columns);
            int headSteps = MatMul.Steps<T>(headDim);
            int rows = tokens * group;
            int paddedRows = RoundUp(rows, T.Rows);
            float* q = scratch.Of(thread);
            float* o = q + (ForwardRows * MaxHeadDim);
            float* keyRoom = o + (ForwardRows * MaxHeadDim);
            float* valueRoom = keyRoom + (MaxHeadDim * Keys);
            float* max = valueRoom + (Keys * MaxHeadDim);
            float* sum = max + ForwardRows;
            int* position = (int*)(sum + ForwardRows);
            float* shrink = sum + (2 * ForwardRows);
            float* tile = shrink + MostTileRows;

            int firstRow = segment.FirstRow + firstToken;
            int firstPosition = segment.FirstPosition + firstToken;
            int column = keyHead * headDim;
            bool cached = !layout.BlockTable.IsEmpty;
            PackHeads<V, T>(q, width, query, firstRow, tokens, keyHead * group, geometry.Scale, geometry);
            ToLeft<T>(q, width, paddedRows, width);
            new Span<float>(o, paddedRows * width).Clear();
            new Span<float>(max, paddedRows).Fill(float.NegativeInfinity);
            new Span<float>(sum, paddedRows).Clear();
            for (int r = 0; r < paddedRows; r++)
            {
                position[r] = firstPosition + Math.Min(r / group, tokens - 1);
            }

            int keyCount = firstPosition + tokens;
            for (int firstKey = 0; firstKey < keyCount; firstKey += Keys)
            {
                int count = Math.Min(Keys, keyCount - firstKey);
                float* keyPanels = keyRoom, valuePanels = valueRoom;
                if (cached)
                {
                    int block = layout.KeyBlockOf(segment, firstKey, keys.Rows);
                    keyPanels = KeyValueCache.Keys<V>(keyRoom, keys, block, keyHead, headDim, count);
                    valuePanels = KeyValueCache.Values<V>(valueRoom, values, block, keyHead, headDim, count);
                }
                else
                {
                    int keyRow = segment.FirstKey + firstKey;
                    PackColumns<T>(keyPanels, keys, keyRow, column, count, headDim);
                    PackSteps<T>(valuePanels, Keys, values.F32(keyRow) + column, values.Stride, count, headDim);
                }

                // A row sees keys up to its own position: of each few rows, only the columns that the last of them sees.
                for (int r = 0; r < paddedRows; r += T.Rows)
                {
                    int seen = Math.Min(Keys, position[r + T.Rows - 1] + 1 - firstKey);
                    if (seen > 0)
                    {
                        float* oRows = o + ((nint)r * width);
                        int columns = RoundUp(seen, T.Columns);
                        Multiply<T>(
                            tile, Keys, q + ((nint)r * width), width, 1, keyPanels, headSteps * T.Columns, columns, headSteps, false);
                        Softmax(tile, columns, firstKey, position + r, max + r, sum + r, shrink, oRows, width);
                        ToLeft<T>(tile, Keys, T.Rows, columns);
                        Multiply<T>(
                            oRows, width, tile, Keys, 1, valuePanels, MatMul.Steps<T>(Keys) * T.Columns, width, MatMul.Steps<T>(Depth<T>(seen)), true);
                    }
                }
            }

            int at = 0;
            for (int row = firstRow; row < firstRow + tokens; row++)
            {
                for (int head = keyHead * group; head < (keyHead + 1) * group; head++, at++)
                {
                    PackRow<V>(output.F32(row) + (head * headDim), o + ((nint)at * width), 1f / sum[at], headDim, headDim);
                    logSumExp.F32(row)[head] = (float)(max[at] + Math.Log(sum[at]));
                }
            }
        }

        /// <summary>
        /// Turns scores into exp(score - max) with the largest score so far, and scales what was summed under the former
        /// maximum. <paramref name="shrink"/> is room for a whole register of any width; its lanes beyond the rows
        /// compute nothing that is used.
        /// </summary>
        private static void Softmax(
            float* tile, int columns, int firstKey, int* position, float* max, float* sum, float* shrink, float* o, int width)
        {
            for (int r = 0; r < T.Rows; r++)
            {
                float* row = tile + (r * Keys);
                for (int j = Math.Max(0, position[r] + 1 - firstKey); j < columns; j++)
                {
                    row[j] = float.NegativeInfinity;
                }

                V m0 = V.Load(row), m1 = V.Load(row + V.Count);
                for (int j = 2 * V.Count; j < columns; j += 2 * V.Count)
                {
                    m0 = V.Max(m0, V.Load(row + j));
                    m1 = V.Max(m1, V.Load(row + j + V.Count));
                }

                float top = V.Max(m0, m1).Max();
                top = max[r] > top ? max[r] : top;
                shrink[r] = max[r] - top;
                max[r] = top;
            }

            for (int r = 0; r < T.Rows; r += V.Count)
            {
                Exponential.ExpOfUpToZero(V.Load(shrink + r)).Store(shrink + r);
            }

            for (int r = 0; r < T.Rows; r++)
            {
                float* row = tile + (r * Keys);
                V top = V.Create(max[r]);
                V s0 = default, s1 = default;
                for (int j = 0; j < columns; j += 2 * V.Count)
                {
                    V e0 = Exponential.ExpOfUpToZero(V.Load(row + j) - top);
                    V e1 = Exponential.ExpOfUpToZero(V.Load(row + j + V.Count) - top);
                    e0.Store(row + j);
                    e1.Store(row + j + V.Count);
                    s0 += e0;
                    s1 += e1;
                }

                sum[r] = (sum[r] * shrink[r]) + (s0 + s1).Sum();
                V keep = V.Create(shrink[r]);
                for (float* x = o + ((nint)r * width), end = x + width; x < end; x += V.Count)
                {
                    (V.Load(x) * keep).Store(x);
                }
            }
        }
    }

    private readonly struct BackwardWork<V, T>(
        Scratch scratch, Tensor dQuery, Tensor dKeys, Tensor dValues, Tensor delta, Tensor dOutput, Tensor output,
        Tensor logSumExp, Tensor query, Tensor keys, Tensor values, TokenLayout layout, Geometry geometry) : IWork
        where V : struct, ILanes<V>
        where T : struct, IPackingTile
    {
        public void Run(int task, int thread)
        {
            int keyHead = task % geometry.KeyHeads;
            Segment segment = layout.SegmentAt(task / geometry.KeyHeads);
            (int headDim, int group) = (geometry.HeadDim, geometry.Group);
            for (int n = segment.FirstRow; n < segment.FirstRow + segment.RowCount; n++)
            {
                for (int head = keyHead * group; head < (keyHead + 1) * group; head++)
                {
                    delta.F32(n)[head] = Dot<V>(dOutput.F32(n) + (head * headDim), output.F32(n) + (head * headDim), headDim);
                }
            }

            int width = RoundUp(headDim, T.Columns);
            float* keyPanels = scratch.Of(thread);
            float* valuePanels = keyPanels + (MaxHeadDim * Keys);
            float* keySteps = valuePanels + (MaxHeadDim * Keys);
            float* dk = keySteps + (Keys * MaxHeadDim);
            float* dv = dk + (MostKeyRows * MaxHeadDim);
            float* blocks = dv + (MostKeyRows * MaxHeadDim);
            int column = keyHead * headDim;

            T.Begin();
            for (int firstKey = 0; firstKey < segment.RowCount; firstKey += Keys)
            {
                int count = Math.Min(Keys, segment.RowCount - firstKey);
                int keyRow = segment.FirstKey + firstKey;
                PackColumns<T>(keyPanels, keys, keyRow, column, count, headDim);
                PackColumns<T>(valuePanels, values, keyRow, column, count, headDim);
                PackSteps<T>(keySteps, Keys, keys.F32(keyRow) + column, keys.Stride, count, headDim);
                new Span<float>(dk, MostKeyRows * width).Clear();
                new Span<float>(dv, MostKeyRows * width).Clear();

                // The first block that sees the tile holds its first key's position; blocks start at position 0.
                int firstToken = firstKey / geometry.TokensPerBlock * geometry.TokensPerBlock;
                for (; firstToken < segment.RowCount; firstToken += geometry.TokensPerBlock)
                {
                    int tokens = Math.Min(geometry.TokensPerBlock, segment.RowCount - firstToken);
                    Block(segment, firstToken, tokens, keyHead, firstKey, keyPanels, valuePanels, keySteps, dk, dv, blocks, width);
                }

                for (int j = 0; j < count; j++)
                {
                    PackRow<V>(dKeys.F32(keyRow + j) + column, dk + ((nint)j * width), 1f, headDim, headDim);
                    PackRow<V>(dValues.F32(keyRow + j) + column, dv + ((nint)j * width), 1f, headDim, headDim);
                }
            }

            T.End();
        }

        /// <summary>What one block of query rows adds to the gradients by one tile of keys.</summary>
        private void Block(
            Segment segment, int firstToken, int tokens, int keyHead, int firstKey, float* keyPanels, float* valuePanels,
            float* keySteps, float* dk, float* dv, float* blocks, int width)
        {
            (int headDim, int group) = (geometry.HeadDim, geometry.Group);
            int rows = tokens * group;
            int paddedRows = RoundUp(rows, T.Rows);
            float* p = blocks;
            float* ds = p + (ForwardRows * ProbabilityRow);
            float* q = ds + (ForwardRows * ProbabilityRow);
            float* dy = q + (ForwardRows * MaxHeadDim);
            float* qSteps = dy + (ForwardRows * MaxHeadDim);
            float* dySteps = qSteps + (ForwardRows * MaxHeadDim);
            float* dq = dySteps + (ForwardRows * MaxHeadDim);
            float* logSum = dq + (ForwardRows * MaxHeadDim);
            float* mean = logSum + ForwardRows;
            int* own = (int*)(mean + ForwardRows);
            float* dScores = mean + (2 * ForwardRows);
            float* turned = dScores + (MostTileRows * Keys);
            int firstHead = keyHead * group;
            int firstRow = segment.FirstRow + firstToken;
            PackHeads<V, T>(q, width, query, firstRow, tokens, firstHead, geometry.Scale, geometry);
            PackHeads<V, T>(dy, width, dOutput, firstRow, tokens, firstHead, 1f, geometry);
            PackSteps<T>(qSteps, paddedRows, q, width, paddedRows, width);
            PackSteps<T>(dySteps, paddedRows, dy, width, paddedRows, width);
            ToLeft<T>(q, width, paddedRows, width);
            ToLeft<T>(dy, width, paddedRows, width);
            int next = 0;
            for (int t = 0; t < tokens; t++)
            {
                for (int head = firstHead; head < firstHead + group; head++, next++)
                {
                    own[next] = Math.Clamp(firstToken + t + 1 - firstKey, 0, Keys);
                    logSum[next] = logSumExp.F32(firstRow + t)[head];
                    mean[next] = delta.F32(firstRow + t)[head];
                }
            }

            // Rows that only fill up the last register tile see no key.
            for (; next < paddedRows; next++)
            {
                (own[next], logSum[next], mean[next]) = (0, 0, 0);
            }

            for (int r = 0; r < paddedRows; r += T.Rows)
            {
                int seen = own[Math.Min(r + T.Rows, rows) - 1];
                int columns = RoundUp(seen, T.Columns);
                float* pRow = p + (r * ProbabilityRow);
                float* dsRow = ds + (r * ProbabilityRow);
                int headSteps = MatMul.Steps<T>(headDim);
                nint nextPanel = headSteps * T.Columns;
                Multiply<T>(pRow, ProbabilityRow, q + ((nint)r * width), width, 1, keyPanels, nextPanel, columns, headSteps, false);
                Multiply<T>(dScores, Keys, dy + ((nint)r * width), width, 1, valuePanels, nextPanel, columns, headSteps, false);
                for (int i = 0; i < T.Rows; i++)
                {
                    Probabilities(
                        pRow + (i * ProbabilityRow), dsRow + (i * ProbabilityRow), dScores + (i * Keys), columns, own[r + i],
                        logSum[r + i], mean[r + i]);
                }

                float* left = dsRow;
                nint leftRow = ProbabilityRow;
                if (T.Type != DType.F32)
                {
                    left = dScores;
                    leftRow = Keys;
                    for (int i = 0; i < T.Rows; i++)
                    {
                        T.CopyRow(left + (i * leftRow), dsRow + (i * ProbabilityRow), columns);
                    }
                }

                Multiply<T>(
                    dq + ((nint)r * width), width, left, leftRow, 1, keySteps, MatMul.Steps<T>(Keys) * T.Columns, width, MatMul.Steps<T>(Depth<T>(seen)), false);
            }

            AddToQueries(dq, width, firstRow, tokens, firstHead, firstKey == 0);

            // dV += Pᵀ · dY and dK += dSᵀ · Q, for a few keys at a time from the first row on that sees one of them.
            // Whatever stands in the columns beyond the keys goes to rows that nothing reads.
            for (int j = 0; j < Keys; j += T.Rows)
            {
                int start = Math.Max(0, firstKey + j - firstToken) * group;
                start = start / Depth<T>(1) * Depth<T>(1);
                int depth = paddedRows - start;
                if (depth > 0)
                {
                    nint from = ((nint)start * ProbabilityRow) + j;
                    nint firstStep = (nint)MatMul.Steps<T>(start) * T.Columns;
                    AddTurned(dv + (j * width), width, p + from, turned, dySteps + firstStep, paddedRows, depth);
                    AddTurned(dk + (j * width), width, ds + from, turned, qSteps + firstStep, paddedRows, depth);
                }
            }
        }

        /// <summary>sums += leftᵀ · the rows that are the steps of panels; <paramref name="turned"/> is room for the left operand as a tile of rows.</summary>
        private static void AddTurned(float* sums, int width, float* left, float* turned, float* panels, int paddedRows, int depth)
        {
            nint nextPanel = MatMul.Steps<T>(paddedRows) * T.Columns;
            if (T.Type == DType.F32)
            {
                Multiply<T>(sums, width, left, 1, ProbabilityRow, panels, nextPanel, width, depth, true);
                return;
            }

            T.PackRows(turned, left, ProbabilityRow, T.Rows, depth);
            Multiply<T>(sums, width, turned, T.PackedRow, T.Rows, panels, nextPanel, width, MatMul.Steps<T>(depth), true);
        }

        /// <summary>Scores into probabilities, and dS = P · (dP - delta); exact zeros for keys that the row does not see.</summary>
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static void Probabilities(float* p, float* ds, float* dScores, int columns, int own, float logSumExp, float delta)
        {
            V logSum = V.Create(logSumExp), mean = V.Create(delta);
            for (int j = 0; j < columns; j += V.Count)
            {
                V e = Exponential.ExpOfUpToZero(V.Load(p + j) - logSum);
                e.Store(p + j);
                (e * (V.Load(dScores + j) - mean)).Store(ds + j);
            }

            for (int j = own; j < Keys; j++)
            {
                (p[j], ds[j]) = (0, 0);
            }
        }

        /// <summary>dQuery += dq / √D, or = for the first tile of keys.</summary>
        private void AddToQueries(float* dq, int width, int firstRow, int tokens, int firstHead, bool first)
        {
            int step = width == geometry.HeadDim ? geometry.Group : 1;
            int count = step * geometry.HeadDim;
            V scale = V.Create(geometry.Scale);
            for (int t = 0; t < tokens; t++)
            {
                for (int head = 0; head < geometry.Group; head += step, dq += step * width)
                {
                    float* y = dQuery.F32(firstRow + t) + ((firstHead + head) * geometry.HeadDim);
                    int i = 0;
                    for (; i <= count - V.Count; i += V.Count)
                    {
                        V.Fma(V.Load(dq + i), scale, first ? default : V.Load(y + i)).Store(y + i);
                    }

                    for (; i < count; i++)
                    {
                        y[i] = (dq[i] * geometry.Scale) + (first ? 0 : y[i]);
                    }
                }
            }
        }
    }

    /// <summary>The definition, for one query row of one head. keys, values (count, D), all of which it sees.</summary>
    internal static class Scalar
    {
        /// <summary>Writes output; returns the log of the sum of exponentials.</summary>
        public static double Forward(
            Span<double> output, ReadOnlySpan<double> query, ReadOnlySpan<double> keys, ReadOnlySpan<double> values)
        {
            int headDim = query.Length;
            output.Clear();
            double logSum = double.NegativeInfinity;
            for (int at = 0; at < keys.Length; at += headDim)
            {
                double score = Dot(query, keys.Slice(at, headDim)) / Math.Sqrt(headDim);
                double larger = Math.Max(logSum, score);
                logSum = larger + Math.Log(Math.Exp(logSum - larger) + Math.Exp(score - larger));
            }

            for (int at = 0; at < keys.Length; at += headDim)
            {
                double p = Math.Exp((Dot(query, keys.Slice(at, headDim)) / Math.Sqrt(headDim)) - logSum);
                for (int d = 0; d < headDim; d++)
                {
                    output[d] += p * values[at + d];
                }
            }

            return logSum;
        }

        /// <summary>Adds to the gradients.</summary>
        public static void Backward(
            Span<double> dQuery, Span<double> dKeys, Span<double> dValues, ReadOnlySpan<double> dOutput,
            ReadOnlySpan<double> query, ReadOnlySpan<double> keys, ReadOnlySpan<double> values)
        {
            int headDim = query.Length;
            double root = Math.Sqrt(headDim);
            double[] output = new double[headDim];
            double logSum = Forward(output, query, keys, values);
            double delta = Dot(dOutput, output);
            for (int at = 0; at < keys.Length; at += headDim)
            {
                double p = Math.Exp((Dot(query, keys.Slice(at, headDim)) / root) - logSum);
                double dScore = p * (Dot(dOutput, values.Slice(at, headDim)) - delta) / root;
                for (int d = 0; d < headDim; d++)
                {
                    dQuery[d] += dScore * keys[at + d];
                    dKeys[at + d] += dScore * query[d];
                    dValues[at + d] += p * dOutput[d];
                }
            }
        }

        private static double Dot(ReadOnlySpan<double> a, ReadOnlySpan<double> b)
        {
            double sum = 0;
            for (int i = 0; i < a.Length; i++)
            {
                sum += a[i] * b[i];
            }

            return sum;
        }
    }
}
