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
    /// sums + a · x + b · y in int16, two a lane: products of neighbouring bytes add up. x and y are dwords at p and p + 4, in
    /// each lane. Bytes of a and b are 0 … 63, of x and y -127 … 127.
    /// </summary>
    static abstract TSelf AddWordProducts(TSelf sums, TSelf a, TSelf b, byte* p);

    /// <summary>The same in int32: the sum of four products a lane of a and x, four of b and y.</summary>
    static abstract TSelf AddDwordProducts(TSelf sums, TSelf a, TSelf b, byte* p);

    /// <summary>The same with bytes of a and b from -128 to 127.</summary>
    static abstract TSelf AddSignedProducts(TSelf sums, TSelf a, TSelf b, byte* p);

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
    public static Lanes512 AddWordProducts(Lanes512 sums, Lanes512 a, Lanes512 b, byte* p) =>
        new((sums._value.AsInt16() + (Products(a._value, p) + Products(b._value, p + sizeof(int)))).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 AddDwordProducts(Lanes512 sums, Lanes512 a, Lanes512 b, byte* p) =>
        new((sums._value.AsInt32() + Neighbours(Products(a._value, p) + Products(b._value, p + sizeof(int)))).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 AddSignedProducts(Lanes512 sums, Lanes512 a, Lanes512 b, byte* p) =>
        new((sums._value.AsInt32() + (Neighbours(SignedProducts(a._value, p)) + Neighbours(SignedProducts(b._value, p + sizeof(int))))).AsSingle());

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
        Vector256<short> words = Vector256.Narrow(dwords.GetLower(), dwords.GetUpper());
        Vector256<sbyte> bytes = Vector256.Narrow(words, words);
        bytes.GetLower().Store(p);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector512<short> Products(Vector512<float> a, byte* p) => Avx512BW.IsSupported
        ? Avx512BW.MultiplyAddAdjacent(a.AsByte(), Vector512.Create(*(int*)p).AsSByte())
        : EvenAndOdd(a.AsInt16(), Vector512.Create(*(int*)p).AsInt16());

    // The sign goes to the other factor.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector512<short> SignedProducts(Vector512<float> a, byte* p) => Avx512BW.IsSupported
        ? Avx512BW.MultiplyAddAdjacent(
                Avx512BW.Abs(a.AsSByte()),
                Vector512.ConditionalSelect(Vector512.LessThan(a.AsSByte(), Vector512<sbyte>.Zero), -Vector512.Create(*(int*)p).AsSByte(), Vector512.Create(*(int*)p).AsSByte()))
        : EvenAndOdd(a.AsInt16(), Vector512.Create(*(int*)p).AsInt16());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector512<int> Neighbours(Vector512<short> words) => Avx512BW.IsSupported
        ? Avx512BW.MultiplyAddAdjacent(words, Vector512<short>.One)
        : ((words.AsInt32() << 16) >> 16) + (words.AsInt32() >> 16);

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
    public static Lanes256 AddWordProducts(Lanes256 sums, Lanes256 a, Lanes256 b, byte* p) =>
        new((sums._value.AsInt16() + (Products(a._value, p) + Products(b._value, p + sizeof(int)))).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 AddDwordProducts(Lanes256 sums, Lanes256 a, Lanes256 b, byte* p) =>
        new((sums._value.AsInt32() + Neighbours(Products(a._value, p) + Products(b._value, p + sizeof(int)))).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 AddSignedProducts(Lanes256 sums, Lanes256 a, Lanes256 b, byte* p) =>
        new((sums._value.AsInt32() + (Neighbours(SignedProducts(a._value, p)) + Neighbours(SignedProducts(b._value, p + sizeof(int))))).AsSingle());

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
    private static Vector256<short> Products(Vector256<float> a, byte* p) => Avx2.IsSupported
        ? Avx2.MultiplyAddAdjacent(a.AsByte(), Vector256.Create(*(int*)p).AsSByte())
        : EvenAndOdd(a.AsInt16(), Vector256.Create(*(int*)p).AsInt16());

    // The sign goes to the other factor.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector256<short> SignedProducts(Vector256<float> a, byte* p) => Avx2.IsSupported
        ? Avx2.MultiplyAddAdjacent(Avx2.Abs(a.AsSByte()), Avx2.Sign(Vector256.Create(*(int*)p).AsSByte(), a.AsSByte()))
        : EvenAndOdd(a.AsInt16(), Vector256.Create(*(int*)p).AsInt16());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector256<int> Neighbours(Vector256<short> words) => Avx2.IsSupported
        ? Avx2.MultiplyAddAdjacent(words, Vector256<short>.One)
        : ((words.AsInt32() << 16) >> 16) + (words.AsInt32() >> 16);

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
    public static Lanes128 AddWordProducts(Lanes128 sums, Lanes128 a, Lanes128 b, byte* p) =>
        new((sums._value.AsInt16() + (Products(a._value, p) + Products(b._value, p + sizeof(int)))).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 AddDwordProducts(Lanes128 sums, Lanes128 a, Lanes128 b, byte* p) =>
        new((sums._value.AsInt32() + Neighbours(Products(a._value, p) + Products(b._value, p + sizeof(int)))).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 AddSignedProducts(Lanes128 sums, Lanes128 a, Lanes128 b, byte* p) =>
        new((sums._value.AsInt32() + (Neighbours(SignedProducts(a._value, p)) + Neighbours(SignedProducts(b._value, p + sizeof(int))))).AsSingle());

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
    private static Vector128<short> Products(Vector128<float> a, byte* p) => Ssse3.IsSupported
        ? Ssse3.MultiplyAddAdjacent(a.AsByte(), Vector128.Create(*(int*)p).AsSByte())
        : EvenAndOdd(a.AsInt16(), Vector128.Create(*(int*)p).AsInt16());

    // The sign goes to the other factor.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector128<short> SignedProducts(Vector128<float> a, byte* p) => Ssse3.IsSupported
        ? Ssse3.MultiplyAddAdjacent(Ssse3.Abs(a.AsSByte()), Ssse3.Sign(Vector128.Create(*(int*)p).AsSByte(), a.AsSByte()))
        : EvenAndOdd(a.AsInt16(), Vector128.Create(*(int*)p).AsInt16());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector128<int> Neighbours(Vector128<short> words) => Sse2.IsSupported
        ? Sse2.MultiplyAddAdjacent(words, Vector128<short>.One)
        : ((words.AsInt32() << 16) >> 16) + (words.AsInt32() >> 16);

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

    public static Lanes1 AddWordProducts(Lanes1 sums, Lanes1 a, Lanes1 b, byte* p)
    {
        (short low, short high) = Words(a, p);
        (short low2, short high2) = Words(b, p + sizeof(int));
        return FromBits((ushort)(Bits(sums) + low + low2) | ((uint)((Bits(sums) >> 16) + high + high2) << 16));
    }

    public static Lanes1 AddDwordProducts(Lanes1 sums, Lanes1 a, Lanes1 b, byte* p)
    {
        (short low, short high) = Words(a, p);
        (short low2, short high2) = Words(b, p + sizeof(int));
        return FromBits((uint)((int)Bits(sums) + low + low2 + high + high2));
    }

    public static Lanes1 AddSignedProducts(Lanes1 sums, Lanes1 a, Lanes1 b, byte* p) => AddDwordProducts(sums, a, b, p);

    public static Lanes1 LoadNibbles(byte* p, int shift) => FromBits((*(uint*)p >> shift) & 0x0F0F0F0F);

    public static Lanes1 AddDwords(Lanes1 a, Lanes1 b) => FromBits(Bits(a) + Bits(b));

    public static Lanes1 AddNeighbours(Lanes1 words) => FromBits((uint)((short)Bits(words) + ((int)Bits(words) >> 16)));

    public static Lanes1 FromInt32(Lanes1 a) => new((int)Bits(a));

    public void StoreLowBytes(sbyte* p) => *p = (sbyte)Bits(this);

    private static uint Bits(Lanes1 a) => BitConverter.SingleToUInt32Bits(a._value);

    // The products of neighbouring bytes, added.
    private static (short Low, short High) Words(Lanes1 a, byte* p)
    {
        sbyte* x = (sbyte*)p;
        uint bytes = Bits(a);
        return (
            (short)(((sbyte)bytes * x[0]) + ((sbyte)(bytes >> 8) * x[1])),
            (short)(((sbyte)(bytes >> 16) * x[2]) + ((sbyte)(bytes >> 24) * x[3])));
    }
}
