using System.Runtime.InteropServices;

namespace TinyLlama.Compute;

/// <summary>Some consecutive query rows of one sequence, and where the keys they may attend to lie.</summary>
/// <remarks>
/// The query row with position p attends to the keys of positions 0 … p. Training: <see cref="FirstKey"/> is the row of
/// the batch that holds the key of position 0. With a cache it is an index into the block table: the key of position p
/// lies in block <c>table[FirstKey + p / 64]</c>, at place p mod 64.
/// </remarks>
/// <param name="FirstRow">First query row in the packed tokens.</param>
/// <param name="RowCount">Number of query rows.</param>
/// <param name="FirstPosition">Position of the first query row in its sequence.</param>
/// <param name="FirstKey">Row of the first key, or first entry in the block table.</param>
public readonly record struct Segment(int FirstRow, int RowCount, int FirstPosition, int FirstKey)
{
    /// <summary>Gets the number of keys that the last query row sees.</summary>
    public int KeyCount => FirstPosition + RowCount;
}

/// <summary>
/// Which keys each packed token may see. One layout serves training (N = batch × context), prefill (ragged prompts),
/// decode (one row per sequence) and verification: they are one forward.
/// </summary>
/// <remarks>Lives in device buffers of a capacity fixed in the plan, so that a step can be replayed with other contents.</remarks>
public sealed class TokenLayout
{
    /// <summary>
    /// Rows of a block of the key-value cache, and the step of key tiles in absolute key position: the same tiles
    /// whatever the number of query rows, so that a sequence gets the same bits alone and in a batch.
    /// </summary>
    public const int KeyBlock = 64;

    private readonly int[] _positions;

    /// <summary>Takes the buffers.</summary>
    /// <param name="arena">Their owner.</param>
    /// <param name="tokens">Most packed tokens (N) of a forward.</param>
    /// <param name="segments">Most segments of a forward.</param>
    /// <param name="tableEntries">Most block table entries; 0 where keys are rows of the batch.</param>
    public TokenLayout(Arena arena, int tokens, int segments, int tableEntries = 0)
    {
        _positions = new int[tokens];
        Positions = arena.Take(tokens, 1, DType.I32);
        Segments = arena.Take(segments, 4, DType.I32);
        BlockTable = arena.Take(tableEntries, 1, DType.I32);
    }

    /// <summary>Gets the position of each packed token in its sequence, (N, 1) of I32.</summary>
    public Tensor Positions { get; private set; }

    /// <summary>Gets the segments, (S, 4) of I32: the fields of <see cref="Segment"/> in their order.</summary>
    public Tensor Segments { get; private set; }

    /// <summary>Gets the cache block of each key block of each sequence, (entries, 1) of I32; empty in training.</summary>
    public Tensor BlockTable { get; }

    /// <summary>Gets the number of segments in use.</summary>
    public int SegmentCount { get; private set; }

    /// <summary>Gets the number of packed tokens in use.</summary>
    public int TokenCount { get; private set; }

    /// <summary>Gets the most keys that a query row sees.</summary>
    public int MostKeys { get; private set; }

    /// <summary>Gets the rows that keys have at least: of the batch or, with a block table, blocks of the cache.</summary>
    public int KeyRows { get; private set; }

    /// <summary>Gets a value indicating whether each segment is a whole sequence whose keys are its own rows, as backward needs.</summary>
    public bool HasWholeSequences { get; private set; }

    /// <summary>Writes the segments, and from them the positions. Queued like any operation.</summary>
    /// <param name="backend">The device of the arena.</param>
    /// <param name="segments">Segments that together cover rows 0 … N-1 once, in order.</param>
    /// <param name="blockTable">The block table, if keys lie in a cache.</param>
    public void Set(Backend backend, ReadOnlySpan<Segment> segments, ReadOnlySpan<int> blockTable = default)
    {
        Shape.Require(segments.Length <= Segments.Rows && blockTable.Length <= BlockTable.Rows, "a layout within its capacity");
        (int row, int mostKeys, int keyRows, bool whole) = (0, 0, 0, blockTable.IsEmpty);
        foreach (Segment segment in segments)
        {
            Shape.Require(segment.FirstRow == row && row + segment.RowCount <= Positions.Rows, "segments that cover the rows in order");
            for (int i = 0; i < segment.RowCount; i++)
            {
                _positions[row + i] = segment.FirstPosition + i;
            }

            row += segment.RowCount;
            mostKeys = Math.Max(mostKeys, segment.KeyCount);
            keyRows = Math.Max(keyRows, segment.FirstKey + segment.KeyCount);
            whole &= segment.FirstPosition == 0 && segment.FirstKey == segment.FirstRow;
        }

        if (!blockTable.IsEmpty)
        {
            keyRows = 1;
            foreach (int block in blockTable)
            {
                keyRows = Math.Max(keyRows, block + 1);
            }
        }

        // One copy each: a device may wait for what is queued before it copies from memory of the host.
        backend.Write(Segments.RowRange(0, segments.Length), MemoryMarshal.Cast<Segment, int>(segments));
        backend.Write<int>(Positions.RowRange(0, row), _positions.AsSpan(0, row));
        if (blockTable.Length > 0)
        {
            backend.Write(BlockTable.RowRange(0, blockTable.Length), blockTable);
        }

        (SegmentCount, TokenCount, MostKeys, KeyRows, HasWholeSequences) = (segments.Length, row, mostKeys, keyRows, whole);
    }
}
