using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Runtime.Intrinsics;

namespace TinyLlama.Data.Tokenizers;

/// <summary>
/// The ids of short stretches of text that were encoded lately. Each place holds one stretch, the last that came there; an
/// entry fills one cache line of 64 bytes, the whole cache 2 MiB.
/// </summary>
internal sealed class StretchCache
{
    /// <summary>The longest stretch that is kept, in bytes.</summary>
    public const int KeyBytes = 32;

    private const int EntryBits = 15;
    private const int MaximumTokens = 7;
    private static readonly Vector256<byte> s_places = Vector256.CreateSequence<byte>(0, 1);
    private readonly Entry[] _entries = new Entry[1 << EntryBits];

    /// <summary>Appends the ids of a stretch if they are known.</summary>
    /// <param name="buffer">The stretch, and what follows it, at least <see cref="KeyBytes"/> bytes.</param>
    /// <param name="length">The length of the stretch in bytes.</param>
    /// <param name="tokens">Where ids are appended.</param>
    public bool TryAppend(ReadOnlySpan<byte> buffer, int length, List<int> tokens)
    {
        Vector256<byte> key = Key(buffer, length);
        ref Entry entry = ref _entries[Place(key)];
        if (entry.ByteCount != length || entry.Key != key)
        {
            return false;
        }

        int count = entry.TokenCount;
        int before = tokens.Count;
        if (before + MaximumTokens > tokens.Capacity)
        {
            tokens.EnsureCapacity(before + MaximumTokens);
        }

        CollectionsMarshal.SetCount(tokens, before + count);
        Span<int> target = CollectionsMarshal.AsSpan(tokens)[before..];
        for (int i = 0; i < target.Length && i < count; i++)
        {
            target[i] = entry.Tokens[i];
        }

        return true;
    }

    /// <summary>Keeps the ids of a stretch, which are those of the list from a place on; too many are not kept.</summary>
    public void Remember(ReadOnlySpan<byte> buffer, int length, List<int> tokens, int from)
    {
        int count = tokens.Count - from;
        if (count > MaximumTokens)
        {
            return;
        }

        Vector256<byte> key = Key(buffer, length);
        ref Entry entry = ref _entries[Place(key)];
        entry.Key = key;
        entry.ByteCount = (short)length;
        entry.TokenCount = (short)count;
        for (int i = 0; i < count; i++)
        {
            entry.Tokens[i] = tokens[from + i];
        }
    }

    private static Vector256<byte> Key(ReadOnlySpan<byte> buffer, int length)
    {
        Vector256<byte> isInside = Vector256.LessThan(s_places, Vector256.Create((byte)length));
        return Vector256.Create(buffer[..KeyBytes]) & isInside;
    }

    private static int Place(Vector256<byte> key)
    {
        Vector256<ulong> words = key.AsUInt64();
        ulong low = (words.GetElement(0) ^ (words.GetElement(1) * 0xC2B2AE3D27D4EB4FUL)) * 0x9E3779B97F4A7C15UL;
        ulong high = (words.GetElement(2) ^ (words.GetElement(3) * 0x165667B19E3779F9UL)) * 0xD6E8FEB86659FD93UL;
        ulong hash = low ^ (low >> 29) ^ high;
        return (int)((hash * 0x9FB21C651E98DF25UL) >> (64 - EntryBits));
    }

    private struct Entry
    {
        public Vector256<byte> Key;
        public short ByteCount;
        public short TokenCount;
        public TokenList Tokens;
    }

    [InlineArray(MaximumTokens)]
    private struct TokenList
    {
        private int _first;
    }
}
