using System.Runtime.CompilerServices;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// How a kernel reads quantized weights from a panel (<see cref="WeightPanels"/>): groups of 32 elements of as many rows as
/// a register has lanes, in dwords of four bytes 0 … 63, with value = scale · byte + offset.
/// </summary>
/// <typeparam name="V">The register.</typeparam>
internal unsafe interface IBlockFormat<V>
    where V : struct, ILanes<V>
{
    /// <summary>Gets the bytes of a row's block.</summary>
    static abstract int BlockBytes { get; }

    /// <summary>Gets the groups of a block.</summary>
    static virtual int Groups => 1;

    /// <summary>Gets a value indicating whether the products of a group add up in int16: bytes are 0 … 15.</summary>
    static virtual bool FitsWords => false;

    /// <summary>Gets a value indicating whether a scale is of 16 elements, not of 32: <see cref="HalfScales"/>.</summary>
    static virtual bool HasHalfScales => false;

    /// <summary>Gets a value indicating whether there is an offset.</summary>
    static virtual bool HasOffsets => false;

    /// <summary>Gets what bytes have too much, where no offset says so: value = scale · (byte - excess).</summary>
    static virtual int Excess => 0;

    /// <summary>Elements 4i … 4i + 3 of a group.</summary>
    static abstract V Bytes(byte* block, int group, int i);

    /// <summary>What scales and offsets of all groups of a block are multiples of; and those, where they need work that groups share.</summary>
    /// <param name="block">The block.</param>
    /// <param name="scales">Room for four registers.</param>
    /// <param name="scale">The unit of scales.</param>
    /// <param name="offset">The unit of offsets.</param>
    static abstract void Units(byte* block, byte* scales, out V scale, out V offset);

    /// <summary>The scales and offsets of a group: in units, out values. By default the units are the values.</summary>
    static virtual void Scale(byte* block, byte* scales, int group, ref V scale, ref V offset)
    {
    }

    /// <summary>Scales of 16 elements, signed bytes that count units, as int16.</summary>
    /// <param name="block">The block.</param>
    /// <param name="group">The group.</param>
    /// <param name="first">That of the first half, twice.</param>
    /// <param name="second">That of the second, twice.</param>
    /// <param name="both">Both, doubled.</param>
    static virtual void HalfScales(byte* block, int group, out V first, out V second, out V both) =>
        throw new NotSupportedException();
}

/// <summary>What the formats share.</summary>
/// <typeparam name="V">The register.</typeparam>
internal static unsafe class BlockFormat<V>
    where V : struct, ILanes<V>
{
    /// <summary>The two halves of each lane at p.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void HalfPairs(byte* p, out V first, out V second)
    {
        V pairs = V.LoadDwords(p);
        (first, second) = (Halves<V>.FromLow(pairs), Halves<V>.FromHigh(pairs));
    }

    /// <summary>Dword plane i after some bytes of each lane.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Plane(byte* block, int bytesBefore, int i) => V.LoadDwords(block + (((nint)bytesBefore + (4 * i)) * V.Count));

    /// <summary>Elements 4i … 4i + 3 of a group of 32 nibbles: those of the first half lie in the low bits, of the second in the high ones.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Nibbles(byte* block, int bytesBefore, int i) =>
        V.LoadNibbles(block + ((bytesBefore + (4 * (i % 4))) * (nint)V.Count), i / 4 * 4);

    /// <summary>Bits 4i … 4i + 3 of each dword, each as bit 4 of a byte.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V FifthBits(V bits, int i)
    {
        V four = V.ShiftRight(bits, 4 * i);
        V low = V.Or(V.ShiftLeft(V.And(four, V.CreateDword(1)), 4), V.ShiftLeft(V.And(four, V.CreateDword(2)), 11));
        return V.Or(low, V.Or(V.ShiftLeft(V.And(four, V.CreateDword(4)), 18), V.ShiftLeft(V.And(four, V.CreateDword(8)), 25)));
    }

    /// <summary>
    /// The scales of 6 bits of Q4_K and Q5_K, a byte each: those of groups 0 to 3 lie in the low bits of their own bytes,
    /// those of 4 to 7 in the low bits of the last four bytes and the high bits of the others; minima in the same way.
    /// </summary>
    /// <param name="own">The bytes of groups 0 to 3.</param>
    /// <param name="last">The last four bytes, their four bits lowest.</param>
    /// <param name="p">Receives two registers: groups 0 to 3, groups 4 to 7.</param>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void UnpackSixBits(V own, V last, byte* p)
    {
        V.And(own, V.CreateDword(0x3F3F3F3F)).Store((float*)p);
        V high = V.And(V.ShiftRight(own, 2), V.CreateDword(0x30303030));
        V.Or(V.And(last, V.CreateDword(0x0F0F0F0F)), high).Store((float*)p + V.Count);
    }

    /// <summary>One of the eight that <see cref="UnpackSixBits"/> stored.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V SixBits(byte* p, int group)
    {
        V four = V.LoadDwords(p + ((nint)(group >> 2) * (sizeof(float) * V.Count)));
        return V.FromInt32(V.And(V.ShiftRight(four, 8 * (group & 3)), V.CreateDword(0xFF)));
    }
}

/// <summary>A scale, then 32 nibbles, each 8 too large.</summary>
/// <typeparam name="V">The register.</typeparam>
internal readonly unsafe struct Q4Format<V> : IBlockFormat<V>
    where V : struct, ILanes<V>
{
    public static int BlockBytes => 18;

    public static bool FitsWords => true;

    public static int Excess => 8;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Bytes(byte* block, int group, int i) => BlockFormat<V>.Nibbles(block, 2, i);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Units(byte* block, byte* scales, out V scale, out V offset) =>
        (scale, offset) = (Halves<V>.Load(block), default);
}

/// <summary>A scale and an offset, then 32 nibbles.</summary>
/// <typeparam name="V">The register.</typeparam>
internal readonly unsafe struct Q41Format<V> : IBlockFormat<V>
    where V : struct, ILanes<V>
{
    public static int BlockBytes => 20;

    public static bool FitsWords => true;

    public static bool HasOffsets => true;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Bytes(byte* block, int group, int i) => BlockFormat<V>.Nibbles(block, 4, i);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Units(byte* block, byte* scales, out V scale, out V offset) =>
        BlockFormat<V>.HalfPairs(block, out scale, out offset);
}

/// <summary>A scale, 32 fifth bits, 32 nibbles; values 16 too large.</summary>
/// <typeparam name="V">The register.</typeparam>
internal readonly unsafe struct Q5Format<V> : IBlockFormat<V>
    where V : struct, ILanes<V>
{
    public static int BlockBytes => 22;

    public static bool HasOffsets => true;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Bytes(byte* block, int group, int i) =>
        V.Or(BlockFormat<V>.Nibbles(block, 6, i), BlockFormat<V>.FifthBits(BlockFormat<V>.Plane(block, 2, 0), i));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Units(byte* block, byte* scales, out V scale, out V offset)
    {
        scale = Halves<V>.Load(block);
        offset = scale * V.Create(-16);
    }
}

/// <summary>A scale and an offset, 32 fifth bits, 32 nibbles.</summary>
/// <typeparam name="V">The register.</typeparam>
internal readonly unsafe struct Q51Format<V> : IBlockFormat<V>
    where V : struct, ILanes<V>
{
    public static int BlockBytes => 24;

    public static bool HasOffsets => true;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Bytes(byte* block, int group, int i) =>
        V.Or(BlockFormat<V>.Nibbles(block, 8, i), BlockFormat<V>.FifthBits(BlockFormat<V>.Plane(block, 4, 0), i));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Units(byte* block, byte* scales, out V scale, out V offset) =>
        BlockFormat<V>.HalfPairs(block, out scale, out offset);
}

/// <summary>8 groups: a scale and a minimum of the block, 6 bits of each group, then nibbles of two groups at a time.</summary>
/// <typeparam name="V">The register.</typeparam>
internal readonly unsafe struct Q4KFormat<V> : IBlockFormat<V>
    where V : struct, ILanes<V>
{
    public static int BlockBytes => 144;

    public static int Groups => 8;

    public static bool FitsWords => true;

    public static bool HasOffsets => true;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Bytes(byte* block, int group, int i) =>
        V.LoadNibbles(block + ((nint)(group >> 1) * (32 * V.Count)) + ((16 + (4 * i)) * V.Count), (group & 1) * 4);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Units(byte* block, byte* scales, out V scale, out V offset) =>
        UnpackScales(block, scales, out scale, out offset);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Scale(byte* block, byte* scales, int group, ref V scale, ref V offset)
    {
        scale *= BlockFormat<V>.SixBits(scales, group);
        offset *= BlockFormat<V>.SixBits(scales + (2 * sizeof(float) * V.Count), group);
    }

    /// <summary>Also those of <see cref="Q5KFormat{V}"/>.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void UnpackScales(byte* block, byte* scales, out V scale, out V offset)
    {
        BlockFormat<V>.HalfPairs(block, out scale, out V minimum);
        offset = V.Create(0) - minimum;
        V last = BlockFormat<V>.Plane(block, 4, 2);
        BlockFormat<V>.UnpackSixBits(BlockFormat<V>.Plane(block, 4, 0), last, scales);
        BlockFormat<V>.UnpackSixBits(BlockFormat<V>.Plane(block, 4, 1), V.ShiftRight(last, 4), scales + (2 * sizeof(float) * V.Count));
    }
}

/// <summary>As <see cref="Q4KFormat{V}"/>, with a fifth bit of each element before the nibbles.</summary>
/// <typeparam name="V">The register.</typeparam>
internal readonly unsafe struct Q5KFormat<V> : IBlockFormat<V>
    where V : struct, ILanes<V>
{
    public static int BlockBytes => 176;

    public static int Groups => 8;

    public static bool HasOffsets => true;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Bytes(byte* block, int group, int i)
    {
        V nibble = V.LoadNibbles(block + ((nint)(group >> 1) * (32 * V.Count)) + ((48 + (4 * i)) * V.Count), (group & 1) * 4);
        V bit = V.And(V.ShiftRight(BlockFormat<V>.Plane(block, 16, i), group), V.CreateDword(0x01010101));
        return V.Or(nibble, V.ShiftLeft(bit, 4));
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Units(byte* block, byte* scales, out V scale, out V offset) =>
        Q4KFormat<V>.UnpackScales(block, scales, out scale, out offset);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Scale(byte* block, byte* scales, int group, ref V scale, ref V offset) =>
        Q4KFormat<V>.Scale(block, scales, group, ref scale, ref offset);
}

/// <summary>A scale, then 32 signed bytes; for <see cref="TiledMatMul"/> alone, as <see cref="Q8MatMul"/> reads them by itself.</summary>
/// <typeparam name="V">The register.</typeparam>
internal readonly unsafe struct Q8Format<V> : IBlockFormat<V>
    where V : struct, ILanes<V>
{
    public static int BlockBytes => 34;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Bytes(byte* block, int group, int i) => BlockFormat<V>.Plane(block, 2, i);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Units(byte* block, byte* scales, out V scale, out V offset) =>
        (scale, offset) = (Halves<V>.Load(block), default);
}

/// <summary>A scale of the block, nibbles, two high bits of each element, a signed scale of each 16 elements; values 32 too large.</summary>
/// <typeparam name="V">The register.</typeparam>
internal readonly unsafe struct Q6KFormat<V> : IBlockFormat<V>
    where V : struct, ILanes<V>
{
    public static int BlockBytes => 210;

    public static int Groups => 8;

    public static bool HasHalfScales => true;

    public static bool HasOffsets => true;

    public static int Excess => 32;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Bytes(byte* block, int group, int i)
    {
        // Of 128 elements, groups 0 and 2 share bytes, as do 1 and 3.
        V high = BlockFormat<V>.Plane(block + ((nint)(group >> 2) * (32 * V.Count)), 2 + 128, i);
        V nibble = V.LoadNibbles(
            block + ((nint)(((group >> 2) * 2) + (group & 1)) * (32 * V.Count)) + ((2 + (4 * i)) * V.Count), (group & 2) * 2);
        V bits = V.And(V.ShiftRight(high, (group & 3) * 2), V.CreateDword(0x03030303));
        return V.Or(nibble, V.ShiftLeft(bits, 4));
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Units(byte* block, byte* scales, out V scale, out V offset) =>
        (scale, offset) = (Halves<V>.Load(block), default);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void HalfScales(byte* block, int group, out V first, out V second, out V both)
    {
        // Two groups share a dword.
        V four = V.LoadDwords(block + ((nint)((2 * group) & ~3) * V.Count) + ((2 + 192) * V.Count));
        (V even, V odd) = (V.EvenWords(four), V.OddWords(four));
        V pair;
        if ((group & 1) == 0)
        {
            V low = V.CreateDword(0xFFFF);
            (V a, V b) = (V.ShiftLeft(even, 16), V.ShiftLeft(odd, 16));
            first = V.Or(V.And(even, low), a);
            second = V.Or(V.And(odd, low), b);
            pair = V.Or(V.And(even, low), b);
        }
        else
        {
            V high = V.CreateDword(0xFFFF0000);
            (V a, V b) = (V.ShiftRight(even, 16), V.ShiftRight(odd, 16));
            first = V.Or(V.And(even, high), a);
            second = V.Or(V.And(odd, high), b);
            pair = V.Or(V.And(odd, high), a);
        }

        both = V.AddWords(pair, pair);
    }
}
