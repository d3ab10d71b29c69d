namespace TinyLlama.Compute.Tests.Cuda;

public sealed class TopLogitsTests : CudaTests
{
    private static readonly float[] s_inverseTemperatures = [1, 0.5f, 3, 0, 1e-3f];

    // Of normal numbers rounded to bfloat16 many are equal.
    [Theory]
    [InlineData(1, 1, 1)]
    [InlineData(3, 37, 5)]
    [InlineData(5, 300, 300)]
    [InlineData(2, 257, 256)]
    [InlineData(4, 5000, 256)]
    [InlineData(2, 32003, 40)]
    public void Are_those_of_a_sort(int rows, int vocabulary, int count)
    {
        float[] logits = Normal(rows * vocabulary, 4);
        Check(rows, vocabulary, count, logits, Get(Run(PutStrided(rows, vocabulary, logits, DType.F32), count)));
    }

    [Fact]
    public void Of_equal_logits_those_in_the_first_columns_are_the_largest()
    {
        float[] equal = new float[2000], zeros = [.. Enumerable.Range(0, 2000).Select(v => v % 3 == 0 ? -0f : v % 3 == 1 ? 0f : -1)];
        Check(2, 2000, 100, [.. equal, .. zeros], Get(Run(Put(2, 2000, [.. equal, .. zeros], DType.F32), 100)));
    }

    [Fact]
    public void Logits_may_be_as_far_apart_as_singles_are()
    {
        float[] logits =
        [
            .. Enumerable.Range(0, 500).Select(v => (v % 7) switch
            {
                0 => float.NegativeInfinity,
                1 => float.MinValue,
                2 => float.Epsilon * v,
                3 => -float.Epsilon,
                4 => -1e-20f * v,
                5 => v < 300 ? 40 + v : -v,
                _ => -100f + (v % 50),
            }),
        ];
        Check(1, 500, 20, logits, Get(Run(Put(1, 500, logits, DType.F32), 20)));
        Check(1, 500, 200, logits, Get(Run(Put(1, 500, logits, DType.F32), 200)));
    }

    [Theory]
    [InlineData(float.NaN)]
    [InlineData(float.PositiveInfinity)]
    public void What_is_no_logit_is_among_the_largest(float value)
    {
        float[] logits = Normal(3000, 4);
        logits[1234] = float.IsNaN(value) ? BitConverter.Int32BitsToSingle(unchecked((int)0xffc00001)) : value;
        float[] top = Get(Run(Put(1, 3000, logits, DType.F32), 1));
        Assert.Equal(value, top[0]);
        Assert.Equal(1234, new TopLogitsRow(top).Column(0));
    }

    [Fact]
    public void A_row_has_the_same_bits_alone_and_among_others()
    {
        float[] logits = Normal(5 * 1003, 4);
        Tensor rows = PutStrided(5, 1003, logits, DType.F32);
        float[] together = Get(Run(rows, 64));
        for (int row = 0; row < 5; row++)
        {
            float[] alone = Get(Run(Put(1, 1003, logits.AsSpan(row * 1003, 1003), DType.F32), 64, s_inverseTemperatures[row]));
            SameBits(together.AsSpan(row * alone.Length, alone.Length), alone, $"row {row}");
        }
    }

    [Fact]
    public void Nothing_is_allocated_and_more_logits_than_there_are_is_refused()
    {
        Tensor logits = Put(2, 100, Normal(200), DType.F32), inverse = Put(2, 1, [1, 1], DType.F32), top = Take(2, TopLogitsRow.Width(8), DType.F32);
        AllocatesNothing(() => Cuda.TopLogits(top, logits, inverse, 8));
        Tensor all = Take(2, TopLogitsRow.Width(101), DType.F32);
        Assert.Throws<ArgumentException>(() => Cuda.TopLogits(all, logits, inverse, 101));
    }

    private Tensor Run(Tensor logits, int count, params ReadOnlySpan<float> inverseTemperatures)
    {
        Tensor top = Take(logits.Rows, TopLogitsRow.Width(count), DType.F32);
        ReadOnlySpan<float> inverse = inverseTemperatures.IsEmpty ? s_inverseTemperatures.AsSpan(0, logits.Rows) : inverseTemperatures;
        Cuda.TopLogits(top, logits, Put(logits.Rows, 1, inverse, DType.F32), count);
        return top;
    }

    private static void Check(int rows, int vocabulary, int count, float[] logits, float[] top)
    {
        for (int n = 0; n < rows; n++)
        {
            float[] x = logits[(n * vocabulary)..((n + 1) * vocabulary)];
            int[] order = [.. Enumerable.Range(0, vocabulary).OrderByDescending(v => x[v]).ThenBy(v => v)];
            int[] largest = [.. order.Take(count).Order()];
            bool[] isLargest = new bool[vocabulary];
            Array.ForEach(largest, v => isLargest[v] = true);
            TopLogitsRow actual = new(top.AsSpan(n * TopLogitsRow.Width(count), TopLogitsRow.Width(count)));
            Assert.Equal(count, actual.Count);
            double before = 0, atOne = 0;
            int place = 0;
            for (int v = 0; v < vocabulary; v++)
            {
                if (isLargest[v])
                {
                    Assert.Equal(v, actual.Column(place));
                    Assert.Equal(x[v], actual.Logits[place]);
                    Near(before, actual.OthersBefore(place));
                    place++;
                }
                else
                {
                    before += Math.Exp(((double)x[v] - x[order[0]]) * s_inverseTemperatures[n]);
                    atOne += Math.Exp((double)x[v] - x[order[0]]);
                }
            }

            Near(before, actual.Others);
            Near(atOne, actual.OthersAtOne);
        }
    }

    // Weights below the smallest normal number may be 0.
    private static void Near(double expected, float actual) => Assert.Equal(expected, actual, (TopLogitsRow.OthersError * expected) + 1e-32);
}
