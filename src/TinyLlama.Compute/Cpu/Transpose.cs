using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;

namespace TinyLlama.Compute.Cpu;

/// <summary>Transposes of small blocks of dwords in registers, which packing of weights is made of.</summary>
internal static unsafe class Transpose
{
    /// <summary>Gets a value indicating whether the machine has the instructions.</summary>
    public static bool IsSupported => Avx.IsSupported;

    /// <summary>Eight rows of four dwords become four rows of eight: in two rounds of pairs, of lanes and of pairs of lanes.</summary>
    /// <param name="destination">The first row of eight.</param>
    /// <param name="destinationRow">Dwords from one to the next.</param>
    /// <param name="source">The first row of four; at any byte.</param>
    /// <param name="sourceRow">Bytes from one to the next.</param>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void EightRows(float* destination, nint destinationRow, byte* source, nint sourceRow)
    {
        Vector256<float> r0 = Rows(source, 4 * sourceRow);
        Vector256<float> r1 = Rows(source + sourceRow, 4 * sourceRow);
        Vector256<float> r2 = Rows(source + (2 * sourceRow), 4 * sourceRow);
        Vector256<float> r3 = Rows(source + (3 * sourceRow), 4 * sourceRow);
        Vector256<double> low = Avx.UnpackLow(r0, r1).AsDouble(), high = Avx.UnpackHigh(r0, r1).AsDouble();
        Vector256<double> low2 = Avx.UnpackLow(r2, r3).AsDouble(), high2 = Avx.UnpackHigh(r2, r3).AsDouble();
        Avx.UnpackLow(low, low2).AsSingle().Store(destination);
        Avx.UnpackHigh(low, low2).AsSingle().Store(destination + destinationRow);
        Avx.UnpackLow(high, high2).AsSingle().Store(destination + (2 * destinationRow));
        Avx.UnpackHigh(high, high2).AsSingle().Store(destination + (3 * destinationRow));
    }

    // Four dwords of a row and of the fourth after it.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector256<float> Rows(byte* row, nint toFourth) =>
        Vector256.Create(Vector128.Load((float*)row), Vector128.Load((float*)(row + toFourth)));
}
