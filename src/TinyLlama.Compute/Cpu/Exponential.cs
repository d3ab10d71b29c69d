using System.Runtime.CompilerServices;

namespace TinyLlama.Compute.Cpu;

/// <summary>eˣ in lanes.</summary>
internal static class Exponential
{
    /// <summary>
    /// eˣ within 2 ulp: x = n · ln 2 + r, then 2ⁿ times a polynomial in r (the coefficients of Cephes' expf). Exactly 1
    /// for 0; exactly 0 below -87.7, so that what is masked by -∞ weighs nothing; +∞ above 88.3; NaN stays NaN.
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Exp<V>(V x)
        where V : struct, ILanes<V>
    {
        // Adding 1.5 · 2²³ rounds to a whole number, because a float of that size has no bits for fractions.
        V round = V.Create(12_582_912f);
        x = V.Min(V.Create(89f), V.Max(V.Create(-88f), x));
        V n = V.Fma(x, V.Create(1.44269504f), round) - round;

        // ln 2 in two parts, the first with few bits: n times it is exact.
        V r = V.Fma(n, V.Create(-0.693359375f), x);
        r = V.Fma(n, V.Create(2.12194440e-4f), r);

        V p = V.Fma(V.Create(1.9875691500e-4f), r, V.Create(1.3981999507e-3f));
        p = V.Fma(p, r, V.Create(8.3334519073e-3f));
        p = V.Fma(p, r, V.Create(4.1665795894e-2f));
        p = V.Fma(p, r, V.Create(1.6666665459e-1f));
        p = V.Fma(p, r, V.Create(5.0000001201e-1f));
        p = V.Fma(p, r * r, r) + V.Create(1f);
        return p * V.PowerOfTwo(n);
    }
}
