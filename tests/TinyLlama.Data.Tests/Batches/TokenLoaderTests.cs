using TinyLlama.Data.Batches;
using TinyLlama.Data.Shards;

namespace TinyLlama.Data.Tests.Batches;

public sealed class TokenLoaderTests
{
    [Theory]
    [InlineData(2, 8)]
    [InlineData(8, 8)]
    [InlineData(9, 8)]
    [InlineData(10, 8)]
    [InlineData(1000, 7)]
    [InlineData(1000, 1)]
    [InlineData(1001, 1000)]
    public void Every_token_but_the_first_is_a_target_once_per_epoch(int tokenCount, int contextLength)
    {
        using TemporaryFolder folder = new();
        using TokenShards shards = folder.Shards(Split.Train, Numbers(tokenCount, documentLength: 13));
        TokenLoader loader = new(shards, Split.Train, contextLength, seed: 5);
        int[] tokens = new int[contextLength];
        int[] targets = new int[contextLength];
        for (int epoch = 0; epoch < 3; epoch++)
        {
            List<int> seen = [];
            for (long i = 0; i < loader.BlocksPerEpoch; i++)
            {
                int count = loader.Read((epoch * loader.BlocksPerEpoch) + i, tokens, targets);
                Assert.Equal(count, targets.Count(t => t != TokenLoader.Ignored));
                for (int t = 0; t < count; t++)
                {
                    // Token i of the corpus is i: a target is one more than its input.
                    Assert.Equal(tokens[t] + 1, targets[t]);
                    seen.Add(targets[t]);
                }
            }

            seen.Sort();
            Assert.Equal(Enumerable.Range(1, tokenCount - 1), seen);
        }
    }

    [Fact]
    public void Epochs_are_shuffled_differently_and_a_sample_is_the_same_whenever_it_is_read()
    {
        using TemporaryFolder folder = new();
        using TokenShards shards = folder.Shards(Split.Train, Numbers(1000, documentLength: 50));
        TokenLoader loader = new(shards, Split.Train, 16, seed: 1);
        long[] stream = [.. Enumerable.Range(0, 4 * (int)loader.BlocksPerEpoch).Select(s => loader.BlockOf(s))];
        Assert.NotEqual(stream[..63], stream[63..126]);
        Assert.Equal(Enumerable.Range(0, 63).Select(b => (long)b), stream[63..126].Order());

        TokenLoader resumed = new(shards, Split.Train, 16, seed: 1);
        for (int s = stream.Length - 1; s >= 0; s--)
        {
            Assert.Equal(stream[s], resumed.BlockOf(s));
        }

        TokenLoader other = new(shards, Split.Train, 16, seed: 2);
        Assert.NotEqual(stream, Enumerable.Range(0, stream.Length).Select(s => other.BlockOf(s)));
    }

    [Fact]
    public void Blocks_by_place_are_the_corpus_in_order()
    {
        using TemporaryFolder folder = new();
        using TokenShards shards = folder.Shards(Split.Validation, Numbers(205, documentLength: 9));
        TokenLoader loader = new(shards, Split.Validation, 32, seed: 9);
        int[] tokens = new int[32];
        int[] targets = new int[32];
        Assert.Equal(7, loader.BlocksPerEpoch);
        for (int b = 0; b < 6; b++)
        {
            Assert.Equal(32, loader.ReadBlock(b, tokens, targets));
            Assert.Equal(Enumerable.Range(32 * b, 32), tokens);
        }

        Assert.Equal(12, loader.ReadBlock(6, tokens, targets));
        Assert.Equal(Enumerable.Range(192, 12).Concat(Enumerable.Repeat(0, 20)), tokens);
        Assert.Equal(Enumerable.Range(193, 12).Concat(Enumerable.Repeat(TokenLoader.Ignored, 20)), targets);
    }

    [Fact]
    public void Documents_of_a_block_are_found_and_named()
    {
        using TemporaryFolder folder = new();
        // Documents begin at 0, 40, 45, 45 (empty), 100 … over several shards.
        int[][] documents = [Run(0, 40), Run(40, 5), [], Run(45, 55), Run(100, 1), Run(101, 99), Run(200, 3)];
        using TokenShards shards = folder.Shards(Split.Train, documents, tokensPerShard: 50);
        TokenLoader loader = new(shards, Split.Train, 64, seed: 1);
        int[] starts = new int[64];
        Assert.Equal(4, loader.BlocksPerEpoch);
        Assert.Equal([0, 40, 45], starts[..loader.ReadDocumentStarts(0, starts)]);
        Assert.Equal([0, 100 - 64, 101 - 64], starts[..loader.ReadDocumentStarts(1, starts)]);
        Assert.Equal([0], starts[..loader.ReadDocumentStarts(2, starts)]);
        Assert.Equal([0, 200 - 192], starts[..loader.ReadDocumentStarts(3, starts)]);
        Assert.Equal([4L, 5L, 6L], loader.Documents(1).Select(d => d.Line));
        Assert.Equal([45L, 100L, 101L], loader.Documents(1).Select(d => d.FirstToken));
        Assert.Equal([6L], loader.Documents(2).Select(d => d.Line));
    }

    [Fact]
    public void Reading_allocates_nothing()
    {
        using TemporaryFolder folder = new();
        using TokenShards shards = folder.Shards(Split.Train, Numbers(5000, documentLength: 20), tokensPerShard: 1000);
        TokenLoader loader = new(shards, Split.Train, 256, seed: 1);
        int[] tokens = new int[256];
        int[] targets = new int[256];
        int[] starts = new int[256];
        long before = 0;
        for (int s = 0; s < 100; s++)
        {
            before = s == 50 ? GC.GetAllocatedBytesForCurrentThread() : before;
            loader.Read(s, tokens, targets);
            loader.ReadDocumentStarts(loader.BlockOf(s), starts);
        }

        Assert.Equal(before, GC.GetAllocatedBytesForCurrentThread());
    }

    [Fact]
    public void Ids_of_four_bytes_read_back()
    {
        using TemporaryFolder folder = new();
        using TokenShards shards = folder.Shards(Split.Train, [[99_999, 0, 65_536], [7]], vocabularySize: 100_000);
        int[] tokens = new int[4];
        shards.ReadTokens(Split.Train, 0, tokens);
        Assert.Equal([99_999, 0, 65_536, 7], tokens);
    }

    [Theory]
    [InlineData(0)]
    [InlineData(1)]
    public void A_split_of_less_than_two_tokens_is_refused(int tokenCount)
    {
        using TemporaryFolder folder = new();
        using TokenShards shards = folder.Shards(Split.Train, Numbers(tokenCount, documentLength: 4));
        Assert.Contains("at least 2", Assert.Throws<UserErrorException>(() => new TokenLoader(shards, Split.Train, 4, 0)).Message, StringComparison.Ordinal);
    }

    private static int[] Run(int first, int count) => [.. Enumerable.Range(first, count)];

    private static IEnumerable<int[]> Numbers(int count, int documentLength) => Run(0, count).Chunk(documentLength);
}
