using System.Runtime.InteropServices;
using TinyLlama.Compute;

namespace TinyLlama.Inference;

/// <summary>
/// Whose the blocks of a key-value cache are. Several sequences may have one block. A full block that was published is
/// found again by its tokens and the block before it, also when no sequence has it any more, until its room is needed:
/// of the unused blocks the one unused for longest goes first.
/// </summary>
/// <remarks>
/// A published block has the number of its content, which is never used again. The key of a block is (content before it,
/// hash of its tokens), and its tokens are compared too: so what is found is the whole prefix, exactly.
/// </remarks>
internal sealed class CacheBlocks
{
    private const int Unpublished = 0;

    private readonly int[] _users;
    private readonly int[] _tokens;
    private readonly long[] _content;
    private readonly BlockKey[] _keys;
    private readonly LinkedListNode<int>[] _nodes;
    private readonly LinkedList<int> _unused = [];
    private readonly Dictionary<BlockKey, int> _published = [];
    private long _lastContent;

    /// <summary>Makes all blocks unused.</summary>
    public CacheBlocks(int count)
    {
        _users = new int[count];
        _tokens = new int[checked(count * TokenLayout.KeyBlock)];
        _content = new long[count];
        _keys = new BlockKey[count];
        _nodes = new LinkedListNode<int>[count];
        for (int block = 0; block < count; block++)
        {
            _nodes[block] = new LinkedListNode<int>(block);
            _unused.AddLast(_nodes[block]);
        }
    }

    /// <summary>Gets the number of blocks.</summary>
    public int Count => _users.Length;

    /// <summary>Gets the number of blocks that no sequence has.</summary>
    public int Unused => _unused.Count;

    /// <summary>Gets the number of blocks that can be found.</summary>
    public int Published => _published.Count;

    /// <summary>The tokens whose keys and values a block holds, <see cref="TokenLayout.KeyBlock"/> of them.</summary>
    public Span<int> Tokens(int block) => _tokens.AsSpan(block * TokenLayout.KeyBlock, TokenLayout.KeyBlock);

    /// <summary>Whether more than one sequence has a block.</summary>
    public bool IsShared(int block) => _users[block] > 1;

    /// <summary>Takes the block that was unused for longest, for one sequence.</summary>
    public int Take()
    {
        int block = _unused.First!.Value;
        Forget(block);
        Share(block);
        return block;
    }

    /// <summary>One more sequence has a block.</summary>
    public void Share(int block)
    {
        if (_users[block]++ == 0)
        {
            _unused.Remove(_nodes[block]);
        }
    }

    /// <summary>One sequence less has a block.</summary>
    public void Release(int block)
    {
        if (--_users[block] > 0)
        {
            return;
        }

        if (_content[block] == Unpublished)
        {
            _unused.AddFirst(_nodes[block]);
        }
        else
        {
            _unused.AddLast(_nodes[block]);
        }
    }

    /// <summary>Finds the published block with these tokens after another one; null for the first of a sequence.</summary>
    public bool TryFind(int? before, ReadOnlySpan<int> tokens, out int block) =>
        _published.TryGetValue(Key(before, tokens), out block) && Tokens(block).SequenceEqual(tokens);

    /// <summary>Makes a full block findable by its tokens, after a published one; null for the first of a sequence.</summary>
    /// <returns>The block that has this content: this one, or one that had it earlier.</returns>
    public int Publish(int block, int? before)
    {
        if (_content[block] != Unpublished)
        {
            return block;
        }

        BlockKey key = Key(before, Tokens(block));
        if (_published.TryGetValue(key, out int other) && Tokens(other).SequenceEqual(Tokens(block)))
        {
            return other;
        }

        // Of two blocks with the same hash the earlier one can be found.
        _published.TryAdd(key, block);
        (_keys[block], _content[block]) = (key, ++_lastContent);
        return block;
    }

    /// <summary>Makes a block that is about to change unfindable.</summary>
    public void Forget(int block)
    {
        if (_content[block] != Unpublished && _published.TryGetValue(_keys[block], out int found) && found == block)
        {
            _published.Remove(_keys[block]);
        }

        _content[block] = Unpublished;
    }

    private BlockKey Key(int? before, ReadOnlySpan<int> tokens)
    {
        var hash = default(HashCode);
        hash.AddBytes(MemoryMarshal.AsBytes(tokens));
        return new BlockKey(before is int b ? _content[b] : Unpublished, hash.ToHashCode());
    }

    private readonly record struct BlockKey(long Before, int Hash);
}
