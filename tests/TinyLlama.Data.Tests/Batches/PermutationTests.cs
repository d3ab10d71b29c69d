using TinyLlama.Data.Batches;

namespace TinyLlama.Data.Tests.Batches;

public sealed class PermutationTests
{
    [Fact]
    public void Every_size_up_to_2000_is_permuted()
    {
        for (int count = 1; count <= 2000; count++)
        {
            bool[] seen = new bool[count];
            Permutation permutation = new(count, seed: (ulong)count * 31, epoch: count % 7);
            for (int place = 0; place < count; place++)
            {
                long element = permutation[place];
                Assert.InRange(element, 0, count - 1);
                Assert.False(seen[element], $"size {count}: {element} comes twice");
                seen[element] = true;
            }
        }
    }

    [Fact]
    public void Sizes_beyond_32_bits_stay_in_range_and_apart()
    {
        Permutation permutation = new((1L << 40) + 7, seed: 1, epoch: 0);
        HashSet<long> seen = [];
        for (long place = 0; place < 10_000; place++)
        {
            long element = permutation[place * 109_951_162];
            Assert.InRange(element, 0, (1L << 40) + 6);
            Assert.True(seen.Add(element));
        }
    }

    [Fact]
    public void Seeds_and_epochs_give_orders_of_their_own()
    {
        string Order(ulong seed, long epoch) => string.Join(' ', Enumerable.Range(0, 50).Select(i => new Permutation(50, seed, epoch)[i]));

        Assert.Equal(Order(1, 0), Order(1, 0));
        Assert.Equal(4, new[] { Order(1, 0), Order(1, 1), Order(2, 0), Order(2, 1) }.Distinct(StringComparer.Ordinal).Count());
    }

    /// <summary>Over 1,000 epochs each element is about equally often at each place: the order is a shuffle, not a shift.</summary>
    [Theory]
    [InlineData(5)]
    [InlineData(16)]
    [InlineData(23)]
    public void Places_and_elements_are_independent(int count)
    {
        const int epochs = 2000;
        int[,] times = new int[count, count];
        int neighbours = 0;
        for (int epoch = 0; epoch < epochs; epoch++)
        {
            Permutation permutation = new(count, seed: 11, epoch);
            for (int place = 0; place < count; place++)
            {
                times[place, permutation[place]]++;
                neighbours += place > 0 && permutation[place] == permutation[place - 1] + 1 ? 1 : 0;
            }
        }

        double expected = (double)epochs / count;
        double chiSquare = times.Cast<int>().Sum(n => (n - expected) * (n - expected) / expected);

        // (count - 1)² degrees of freedom; ten standard deviations above the mean is far outside chance.
        double freedom = (count - 1) * (count - 1);
        Assert.InRange(chiSquare, 0, freedom + (10 * Math.Sqrt(2 * freedom)));
        Assert.InRange(neighbours, 0.8 * epochs * (count - 1) / count, 1.2 * epochs * (count - 1) / count);
    }
}
