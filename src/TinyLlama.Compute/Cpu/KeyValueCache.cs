namespace TinyLlama.Compute.Cpu;

/// <summary>The rows of a key-value cache, in blocks of <see cref="TokenLayout.KeyBlock"/> rows.</summary>
internal static unsafe class KeyValueCache
{
    /// <summary>Copies the keys and values of each token to the cache row of its position.</summary>
    public static void Append(Tensor cacheKeys, Tensor cacheValues, Tensor keys, Tensor values, TokenLayout layout)
    {
        int columns = keys.Columns;
        Shape.Require(!layout.BlockTable.IsEmpty, "a layout with a block table");
        keys.Require(layout.TokenCount, columns);
        values.Require(layout.TokenCount, columns);
        cacheKeys.Require(cacheKeys.Rows, columns);
        cacheValues.Require(cacheKeys.Rows, columns);
        for (int s = 0; s < layout.SegmentCount; s++)
        {
            Segment segment = layout.SegmentAt(s);
            for (int i = 0; i < segment.RowCount; i++)
            {
                int row = layout.KeyRow(segment, segment.FirstPosition + i);
                Shape.Require((uint)row < (uint)cacheKeys.Rows, "blocks within the cache");
                long bytes = (long)columns * sizeof(float);
                Buffer.MemoryCopy(keys.F32(segment.FirstRow + i), cacheKeys.F32(row), bytes, bytes);
                Buffer.MemoryCopy(values.F32(segment.FirstRow + i), cacheValues.F32(row), bytes, bytes);
            }
        }
    }

    /// <summary>A segment of a layout in host memory.</summary>
    public static Segment SegmentAt(this TokenLayout layout, int index)
    {
        int* fields = layout.Segments.I32(index);
        return new Segment(fields[0], fields[1], fields[2], fields[3]);
    }

    /// <summary>The row of a segment's key: a row of the batch, or of the cache where there is a block table.</summary>
    public static int KeyRow(this TokenLayout layout, Segment segment, int position)
    {
        if (layout.BlockTable.IsEmpty)
        {
            return segment.FirstKey + position;
        }

        int entry = segment.FirstKey + (position / TokenLayout.KeyBlock);
        Shape.Require((uint)entry < (uint)layout.BlockTable.Rows, "block table entries for each key");
        return (*layout.BlockTable.I32(entry) * TokenLayout.KeyBlock) + (position % TokenLayout.KeyBlock);
    }
}
