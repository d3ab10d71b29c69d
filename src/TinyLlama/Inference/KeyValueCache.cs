using TinyLlama.Compute;
using TinyLlama.Model;

namespace TinyLlama.Inference;

/// <summary>A sequence whose keys and values lie in a <see cref="KeyValueCache"/>.</summary>
public sealed class CachedSequence
{
    internal CachedSequence(int blockCapacity) => Blocks = new int[blockCapacity];

    /// <summary>Gets the number of tokens fed so far: the position of the next one.</summary>
    public int Length { get; internal set; }

    /// <summary>Gets the cache block of each run of <see cref="TokenLayout.KeyBlock"/> positions.</summary>
    internal int[] Blocks { get; }

    internal int BlockCount { get; set; }
}

/// <summary>
/// Keys and values of many sequences in blocks of <see cref="TokenLayout.KeyBlock"/> rows: a sequence takes a free block
/// when it grows into one, so that sequences of any lengths share the rows.
/// </summary>
/// <remarks>Kwon et al. 2023 (PagedAttention). Cache row of position p: <c>Blocks[p / 64] · 64 + p mod 64</c>.</remarks>
public sealed class KeyValueCache : KeyValueSource
{
    private readonly Tensor[] _keys;
    private readonly Tensor[] _values;
    private readonly Stack<int> _free;

    /// <summary>Takes the rows of all layers.</summary>
    /// <param name="arena">Their owner.</param>
    /// <param name="config">The model's shape.</param>
    /// <param name="blocks">Number of blocks that sequences share.</param>
    public KeyValueCache(Arena arena, ModelConfig config, int blocks)
    {
        int rows = checked(blocks * TokenLayout.KeyBlock);
        (_keys, _values) = (new Tensor[config.Layers], new Tensor[config.Layers]);
        for (int l = 0; l < config.Layers; l++)
        {
            _keys[l] = arena.Take(rows, config.KeyValueChannels);
            _values[l] = arena.Take(rows, config.KeyValueChannels);
        }

        _free = new Stack<int>(blocks);
        for (int block = blocks - 1; block >= 0; block--)
        {
            _free.Push(block);
        }
    }

    /// <summary>Gets the number of blocks that no sequence has.</summary>
    public int FreeBlocks => _free.Count;

    /// <summary>The number of blocks that hold so many tokens.</summary>
    public static int BlocksFor(int tokens) => (tokens + TokenLayout.KeyBlock - 1) / TokenLayout.KeyBlock;

    /// <inheritdoc/>
    public override (Tensor Keys, Tensor Values) Append(Backend backend, int layer, Tensor keys, Tensor values, TokenLayout layout)
    {
        backend.AppendToCache(_keys[layer], _values[layer], keys, values, layout);
        return (_keys[layer], _values[layer]);
    }

    /// <summary>Gives a sequence the blocks it needs to grow to a length.</summary>
    /// <exception cref="InvalidOperationException">No block is free.</exception>
    internal void Reserve(CachedSequence sequence, int length)
    {
        for (int needed = BlocksFor(length); sequence.BlockCount < needed; sequence.BlockCount++)
        {
            if (!_free.TryPop(out int block))
            {
                throw new InvalidOperationException("every block of the key-value cache is taken");
            }

            sequence.Blocks[sequence.BlockCount] = block;
        }
    }

    /// <summary>Takes a sequence's blocks back; its length is 0 then.</summary>
    internal void Release(CachedSequence sequence)
    {
        while (sequence.BlockCount > 0)
        {
            _free.Push(sequence.Blocks[--sequence.BlockCount]);
        }

        sequence.Length = 0;
    }
}
