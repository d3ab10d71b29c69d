using System.Buffers.Binary;
using System.Runtime.Intrinsics;

namespace TinyLlama.Compute;

/// <summary>
/// Rounds singles to ggml's quantized blocks. The types of 32 elements have the bytes of ggml's reference; those of 256 are
/// searched for the least squared error.
/// </summary>
/// <remarks>The same bits on every machine: sums have one order, and no multiplication is fused with an addition.</remarks>
public static class BlockQuantizer
{
    private const int AffineGroup = 32;
    private const int SymmetricGroup = 16;
    private const int LargestSixBits = 63;

    // How many scales are tried for a group, and by how much of a level the highest one lies apart from one to the next.
    private const int Candidates = 10;
    private const float CandidateStep = 0.1f;
    private const int Refinements = 3;

    /// <summary>Whether <see cref="Encode"/> makes blocks of this type.</summary>
    public static bool CanEncode(DType type) => type.IsQuantized() && type != DType.Q4_1;

    /// <summary>Rounds the elements of one block.</summary>
    /// <param name="type">A quantized type other than Q4_1.</param>
    /// <param name="values"><see cref="DTypes.BlockElements"/> finite values, in the range of a half.</param>
    /// <param name="block">Receives <see cref="DTypes.BlockBytes"/> bytes.</param>
    public static void Encode(DType type, ReadOnlySpan<float> values, Span<byte> block)
    {
        switch (type)
        {
            case DType.Q8_0:
                EncodeQ8(values, block);
                break;
            case DType.Q4_0:
                EncodeQ4(values, block);
                break;
            case DType.Q5_0:
                EncodeQ5(values, block);
                break;
            case DType.Q5_1:
                EncodeQ51(values, block);
                break;
            case DType.Q4_K:
                EncodeAffine(values, block, largest: 15);
                break;
            case DType.Q5_K:
                EncodeAffine(values, block, largest: 31);
                break;
            case DType.Q6_K:
                EncodeQ6K(values, block);
                break;
            default:
                throw new ArgumentOutOfRangeException(nameof(type), type, "not a type that is written");
        }
    }

    private static void EncodeQ8(ReadOnlySpan<float> values, Span<byte> block)
    {
        float largest = 0;
        for (int i = 0; i < 32; i++)
        {
            largest = Math.Max(largest, Math.Abs(values[i]));
        }

        float scale = largest / 127;
        float inverse = scale == 0 ? 0 : 1 / scale;
        BinaryPrimitives.WriteHalfLittleEndian(block, (Half)scale);
        for (int i = 0; i < 32; i++)
        {
            block[2 + i] = (byte)(sbyte)MathF.Round(values[i] * inverse, MidpointRounding.AwayFromZero);
        }
    }

    // The element of the largest magnitude becomes -8, which has no positive counterpart.
    private static void EncodeQ4(ReadOnlySpan<float> values, Span<byte> block)
    {
        float scale = Extreme(values[..32]) / -8;
        float inverse = scale == 0 ? 0 : 1 / scale;
        BinaryPrimitives.WriteHalfLittleEndian(block, (Half)scale);
        for (int i = 0; i < 16; i++)
        {
            block[2 + i] = (byte)(Level(values[i]) | (Level(values[16 + i]) << 4));
        }

        int Level(float value) => Math.Min(15, (int)((value * inverse) + 8.5f));
    }

    private static void EncodeQ5(ReadOnlySpan<float> values, Span<byte> block)
    {
        float scale = Extreme(values[..32]) / -16;
        float inverse = scale == 0 ? 0 : 1 / scale;
        BinaryPrimitives.WriteHalfLittleEndian(block, (Half)scale);
        Span<byte> quants = stackalloc byte[32];
        for (int i = 0; i < 32; i++)
        {
            quants[i] = (byte)Math.Min(31, (int)((values[i] * inverse) + 16.5f));
        }

        PackFiveBits(block[2..], quants);
    }

    private static void EncodeQ51(ReadOnlySpan<float> values, Span<byte> block)
    {
        (float low, float high) = (values[0], values[0]);
        for (int i = 1; i < 32; i++)
        {
            low = Math.Min(low, values[i]);
            high = Math.Max(high, values[i]);
        }

        float scale = (high - low) / 31;
        float inverse = scale == 0 ? 0 : 1 / scale;
        BinaryPrimitives.WriteHalfLittleEndian(block, (Half)scale);
        BinaryPrimitives.WriteHalfLittleEndian(block[2..], (Half)low);
        Span<byte> quants = stackalloc byte[32];
        for (int i = 0; i < 32; i++)
        {
            quants[i] = (byte)(((values[i] - low) * inverse) + 0.5f);
        }

        PackFiveBits(block[4..], quants);
    }

    // The fifth bits of all 32 in one word, then the nibbles: of the first half low, of the second high.
    private static void PackFiveBits(Span<byte> packed, ReadOnlySpan<byte> quants)
    {
        uint highBits = 0;
        for (int i = 0; i < 32; i++)
        {
            highBits |= (uint)(quants[i] >> 4) << i;
        }

        BinaryPrimitives.WriteUInt32LittleEndian(packed, highBits);
        for (int i = 0; i < 16; i++)
        {
            packed[4 + i] = (byte)((quants[i] & 15) | (quants[16 + i] << 4));
        }
    }

    // Q4_K and Q5_K: value = unit · scale · quant - minimumUnit · minimum, scale and minimum of 6 bits for 32 elements.
    private static void EncodeAffine(ReadOnlySpan<float> values, Span<byte> block, int largest)
    {
        Span<float> scales = stackalloc float[8];
        Span<float> minima = stackalloc float[8];
        (float largestScale, float largestMinimum) = (0, 0);
        for (int group = 0; group < 8; group++)
        {
            (scales[group], minima[group]) = FitAffine(values.Slice(group * AffineGroup, AffineGroup), largest);
            largestScale = Math.Max(largestScale, scales[group]);
            largestMinimum = Math.Max(largestMinimum, minima[group]);
        }

        var unit = (Half)(largestScale / LargestSixBits);
        var minimumUnit = (Half)(largestMinimum / LargestSixBits);
        block.Clear();
        BinaryPrimitives.WriteHalfLittleEndian(block, unit);
        BinaryPrimitives.WriteHalfLittleEndian(block[2..], minimumUnit);
        Span<byte> quants = stackalloc byte[AffineGroup];
        for (int group = 0; group < 8; group++)
        {
            (int scale, int minimum) = RoundAffine(
                values.Slice(group * AffineGroup, AffineGroup), (float)unit, (float)minimumUnit, scales[group], minima[group], largest, quants);
            PackSixBits(block.Slice(4, 12), group, scale, minimum);
            Span<byte> nibbles = block.Slice((largest > 15 ? 48 : 16) + (group / 2 * AffineGroup), AffineGroup);
            for (int i = 0; i < AffineGroup; i++)
            {
                nibbles[i] |= (byte)((quants[i] & 15) << (group % 2 * 4));
                if (largest > 15)
                {
                    block[16 + i] |= (byte)((quants[i] >> 4) << group);
                }
            }
        }
    }

    /// <summary>The scale and the minimum, both at least 0, of x ≈ scale · q - minimum with the least squared error that is found.</summary>
    private static (float Scale, float Minimum) FitAffine(ReadOnlySpan<float> values, int largest)
    {
        (float low, float high) = (0, float.MinValue);
        foreach (float value in values)
        {
            low = Math.Min(low, value);
            high = Math.Max(high, value);
        }

        if (high <= low)
        {
            return (0, -low);
        }

        var best = new Fit(0, -low, float.MinValue);
        for (int c = -Candidates; c <= Candidates; c++)
        {
            Fit fit = SolveAffine(values, (largest + (c * CandidateStep)) / (high - low), -low, largest);
            best = fit.Explained > best.Explained ? fit : best;
        }

        for (int i = 0; i < Refinements && best.Scale > 0; i++)
        {
            Fit fit = SolveAffine(values, 1 / best.Scale, best.Minimum, largest);
            if (fit.Explained <= best.Explained)
            {
                break;
            }

            best = fit;
        }

        return (best.Scale, best.Minimum);
    }

    /// <summary>The least squares for the levels that a scale and a minimum give.</summary>
    private static Fit SolveAffine(ReadOnlySpan<float> values, float inverse, float minimum, int largest)
    {
        Vector256<float> sumX = default, sumQ = default, sumQQ = default, sumXQ = default;
        for (int i = 0; i < AffineGroup; i += Vector256<float>.Count)
        {
            Vector256<float> x = Vector256.Create(values[i..]);
            Vector256<float> q = Levels(x, inverse, minimum, largest);
            sumX += x;
            sumQ += q;
            sumQQ += q * q;
            sumXQ += x * q;
        }

        (float n, float sx, float sq, float sqq, float sxq) = (AffineGroup, Sum(sumX), Sum(sumQ), Sum(sumQQ), Sum(sumXQ));
        float determinant = (n * sqq) - (sq * sq);
        if (determinant <= 0)
        {
            return new Fit(0, Math.Max(0, -sx / n), sx < 0 ? sx * sx / n : 0);
        }

        float scale = ((n * sxq) - (sx * sq)) / determinant;
        float offset = ((sqq * sx) - (sq * sxq)) / determinant;
        if (offset > 0)
        {
            (scale, offset) = (sxq / sqq, 0);
        }

        return new Fit(scale, -offset, (scale * sxq) + (offset * sx));
    }

    /// <summary>The six-bit scale and minimum near the wanted ones with the least squared error, and the levels for them.</summary>
    private static (int Scale, int Minimum) RoundAffine(
        ReadOnlySpan<float> values, float unit, float minimumUnit, float wantedScale, float wantedMinimum, int largest, Span<byte> quants)
    {
        (int scale, int minimum) = (SixBits(wantedScale, unit), SixBits(wantedMinimum, minimumUnit));
        (int bestScale, int bestMinimum, float least) = (scale, minimum, float.PositiveInfinity);
        for (int s = Math.Max(0, scale - 1); s <= Math.Min(LargestSixBits, scale + 1); s++)
        {
            for (int m = Math.Max(0, minimum - 1); m <= Math.Min(LargestSixBits, minimum + 1); m++)
            {
                float error = AffineError(values, unit * s, minimumUnit * m, largest);
                if (error < least)
                {
                    (bestScale, bestMinimum, least) = (s, m, error);
                }
            }
        }

        Span<float> levels = stackalloc float[Vector256<float>.Count];
        for (int i = 0; i < AffineGroup; i += levels.Length)
        {
            Levels(Vector256.Create(values[i..]), Inverse(unit * bestScale), minimumUnit * bestMinimum, largest).CopyTo(levels);
            for (int lane = 0; lane < levels.Length; lane++)
            {
                quants[i + lane] = (byte)levels[lane];
            }
        }

        return (bestScale, bestMinimum);
    }

    private static float AffineError(ReadOnlySpan<float> values, float scale, float minimum, int largest)
    {
        Vector256<float> sum = default;
        float inverse = Inverse(scale);
        for (int i = 0; i < AffineGroup; i += Vector256<float>.Count)
        {
            Vector256<float> x = Vector256.Create(values[i..]);
            Vector256<float> error = (Levels(x, inverse, minimum, largest) * scale) - Vector256.Create(minimum) - x;
            sum += error * error;
        }

        return Sum(sum);
    }

    private static Vector256<float> Levels(Vector256<float> x, float inverse, float minimum, int largest) =>
        Vector256.Clamp(
            Vector256.Round((x + Vector256.Create(minimum)) * inverse), Vector256<float>.Zero, Vector256.Create((float)largest));

    private static int SixBits(float value, float unit) =>
        unit == 0 ? 0 : (int)Math.Clamp(MathF.Round(value / unit), 0, LargestSixBits);

    private static void PackSixBits(Span<byte> packed, int group, int scale, int minimum)
    {
        if (group < 4)
        {
            packed[group] |= (byte)scale;
            packed[group + 4] |= (byte)minimum;
            return;
        }

        packed[group + 4] = (byte)((scale & 15) | ((minimum & 15) << 4));
        packed[group - 4] |= (byte)((scale >> 4) << 6);
        packed[group] |= (byte)((minimum >> 4) << 6);
    }

    // value = unit · scale · quant, a signed scale of 8 bits for 16 elements, quants from -32 to 31.
    private static void EncodeQ6K(ReadOnlySpan<float> values, Span<byte> block)
    {
        Span<float> scales = stackalloc float[16];
        for (int group = 0; group < 16; group++)
        {
            scales[group] = FitSymmetric(values.Slice(group * SymmetricGroup, SymmetricGroup));
        }

        var unit = (Half)(Extreme(scales) / -128);
        block.Clear();
        BinaryPrimitives.WriteHalfLittleEndian(block[208..], unit);
        Span<float> levels = stackalloc float[SymmetricGroup];
        for (int group = 0; group < 16; group++)
        {
            ReadOnlySpan<float> x = values.Slice(group * SymmetricGroup, SymmetricGroup);
            int scale = RoundSymmetric(x, (float)unit, scales[group]);
            block[192 + group] = (byte)(sbyte)scale;
            SymmetricLevels(x, Inverse((float)unit * scale), levels);
            for (int i = 0; i < SymmetricGroup; i++)
            {
                (int half, int place) = Math.DivRem((group * SymmetricGroup) + i, 128);
                (int quarter, int column) = Math.DivRem(place, 32);
                int quant = (int)levels[i] + 32;
                block[(half * 64) + (quarter % 2 * 32) + column] |= (byte)((quant & 15) << (quarter / 2 * 4));
                block[128 + (half * 32) + column] |= (byte)((quant >> 4) << (quarter * 2));
            }
        }
    }

    /// <summary>The scale of x ≈ scale · q with the least squared error that is found; 0 where all are 0.</summary>
    private static float FitSymmetric(ReadOnlySpan<float> values)
    {
        float extreme = Extreme(values);
        if (extreme == 0)
        {
            return 0;
        }

        var best = new Fit(0, 0, float.MinValue);
        for (int c = -Candidates; c <= Candidates; c++)
        {
            Fit fit = SolveSymmetric(values, (-32 + (c * CandidateStep)) / extreme);
            best = fit.Explained > best.Explained ? fit : best;
        }

        for (int i = 0; i < Refinements; i++)
        {
            Fit fit = SolveSymmetric(values, 1 / best.Scale);
            if (fit.Explained <= best.Explained)
            {
                break;
            }

            best = fit;
        }

        return best.Scale;
    }

    private static Fit SolveSymmetric(ReadOnlySpan<float> values, float inverse)
    {
        Vector256<float> sumQQ = default, sumXQ = default;
        for (int i = 0; i < SymmetricGroup; i += Vector256<float>.Count)
        {
            Vector256<float> x = Vector256.Create(values[i..]);
            Vector256<float> q = SymmetricLevels(x, inverse);
            sumQQ += q * q;
            sumXQ += x * q;
        }

        // The extreme's level is never 0.
        (float sqq, float sxq) = (Sum(sumQQ), Sum(sumXQ));
        return new Fit(sxq / sqq, 0, sxq * sxq / sqq);
    }

    private static int RoundSymmetric(ReadOnlySpan<float> values, float unit, float wanted)
    {
        int scale = unit == 0 ? 0 : (int)Math.Clamp(MathF.Round(wanted / unit), -128, 127);
        (int best, float least) = (scale, float.PositiveInfinity);
        for (int s = Math.Max(-128, scale - 1); s <= Math.Min(127, scale + 1); s++)
        {
            Vector256<float> sum = default;
            for (int i = 0; i < SymmetricGroup; i += Vector256<float>.Count)
            {
                Vector256<float> x = Vector256.Create(values[i..]);
                Vector256<float> error = (SymmetricLevels(x, Inverse(unit * s)) * (unit * s)) - x;
                sum += error * error;
            }

            if (Sum(sum) is var squared && squared < least)
            {
                (best, least) = (s, squared);
            }
        }

        return best;
    }

    private static void SymmetricLevels(ReadOnlySpan<float> values, float inverse, Span<float> levels)
    {
        for (int i = 0; i < SymmetricGroup; i += Vector256<float>.Count)
        {
            SymmetricLevels(Vector256.Create(values[i..]), inverse).CopyTo(levels[i..]);
        }
    }

    private static Vector256<float> SymmetricLevels(Vector256<float> x, float inverse) =>
        Vector256.Clamp(Vector256.Round(x * inverse), Vector256.Create(-32f), Vector256.Create(31f));

    // The first of those with the largest magnitude.
    private static float Extreme(ReadOnlySpan<float> values)
    {
        float extreme = 0;
        foreach (float value in values)
        {
            extreme = Math.Abs(value) > Math.Abs(extreme) ? value : extreme;
        }

        return extreme;
    }

    private static float Inverse(float scale) => scale == 0 ? 0 : 1 / scale;

    private static float Sum(Vector256<float> vector)
    {
        Vector128<float> half = vector.GetLower() + vector.GetUpper();
        return (half[0] + half[2]) + (half[1] + half[3]);
    }

    /// <summary>A scale, a minimum, and by how much they lessen the sum of squares: the larger, the smaller the error.</summary>
    private readonly record struct Fit(float Scale, float Minimum, float Explained);
}
