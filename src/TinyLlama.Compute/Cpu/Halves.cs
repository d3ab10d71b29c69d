using System.Runtime.CompilerServices;

namespace TinyLlama.Compute.Cpu;

/// <summary>Finite numbers in half precision, widened and rounded lane by lane: .NET 10 has no intrinsics of the instructions that do it.</summary>
/// <typeparam name="V">The register.</typeparam>
internal static unsafe class Halves<V>
    where V : struct, ILanes<V>
{
    private const int BitsOfHalf = 16;
    private const uint Sign = 0x8000_0000;

    // Of a float over the mantissa of a half, and what its exponent counts from more.
    private const int MoreBits = 13;
    private const uint MoreExponent = (127 - 15) << 23;
    private const float LeastNormal = 6.103515625e-5f;
    private const uint LeastNormalHalf = 1 << 10;

    /// <summary>The floats that the high halves of the dwords are. The low halves do not matter.</summary>
    /// <remarks>
    /// Exponent and mantissa take their places in a float, whose exponent counts from 127, not from 15. Subnormal halves become
    /// 2⁻¹⁵ · (1 + mantissa) so, where 2⁻¹⁴ · mantissa is right: twice as much less 2⁻¹⁴, which is the smaller of both only for them.
    /// No float is subnormal on the way: Intel's processors take over a hundred cycles for a product with one, and scales often are
    /// subnormal halves.
    /// </remarks>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V FromHigh(V dwords)
    {
        const uint Magnitude = 0x7FFF_0000;
        V magnitude = V.AddDwords(V.ShiftRight(V.And(dwords, V.CreateDword(Magnitude)), BitsOfHalf - MoreBits), V.CreateDword(MoreExponent));
        magnitude = V.Min(magnitude, V.Fma(magnitude, V.Create(2), V.Create(-LeastNormal)));
        return V.Or(magnitude, V.And(dwords, V.CreateDword(Sign)));
    }

    /// <summary>The floats that the low halves are.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V FromLow(V dwords) => FromHigh(V.ShiftLeft(dwords, BitsOfHalf));

    /// <summary>Those at p, one a lane.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Load(byte* p) => FromLow(V.LoadWords(p));

    /// <summary>The nearest halves, ties to even, in the low halves of dwords; what is too large becomes the largest half.</summary>
    /// <remarks>
    /// The part up to 2⁻¹⁴ as a multiple of the least half, by adding a number whose last bit that is; the rest as a float whose mantissa
    /// loses 13 bits. Each is 2⁻¹⁴ where the other tells.
    /// </remarks>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Round(V values)
    {
        const float Largest = 65504;
        const float Shift = 0.5f;
        const uint BitsOfShift = 126 << 23;
        V sign = V.And(values, V.CreateDword(Sign));
        V magnitude = V.Min(V.And(values, V.CreateDword(~Sign)), V.Create(Largest));
        V small = V.Min(magnitude, V.Create(LeastNormal)) + V.Create(Shift);
        V large = V.Max(magnitude, V.Create(LeastNormal));
        V isOdd = V.And(V.ShiftRight(large, MoreBits), V.CreateDword(1));
        large = V.AddDwords(V.AddDwords(large, isOdd), V.CreateDword(unchecked((1u << (MoreBits - 1)) - 1 - MoreExponent)));
        V both = V.AddDwords(V.ShiftRight(large, MoreBits), small);
        both = V.AddDwords(both, V.CreateDword(unchecked(0u - BitsOfShift - LeastNormalHalf)));
        return V.Or(both, V.ShiftRight(sign, BitsOfHalf));
    }
}
