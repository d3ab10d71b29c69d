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

    /// <summary>The dword at p in each lane.</summary>
    static abstract TSelf BroadcastDword(byte* p);

    /// <summary>Each dword shifted towards its low bits; zeros follow.</summary>
    static abstract TSelf ShiftRight(TSelf a, int bits);

    /// <summary>Each dword shifted towards its high bits.</summary>
    static abstract TSelf ShiftLeft(TSelf a, int bits);

    /// <summary>Bits that both have.</summary>
    static abstract TSelf And(TSelf a, TSelf b);

    /// <summary>Bits that one of them has.</summary>
    static abstract TSelf Or(TSelf a, TSelf b);

    /// <summary>Two int16 a lane: a₀ · b₀ + a₁ · b₁ and a₂ · b₂ + a₃ · b₃. Bytes of a are 0 … 127, of b -127 … 127.</summary>
    static abstract TSelf ByteProducts(TSelf a, TSelf b);

    /// <summary>The same with bytes of a from -128 on.</summary>
    static abstract TSelf SignedByteProducts(TSelf a, TSelf b);

    /// <summary>Sums of int16.</summary>
    static abstract TSelf AddWords(TSelf a, TSelf b);

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
    public static Lanes512 BroadcastDword(byte* p) => new(Vector512.Create(*(uint*)p).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 ShiftRight(Lanes512 a, int bits) => new((a._value.AsUInt32() >>> bits).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 ShiftLeft(Lanes512 a, int bits) => new((a._value.AsUInt32() << bits).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 And(Lanes512 a, Lanes512 b) => new((a._value.AsUInt32() & b._value.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 Or(Lanes512 a, Lanes512 b) => new((a._value.AsUInt32() | b._value.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 ByteProducts(Lanes512 a, Lanes512 b) => new(Avx512BW.IsSupported
        ? Avx512BW.MultiplyAddAdjacent(a._value.AsByte(), b._value.AsSByte()).AsSingle()
        : EvenAndOdd(a._value.AsInt16(), b._value.AsInt16()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 SignedByteProducts(Lanes512 a, Lanes512 b)
    {
        if (!Avx512BW.IsSupported)
        {
            return new(EvenAndOdd(a._value.AsInt16(), b._value.AsInt16()).AsSingle());
        }

        // The sign goes to the other factor.
        Vector512<sbyte> signed = a._value.AsSByte();
        Vector512<sbyte> other = Vector512.ConditionalSelect(Vector512.LessThan(signed, Vector512<sbyte>.Zero), -b._value.AsSByte(), b._value.AsSByte());
        return new(Avx512BW.MultiplyAddAdjacent(Avx512BW.Abs(signed), other).AsSingle());
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 AddWords(Lanes512 a, Lanes512 b) => new((a._value.AsInt16() + b._value.AsInt16()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 AddDwords(Lanes512 a, Lanes512 b) => new((a._value.AsInt32() + b._value.AsInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 AddNeighbours(Lanes512 words) => new(Avx512BW.IsSupported
        ? Avx512BW.MultiplyAddAdjacent(words._value.AsInt16(), Vector512<short>.One).AsSingle()
        : (((words._value.AsInt32() << 16) >> 16) + (words._value.AsInt32() >> 16)).AsSingle());

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
    public static Lanes256 BroadcastDword(byte* p) => new(Vector256.Create(*(uint*)p).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 ShiftRight(Lanes256 a, int bits) => new((a._value.AsUInt32() >>> bits).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 ShiftLeft(Lanes256 a, int bits) => new((a._value.AsUInt32() << bits).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 And(Lanes256 a, Lanes256 b) => new((a._value.AsUInt32() & b._value.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 Or(Lanes256 a, Lanes256 b) => new((a._value.AsUInt32() | b._value.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 ByteProducts(Lanes256 a, Lanes256 b) => new(Avx2.IsSupported
        ? Avx2.MultiplyAddAdjacent(a._value.AsByte(), b._value.AsSByte()).AsSingle()
        : EvenAndOdd(a._value.AsInt16(), b._value.AsInt16()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 SignedByteProducts(Lanes256 a, Lanes256 b)
    {
        if (!Avx2.IsSupported)
        {
            return new(EvenAndOdd(a._value.AsInt16(), b._value.AsInt16()).AsSingle());
        }

        // The sign goes to the other factor.
        Vector256<sbyte> signed = a._value.AsSByte();
        return new(Avx2.MultiplyAddAdjacent(Avx2.Abs(signed), Avx2.Sign(b._value.AsSByte(), signed)).AsSingle());
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 AddWords(Lanes256 a, Lanes256 b) => new((a._value.AsInt16() + b._value.AsInt16()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 AddDwords(Lanes256 a, Lanes256 b) => new((a._value.AsInt32() + b._value.AsInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 AddNeighbours(Lanes256 words) => new(Avx2.IsSupported
        ? Avx2.MultiplyAddAdjacent(words._value.AsInt16(), Vector256<short>.One).AsSingle()
        : (((words._value.AsInt32() << 16) >> 16) + (words._value.AsInt32() >> 16)).AsSingle());

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
    public static Lanes128 BroadcastDword(byte* p) => new(Vector128.Create(*(uint*)p).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 ShiftRight(Lanes128 a, int bits) => new((a._value.AsUInt32() >>> bits).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 ShiftLeft(Lanes128 a, int bits) => new((a._value.AsUInt32() << bits).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 And(Lanes128 a, Lanes128 b) => new((a._value.AsUInt32() & b._value.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Or(Lanes128 a, Lanes128 b) => new((a._value.AsUInt32() | b._value.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 ByteProducts(Lanes128 a, Lanes128 b) => new(Ssse3.IsSupported
        ? Ssse3.MultiplyAddAdjacent(a._value.AsByte(), b._value.AsSByte()).AsSingle()
        : EvenAndOdd(a._value.AsInt16(), b._value.AsInt16()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 SignedByteProducts(Lanes128 a, Lanes128 b)
    {
        if (!Ssse3.IsSupported)
        {
            return new(EvenAndOdd(a._value.AsInt16(), b._value.AsInt16()).AsSingle());
        }

        // The sign goes to the other factor.
        Vector128<sbyte> signed = a._value.AsSByte();
        return new(Ssse3.MultiplyAddAdjacent(Ssse3.Abs(signed), Ssse3.Sign(b._value.AsSByte(), signed)).AsSingle());
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 AddWords(Lanes128 a, Lanes128 b) => new((a._value.AsInt16() + b._value.AsInt16()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 AddDwords(Lanes128 a, Lanes128 b) => new((a._value.AsInt32() + b._value.AsInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 AddNeighbours(Lanes128 words) => new(Sse2.IsSupported
        ? Sse2.MultiplyAddAdjacent(words._value.AsInt16(), Vector128<short>.One).AsSingle()
        : (((words._value.AsInt32() << 16) >> 16) + (words._value.AsInt32() >> 16)).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 FromInt32(Lanes128 a) => new(Vector128.ConvertToSingle(a._value.AsInt32()));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public void StoreLowBytes(sbyte* p)
    {
        Vector128<short> words = Vector128.Narrow(_value.AsInt32(), _value.AsInt32());
        *(uint*)p = Vector128.Narrow(words, words).AsUInt32().ToScalar();
    }

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

    public static Lanes1 BroadcastDword(byte* p) => FromBits(*(uint*)p);

    public static Lanes1 ShiftRight(Lanes1 a, int bits) => FromBits(Bits(a) >> bits);

    public static Lanes1 ShiftLeft(Lanes1 a, int bits) => FromBits(Bits(a) << bits);

    public static Lanes1 And(Lanes1 a, Lanes1 b) => FromBits(Bits(a) & Bits(b));

    public static Lanes1 Or(Lanes1 a, Lanes1 b) => FromBits(Bits(a) | Bits(b));

    public static Lanes1 ByteProducts(Lanes1 a, Lanes1 b) => SignedByteProducts(a, b);

    public static Lanes1 SignedByteProducts(Lanes1 a, Lanes1 b)
    {
        int low = (Byte(a, 0) * Byte(b, 0)) + (Byte(a, 1) * Byte(b, 1));
        int high = (Byte(a, 2) * Byte(b, 2)) + (Byte(a, 3) * Byte(b, 3));
        return FromBits((ushort)low | ((uint)high << 16));
    }

    public static Lanes1 AddWords(Lanes1 a, Lanes1 b) =>
        FromBits((ushort)(Bits(a) + Bits(b)) | (((Bits(a) >> 16) + (Bits(b) >> 16)) << 16));

    public static Lanes1 AddDwords(Lanes1 a, Lanes1 b) => FromBits(Bits(a) + Bits(b));

    public static Lanes1 AddNeighbours(Lanes1 words) => FromBits((uint)((short)Bits(words) + ((int)Bits(words) >> 16)));

    public static Lanes1 FromInt32(Lanes1 a) => new((int)Bits(a));

    public void StoreLowBytes(sbyte* p) => *p = (sbyte)Bits(this);

    private static uint Bits(Lanes1 a) => BitConverter.SingleToUInt32Bits(a._value);

    private static int Byte(Lanes1 a, int index) => (sbyte)(Bits(a) >> (8 * index));
}
