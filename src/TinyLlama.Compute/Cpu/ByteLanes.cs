using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// The same registers as bits: each lane is a dword, two int16 or four bytes, which integer products of quantized weights
/// work on. Integers are exact, so every width gives the same.
/// </summary>
internal unsafe partial interface ILanes<TSelf>
{
    /// <summary>Loads <see cref="Count"/> dwords.</summary>
    static abstract TSelf LoadDwords(byte* p);

    /// <summary>Loads <see cref="Count"/> words of 16 bits, one a lane.</summary>
    static abstract TSelf LoadWords(byte* p);

    /// <summary>The same dword in each lane.</summary>
    static abstract TSelf CreateDword(uint bits);

    /// <summary>Each dword shifted towards its low bits; zeros follow.</summary>
    static abstract TSelf ShiftRight(TSelf a, int bits);

    /// <summary>The same; copies of the highest bit follow.</summary>
    static abstract TSelf ShiftRightSigned(TSelf a, int bits);

    /// <summary>Each dword shifted towards its high bits.</summary>
    static abstract TSelf ShiftLeft(TSelf a, int bits);

    /// <summary>Bits that both have.</summary>
    static abstract TSelf And(TSelf a, TSelf b);

    /// <summary>Bits that one of them has.</summary>
    static abstract TSelf Or(TSelf a, TSelf b);

    /// <summary>
    /// Products of the bytes of a and x, those of neighbours added: two int16 a lane. Bytes of a are 0 … 63, of x -127 … 127;
    /// or a and x are <see cref="Magnitudes"/> and <see cref="WithSigns"/>.
    /// </summary>
    static abstract TSelf WordProducts(TSelf a, TSelf x);

    /// <summary>What stands for signed bytes a in <see cref="WordProducts"/>: it may be without their signs.</summary>
    static abstract TSelf Magnitudes(TSelf a);

    /// <summary>What stands for x then: it has the signs that <see cref="Magnitudes"/> takes from a.</summary>
    static abstract TSelf WithSigns(TSelf x, TSelf a);

    /// <summary>The first and the third byte of each lane, signed, as its two int16.</summary>
    static abstract TSelf EvenWords(TSelf a);

    /// <summary>The second and the fourth.</summary>
    static abstract TSelf OddWords(TSelf a);

    /// <summary>Products of the int16 of a and x, those of each lane added.</summary>
    static abstract TSelf DwordProducts(TSelf a, TSelf x);

    /// <summary>Sums of int16.</summary>
    static abstract TSelf AddWords(TSelf a, TSelf b);

    /// <summary>The four bits of each byte that begin at bit <paramref name="shift"/>: 0 or 4.</summary>
    static abstract TSelf LoadNibbles(byte* p, int shift);

    /// <summary>Sums of int32.</summary>
    static abstract TSelf AddDwords(TSelf a, TSelf b);

    /// <summary>The sum of the two int16 of each lane.</summary>
    static abstract TSelf AddNeighbours(TSelf words);

    /// <summary>The int32 of each lane as a float.</summary>
    static abstract TSelf FromInt32(TSelf a);

    /// <summary>Stores the low byte of each lane.</summary>
    void StoreLowBytes(sbyte* p);
}

internal unsafe partial struct Lanes512
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 LoadDwords(byte* p) => new(Vector512.Load(p).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 LoadWords(byte* p)
    {
        if (Avx512F.IsSupported)
        {
            return new(Avx512F.ConvertToVector512Int32(Vector256.Load((ushort*)p)).AsSingle());
        }

        Vector256<ushort> words = Vector256.Load((ushort*)p);
        return new(Vector512.Create(Vector256.WidenLower(words), Vector256.WidenUpper(words)).AsSingle());
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 CreateDword(uint bits) => new(Vector512.Create(bits).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 ShiftRight(Lanes512 a, int bits) => new((a._value.AsUInt32() >>> bits).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 ShiftRightSigned(Lanes512 a, int bits) => new((a._value.AsInt32() >> bits).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 ShiftLeft(Lanes512 a, int bits) => new((a._value.AsUInt32() << bits).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 And(Lanes512 a, Lanes512 b) => new((a._value.AsUInt32() & b._value.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 Or(Lanes512 a, Lanes512 b) => new((a._value.AsUInt32() | b._value.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 WordProducts(Lanes512 a, Lanes512 x) => new((Avx512BW.IsSupported
        ? Avx512BW.MultiplyAddAdjacent(a._value.AsByte(), x._value.AsSByte())
        : EvenAndOdd(a._value.AsInt16(), x._value.AsInt16())).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 Magnitudes(Lanes512 a) => Avx512BW.IsSupported ? new(Avx512BW.Abs(a._value.AsSByte()).AsSingle()) : a;

    // A byte whose partner is 0 may become anything.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 WithSigns(Lanes512 x, Lanes512 a) => Avx512BW.IsSupported
        ? new(Vector512.ConditionalSelect(Vector512.LessThan(a._value.AsSByte(), Vector512<sbyte>.Zero), -x._value.AsSByte(), x._value.AsSByte()).AsSingle())
        : x;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 EvenWords(Lanes512 a) => new(((a._value.AsInt16() << 8) >> 8).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 OddWords(Lanes512 a) => new((a._value.AsInt16() >> 8).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 DwordProducts(Lanes512 a, Lanes512 x) => new(Pairs(a._value.AsInt16(), x._value.AsInt16()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 AddWords(Lanes512 a, Lanes512 b) => new((a._value.AsInt16() + b._value.AsInt16()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 LoadNibbles(byte* p, int shift) =>
        new(((Vector512.Load((uint*)p) >>> shift) & Vector512.Create(0x0F0F0F0Fu)).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 AddDwords(Lanes512 a, Lanes512 b) => new((a._value.AsInt32() + b._value.AsInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 AddNeighbours(Lanes512 words) => new(Neighbours(words._value.AsInt16()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 FromInt32(Lanes512 a) => new(Vector512.ConvertToSingle(a._value.AsInt32()));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public void StoreLowBytes(sbyte* p)
    {
        Vector512<int> dwords = _value.AsInt32();
        if (Avx512F.IsSupported)
        {
            Avx512F.ConvertToVector128SByte(dwords).Store(p);
            return;
        }

        Vector256<short> words = Vector256.Narrow(dwords.GetLower(), dwords.GetUpper());
        Vector256<sbyte> bytes = Vector256.Narrow(words, words);
        bytes.GetLower().Store(p);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector512<int> Neighbours(Vector512<short> words) => Avx512BW.IsSupported
        ? Avx512BW.MultiplyAddAdjacent(words, Vector512<short>.One)
        : ((words.AsInt32() << 16) >> 16) + (words.AsInt32() >> 16);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector512<int> Pairs(Vector512<short> a, Vector512<short> b) => Avx512BW.IsSupported
        ? Avx512BW.MultiplyAddAdjacent(a, b)
        : (((a.AsInt32() << 16) >> 16) * ((b.AsInt32() << 16) >> 16)) + ((a.AsInt32() >> 16) * (b.AsInt32() >> 16));

    // Bytes as int16: the even ones shifted out of and back into the low halves, the odd ones down.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector512<short> EvenAndOdd(Vector512<short> a, Vector512<short> b) =>
        (((a << 8) >> 8) * ((b << 8) >> 8)) + ((a >> 8) * (b >> 8));
}

internal unsafe partial struct Lanes256
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 LoadDwords(byte* p) => new(Vector256.Load(p).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 LoadWords(byte* p)
    {
        if (Avx2.IsSupported)
        {
            return new(Avx2.ConvertToVector256Int32((ushort*)p).AsSingle());
        }

        Vector128<ushort> words = Vector128.Load((ushort*)p);
        return new(Vector256.Create(Vector128.WidenLower(words), Vector128.WidenUpper(words)).AsSingle());
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 CreateDword(uint bits) => new(Vector256.Create(bits).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 ShiftRight(Lanes256 a, int bits) => new((a._value.AsUInt32() >>> bits).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 ShiftRightSigned(Lanes256 a, int bits) => new((a._value.AsInt32() >> bits).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 ShiftLeft(Lanes256 a, int bits) => new((a._value.AsUInt32() << bits).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 And(Lanes256 a, Lanes256 b) => new((a._value.AsUInt32() & b._value.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 Or(Lanes256 a, Lanes256 b) => new((a._value.AsUInt32() | b._value.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 WordProducts(Lanes256 a, Lanes256 x) => new((Avx2.IsSupported
        ? Avx2.MultiplyAddAdjacent(a._value.AsByte(), x._value.AsSByte())
        : EvenAndOdd(a._value.AsInt16(), x._value.AsInt16())).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 Magnitudes(Lanes256 a) => Avx2.IsSupported ? new(Avx2.Abs(a._value.AsSByte()).AsSingle()) : a;

    // A byte whose partner is 0 may become anything.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 WithSigns(Lanes256 x, Lanes256 a) => Avx2.IsSupported ? new(Avx2.Sign(x._value.AsSByte(), a._value.AsSByte()).AsSingle()) : x;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 EvenWords(Lanes256 a) => new(((a._value.AsInt16() << 8) >> 8).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 OddWords(Lanes256 a) => new((a._value.AsInt16() >> 8).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 DwordProducts(Lanes256 a, Lanes256 x) => new(Pairs(a._value.AsInt16(), x._value.AsInt16()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 AddWords(Lanes256 a, Lanes256 b) => new((a._value.AsInt16() + b._value.AsInt16()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 LoadNibbles(byte* p, int shift) =>
        new(((Vector256.Load((uint*)p) >>> shift) & Vector256.Create(0x0F0F0F0Fu)).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 AddDwords(Lanes256 a, Lanes256 b) => new((a._value.AsInt32() + b._value.AsInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 AddNeighbours(Lanes256 words) => new(Neighbours(words._value.AsInt16()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 FromInt32(Lanes256 a) => new(Vector256.ConvertToSingle(a._value.AsInt32()));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public void StoreLowBytes(sbyte* p)
    {
        Vector256<int> dwords = _value.AsInt32();
        Vector128<short> words = Vector128.Narrow(dwords.GetLower(), dwords.GetUpper());
        Vector128<sbyte> bytes = Vector128.Narrow(words, words);
        bytes.GetLower().Store(p);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector256<int> Neighbours(Vector256<short> words) => Avx2.IsSupported
        ? Avx2.MultiplyAddAdjacent(words, Vector256<short>.One)
        : ((words.AsInt32() << 16) >> 16) + (words.AsInt32() >> 16);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector256<int> Pairs(Vector256<short> a, Vector256<short> b) => Avx2.IsSupported
        ? Avx2.MultiplyAddAdjacent(a, b)
        : (((a.AsInt32() << 16) >> 16) * ((b.AsInt32() << 16) >> 16)) + ((a.AsInt32() >> 16) * (b.AsInt32() >> 16));

    // Bytes as int16: the even ones shifted out of and back into the low halves, the odd ones down.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector256<short> EvenAndOdd(Vector256<short> a, Vector256<short> b) =>
        (((a << 8) >> 8) * ((b << 8) >> 8)) + ((a >> 8) * (b >> 8));
}

internal readonly unsafe partial struct Lanes128
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 LoadDwords(byte* p) => new(Vector128.Load(p).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 LoadWords(byte* p) => new(Vector128.WidenLower(Vector128.CreateScalarUnsafe(*(ulong*)p).AsUInt16()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 CreateDword(uint bits) => new(Vector128.Create(bits).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 ShiftRight(Lanes128 a, int bits) => new((a._value.AsUInt32() >>> bits).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 ShiftRightSigned(Lanes128 a, int bits) => new((a._value.AsInt32() >> bits).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 ShiftLeft(Lanes128 a, int bits) => new((a._value.AsUInt32() << bits).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 And(Lanes128 a, Lanes128 b) => new((a._value.AsUInt32() & b._value.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Or(Lanes128 a, Lanes128 b) => new((a._value.AsUInt32() | b._value.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 WordProducts(Lanes128 a, Lanes128 x) => new((Ssse3.IsSupported
        ? Ssse3.MultiplyAddAdjacent(a._value.AsByte(), x._value.AsSByte())
        : EvenAndOdd(a._value.AsInt16(), x._value.AsInt16())).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Magnitudes(Lanes128 a) => Ssse3.IsSupported ? new(Ssse3.Abs(a._value.AsSByte()).AsSingle()) : a;

    // A byte whose partner is 0 may become anything.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 WithSigns(Lanes128 x, Lanes128 a) => Ssse3.IsSupported ? new(Ssse3.Sign(x._value.AsSByte(), a._value.AsSByte()).AsSingle()) : x;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 EvenWords(Lanes128 a) => new(((a._value.AsInt16() << 8) >> 8).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 OddWords(Lanes128 a) => new((a._value.AsInt16() >> 8).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 DwordProducts(Lanes128 a, Lanes128 x) => new(Pairs(a._value.AsInt16(), x._value.AsInt16()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 AddWords(Lanes128 a, Lanes128 b) => new((a._value.AsInt16() + b._value.AsInt16()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 LoadNibbles(byte* p, int shift) =>
        new(((Vector128.Load((uint*)p) >>> shift) & Vector128.Create(0x0F0F0F0Fu)).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 AddDwords(Lanes128 a, Lanes128 b) => new((a._value.AsInt32() + b._value.AsInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 AddNeighbours(Lanes128 words) => new(Neighbours(words._value.AsInt16()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 FromInt32(Lanes128 a) => new(Vector128.ConvertToSingle(a._value.AsInt32()));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public void StoreLowBytes(sbyte* p)
    {
        Vector128<short> words = Vector128.Narrow(_value.AsInt32(), _value.AsInt32());
        *(uint*)p = Vector128.Narrow(words, words).AsUInt32().ToScalar();
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector128<int> Neighbours(Vector128<short> words) => Sse2.IsSupported
        ? Sse2.MultiplyAddAdjacent(words, Vector128<short>.One)
        : ((words.AsInt32() << 16) >> 16) + (words.AsInt32() >> 16);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector128<int> Pairs(Vector128<short> a, Vector128<short> b) => Sse2.IsSupported
        ? Sse2.MultiplyAddAdjacent(a, b)
        : (((a.AsInt32() << 16) >> 16) * ((b.AsInt32() << 16) >> 16)) + ((a.AsInt32() >> 16) * (b.AsInt32() >> 16));

    // Bytes as int16: the even ones shifted out of and back into the low halves, the odd ones down.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector128<short> EvenAndOdd(Vector128<short> a, Vector128<short> b) =>
        (((a << 8) >> 8) * ((b << 8) >> 8)) + ((a >> 8) * (b >> 8));
}

internal readonly unsafe partial struct Lanes1
{
    public static Lanes1 LoadDwords(byte* p) => FromBits(*(uint*)p);

    public static Lanes1 LoadWords(byte* p) => FromBits(*(ushort*)p);

    public static Lanes1 CreateDword(uint bits) => FromBits(bits);

    public static Lanes1 ShiftRight(Lanes1 a, int bits) => FromBits(Bits(a) >> bits);

    public static Lanes1 ShiftRightSigned(Lanes1 a, int bits) => FromBits((uint)((int)Bits(a) >> bits));

    public static Lanes1 ShiftLeft(Lanes1 a, int bits) => FromBits(Bits(a) << bits);

    public static Lanes1 And(Lanes1 a, Lanes1 b) => FromBits(Bits(a) & Bits(b));

    public static Lanes1 Or(Lanes1 a, Lanes1 b) => FromBits(Bits(a) | Bits(b));

    public static Lanes1 WordProducts(Lanes1 a, Lanes1 x)
    {
        (uint u, uint v) = (Bits(a), Bits(x));
        int low = ((sbyte)u * (sbyte)v) + ((sbyte)(u >> 8) * (sbyte)(v >> 8));
        int high = ((sbyte)(u >> 16) * (sbyte)(v >> 16)) + ((sbyte)(u >> 24) * (sbyte)(v >> 24));
        return FromBits((ushort)low | ((uint)high << 16));
    }

    public static Lanes1 Magnitudes(Lanes1 a) => a;

    public static Lanes1 WithSigns(Lanes1 x, Lanes1 a) => x;

    public static Lanes1 EvenWords(Lanes1 a)
    {
        (uint low, uint high) = ((ushort)(sbyte)Bits(a), (ushort)(sbyte)(Bits(a) >> 16));
        return FromBits(low | (high << 16));
    }

    public static Lanes1 OddWords(Lanes1 a) => EvenWords(ShiftRight(a, 8));

    public static Lanes1 DwordProducts(Lanes1 a, Lanes1 x) =>
        FromBits((uint)(((short)Bits(a) * (short)Bits(x)) + (((int)Bits(a) >> 16) * ((int)Bits(x) >> 16))));

    public static Lanes1 AddWords(Lanes1 a, Lanes1 b) =>
        FromBits((ushort)(Bits(a) + Bits(b)) | (((Bits(a) >> 16) + (Bits(b) >> 16)) << 16));

    public static Lanes1 LoadNibbles(byte* p, int shift) => FromBits((*(uint*)p >> shift) & 0x0F0F0F0F);

    public static Lanes1 AddDwords(Lanes1 a, Lanes1 b) => FromBits(Bits(a) + Bits(b));

    public static Lanes1 AddNeighbours(Lanes1 words) => FromBits((uint)((short)Bits(words) + ((int)Bits(words) >> 16)));

    public static Lanes1 FromInt32(Lanes1 a) => new((int)Bits(a));

    public void StoreLowBytes(sbyte* p) => *p = (sbyte)Bits(this);

    private static uint Bits(Lanes1 a) => BitConverter.SingleToUInt32Bits(a._value);
}
