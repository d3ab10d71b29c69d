using System.Runtime.CompilerServices;

namespace TinyLlama.Compute.Cpu;

/// <summary>eˣ in lanes, within 2 ulp: exactly 1 for 0; exactly 0 below -87.7, so that what is masked by -∞ weighs nothing.</summary>
internal static class Exponential
{
    /// <summary>eˣ for any x: +∞ above 88.3; NaN stays NaN.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Exp<V>(V x)
        where V : struct, ILanes<V> => ExpOfUpToZero(V.Min(V.Create(89f), x));

    /// <summary>eˣ for x up to 88, as where the largest was subtracted; NaN stays NaN.</summary>
    /// <remarks>
    /// x = n · ln 2 + r with whole n; then 2ⁿ times a polynomial in r, 1 + r + …, the minimax one of degree 6 on
    /// ±ln 2 / 2 (relative error 3e-9; found by Remez' exchange).
    /// </remarks>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V ExpOfUpToZero<V>(V x)
        where V : struct, ILanes<V>
    {
        // Adding the constant rounds to a whole number, because a float of that size has no bits for fractions.
        x = V.Max(V.Create(-88f), x);
        V shifted = V.Fma(x, V.Create(1.44269504f), V.Create(LaneBits.Exponent));
        V n = shifted - V.Create(LaneBits.Exponent);

        // ln 2 in two parts, the first with few bits: n times it is exact.
        V r = V.Fma(n, V.Create(-0.693359375f), x);
        r = V.Fma(n, V.Create(2.12194440e-4f), r);

        V p = V.Fma(V.Create(1.381446724e-3f), r, V.Create(8.368780836e-3f));
        p = V.Fma(p, r, V.Create(4.166839272e-2f));
        p = V.Fma(p, r, V.Create(1.666651964e-1f));
        p = V.Fma(p, r, V.Create(4.999999404e-1f));
        p = V.Fma(p, r, V.Create(1f));
        p = V.Fma(p, r, V.Create(1f));
        return p * V.PowerOfTwo(shifted);
    }
}
