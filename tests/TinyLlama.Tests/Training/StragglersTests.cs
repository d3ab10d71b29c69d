using TinyLlama.Training;

namespace TinyLlama.Tests.Training;

public sealed class StragglersTests
{
    [Fact]
    public void A_rank_that_computes_a_fifth_longer_than_the_median_is_named_once_in_so_many_steps()
    {
        var stragglers = new Stragglers(4, every: 30);
        for (int round = 0; round < 2; round++)
        {
            Assert.Null(Steps(stragglers, 29, 1, 1.1, 1.31, 1));
            Assert.Equal("slow ranks over 30 steps: rank 2 1.310 s of computing a step, the median is 1.050 s", Steps(stragglers, 1, 1, 1.1, 1.31, 1));
        }
    }

    [Fact]
    public void Ranks_within_a_fifth_are_not_named_and_a_single_slow_step_is_not_either()
    {
        var stragglers = new Stragglers(4, every: 30);
        Assert.Null(Steps(stragglers, 30, 1, 1, 1.19, 1));
        Assert.Null(Steps(stragglers, 1, 1, 1, 2, 1));
        Assert.Null(Steps(stragglers, 29, 1, 1, 1, 1));
    }

    [Fact]
    public void The_end_of_a_run_judges_the_steps_that_are_left_but_not_a_few()
    {
        var stragglers = new Stragglers(3);
        Steps(stragglers, 19, 2, 1, 1);
        Assert.Null(stragglers.End());
        Steps(stragglers, 1, 2, 1, 1);
        Assert.Equal("slow ranks over 20 steps: rank 0 2.000 s of computing a step, the median is 1.000 s", stragglers.End());
        Assert.Null(stragglers.End());
    }

    /// <returns>What was said of the last of them.</returns>
    private static string? Steps(Stragglers stragglers, int count, params double[] seconds)
    {
        RankReport[] reports = [.. seconds.Select(static rank => new RankReport(rank, 0))];
        string? line = null;
        for (int step = 0; step < count; step++)
        {
            line = stragglers.Add(reports);
        }

        return line;
    }
}
