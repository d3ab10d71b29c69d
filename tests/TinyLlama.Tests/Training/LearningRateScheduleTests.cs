using System.Globalization;
using System.Text.Json;
using TinyLlama.Tests.Common;
using TinyLlama.Training;

namespace TinyLlama.Tests.Training;

public sealed class LearningRateScheduleTests
{
    /// <summary>The published run counts 8 micro-batches a step.</summary>
    private static readonly LearningRateSchedule s_published = new(ScheduleKind.Cosine, 4e-4, 4e-5, 2000, 1_430_512);

    [Theory]
    [InlineData("tinyllama")]
    [InlineData("small")]
    public void The_cosine_is_that_of_TinyLlama(string name)
    {
        string path = SharedFiles.Require("goldens/llama-tiny/lr_schedule.json");
        using JsonDocument golden = JsonDocument.Parse(File.ReadAllText(path));
        JsonElement setting = golden.RootElement.GetProperty(name);
        var schedule = new LearningRateSchedule(
            ScheduleKind.Cosine, setting.GetProperty("learning_rate").GetDouble(), setting.GetProperty("min_lr").GetDouble(),
            setting.GetProperty("warmup_iters").GetDouble(), setting.GetProperty("lr_decay_iters").GetDouble());

        foreach (JsonElement pair in setting.GetProperty("values").EnumerateArray())
        {
            Assert.Equal(pair[1].GetDouble(), schedule.At(pair[0].GetDouble()), 1e-18);
        }
    }

    [Fact]
    public void The_rates_of_the_anchor_run_are_those_at_the_beginning_of_each_step()
    {
        string path = SharedFiles.Require("goldens/anchor-s/curve_fp32.csv");
        var schedule = new LearningRateSchedule(ScheduleKind.Cosine, 1e-3, 1e-4, 20, 300);
        foreach (string[] row in File.ReadLines(path).Skip(1).Select(line => line.Split(',')))
        {
            // The last row is the validation after the run.
            if (row[2].Length == 0)
            {
                continue;
            }

            double expected = double.Parse(row[2], CultureInfo.InvariantCulture);
            Assert.Equal(expected, schedule.At(long.Parse(row[0], CultureInfo.InvariantCulture)), 1e-18);
        }
    }

    [Theory]
    [InlineData(0, 1.75e-7)]
    [InlineData(999, 1.99975e-4)]
    [InlineData(2000, 4e-4)]
    [InlineData(240_000, 3.759012867e-4)]
    [InlineData(715_256, 2.203955104e-4)]
    [InlineData(1_195_000, 6.36084e-5)]
    [InlineData(1_430_511, 4e-5)]
    public void Seven_eighths_into_a_step_is_the_rate_that_the_published_run_used(long step, double rate) =>
        Assert.Equal(rate, s_published.At(step + 0.875), rate * 1e-6);

    [Fact]
    public void Counted_in_tokens_the_curve_is_the_same()
    {
        LearningRateSchedule byTokens = s_published with { Warmup = 2000.0 * 2_097_152, End = 1_430_512.0 * 2_097_152 };
        foreach (long step in new long[] { 0, 1, 1999, 2000, 2001, 700_000, 1_430_512, 1_500_000 })
        {
            Assert.Equal(s_published.At(step), byTokens.At(step * 2_097_152.0), 1e-18);
        }
    }

    [Theory]
    [InlineData(ScheduleKind.Linear, new[] { 0, 0.5, 1.0, 0.775, 0.55, 0.1, 0.1 })]
    [InlineData(ScheduleKind.Wsd, new[] { 0, 0.5, 1.0, 1.0, 1.0, 0.1, 0.1 })]
    [InlineData(ScheduleKind.Constant, new[] { 0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0 })]
    [InlineData(ScheduleKind.Cosine, new[] { 0, 0.5, 1.0, 0.86819805, 0.55, 0.1, 0.1 })]
    public void Each_kind_warms_up_and_then_falls_in_its_own_way(ScheduleKind kind, double[] rates)
    {
        var schedule = new LearningRateSchedule(kind, 1, 0.1, Warmup: 20, End: 100, DecayShare: 0.25);
        double[] at = [0, 10, 20, 40, 60, 100, 101];
        Assert.All(at.Zip(rates), pair => Assert.Equal(pair.Second, schedule.At(pair.First), 1e-7));
    }

    [Fact]
    public void Wsd_falls_in_a_line_over_the_last_share()
    {
        var schedule = new LearningRateSchedule(ScheduleKind.Wsd, 1, 0, Warmup: 20, End: 100, DecayShare: 0.2);
        Assert.Equal([1, 1, 0.75, 0.5, 0], new double[] { 79, 80, 85, 90, 100 }.Select(x => Math.Round(schedule.At(x), 12)));
    }

    [Fact]
    public void No_schedule_leaves_the_band_between_its_rates_or_rises_after_the_warm_up()
    {
        var random = new Random(5);
        for (int i = 0; i < 2000; i++)
        {
            double peak = random.NextDouble() + 0.01;
            double end = random.Next(1, 1000);
            var schedule = new LearningRateSchedule(
                (ScheduleKind)random.Next(4), peak, peak * random.NextDouble(), end * random.NextDouble(), end, 0.01 + (0.99 * random.NextDouble()));
            double before = peak;
            for (double x = schedule.Warmup; x < end * 1.2; x += end / 17)
            {
                double rate = schedule.At(x);
                Assert.InRange(rate, schedule.Minimum * (1 - 1e-12), before * (1 + 1e-12));
                before = rate;
            }
        }
    }
}
