using TinyLlama.Checkpoints;
using TinyLlama.Compute;
using TinyLlama.Model;

namespace TinyLlama.Inference;

/// <summary>A sequence whose keys and values lie in a <see cref="KeyValueCache"/>.</summary>
public sealed class CachedSequence
{
    internal CachedSequence(int blockCapacity, bool publishes) => (Blocks, Publishes) = (new int[blockCapacity], publishes);

    /// <summary>Gets the number of tokens fed so far: the position of the next one.</summary>
    public int Length { get; internal set; }

    /// <summary>Gets the cache block of each run of <see cref="TokenLayout.KeyBlock"/> positions.</summary>
    internal int[] Blocks { get; }

    internal int BlockCount { get; set; }

    /// <summary>Gets a value indicating whether others may find its full blocks.</summary>
    internal bool Publishes { get; }

    /// <summary>Gets or sets the number of its blocks that were published.</summary>
    internal int PublishedBlocks { get; set; }
}

/// <summary>
/// Keys and values of many sequences in blocks of <see cref="TokenLayout.KeyBlock"/> positions: a sequence takes a free block
/// when it grows into one, so that sequences of any lengths share the room, and those that begin with the same tokens
/// share blocks.
/// </summary>
/// <remarks>Kwon et al. 2023 (PagedAttention). Position p lies in block <c>Blocks[p / 64]</c>.</remarks>
public sealed class KeyValueCache : KeyValueSource
{
    private readonly int _headDim;
    private readonly Tensor[] _keys;
    private readonly Tensor[] _values;
    private readonly CacheBlocks _blocks;

    /// <summary>Takes the blocks of all layers.</summary>
    /// <param name="arena">Their owner.</param>
    /// <param name="backend">The device, which orders what is in a block.</param>
    /// <param name="config">The model's shape.</param>
    /// <param name="blocks">Number of blocks that sequences share.</param>
    /// <param name="type">What keys and values are rounded to: F32, F16 or Q8_0.</param>
    public KeyValueCache(Arena arena, Backend backend, ModelConfig config, int blocks, DType type)
    {
        _headDim = config.HeadDim;
        (_keys, _values) = (new Tensor[config.Layers], new Tensor[config.Layers]);
        for (int l = 0; l < config.Layers; l++)
        {
            _keys[l] = backend.TakeCache(arena, blocks, config.KeyValueHeads, config.HeadDim, type);
            _values[l] = backend.TakeCache(arena, blocks, config.KeyValueHeads, config.HeadDim, type);
        }

        _blocks = new CacheBlocks(blocks);
    }

    /// <summary>Gets the number of blocks.</summary>
    public int BlockCount => _blocks.Count;

    /// <summary>Gets the number of blocks that no sequence has.</summary>
    public int FreeBlocks => _blocks.Unused;

    /// <summary>Gets the number of blocks that can be found by their tokens.</summary>
    public int PublishedBlocks => _blocks.Published;

    /// <summary>The number of blocks that hold so many tokens.</summary>
    public static int BlocksFor(int tokens) => (tokens + TokenLayout.KeyBlock - 1) / TokenLayout.KeyBlock;

    /// <summary>The memory of a block in bytes: keys and values of its positions in all layers.</summary>
    public static long BlockBytes(Backend backend, ModelConfig config, DType type)
    {
        Arena plan = Arena.Plan("block");
        _ = new KeyValueCache(plan, backend, config, 1, type);
        return plan.UsedBytes;
    }

    /// <summary>Gets the bytes that <see cref="ReadBlock"/> reads.</summary>
    internal int StoredBlockBytes => checked((int)(2 * _keys.Length * _keys[0].Type.RowBytes(_keys[0].Columns)));

    /// <inheritdoc/>
    public override (Tensor Keys, Tensor Values) Append(Backend backend, int layer, Tensor keys, Tensor values, TokenLayout layout)
    {
        backend.AppendToCache(_keys[layer], _values[layer], keys, values, layout, _headDim);
        return (_keys[layer], _values[layer]);
    }

    /// <summary>Gives a new sequence the published blocks that a text begins with, all but its last token at most.</summary>
    internal void Find(CachedSequence sequence, ReadOnlySpan<int> text)
    {
        int? before = null;
        while (sequence.Length + TokenLayout.KeyBlock < text.Length
            && _blocks.TryFind(before, text.Slice(sequence.Length, TokenLayout.KeyBlock), out int block))
        {
            _blocks.Share(block);
            sequence.Blocks[sequence.BlockCount++] = block;
            sequence.Length += TokenLayout.KeyBlock;
            before = block;
        }

        sequence.PublishedBlocks = sequence.BlockCount;
    }

    /// <summary>Gives a new sequence what another one has.</summary>
    internal void Fork(CachedSequence sequence, CachedSequence source)
    {
        sequence.BlockCount = BlocksFor(source.Length);
        for (int i = 0; i < sequence.BlockCount; i++)
        {
            sequence.Blocks[i] = source.Blocks[i];
            _blocks.Share(source.Blocks[i]);
        }

        (sequence.Length, sequence.PublishedBlocks) = (source.Length, source.PublishedBlocks);
    }

    /// <summary>
    /// Gives a sequence the blocks it needs to grow to a length, and a copy of the one it grows in where others have it
    /// too.
    /// </summary>
    /// <returns>False, and nothing is changed, where too few blocks are free.</returns>
    internal bool TryReserve(Backend backend, CachedSequence sequence, int length)
    {
        int last = sequence.Length / TokenLayout.KeyBlock;
        bool growsInBlock = length > sequence.Length && sequence.Length % TokenLayout.KeyBlock > 0;
        bool copies = growsInBlock && _blocks.IsShared(sequence.Blocks[last]);
        int needed = BlocksFor(length);
        if (needed - sequence.BlockCount + (copies ? 1 : 0) > _blocks.Unused)
        {
            return false;
        }

        if (copies)
        {
            int copy = _blocks.Take();
            Copy(backend, copy, sequence.Blocks[last]);
            _blocks.Release(sequence.Blocks[last]);
            sequence.Blocks[last] = copy;
        }
        else if (growsInBlock)
        {
            _blocks.Forget(sequence.Blocks[last]);
        }

        while (sequence.BlockCount < needed)
        {
            sequence.Blocks[sequence.BlockCount++] = _blocks.Take();
        }

        return true;
    }

    /// <summary>Notes the tokens that a sequence grows by; there is room for them.</summary>
    internal void Extend(CachedSequence sequence, ReadOnlySpan<int> tokens)
    {
        while (!tokens.IsEmpty)
        {
            Span<int> room = _blocks.Tokens(sequence.Blocks[sequence.Length / TokenLayout.KeyBlock])[(sequence.Length % TokenLayout.KeyBlock)..];
            int count = Math.Min(room.Length, tokens.Length);
            tokens[..count].CopyTo(room);
            tokens = tokens[count..];
            sequence.Length += count;
        }
    }

    /// <summary>Lets others find the full blocks of a sequence. Where one is there already, the sequence takes that one.</summary>
    internal void Publish(CachedSequence sequence)
    {
        while (sequence.Publishes && (sequence.PublishedBlocks + 1) * TokenLayout.KeyBlock <= sequence.Length)
        {
            int i = sequence.PublishedBlocks++;
            int block = sequence.Blocks[i];
            int published = _blocks.Publish(block, i == 0 ? null : sequence.Blocks[i - 1]);
            if (published != block)
            {
                _blocks.Share(published);
                _blocks.Release(block);
                sequence.Blocks[i] = published;
            }
        }
    }

    /// <summary>Forgets a sequence's tokens from a length on, with the blocks that it has for more.</summary>
    internal void Truncate(CachedSequence sequence, int length)
    {
        for (int kept = BlocksFor(length); sequence.BlockCount > kept;)
        {
            _blocks.Release(sequence.Blocks[--sequence.BlockCount]);
        }

        sequence.Length = length;
        sequence.PublishedBlocks = Math.Min(sequence.PublishedBlocks, length / TokenLayout.KeyBlock);
    }

    /// <summary>Reads a block of a sequence in the device's order: each layer's keys, then each layer's values.</summary>
    internal void ReadBlock(Span<byte> destination, Backend backend, CachedSequence sequence, int index)
    {
        foreach (Tensor blocks in (ReadOnlySpan<Tensor>)[.. _keys, .. _values])
        {
            int count = (int)blocks.Type.RowBytes(blocks.Columns);
            DeviceElements.ReadBytes(destination[..count], backend, blocks.RowRange(sequence.Blocks[index], 1));
            destination = destination[count..];
        }
    }

    /// <summary>Writes what <see cref="ReadBlock"/> read.</summary>
    internal void WriteBlock(Backend backend, CachedSequence sequence, int index, ReadOnlySpan<byte> source)
    {
        foreach (Tensor blocks in (ReadOnlySpan<Tensor>)[.. _keys, .. _values])
        {
            int count = (int)blocks.Type.RowBytes(blocks.Columns);
            DeviceElements.WriteBytes(backend, blocks.RowRange(sequence.Blocks[index], 1), source[..count]);
            source = source[count..];
        }
    }

    private void Copy(Backend backend, int destination, int source)
    {
        _blocks.Tokens(source).CopyTo(_blocks.Tokens(destination));
        foreach (Tensor blocks in (ReadOnlySpan<Tensor>)[.. _keys, .. _values])
        {
            backend.Copy(blocks.RowRange(destination, 1), blocks.RowRange(source, 1));
        }
    }
}
