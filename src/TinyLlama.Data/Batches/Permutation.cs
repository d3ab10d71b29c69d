namespace TinyLlama.Data.Batches;

/// <summary>A pseudo-random order of 0 … n-1 of which any place is computed at once: nothing is stored or shuffled.</summary>
/// <remarks>
/// A balanced Feistel network permutes the smallest power of four that is at least n; a result outside 0 … n-1 is put
/// through again until it is inside (cycle walking), which takes fewer than four turns on average and keeps it a
/// permutation of 0 … n-1. (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002.)
/// </remarks>
/// <param name="count">n, at least 1.</param>
/// <param name="seed">Chooses the order.</param>
/// <param name="epoch">Chooses the order among those of a seed.</param>
internal readonly struct Permutation(long count, ulong seed, long epoch)
{
    private const int Rounds = 8;

    private readonly ulong _count = (ulong)count;
    private readonly ulong _key = Mix(Mix(seed) + (ulong)epoch);
    private readonly int _halfBits = HalfBits((ulong)count);

    /// <summary>Gets the element at a place.</summary>
    /// <param name="place">0 … n-1.</param>
    public long this[long place]
    {
        get
        {
            ulong mask = (1UL << _halfBits) - 1;
            ulong value = (ulong)place;
            do
            {
                ulong left = value >> _halfBits;
                ulong right = value & mask;
                for (int round = 0; round < Rounds; round++)
                {
                    (left, right) = (right, left ^ (Mix(right + (_key ^ (ulong)round * 0xD1B54A32D192ED03)) & mask));
                }

                value = (left << _halfBits) | right;
            }
            while (value >= _count);

            return (long)value;
        }
    }

    /// <summary>Spreads every bit of a number over all of the result (the finalizer of SplitMix64).</summary>
    internal static ulong Mix(ulong value)
    {
        value += 0x9E3779B97F4A7C15;
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9;
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB;
        return value ^ (value >> 31);
    }

    private static int HalfBits(ulong count)
    {
        int bits = 64 - System.Numerics.BitOperations.LeadingZeroCount(count - 1);
        return Math.Max(1, (bits + 1) / 2);
    }
}
