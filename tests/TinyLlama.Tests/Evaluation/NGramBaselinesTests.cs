using TinyLlama.Data.Tokenizers;
using TinyLlama.Evaluation;

namespace TinyLlama.Tests.Evaluation;

public sealed class NGramBaselinesTests
{
    [Fact]
    public void Probabilities_are_those_of_the_definition()
    {
        // Too few tokens to hold any out: the discount is the usual 0.75. Pairs: 01 12 20 01 11 10.
        int[] training = [0, 1, 2, 0, 1, 1, 0];
        NGramBaselines baselines = NGramBaselines.Count(training, 4);
        Assert.Equal(0.75, baselines.Discount);
        Assert.Equal(4 / 11.0, baselines.Probability(0), 1e-15);
        Assert.Equal(1 / 11.0, baselines.Probability(3), 1e-15);
        Assert.Equal((1.25 + (0.75 * 1 * 4 / 11.0)) / 2, baselines.Probability(0, 1), 1e-15);
        Assert.Equal((0.25 + (0.75 * 3 * 4 / 11.0)) / 3, baselines.Probability(1, 0), 1e-15);
        Assert.Equal(0.75 * 3 * (1 / 11.0) / 3, baselines.Probability(1, 3), 1e-15);
        Assert.Equal(1 / 11.0, baselines.Probability(3, 3), 1e-15);
    }

    [Fact]
    public void Probabilities_add_up_to_one_after_every_token()
    {
        int[] training = Chain(5000, states: 30, seed: 1);
        NGramBaselines baselines = NGramBaselines.Count(training, 40);
        Assert.Equal(1, Enumerable.Range(0, 40).Sum(baselines.Probability), 1e-12);
        for (int previous = 0; previous < 40; previous++)
        {
            Assert.Equal(1, Enumerable.Range(0, 40).Sum(next => baselines.Probability(previous, next)), 1e-12);
        }
    }

    [Fact]
    public void Scores_are_the_sums_over_the_same_targets()
    {
        NGramBaselines baselines = NGramBaselines.Count(Chain(20_000, states: 200, seed: 2), 258);
        int[] validation = Chain(1000, states: 200, seed: 3);
        var tokens = new EvaluationTokens(validation, [0], new ByteTokenizer(), "validation");
        Score unigram = baselines.Unigram(tokens);
        Score bigram = baselines.Bigram(tokens);
        Assert.Equal(-validation.Skip(1).Sum(t => Math.Log(baselines.Probability(t))), unigram.TotalNats, 1e-9 * unigram.TotalNats);
        Assert.Equal(
            -validation.Zip(validation.Skip(1), (v, w) => Math.Log(baselines.Probability(v, w))).Sum(), bigram.TotalNats, 1e-9 * bigram.TotalNats);
        Assert.Equal((999L, 999L), (bigram.TargetCount, bigram.ByteCount));
    }

    [Fact]
    public void A_markov_chain_is_learned_to_its_entropy()
    {
        // Each state goes to one of four others with equal probability: ln 4 nats a token.
        NGramBaselines baselines = NGramBaselines.Count(Chain(200_000, states: 100, seed: 4), 258);
        var tokens = new EvaluationTokens(Chain(20_000, states: 100, seed: 5), [0], new ByteTokenizer(), "validation");
        Assert.Equal(Math.Log(4), baselines.Bigram(tokens).Loss, 2e-3);
        Assert.Equal(Math.Log(100), baselines.Unigram(tokens).Loss, 2e-2);
    }

    [Fact]
    public void The_discount_is_the_best_for_what_the_training_tokens_hold_out()
    {
        // Few observations of many pairs: much must go to unseen ones. All observed: nothing.
        Assert.InRange(NGramBaselines.Count(Chain(100_000, states: 20, seed: 6), 20).Discount, 0, 0.2);
        var random = new Random(7);
        int[] independent = [.. Enumerable.Range(0, 20_000).Select(_ => random.Next(1000))];
        Assert.InRange(NGramBaselines.Count(independent, 1000).Discount, 0.9, 1);
    }

    // State s goes to one of four states that s alone decides.
    private static int[] Chain(int count, int states, int seed)
    {
        var random = new Random(seed);
        int[] tokens = new int[count];
        for (int i = 1; i < count; i++)
        {
            tokens[i] = ((tokens[i - 1] * 4) + random.Next(4)) % states;
        }

        return tokens;
    }
}
