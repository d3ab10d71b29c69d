using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// A register of floats, so that a kernel is written once and compiled for each width. A kernel is generic over it:
/// <c>Forward&lt;V&gt;() where V : struct, ILanes&lt;V&gt;</c>; the JIT specializes it to the intrinsics of that width.
/// </summary>
/// <typeparam name="TSelf">The implementing type.</typeparam>
internal unsafe partial interface ILanes<TSelf>
    where TSelf : struct, ILanes<TSelf>
{
    /// <summary>Gets the number of floats.</summary>
    static abstract int Count { get; }

    /// <summary>Loads <see cref="Count"/> floats, aligned or not.</summary>
    static abstract TSelf Load(float* p);

    /// <summary>The same value in each lane.</summary>
    static abstract TSelf Create(float value);

    /// <summary>a · b + c, rounded once where the width has fused multiply-add.</summary>
    static abstract TSelf Fma(TSelf a, TSelf b, TSelf c);

    /// <summary>
    /// sum = a · b + sum, the bits of <see cref="Fma"/>. In place, so that the JIT knows which register to overwrite: the
    /// other form costs a move for each second product of a kernel that has no register to spare.
    /// </summary>
    static abstract void AddProduct(ref TSelf sum, TSelf a, TSelf b);

    /// <summary>
    /// The same with one factor for all lanes, read for this product alone: at 512 bits by the multiplication itself, which costs nothing. A
    /// register that is filled first pays where several products use it.
    /// </summary>
    static abstract void AddProduct(ref TSelf sum, float* a, TSelf b);

    /// <summary>The larger of each pair; where b is not a number, b.</summary>
    static abstract TSelf Max(TSelf a, TSelf b);

    /// <summary>The smaller of each pair; where b is not a number, b.</summary>
    static abstract TSelf Min(TSelf a, TSelf b);

    /// <summary>Square roots.</summary>
    static abstract TSelf Sqrt(TSelf a);

    /// <summary>2ⁿ from n + <see cref="LaneBits.Exponent"/>, for whole n from -127, which gives 0, to 128, which gives infinity.</summary>
    static abstract TSelf PowerOfTwo(TSelf shifted);

    /// <summary>The nearest bfloat16 of each lane, ties to even, as a float. NaN stays NaN.</summary>
    static abstract TSelf ToBFloat16(TSelf a);

    /// <summary>Pairs of bfloat16, one pair a lane: the nearest to first in the low halves, the nearest to second in the high ones.</summary>
    static abstract TSelf Pairs(TSelf first, TSelf second);

    /// <summary>The same of neighbours: lanes 0 and 1 of a become the first pair, the last two of b the last.</summary>
    static abstract TSelf NeighbourPairs(TSelf a, TSelf b);

    /// <summary>The floats that the first bfloat16 of each pair are.</summary>
    static abstract TSelf First(TSelf pairs);

    /// <summary>The floats that the second bfloat16 of each pair are.</summary>
    static abstract TSelf Second(TSelf pairs);

    /// <summary>a + b.</summary>
    static abstract TSelf operator +(TSelf a, TSelf b);

    /// <summary>a - b.</summary>
    static abstract TSelf operator -(TSelf a, TSelf b);

    /// <summary>a · b.</summary>
    static abstract TSelf operator *(TSelf a, TSelf b);

    /// <summary>a / b.</summary>
    static abstract TSelf operator /(TSelf a, TSelf b);

    /// <summary>Stores <see cref="Count"/> floats, aligned or not.</summary>
    void Store(float* p);

    /// <summary>The sum of the lanes, always in the same order.</summary>
    float Sum();

    /// <summary>The largest lane.</summary>
    float Max();
}

/// <summary>Constants of the lanes.</summary>
internal static class LaneBits
{
    /// <summary>1.5 · 2²³ + 127: added to whole n, the last nine bits of the sum are the exponent bits of 2ⁿ.</summary>
    public const float Exponent = 12_583_039f;

    /// <summary>The half of a float that bfloat16 keeps.</summary>
    public const uint HighHalf = 0xFFFF_0000;

    /// <summary>Just less than half of the last place of the high half: with that place's own bit added, ties go to even.</summary>
    public const uint AlmostHalf = 0x7FFF;

    /// <summary>What makes any NaN one that stays one when its low half is dropped.</summary>
    public const uint Quiet = 0x0040_0000;
}

/// <summary>16 floats. Runs on any CPU; fast where it has AVX-512.</summary>
internal unsafe partial struct Lanes512(Vector512<float> value) : ILanes<Lanes512>
{
    private Vector512<float> _value = value;

    public static int Count => 16;

    /// <summary>Gets the register.</summary>
    public readonly Vector512<float> Value => _value;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 Load(float* p) => new(Vector512.Load(p));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 Create(float value) => new(Vector512.Create(value));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 Fma(Lanes512 a, Lanes512 b, Lanes512 c) => new(Vector512.FusedMultiplyAdd(a._value, b._value, c._value));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void AddProduct(ref Lanes512 sum, Lanes512 a, Lanes512 b) => sum._value = Vector512.FusedMultiplyAdd(a._value, b._value, sum._value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void AddProduct(ref Lanes512 sum, float* a, Lanes512 b) => sum._value = Vector512.FusedMultiplyAdd(Vector512.Create(*a), b._value, sum._value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 Max(Lanes512 a, Lanes512 b) => new(Vector512.MaxNative(a._value, b._value));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 Min(Lanes512 a, Lanes512 b) => new(Vector512.MinNative(a._value, b._value));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 Sqrt(Lanes512 a) => new(Vector512.Sqrt(a._value));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 PowerOfTwo(Lanes512 shifted) => new(Vector512.ShiftLeft(shifted._value.AsInt32(), 23).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 ToBFloat16(Lanes512 a) => Second(new(Rounded(a._value).AsSingle()));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 Pairs(Lanes512 first, Lanes512 second) =>
        new(((Rounded(first._value) >>> 16) | (Rounded(second._value) & Vector512.Create(LaneBits.HighHalf))).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 NeighbourPairs(Lanes512 a, Lanes512 b) =>
        new(Vector512.Narrow(Rounded(a._value) >>> 16, Rounded(b._value) >>> 16).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 First(Lanes512 pairs) => new((pairs._value.AsUInt32() << 16).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 Second(Lanes512 pairs) => new((pairs._value.AsUInt32() & Vector512.Create(LaneBits.HighHalf)).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 operator +(Lanes512 a, Lanes512 b) => new(a._value + b._value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 operator -(Lanes512 a, Lanes512 b) => new(a._value - b._value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 operator *(Lanes512 a, Lanes512 b) => new(a._value * b._value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 operator /(Lanes512 a, Lanes512 b) => new(a._value / b._value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public void Store(float* p) => _value.Store(p);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public float Sum() => Vector512.Sum(_value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public float Max() => new Lanes256(Vector256.MaxNative(_value.GetLower(), _value.GetUpper())).Max();

    // The high halves are the nearest bfloat16; the low halves are of no use.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector512<uint> Rounded(Vector512<float> value)
    {
        Vector512<uint> bits = value.AsUInt32();
        Vector512<uint> nearest = bits + Vector512.Create(LaneBits.AlmostHalf) + ((bits >>> 16) & Vector512<uint>.One);
        return Vector512.ConditionalSelect(Vector512.Equals(value, value).AsUInt32(), nearest, bits | Vector512.Create(LaneBits.Quiet));
    }
}

/// <summary>8 floats: AVX2 with FMA.</summary>
internal unsafe partial struct Lanes256(Vector256<float> value) : ILanes<Lanes256>
{
    private Vector256<float> _value = value;

    public static int Count => 8;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 Load(float* p) => new(Vector256.Load(p));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 Create(float value) => new(Vector256.Create(value));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 Fma(Lanes256 a, Lanes256 b, Lanes256 c) => new(Vector256.FusedMultiplyAdd(a._value, b._value, c._value));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void AddProduct(ref Lanes256 sum, Lanes256 a, Lanes256 b) => sum._value = Vector256.FusedMultiplyAdd(a._value, b._value, sum._value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void AddProduct(ref Lanes256 sum, float* a, Lanes256 b) => sum._value = Vector256.FusedMultiplyAdd(Vector256.Create(*a), b._value, sum._value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 Max(Lanes256 a, Lanes256 b) => new(Vector256.MaxNative(a._value, b._value));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 Min(Lanes256 a, Lanes256 b) => new(Vector256.MinNative(a._value, b._value));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 Sqrt(Lanes256 a) => new(Vector256.Sqrt(a._value));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 PowerOfTwo(Lanes256 shifted) => new(Vector256.ShiftLeft(shifted._value.AsInt32(), 23).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 ToBFloat16(Lanes256 a) => Second(new(Rounded(a._value).AsSingle()));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 Pairs(Lanes256 first, Lanes256 second) =>
        new(((Rounded(first._value) >>> 16) | (Rounded(second._value) & Vector256.Create(LaneBits.HighHalf))).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 NeighbourPairs(Lanes256 a, Lanes256 b) =>
        new(Vector256.Narrow(Rounded(a._value) >>> 16, Rounded(b._value) >>> 16).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 First(Lanes256 pairs) => new((pairs._value.AsUInt32() << 16).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 Second(Lanes256 pairs) => new((pairs._value.AsUInt32() & Vector256.Create(LaneBits.HighHalf)).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 operator +(Lanes256 a, Lanes256 b) => new(a._value + b._value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 operator -(Lanes256 a, Lanes256 b) => new(a._value - b._value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 operator *(Lanes256 a, Lanes256 b) => new(a._value * b._value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 operator /(Lanes256 a, Lanes256 b) => new(a._value / b._value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public void Store(float* p) => _value.Store(p);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public float Sum() => Vector256.Sum(_value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public float Max() => new Lanes128(Vector128.MaxNative(_value.GetLower(), _value.GetUpper())).Max();

    // The high halves are the nearest bfloat16; the low halves are of no use.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector256<uint> Rounded(Vector256<float> value)
    {
        Vector256<uint> bits = value.AsUInt32();
        Vector256<uint> nearest = bits + Vector256.Create(LaneBits.AlmostHalf) + ((bits >>> 16) & Vector256<uint>.One);
        return Vector256.ConditionalSelect(Vector256.Equals(value, value).AsUInt32(), nearest, bits | Vector256.Create(LaneBits.Quiet));
    }
}

/// <summary>4 floats: any x64 or ARM64.</summary>
internal readonly unsafe partial struct Lanes128(Vector128<float> value) : ILanes<Lanes128>
{
    private readonly Vector128<float> _value = value;

    public static int Count => 4;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Load(float* p) => new(Vector128.Load(p));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Create(float value) => new(Vector128.Create(value));

    // Without the instruction the fused form is a library call, eight times slower than scalar code: multiply and add.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Fma(Lanes128 a, Lanes128 b, Lanes128 c) => new(CpuPaths.HasFma
        ? Vector128.FusedMultiplyAdd(a._value, b._value, c._value)
        : (a._value * b._value) + c._value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void AddProduct(ref Lanes128 sum, Lanes128 a, Lanes128 b) => sum = Fma(a, b, sum);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void AddProduct(ref Lanes128 sum, float* a, Lanes128 b) => sum = Fma(Create(*a), b, sum);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Max(Lanes128 a, Lanes128 b) => new(Vector128.MaxNative(a._value, b._value));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Min(Lanes128 a, Lanes128 b) => new(Vector128.MinNative(a._value, b._value));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Sqrt(Lanes128 a) => new(Vector128.Sqrt(a._value));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 PowerOfTwo(Lanes128 shifted) => new(Vector128.ShiftLeft(shifted._value.AsInt32(), 23).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 ToBFloat16(Lanes128 a) => Second(new(Rounded(a._value).AsSingle()));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Pairs(Lanes128 first, Lanes128 second) =>
        new(((Rounded(first._value) >>> 16) | (Rounded(second._value) & Vector128.Create(LaneBits.HighHalf))).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 NeighbourPairs(Lanes128 a, Lanes128 b) =>
        new(Vector128.Narrow(Rounded(a._value) >>> 16, Rounded(b._value) >>> 16).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 First(Lanes128 pairs) => new((pairs._value.AsUInt32() << 16).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Second(Lanes128 pairs) => new((pairs._value.AsUInt32() & Vector128.Create(LaneBits.HighHalf)).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 operator +(Lanes128 a, Lanes128 b) => new(a._value + b._value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 operator -(Lanes128 a, Lanes128 b) => new(a._value - b._value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 operator *(Lanes128 a, Lanes128 b) => new(a._value * b._value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 operator /(Lanes128 a, Lanes128 b) => new(a._value / b._value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public void Store(float* p) => _value.Store(p);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public float Sum() => Vector128.Sum(_value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public float Max()
    {
        Vector128<float> pairs = Vector128.MaxNative(_value, Vector128.Shuffle(_value, Vector128.Create(2, 3, 0, 1)));
        return Vector128.MaxNative(pairs, Vector128.Shuffle(pairs, Vector128.Create(1, 0, 3, 2))).ToScalar();
    }

    // The high halves are the nearest bfloat16; the low halves are of no use.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector128<uint> Rounded(Vector128<float> value)
    {
        Vector128<uint> bits = value.AsUInt32();
        Vector128<uint> nearest = bits + Vector128.Create(LaneBits.AlmostHalf) + ((bits >>> 16) & Vector128<uint>.One);
        return Vector128.ConditionalSelect(Vector128.Equals(value, value).AsUInt32(), nearest, bits | Vector128.Create(LaneBits.Quiet));
    }
}

/// <summary>1 float: no vector instructions at all.</summary>
internal readonly unsafe partial struct Lanes1(float value) : ILanes<Lanes1>
{
    private readonly float _value = value;

    public static int Count => 1;

    public static Lanes1 Load(float* p) => new(*p);

    public static Lanes1 Create(float value) => new(value);

    public static Lanes1 Fma(Lanes1 a, Lanes1 b, Lanes1 c) => new((a._value * b._value) + c._value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void AddProduct(ref Lanes1 sum, Lanes1 a, Lanes1 b) => sum = Fma(a, b, sum);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void AddProduct(ref Lanes1 sum, float* a, Lanes1 b) => sum = Fma(Create(*a), b, sum);

    public static Lanes1 Max(Lanes1 a, Lanes1 b) => a._value > b._value ? a : b;

    public static Lanes1 Min(Lanes1 a, Lanes1 b) => a._value < b._value ? a : b;

    public static Lanes1 Sqrt(Lanes1 a) => new(MathF.Sqrt(a._value));

    public static Lanes1 PowerOfTwo(Lanes1 shifted) =>
        new(BitConverter.Int32BitsToSingle(BitConverter.SingleToInt32Bits(shifted._value) << 23));

    public static Lanes1 ToBFloat16(Lanes1 a) => FromBits((uint)Copy.ToBFloat16(a._value) << 16);

    public static Lanes1 Pairs(Lanes1 first, Lanes1 second) =>
        FromBits(Copy.ToBFloat16(first._value) | ((uint)Copy.ToBFloat16(second._value) << 16));

    public static Lanes1 NeighbourPairs(Lanes1 a, Lanes1 b) => Pairs(a, b);

    public static Lanes1 First(Lanes1 pairs) => FromBits(BitConverter.SingleToUInt32Bits(pairs._value) << 16);

    public static Lanes1 Second(Lanes1 pairs) => FromBits(BitConverter.SingleToUInt32Bits(pairs._value) & LaneBits.HighHalf);

    public static Lanes1 operator +(Lanes1 a, Lanes1 b) => new(a._value + b._value);

    public static Lanes1 operator -(Lanes1 a, Lanes1 b) => new(a._value - b._value);

    public static Lanes1 operator *(Lanes1 a, Lanes1 b) => new(a._value * b._value);

    public static Lanes1 operator /(Lanes1 a, Lanes1 b) => new(a._value / b._value);

    public void Store(float* p) => *p = _value;

    public float Sum() => _value;

    public float Max() => _value;

    private static Lanes1 FromBits(uint bits) => new(BitConverter.UInt32BitsToSingle(bits));
}
