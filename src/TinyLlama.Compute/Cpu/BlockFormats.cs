using System.Runtime.CompilerServices;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// How a kernel reads quantized weights from a panel (<see cref="WeightPanels"/>): groups of 32 elements of as many rows as
/// a register has lanes, in dwords of four bytes, with value = scale · byte + offset.
/// </summary>
/// <typeparam name="V">The register.</typeparam>
internal unsafe interface IBlockFormat<V>
    where V : struct, ILanes<V>
{
    /// <summary>Gets the storage type.</summary>
    static abstract DType Type { get; }

    /// <summary>Gets how many <see cref="ILanes{TSelf}.ByteProducts"/> fit one int16; 0 where bytes are signed.</summary>
    static abstract int ProductsPerWord { get; }

    /// <summary>Gets a value indicating whether a scale is of 16 elements, not of 32.</summary>
    static abstract bool HasHalfScales { get; }

    /// <summary>Gets a value indicating whether there is an offset.</summary>
    static abstract bool HasOffsets { get; }

    /// <summary>The elements of a group.</summary>
    static abstract void Load(byte* block, int group, out V w0, out V w1, out V w2, out V w3, out V w4, out V w5, out V w6, out V w7);

    /// <summary>The scales of a group, or of one of its halves.</summary>
    static abstract V Scale(byte* block, int group, int half);

    /// <summary>What is added after scaling.</summary>
    static abstract V Offset(byte* block, int group, int half);
}

/// <summary>What the formats share.</summary>
/// <typeparam name="V">The register.</typeparam>
internal static unsafe class BlockFormat<V>
    where V : struct, ILanes<V>
{
    /// <summary>The float that a half in the low bits of each dword is; the high bits do not matter. Only of finite ones.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V FromHalf(V bits)
    {
        // Exponent and mantissa at the places that they have in a float, whose exponent counts from 127, not from 15.
        V magnitude = V.ShiftLeft(V.And(bits, V.CreateDword(0x7FFF)), 13) * V.Create(5.192296858534828e33f);
        return V.Or(magnitude, V.ShiftLeft(V.And(bits, V.CreateDword(0x8000)), 16));
    }

    /// <summary>The halves at p, one a lane.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Halves(byte* p) => FromHalf(V.LoadWords(p));

    /// <summary>Dword plane i after some bytes of each lane.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Plane(byte* block, int bytesBefore, int i) => V.LoadDwords(block + (((nint)bytesBefore + (4 * i)) * V.Count));

    /// <summary>The low four bits of each byte.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Low(V bytes) => V.And(bytes, V.CreateDword(0x0F0F0F0F));

    /// <summary>The high four bits of each byte.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V High(V bytes) => Low(V.ShiftRight(bytes, 4));

    /// <summary>Four dwords of nibbles as a group: first the low ones, then the high ones.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Nibbles(byte* block, int bytesBefore, out V w0, out V w1, out V w2, out V w3, out V w4, out V w5, out V w6, out V w7)
    {
        (V a, V b, V c, V d) = (Plane(block, bytesBefore, 0), Plane(block, bytesBefore, 1), Plane(block, bytesBefore, 2), Plane(block, bytesBefore, 3));
        (w0, w1, w2, w3) = (Low(a), Low(b), Low(c), Low(d));
        (w4, w5, w6, w7) = (High(a), High(b), High(c), High(d));
    }

    /// <summary>Byte number <paramref name="index"/> of each dword, as a dword.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Byte(V dwords, int index, uint mask) => V.And(V.ShiftRight(dwords, 8 * index), V.CreateDword(mask));

    /// <summary>
    /// A scale of 6 bits of Q4_K and Q5_K: those of groups 0 to 3 lie in the low bits of their own bytes, those of 4 to 7
    /// in four bits of the last four bytes and the high bits of the others.
    /// </summary>
    /// <param name="own">The four bytes of groups 0 to 3.</param>
    /// <param name="last">The last four bytes.</param>
    /// <param name="shift">Of the four bits in the last bytes: 0 for scales, 4 for minima.</param>
    /// <param name="group">0 … 7.</param>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V SixBits(V own, V last, int shift, int group) => V.FromInt32(group < 4
        ? Byte(own, group, 0x3F)
        : V.Or(V.And(V.ShiftRight(last, (8 * (group - 4)) + shift), V.CreateDword(0x0F)), V.ShiftLeft(V.And(V.ShiftRight(own, (8 * (group - 4)) + 6), V.CreateDword(3)), 4)));
}

/// <summary>A scale, then 32 signed bytes.</summary>
/// <typeparam name="V">The register.</typeparam>
internal readonly unsafe struct Q8Format<V> : IBlockFormat<V>
    where V : struct, ILanes<V>
{
    public static DType Type => DType.Q8_0;

    public static int ProductsPerWord => 0;

    public static bool HasHalfScales => false;

    public static bool HasOffsets => false;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Load(byte* block, int group, out V w0, out V w1, out V w2, out V w3, out V w4, out V w5, out V w6, out V w7)
    {
        (w0, w1, w2, w3) = (BlockFormat<V>.Plane(block, 2, 0), BlockFormat<V>.Plane(block, 2, 1), BlockFormat<V>.Plane(block, 2, 2), BlockFormat<V>.Plane(block, 2, 3));
        (w4, w5, w6, w7) = (BlockFormat<V>.Plane(block, 2, 4), BlockFormat<V>.Plane(block, 2, 5), BlockFormat<V>.Plane(block, 2, 6), BlockFormat<V>.Plane(block, 2, 7));
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Scale(byte* block, int group, int half) => BlockFormat<V>.Halves(block);

    public static V Offset(byte* block, int group, int half) => default;
}

/// <summary>A scale, then 32 nibbles, each 8 too large.</summary>
/// <typeparam name="V">The register.</typeparam>
internal readonly unsafe struct Q4Format<V> : IBlockFormat<V>
    where V : struct, ILanes<V>
{
    public static DType Type => DType.Q4_0;

    public static int ProductsPerWord => 8;

    public static bool HasHalfScales => false;

    public static bool HasOffsets => true;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Load(byte* block, int group, out V w0, out V w1, out V w2, out V w3, out V w4, out V w5, out V w6, out V w7) =>
        BlockFormat<V>.Nibbles(block, 2, out w0, out w1, out w2, out w3, out w4, out w5, out w6, out w7);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Scale(byte* block, int group, int half) => BlockFormat<V>.Halves(block);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Offset(byte* block, int group, int half) => BlockFormat<V>.Halves(block) * V.Create(-8);
}

/// <summary>A scale and an offset, then 32 nibbles.</summary>
/// <typeparam name="V">The register.</typeparam>
internal readonly unsafe struct Q41Format<V> : IBlockFormat<V>
    where V : struct, ILanes<V>
{
    public static DType Type => DType.Q4_1;

    public static int ProductsPerWord => 8;

    public static bool HasHalfScales => false;

    public static bool HasOffsets => true;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Load(byte* block, int group, out V w0, out V w1, out V w2, out V w3, out V w4, out V w5, out V w6, out V w7) =>
        BlockFormat<V>.Nibbles(block, 4, out w0, out w1, out w2, out w3, out w4, out w5, out w6, out w7);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Scale(byte* block, int group, int half) => BlockFormat<V>.FromHalf(V.LoadDwords(block));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Offset(byte* block, int group, int half) => BlockFormat<V>.FromHalf(V.ShiftRight(V.LoadDwords(block), 16));
}

/// <summary>A scale, 32 fifth bits, 32 nibbles; values 16 too large.</summary>
/// <typeparam name="V">The register.</typeparam>
internal readonly unsafe struct Q5Format<V> : IBlockFormat<V>
    where V : struct, ILanes<V>
{
    public static DType Type => DType.Q5_0;

    public static int ProductsPerWord => 4;

    public static bool HasHalfScales => false;

    public static bool HasOffsets => true;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Load(byte* block, int group, out V w0, out V w1, out V w2, out V w3, out V w4, out V w5, out V w6, out V w7)
    {
        BlockFormat<V>.Nibbles(block, 6, out w0, out w1, out w2, out w3, out w4, out w5, out w6, out w7);
        FifthBits.Add(BlockFormat<V>.Plane(block, 2, 0), ref w0, ref w1, ref w2, ref w3, ref w4, ref w5, ref w6, ref w7);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Scale(byte* block, int group, int half) => BlockFormat<V>.Halves(block);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Offset(byte* block, int group, int half) => BlockFormat<V>.Halves(block) * V.Create(-16);
}

/// <summary>A scale and an offset, 32 fifth bits, 32 nibbles.</summary>
/// <typeparam name="V">The register.</typeparam>
internal readonly unsafe struct Q51Format<V> : IBlockFormat<V>
    where V : struct, ILanes<V>
{
    public static DType Type => DType.Q5_1;

    public static int ProductsPerWord => 4;

    public static bool HasHalfScales => false;

    public static bool HasOffsets => true;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Load(byte* block, int group, out V w0, out V w1, out V w2, out V w3, out V w4, out V w5, out V w6, out V w7)
    {
        BlockFormat<V>.Nibbles(block, 8, out w0, out w1, out w2, out w3, out w4, out w5, out w6, out w7);
        FifthBits.Add(BlockFormat<V>.Plane(block, 4, 0), ref w0, ref w1, ref w2, ref w3, ref w4, ref w5, ref w6, ref w7);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Scale(byte* block, int group, int half) => BlockFormat<V>.FromHalf(V.LoadDwords(block));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Offset(byte* block, int group, int half) => BlockFormat<V>.FromHalf(V.ShiftRight(V.LoadDwords(block), 16));
}

/// <summary>The fifth bits of Q5_0 and Q5_1: bit j of a dword belongs to element j.</summary>
internal static class FifthBits
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Add<V>(V bits, ref V w0, ref V w1, ref V w2, ref V w3, ref V w4, ref V w5, ref V w6, ref V w7)
        where V : struct, ILanes<V>
    {
        (w0, w1, w2, w3) = (V.Or(w0, Spread(bits, 0)), V.Or(w1, Spread(bits, 4)), V.Or(w2, Spread(bits, 8)), V.Or(w3, Spread(bits, 12)));
        (w4, w5, w6, w7) = (V.Or(w4, Spread(bits, 16)), V.Or(w5, Spread(bits, 20)), V.Or(w6, Spread(bits, 24)), V.Or(w7, Spread(bits, 28)));
    }

    // Four bits, each to bit 4 of its byte.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static V Spread<V>(V bits, int first)
        where V : struct, ILanes<V>
    {
        V four = V.ShiftRight(bits, first);
        V low = V.Or(V.ShiftLeft(V.And(four, V.CreateDword(1)), 4), V.ShiftLeft(V.And(four, V.CreateDword(2)), 11));
        return V.Or(low, V.Or(V.ShiftLeft(V.And(four, V.CreateDword(4)), 18), V.ShiftLeft(V.And(four, V.CreateDword(8)), 25)));
    }
}

/// <summary>8 groups: a scale and a minimum of the block, 6 bits of each group, then nibbles of two groups at a time.</summary>
/// <typeparam name="V">The register.</typeparam>
internal readonly unsafe struct Q4KFormat<V> : IBlockFormat<V>
    where V : struct, ILanes<V>
{
    public static DType Type => DType.Q4_K;

    public static int ProductsPerWord => 8;

    public static bool HasHalfScales => false;

    public static bool HasOffsets => true;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Load(byte* block, int group, out V w0, out V w1, out V w2, out V w3, out V w4, out V w5, out V w6, out V w7)
    {
        byte* pair = block + ((16 + (group / 2 * 32)) * (nint)V.Count);
        int shift = group % 2 * 4;
        (w0, w1, w2, w3) = (Nibble(pair, 0, shift), Nibble(pair, 1, shift), Nibble(pair, 2, shift), Nibble(pair, 3, shift));
        (w4, w5, w6, w7) = (Nibble(pair, 4, shift), Nibble(pair, 5, shift), Nibble(pair, 6, shift), Nibble(pair, 7, shift));
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Scale(byte* block, int group, int half) => BlockFormat<V>.FromHalf(V.LoadDwords(block))
        * BlockFormat<V>.SixBits(BlockFormat<V>.Plane(block, 4, 0), BlockFormat<V>.Plane(block, 4, 2), 0, group);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Offset(byte* block, int group, int half) => BlockFormat<V>.FromHalf(V.ShiftRight(V.LoadDwords(block), 16))
        * BlockFormat<V>.SixBits(BlockFormat<V>.Plane(block, 4, 1), BlockFormat<V>.Plane(block, 4, 2), 4, group) * V.Create(-1);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static V Nibble(byte* pair, int i, int shift) => BlockFormat<V>.Low(V.ShiftRight(BlockFormat<V>.Plane(pair, 0, i), shift));
}

/// <summary>As <see cref="Q4KFormat{V}"/>, with a fifth bit of each element before the nibbles.</summary>
/// <typeparam name="V">The register.</typeparam>
internal readonly unsafe struct Q5KFormat<V> : IBlockFormat<V>
    where V : struct, ILanes<V>
{
    public static DType Type => DType.Q5_K;

    public static int ProductsPerWord => 4;

    public static bool HasHalfScales => false;

    public static bool HasOffsets => true;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Load(byte* block, int group, out V w0, out V w1, out V w2, out V w3, out V w4, out V w5, out V w6, out V w7)
    {
        byte* high = block + (16 * (nint)V.Count);
        byte* low = block + ((48 + (group / 2 * 32)) * (nint)V.Count);
        (w0, w1, w2, w3) = (Value(low, high, 0, group), Value(low, high, 1, group), Value(low, high, 2, group), Value(low, high, 3, group));
        (w4, w5, w6, w7) = (Value(low, high, 4, group), Value(low, high, 5, group), Value(low, high, 6, group), Value(low, high, 7, group));
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Scale(byte* block, int group, int half) => Q4KFormat<V>.Scale(block, group, half);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Offset(byte* block, int group, int half) => Q4KFormat<V>.Offset(block, group, half);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static V Value(byte* low, byte* high, int i, int group)
    {
        V nibble = BlockFormat<V>.Low(V.ShiftRight(BlockFormat<V>.Plane(low, 0, i), group % 2 * 4));
        V bit = V.And(V.ShiftRight(BlockFormat<V>.Plane(high, 0, i), group), V.CreateDword(0x01010101));
        return V.Or(nibble, V.ShiftLeft(bit, 4));
    }
}

/// <summary>A scale of the block, nibbles, two high bits of each element, a signed scale of each 16 elements; values 32 too large.</summary>
/// <typeparam name="V">The register.</typeparam>
internal readonly unsafe struct Q6KFormat<V> : IBlockFormat<V>
    where V : struct, ILanes<V>
{
    public static DType Type => DType.Q6_K;

    public static int ProductsPerWord => 2;

    public static bool HasHalfScales => true;

    public static bool HasOffsets => true;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Load(byte* block, int group, out V w0, out V w1, out V w2, out V w3, out V w4, out V w5, out V w6, out V w7)
    {
        // Of 128 elements, groups 0 and 2 share bytes, as do 1 and 3.
        byte* low = block + ((2 + (group / 4 * 64) + (group % 2 * 32)) * (nint)V.Count);
        byte* high = block + ((2 + 128 + (group / 4 * 32)) * (nint)V.Count);
        (w0, w1, w2, w3) = (Value(low, high, 0, group), Value(low, high, 1, group), Value(low, high, 2, group), Value(low, high, 3, group));
        (w4, w5, w6, w7) = (Value(low, high, 4, group), Value(low, high, 5, group), Value(low, high, 6, group), Value(low, high, 7, group));
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Scale(byte* block, int group, int half)
    {
        // The byte with its sign: to the top of a dword, which is then 2²⁴ too large.
        int index = (2 * group) + half;
        V scales = BlockFormat<V>.Plane(block, 2 + 192, index / 4);
        V top = V.And(V.ShiftLeft(scales, 8 * (3 - (index % 4))), V.CreateDword(0xFF000000));
        return BlockFormat<V>.Halves(block) * (V.FromInt32(top) * V.Create(5.9604644775390625e-8f));
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Offset(byte* block, int group, int half) => Scale(block, group, half) * V.Create(-32);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static V Value(byte* low, byte* high, int i, int group)
    {
        V nibble = BlockFormat<V>.Low(V.ShiftRight(BlockFormat<V>.Plane(low, 0, i), group % 4 / 2 * 4));
        V bits = V.And(V.ShiftRight(BlockFormat<V>.Plane(high, 0, i), group % 4 * 2), V.CreateDword(0x03030303));
        return V.Or(nibble, V.ShiftLeft(bits, 4));
    }
}
