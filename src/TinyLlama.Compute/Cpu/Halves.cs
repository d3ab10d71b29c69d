using System.Runtime.CompilerServices;

namespace TinyLlama.Compute.Cpu;

/// <summary>Finite numbers in half precision, widened lane by lane: .NET 10 has no intrinsic of the instructions that do it.</summary>
/// <typeparam name="V">The register.</typeparam>
internal static unsafe class Halves<V>
    where V : struct, ILanes<V>
{
    private const int BitsOfHalf = 16;

    /// <summary>The floats that the high halves of the dwords are. The low halves do not matter.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V FromHigh(V dwords)
    {
        // Sign, exponent and mantissa at the places that they have in a float, whose exponent counts from 127, not from 15.
        const uint Bits = 0x8FFFE000;
        const float Scale = 5.192296858534828e33f; // 2 to the power of 127 - 15
        return V.And(V.ShiftRightSigned(dwords, 3), V.CreateDword(Bits)) * V.Create(Scale);
    }

    /// <summary>The floats that the low halves are.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V FromLow(V dwords) => FromHigh(V.ShiftLeft(dwords, BitsOfHalf));

    /// <summary>Those at p, one a lane.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static V Load(byte* p) => FromLow(V.LoadWords(p));
}
