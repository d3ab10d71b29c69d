namespace TinyLlama.Compute.Cpu;

/// <summary>
/// Keys and values in blocks of <see cref="TokenLayout.KeyBlock"/> positions, each block in the panels that
/// <see cref="Attention"/> multiplies by: it packs them once, when they are appended, not in each step that reads them.
/// </summary>
/// <remarks>
/// In a block, head after head: of keys a panel for each <see cref="ITile.Columns"/> positions, channel after channel; of
/// values a panel for each so many channels, position after position. The last panel of values may be wider than the head.
/// </remarks>
internal static unsafe class KeyValueCache
{
    private const int Block = TokenLayout.KeyBlock;

    // Tokens of a task.
    private const int TokensPerTask = 16;

    /// <summary>Room for keys, or values.</summary>
    public static Tensor Take<V>(Arena arena, int blocks, int keyHeads, int headDim)
        where V : struct, ILanes<V> =>
        arena.Take(blocks, checked(keyHeads * HeadElements<V>(headDim)));

    /// <summary>The elements of a block that a head takes.</summary>
    public static int HeadElements<V>(int headDim)
        where V : struct, ILanes<V> =>
        (headDim + Tile<V>.Columns - 1) / Tile<V>.Columns * Tile<V>.Columns * Block;

    /// <summary>Copies the keys and values of each token to its position.</summary>
    public static void Append<V>(
        ThreadTeam team, Tensor cacheKeys, Tensor cacheValues, Tensor keys, Tensor values, TokenLayout layout, int headDim)
        where V : struct, ILanes<V>
    {
        Shape.Require(!layout.BlockTable.IsEmpty && headDim > 0 && keys.Columns % headDim == 0, "a layout with a block table, and whole heads");
        int elements = keys.Columns / headDim * HeadElements<V>(headDim);
        keys.Require(layout.TokenCount, keys.Columns);
        values.Require(layout.TokenCount, keys.Columns);
        cacheKeys.Require(cacheKeys.Rows, elements);
        cacheValues.Require(cacheKeys.Rows, elements);
        for (int s = 0; s < layout.SegmentCount; s++)
        {
            Segment segment = layout.SegmentAt(s);
            for (int position = segment.FirstPosition; position < segment.KeyCount; position = (position / Block * Block) + Block)
            {
                _ = layout.KeyBlockOf(segment, position, cacheKeys.Rows);
            }

            AppendWork<V> work = new(cacheKeys, cacheValues, keys, values, layout, segment, headDim);
            team.Run(ref work, (segment.RowCount + TokensPerTask - 1) / TokensPerTask);
        }
    }

    /// <summary>A segment of a layout in host memory.</summary>
    public static Segment SegmentAt(this TokenLayout layout, int index)
    {
        int* fields = layout.Segments.I32(index);
        return new Segment(fields[0], fields[1], fields[2], fields[3]);
    }

    /// <summary>The block of a cache of so many that holds the key of a position.</summary>
    public static int KeyBlockOf(this TokenLayout layout, Segment segment, int position, int blocks)
    {
        int entry = segment.FirstKey + (position / Block);
        Shape.Require((uint)entry < (uint)layout.BlockTable.Rows, "block table entries for each key");
        int block = *layout.BlockTable.I32(entry);
        Shape.Require((uint)block < (uint)blocks, "blocks within the cache");
        return block;
    }

    private readonly struct AppendWork<V>(
        Tensor cacheKeys, Tensor cacheValues, Tensor keys, Tensor values, TokenLayout layout, Segment segment, int headDim) : IWork
        where V : struct, ILanes<V>
    {
        public void Run(int task, int thread)
        {
            int end = Math.Min(segment.RowCount, (task + 1) * TokensPerTask);
            for (int token = task * TokensPerTask; token < end; token++)
            {
                int position = segment.FirstPosition + token;
                int block = layout.KeyBlockOf(segment, position, cacheKeys.Rows);
                int place = position % Block;
                Scatter(cacheKeys.F32(block), keys.F32(segment.FirstRow + token), place);
                Gather(cacheValues.F32(block), values.F32(segment.FirstRow + token), place);
            }
        }

        // A key is a column of its panel.
        private void Scatter(float* block, float* key, int place)
        {
            (int panel, int column) = Math.DivRem(place, Tile<V>.Columns);
            for (int head = 0; head < keys.Columns; head += headDim)
            {
                float* y = block + (panel * headDim * Tile<V>.Columns) + column;
                for (int d = 0; d < headDim; d++)
                {
                    y[d * Tile<V>.Columns] = key[head + d];
                }

                block += HeadElements<V>(headDim);
            }
        }

        // A value is a step of each panel.
        private void Gather(float* block, float* value, int place)
        {
            for (int head = 0; head < keys.Columns; head += headDim)
            {
                for (int d = 0; d < headDim; d += Tile<V>.Columns)
                {
                    int count = Math.Min(Tile<V>.Columns, headDim - d);
                    float* y = block + (d * Block) + (place * Tile<V>.Columns);
                    new ReadOnlySpan<float>(value + head + d, count).CopyTo(new Span<float>(y, count));
                }

                block += HeadElements<V>(headDim);
            }
        }
    }
}
