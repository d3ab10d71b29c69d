using System.Numerics;

namespace TinyLlama.Data.Tokenizers;

/// <summary>
/// What two neighbouring symbols become, and how early: a hash table with open addressing, 16 bytes an entry, at most half
/// full, so that a look-up touches one cache line as a rule.
/// </summary>
internal sealed class MergeTable
{
    /// <summary>The rank of a pair that does not merge.</summary>
    public const int NoMerge = int.MaxValue;

    /// <summary>The key of no pair: symbols are smaller, and an unknown character is -1.</summary>
    private const ulong Empty = 0x7FFFFFFF_7FFFFFFF;

    private readonly Slot[] _slots;
    private readonly int _shift;

    /// <summary>Makes an empty table.</summary>
    /// <param name="capacity">The most pairs that it will hold.</param>
    public MergeTable(int capacity)
    {
        int bits = Math.Max(4, BitOperations.Log2((uint)Math.Max(1, capacity)) + 2);
        _slots = new Slot[1 << bits];
        _shift = 64 - bits;
        Array.Fill(_slots, new Slot { Key = Empty });
    }

    /// <summary>Sets what a pair becomes; a pair that is set twice keeps the later.</summary>
    public void Set(int left, int right, int rank, int result)
    {
        ulong key = Key(left, right);
        int index = Index(key);
        while (_slots[index].Key != Empty && _slots[index].Key != key)
        {
            index = (index + 1) & (_slots.Length - 1);
        }

        _slots[index] = new Slot { Key = key, Rank = rank, Result = result };
    }

    /// <summary>The rank of a pair, lowest first, and its result; <see cref="NoMerge"/> where it has none.</summary>
    public int Find(int left, int right, out int result)
    {
        ulong key = Key(left, right);
        Slot[] slots = _slots;
        for (int index = Index(key); ; index++)
        {
            ref Slot slot = ref slots[index & (slots.Length - 1)];
            if (slot.Key == key)
            {
                result = slot.Result;
                return slot.Rank;
            }

            if (slot.Key == Empty)
            {
                result = -1;
                return NoMerge;
            }
        }
    }

    private static ulong Key(int left, int right) => ((ulong)(uint)left << 32) | (uint)right;

    private int Index(ulong key) => (int)((key * 0x9E3779B97F4A7C15UL) >> _shift);

    private struct Slot
    {
        public ulong Key;
        public int Rank;
        public int Result;
    }
}
