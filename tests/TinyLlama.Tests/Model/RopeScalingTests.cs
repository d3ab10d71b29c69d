using TinyLlama.Model;

namespace TinyLlama.Tests.Model;

public sealed class RopeScalingTests
{
    [Theory]
    [InlineData(8, 1, 4, 8192, 128, 500_000)]
    [InlineData(32, 1, 4, 8192, 64, 500_000)]
    [InlineData(8, 2, 9, 300, 64, 10_000)]
    public void Long_waves_are_slowed_down_short_ones_not_and_those_between_by_a_part(
        float factor, float low, float high, int context, int headDim, float theta)
    {
        var scaling = new RopeScaling { Factor = factor, LowFrequencyFactor = low, HighFrequencyFactor = high, OriginalContextLength = context };
        var seen = new HashSet<string>();
        for (int pair = 0; pair < headDim / 2; pair++)
        {
            // As transformers has it, by wavelengths.
            double frequency = Math.Pow(theta, -2.0 * pair / headDim);
            double wavelength = 2 * Math.PI / frequency;
            double smooth = ((context / wavelength) - low) / (high - low);
            double expected = wavelength < context / (double)high ? frequency
                : wavelength > context / (double)low ? frequency / factor
                : ((1 - smooth) * frequency / factor) + (smooth * frequency);
            seen.Add(expected == frequency ? "short" : expected == frequency / factor ? "long" : "between");
            Assert.Equal(expected, frequency / scaling.Divisor(frequency), expected * 1e-12);
        }

        Assert.Equal(3, seen.Count);
    }

    [Theory]
    [InlineData(8, 1, 4, 8192, 128, 500_000)]
    [InlineData(32, 1, 4, 8192, 64, 500_000)]
    [InlineData(4, 1, 3.5, 300, 64, 10_000)]
    public void A_scaling_is_found_by_its_divisors(float factor, float low, float high, int context, int headDim, float theta)
    {
        var scaling = new RopeScaling { Factor = factor, LowFrequencyFactor = low, HighFrequencyFactor = high, OriginalContextLength = context };
        float[] divisors = Divisors(scaling, headDim, theta);
        Assert.Equal(scaling, RopeScaling.Fit(divisors, theta));
        divisors[(headDim / 4) + 3] *= 1.01f;
        Assert.Null(RopeScaling.Fit(divisors, theta));
    }

    [Theory]
    [InlineData(float.NaN)]
    [InlineData(0f)]
    [InlineData(-1f)]
    [InlineData(1f)]
    [InlineData(float.PositiveInfinity)]
    public void Divisors_that_make_no_scaling_are_told(float value)
    {
        float[] divisors = Divisors(new() { Factor = 8, LowFrequencyFactor = 1, HighFrequencyFactor = 4, OriginalContextLength = 8192 }, 128, 500_000);
        for (int pair = 0; pair < divisors.Length; pair++)
        {
            float[] altered = [.. divisors];
            altered.AsSpan(pair).Fill(value);
            Assert.Null(RopeScaling.Fit(altered, 500_000));
        }
    }

    private static float[] Divisors(RopeScaling scaling, int headDim, double theta) =>
        [.. Enumerable.Range(0, headDim / 2).Select(pair => (float)scaling.Divisor(Math.Pow(theta, -2.0 * pair / headDim)))];
}
