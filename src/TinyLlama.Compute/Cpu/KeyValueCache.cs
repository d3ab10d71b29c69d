using System.Runtime.CompilerServices;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// Keys and values in blocks of <see cref="TokenLayout.KeyBlock"/> positions, each block in the panels that
/// <see cref="Attention"/> multiplies by: it packs them once, when they are appended, not in each step that reads them.
/// </summary>
/// <remarks>
/// In a block, head after head: of keys a panel for each <see cref="ITile.Columns"/> positions, channel after channel; of
/// values a panel for each so many channels, position after position. The last panel of values may be wider than the head.
/// Elements are F32, F16, or Q8_0: bytes, then a scale for each run of <see cref="GroupChannels"/> channels of each position,
/// the largest of them / 127. The two halves of a step of bytes are interleaved, so that they widen word by word.
/// What is not F32 is widened for each block of queries that reads it. Too large for F16 becomes its largest number.
/// </remarks>
internal static unsafe class KeyValueCache
{
    // Channels of a position that share a scale.
    private const int GroupChannels = 32;

    private const int Block = TokenLayout.KeyBlock;

    // Tokens of a task, of one head. Positions that follow each other share lines: threads should not write them in turns.
    private const int TokensPerTask = 32;

    /// <summary>Room for keys, or values.</summary>
    public static Tensor Take(Arena arena, int blocks, int keyHeads, int headDim, DType type)
    {
        return type is DType.F32 or DType.F16 or DType.Q8_0
            ? arena.Take(blocks, checked(keyHeads * HeadElements(headDim)), type)
            : throw new DeviceException($"the CPU keeps keys and values in F32, F16 or Q8_0, not in {type}: choose another cache type");
    }

    /// <summary>The elements of a block that a head takes.</summary>
    public static int HeadElements(int headDim) => (headDim + GroupChannels - 1) / GroupChannels * GroupChannels * Block;

    /// <summary>Copies the keys and values of each token to its position.</summary>
    public static void Append<V>(
        ThreadTeam team, Tensor cacheKeys, Tensor cacheValues, Tensor keys, Tensor values, TokenLayout layout, int headDim)
        where V : struct, ILanes<V>
    {
        Shape.Require(!layout.BlockTable.IsEmpty && headDim > 0 && keys.Columns % headDim == 0, "a layout with a block table, and whole heads");
        int elements = keys.Columns / headDim * HeadElements(headDim);
        keys.Require(layout.TokenCount, keys.Columns);
        values.Require(layout.TokenCount, keys.Columns);
        cacheKeys.Require(cacheKeys.Rows, elements, cacheKeys.Type);
        cacheValues.Require(cacheKeys.Rows, elements, cacheKeys.Type);
        for (int s = 0; s < layout.SegmentCount; s++)
        {
            Segment segment = layout.SegmentAt(s);
            for (int position = segment.FirstPosition; position < segment.KeyCount; position = (position / Block * Block) + Block)
            {
                _ = layout.KeyBlockOf(segment, position, cacheKeys.Rows);
            }
        }

        AppendWork<V> work = new(cacheKeys, cacheValues, keys, values, layout, headDim);
        team.Run(ref work, (layout.TokenCount + TokensPerTask - 1) / TokensPerTask * (keys.Columns / headDim));
    }

    /// <summary>The panels of the first keys of a block: in place, or widened to <paramref name="room"/>.</summary>
    [SkipLocalsInit]
    public static float* Keys<V>(float* room, Tensor cache, int block, int head, int headDim, int count)
        where V : struct, ILanes<V>
    {
        byte* source = Head(cache, block, head, headDim);
        if (cache.Type == DType.F32)
        {
            return (float*)source;
        }

        float* scales = stackalloc float[Attention.MaxHeadDim / GroupChannels * Block];
        WidenScales<V>(scales, source, headDim, cache.Type);
        float* y = room;
        for (int position = 0; position < count; position += Tile<V>.Columns)
        {
            for (int d = 0; d < headDim; d++, y += Tile<V>.Columns)
            {
                if (cache.Type == DType.F16)
                {
                    source = WidenHalves<V>(y, source);
                }
                else
                {
                    float* scale = scales + (d / GroupChannels * Block) + position;
                    source = WidenBytes(y, source, V.Load(scale), V.Load(scale + V.Count));
                }
            }
        }

        return room;
    }

    /// <summary>The panels of the first values of a block, the same way.</summary>
    [SkipLocalsInit]
    public static float* Values<V>(float* room, Tensor cache, int block, int head, int headDim, int count)
        where V : struct, ILanes<V>
    {
        byte* source = Head(cache, block, head, headDim);
        if (cache.Type == DType.F32)
        {
            return (float*)source;
        }

        float* scales = stackalloc float[Attention.MaxHeadDim / GroupChannels * Block];
        WidenScales<V>(scales, source, headDim, cache.Type);
        int stepBytes = Tile<V>.Columns * (cache.Type == DType.F16 ? sizeof(ushort) : sizeof(sbyte));
        for (int d = 0; d < headDim; d += Tile<V>.Columns)
        {
            byte* x = source + (d / Tile<V>.Columns * Block * stepBytes);
            float* y = room + (d * Block);
            for (int step = 0; step < count; step++, y += Tile<V>.Columns)
            {
                if (cache.Type == DType.F16)
                {
                    x = WidenHalves<V>(y, x);
                }
                else
                {
                    V scale = V.Create(scales[(d / GroupChannels * Block) + step]);
                    x = WidenBytes(y, x, scale, scale);
                }
            }
        }

        return room;
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

    private static byte* Head(Tensor cache, int block, int head, int headDim) =>
        (byte*)cache.RowRange(block, 1).Address + cache.Type.RowBytes((long)head * HeadElements(headDim));

    // One step of a panel; returns the next one's place.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static byte* WidenHalves<V>(float* y, byte* x)
        where V : struct, ILanes<V>
    {
        int register = V.Count * sizeof(ushort);
        Halves<V>.Load(x).Store(y);
        Halves<V>.Load(x + register).Store(y + V.Count);
        return x + (2 * register);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static byte* WidenBytes<V>(float* y, byte* x, V first, V second)
        where V : struct, ILanes<V>
    {
        const int BitsOfThree = 24;
        const int BitsOfTwo = 16;
        V words = V.LoadWords(x);
        (V.FromInt32(V.ShiftRightSigned(V.ShiftLeft(words, BitsOfThree), BitsOfThree)) * first).Store(y);
        (V.FromInt32(V.ShiftRightSigned(V.ShiftLeft(words, BitsOfTwo), BitsOfThree)) * second).Store(y + V.Count);
        return x + Tile<V>.Columns;
    }

    private static void WidenScales<V>(float* scales, byte* head, int headDim, DType type)
        where V : struct, ILanes<V>
    {
        if (type == DType.Q8_0)
        {
            byte* halves = head + HeadElements(headDim);
            int count = (headDim + GroupChannels - 1) / GroupChannels * Block;
            for (int done = 0; done < count; done += Tile<V>.Columns)
            {
                halves = WidenHalves<V>(scales + done, halves);
            }
        }
    }

    private readonly struct AppendWork<V>(
        Tensor cacheKeys, Tensor cacheValues, Tensor keys, Tensor values, TokenLayout layout, int headDim) : IWork
        where V : struct, ILanes<V>
    {
        public void Run(int task, int thread)
        {
            (int chunk, int head) = Math.DivRem(task, keys.Columns / headDim);
            int first = chunk * TokensPerTask;
            int end = Math.Min(layout.TokenCount, first + TokensPerTask);
            for (int s = 0; s < layout.SegmentCount; s++)
            {
                Segment segment = layout.SegmentAt(s);
                int endOfBoth = Math.Min(end, segment.FirstRow + segment.RowCount);
                for (int row = Math.Max(first, segment.FirstRow); row < endOfBoth; row++)
                {
                    Append(segment, row, head);
                }
            }
        }

        private void Append(Segment segment, int row, int head)
        {
            int position = segment.FirstPosition + row - segment.FirstRow;
            int block = layout.KeyBlockOf(segment, position, cacheKeys.Rows);
            int place = position % Block;
            byte* key = Head(cacheKeys, block, head, headDim);
            byte* value = Head(cacheValues, block, head, headDim);
            for (int d = 0; d < headDim; d += GroupChannels)
            {
                PutGroup(key, keys.F32(row) + (head * headDim), d, place, areKeys: true);
                PutGroup(value, values.F32(row) + (head * headDim), d, place, areKeys: false);
            }
        }

        [SkipLocalsInit]
        private void PutGroup(byte* head, float* x, int first, int place, bool areKeys)
        {
            int end = Math.Min(first + GroupChannels, headDim);
            switch (cacheKeys.Type)
            {
                case DType.F32:
                    for (int d = first; d < end; d++)
                    {
                        (int step, int column) = Element(d, place, areKeys);
                        ((float*)head)[(step * Tile<V>.Columns) + column] = x[d];
                    }

                    break;
                case DType.F16:
                    uint* halves = stackalloc uint[GroupChannels];
                    Round(halves, x + first, end - first);
                    for (int d = first; d < end; d++)
                    {
                        (int step, int column) = Element(d, place, areKeys);
                        ((ushort*)head)[(step * Tile<V>.Columns) + column] = (ushort)halves[d - first];
                    }

                    break;
                default:
                    float inverse = PutScale(head, x, first, end, place);
                    for (int d = first; d < end; d++)
                    {
                        (int step, int column) = Element(d, place, areKeys);
                        (int half, int word) = Math.DivRem(column, V.Count);
                        ((sbyte*)head)[(step * Tile<V>.Columns) + (2 * word) + half] =
                            (sbyte)Math.Clamp(MathF.Round(x[d] * inverse), -sbyte.MaxValue, sbyte.MaxValue);
                    }

                    break;
            }
        }

        // Of a head's panels: a key is a column of one, a value a step of each.
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private (int Step, int Column) Element(int d, int place, bool areKeys) => areKeys
            ? ((place / Tile<V>.Columns * headDim) + d, place % Tile<V>.Columns)
            : ((d / Tile<V>.Columns * Block) + place, d % Tile<V>.Columns);

        private static void Round(uint* halves, float* x, int count)
        {
            int i = 0;
            for (; i + V.Count <= count; i += V.Count)
            {
                Halves<V>.Round(V.Load(x + i)).Store((float*)halves + i);
            }

            for (; i < count; i++)
            {
                Halves<Lanes1>.Round(Lanes1.Load(x + i)).Store((float*)halves + i);
            }
        }

        // Its inverse is what the channels are multiplied by.
        private float PutScale(byte* head, float* x, int first, int end, int place)
        {
            float largest = 0;
            for (int d = first; d < end; d++)
            {
                largest = Math.Max(largest, Math.Abs(x[d]));
            }

            var scale = (Half)(largest / sbyte.MaxValue);
            ((Half*)(head + HeadElements(headDim)))[(first / GroupChannels * Block) + place] = scale;
            return scale == Half.Zero ? 0 : 1 / (float)scale;
        }
    }
}
