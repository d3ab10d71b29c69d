using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Inference;

namespace TinyLlama.Tests.Inference;

public sealed class SamplerTests
{
    private static readonly float[] s_logits = [1f, 3f, 2f, 3f, float.NegativeInfinity, 0f];

    [Fact]
    public void Temperature_zero_takes_the_first_of_the_likeliest_and_draws_no_number()
    {
        SplitMix64 random = new(1);
        Assert.Equal(1, Next(s_logits, new() { Temperature = 0 }, ref random));
        Assert.Equal(new SplitMix64(1).NextUniform(), random.NextUniform());
    }

    [Fact]
    public void Draws_follow_the_softmax_at_the_temperature() =>
        AssertDraws(Softmax(s_logits, 0.7), new() { Temperature = 0.7 });

    [Fact]
    public void Top_k_leaves_exactly_k_tokens_and_of_equal_ones_those_with_the_smaller_id()
    {
        AssertDraws([0, 1, 0, 0, 0, 0], new() { TopK = 1 });
        AssertDraws([0, 0.5, 0, 0.5, 0, 0], new() { TopK = 2 });
        AssertDraws(Softmax(s_logits, 1), new() { TopK = 6 });
        AssertDraws(Softmax([float.NegativeInfinity, 3, 2, 3, float.NegativeInfinity, float.NegativeInfinity], 1), new() { TopK = 3 });
    }

    [Fact]
    public void Top_p_leaves_the_fewest_tokens_that_reach_it()
    {
        // Probabilities 0.4, 0.3, 0.2, 0.1.
        float[] logits = [MathF.Log(0.2f), MathF.Log(0.4f), MathF.Log(0.1f), MathF.Log(0.3f)];
        AssertDraws([0, 1, 0, 0], new() { TopP = 0.39 }, logits);
        AssertDraws([0, 4 / 7.0, 0, 3 / 7.0], new() { TopP = 0.41 }, logits);
        AssertDraws([2 / 9.0, 4 / 9.0, 0, 3 / 9.0], new() { TopP = 0.89 }, logits);
        AssertDraws([0.2, 0.4, 0.1, 0.3], new() { TopP = 0.95 }, logits);
        AssertDraws([0.2, 0.4, 0.1, 0.3], new() { TopP = 1 }, logits);
        AssertDraws([0, 1, 0, 0], new() { TopP = 1e-12 }, logits);
    }

    [Fact]
    public void Top_p_is_a_share_of_what_top_k_left()
    {
        // Of 0.4 and 0.3 the first has 0.57, which is not yet 0.6 but more than 0.5.
        float[] logits = [MathF.Log(0.2f), MathF.Log(0.4f), MathF.Log(0.1f), MathF.Log(0.3f)];
        AssertDraws([0, 1, 0, 0], new() { TopK = 2, TopP = 0.5 }, logits);
        AssertDraws([0, 4 / 7.0, 0, 3 / 7.0], new() { TopK = 2, TopP = 0.6 }, logits);
    }

    [Fact]
    public void Min_p_leaves_tokens_of_a_share_of_the_likeliest()
    {
        float[] logits = [MathF.Log(0.2f), MathF.Log(0.4f), MathF.Log(0.1f), MathF.Log(0.3f)];
        AssertDraws([2 / 9.0, 4 / 9.0, 0, 3 / 9.0], new() { MinP = 0.3 }, logits);
        AssertDraws([0, 4 / 7.0, 0, 3 / 7.0], new() { MinP = 0.7 }, logits);
        AssertDraws([0, 1, 0, 0], new() { MinP = 1 }, logits);
    }

    [Fact]
    public void Cuts_see_the_probabilities_at_the_temperature()
    {
        // At temperature 2 the ratio of the two is 0.5, at temperature 1 it would be 0.25.
        float[] logits = [MathF.Log(4), 0];
        AssertDraws([2 / 3.0, 1 / 3.0], new() { Temperature = 2, MinP = 0.4 }, logits);
        AssertDraws([1, 0], new() { Temperature = 1, MinP = 0.4 }, logits);
    }

    [Fact]
    public void The_repetition_penalty_meets_each_token_of_the_context_once()
    {
        float[] logits = [2f, -2f, 0f, 2f, -2f];
        Sampler.Penalize(logits, [0, 1, 0, 1, 1, 2], 2);
        Assert.Equal([1f, -4f, 0f, 2f, -2f], logits);
    }

    [Fact]
    public void Presence_is_subtracted_once_and_frequency_each_time()
    {
        float[] logits = [2f, -2f, 0f, 2f];
        Sampler.Penalize(logits, [0, 1, 0, 0], 0.5, 0.25);
        Assert.Equal([0.75f, -2.75f, 0f, 2f], logits);
    }

    [Fact]
    public void Penalties_of_generated_tokens_leave_the_prompt_alone()
    {
        SplitMix64 random = new(1);
        var options = new GenerationOptions { Temperature = 0, PresencePenalty = 10 };
        Assert.Equal(1, Sampler.Next([0f, 2f, 1f], [1], [], options, ref random));
        Assert.Equal(2, Sampler.Next([0f, 2f, 1f], [1], [1], options, ref random));
        options = new() { Temperature = 0, FrequencyPenalty = 0.6 };
        Assert.Equal(1, Sampler.Next([0f, 2f, 1f], [], [1], options, ref random));
        Assert.Equal(2, Sampler.Next([0f, 2f, 1f], [], [1, 1], options, ref random));
    }

    [Fact]
    public void A_logit_bias_is_added_before_anything_else()
    {
        AssertDraws([0.5, 0.5], new() { LogitBias = new Dictionary<int, double> { [0] = -1 }, Temperature = 0.5 }, [1, 0]);
        AssertDraws([0, 1], new() { LogitBias = new Dictionary<int, double> { [0] = double.NegativeInfinity } }, [9, 0]);
    }

    [Fact]
    public void Log_probabilities_are_those_of_the_softmax_with_the_likeliest_first()
    {
        double[] expected = Array.ConvertAll(Softmax(s_logits, 1), Math.Log);
        LogProbabilities actual = LogProbabilities.Of(s_logits, 5, 4, new ByteTokenizer());
        Assert.Equal([1, 3, 2, 0], actual.Top.Select(token => token.Token));
        Assert.All(actual.Top, token => Assert.Equal(expected[token.Token], token.LogProbability, 1e-12));
        Assert.Equal(5, actual.Chosen.Token);
        Assert.Equal(expected[5], actual.Chosen.LogProbability, 1e-12);
        Assert.Equal([2], actual.Top[2].Bytes.ToArray());
        Assert.Equal(1, LogProbabilities.Of(s_logits, 5, 1, new ByteTokenizer()).Top[0].Token);
        Assert.Empty(LogProbabilities.Of(s_logits, 5, 0, new ByteTokenizer()).Top);
    }

    [Fact]
    public void Sorting_less_than_the_whole_vocabulary_changes_nothing()
    {
        var source = new Random(17);
        for (int round = 0; round < 200; round++)
        {
            float[] logits = new float[300];
            for (int i = 0; i < logits.Length; i++)
            {
                logits[i] = (float)Math.Round(source.NextDouble() * 12, round % 3);
            }

            double p = source.NextDouble();
            SplitMix64 random = new((ulong)round);
            double[] expected = Nucleus(Softmax(logits, 1), p);
            for (int draw = 0; draw < 20; draw++)
            {
                Assert.True(expected[Next(logits, new() { TopP = p }, ref random)] > 0);
            }
        }
    }

    [Fact]
    public void The_same_seed_draws_the_same_tokens()
    {
        Assert.Equal(Draw(5), Draw(5));
        Assert.NotEqual(Draw(5), Draw(6));

        static int[] Draw(ulong seed)
        {
            SplitMix64 random = new(seed);
            return [.. Enumerable.Range(0, 50).Select(_ => Next(s_logits, new(), ref random))];
        }
    }

    [Fact]
    public void The_generator_is_SplitMix64()
    {
        // First outputs for seed 1234567, as published with the algorithm.
        SplitMix64 random = new(1234567);
        Assert.Equal((6457827717110365317UL >> 11) * Math.Pow(2, -53), random.NextUniform());
        Assert.Equal((3203168211198807973UL >> 11) * Math.Pow(2, -53), random.NextUniform());
    }

    [Theory]
    [InlineData(float.NaN, 0f)]
    [InlineData(0f, float.PositiveInfinity)]
    [InlineData(float.NegativeInfinity, float.NegativeInfinity)]
    public void Logits_without_a_meaning_are_an_error(float first, float second)
    {
        SplitMix64 random = new(1);
        var error = Assert.Throws<UserErrorException>(() => Next([first, second], new() { Temperature = 0 }, ref random));
        Assert.Contains("weights", error.Message, StringComparison.Ordinal);
        Assert.Throws<UserErrorException>(() => Next([first, second], new() { TopP = 0.5 }, ref random));
    }

    [Fact]
    public void A_tiny_temperature_does_not_overflow()
    {
        SplitMix64 random = new(1);
        Assert.Equal(1, Next([-1e30f, 1e30f], new() { Temperature = 1e-30 }, ref random));
    }

    private static int Next(float[] logits, GenerationOptions options, ref SplitMix64 random) =>
        Sampler.Next((float[])logits.Clone(), [], [], options, ref random);

    private static double[] Softmax(float[] logits, double temperature)
    {
        double[] weights = Array.ConvertAll(logits, l => Math.Exp(l / temperature));
        return Array.ConvertAll(weights, w => w / weights.Sum());
    }

    private static double[] Nucleus(double[] probabilities, double p)
    {
        double reached = 0;
        double[] kept = new double[probabilities.Length];
        foreach (int id in Enumerable.Range(0, kept.Length).OrderByDescending(i => probabilities[i]).ThenBy(i => i))
        {
            if (reached >= p + 1e-6)
            {
                break;
            }

            kept[id] = probabilities[id];
            reached += probabilities[id];
        }

        return kept;
    }

    // 20,000 seeded draws lie within five standard deviations of the expectation; impossible tokens never come.
    private static void AssertDraws(double[] expected, GenerationOptions options, float[]? logits = null)
    {
        const int Draws = 20_000;
        SplitMix64 random = new(42);
        int[] counts = new int[expected.Length];
        for (int i = 0; i < Draws; i++)
        {
            counts[Next(logits ?? s_logits, options, ref random)]++;
        }

        for (int id = 0; id < expected.Length; id++)
        {
            double deviation = Math.Sqrt(Draws * expected[id] * (1 - expected[id]));
            Assert.True(
                Math.Abs(counts[id] - (Draws * expected[id])) <= 5 * deviation,
                $"token {id} came {counts[id]} times of {Draws}, its probability is {expected[id]}");
        }
    }
}
