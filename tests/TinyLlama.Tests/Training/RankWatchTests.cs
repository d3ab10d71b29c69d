using TinyLlama.Compute.Collectives;
using TinyLlama.Tests.Checkpoints;
using TinyLlama.Training;

namespace TinyLlama.Tests.Training;

public sealed class RankWatchTests : IDisposable
{
    private static readonly DateTime s_now = new(2026, 1, 2, 14, 5, 7, DateTimeKind.Utc);

    private readonly TemporaryFolder _folder = new();
    private readonly Clock _clock = new();
    private CollectiveProgress _progress;
    private long _step;

    public void Dispose() => _folder.Dispose();

    [Fact]
    public void A_heartbeat_tells_what_the_rank_does_and_since_when()
    {
        using RankWatch watch = Watch(out _);
        _step = 12;
        watch.Look();
        Assert.Equal(Rank(0, null, 0, s_now) with { Host = Environment.MachineName, Pid = Environment.ProcessId }, Read(0));

        // It still computes the same step; then it waits; then it has ended.
        _clock.Now += TimeSpan.FromSeconds(2);
        watch.Look();
        Assert.Equal(s_now, Read(0).Since);
        _progress = new CollectiveProgress(5, "all-gather", TimeSpan.FromSeconds(0.5), default, default);
        watch.Look();
        Assert.Equal(("all-gather", 5L, s_now.AddSeconds(1.5), s_now.AddSeconds(2)), (Read(0).Operation!, Read(0).Operations, Read(0).Since, Read(0).Time));
        watch.Dispose();
        Assert.Equal(Heartbeat.Ended, Read(0).Operation);
        Assert.Equal(["00000.json"], Directory.GetFiles(Path.Combine(_folder["run"], "ranks")).Select(Path.GetFileName));
    }

    [Fact]
    public void A_rank_that_has_waited_too_long_names_the_one_that_computes_and_ends()
    {
        using RankWatch watch = Watch(out List<string> ends);
        _step = 12;
        Rank(1, null, 4, s_now.AddSeconds(-124)).Write(_folder["run"]);
        _progress = new CollectiveProgress(5, "reduce-scatter", TimeSpan.FromSeconds(120), default, default);
        watch.Look();
        Assert.Empty(ends);

        _progress = _progress with { Age = TimeSpan.FromSeconds(121) };
        watch.Look();
        Assert.Equal(
            "rank 1 (host a, pid 7) is in step 12 since 14:03:03Z, computing; the others wait in reduce-scatter of step 12 since 14:03:06Z; distribution.timeout_seconds is 120, this rank ends",
            Assert.Single(ends));
    }

    [Fact]
    public void A_silent_rank_is_told_from_one_that_computes()
    {
        Heartbeat own = Rank(0, "all-gather", 5, s_now);
        Heartbeat stopped = Rank(1, null, 4, s_now) with { Time = s_now.AddSeconds(-31) };
        Heartbeat computing = Rank(2, null, 4, s_now);
        const string Waiting = "; the others wait in all-gather of step 12 since 14:05:07Z";

        Assert.Equal(
            "rank 1 (host a, pid 7) is in step 12 since 14:05:07Z, computing, silent since 14:04:36Z: stopped, dead or cut off" + Waiting,
            Heartbeat.NameLaggards(own, [(1, stopped), (2, computing)]));
        Assert.Equal("rank 1 has given no sign of life" + Waiting, Heartbeat.NameLaggards(own, [(1, null), (2, computing)]));
        Assert.Equal(
            "rank 1 (host a, pid 7) is in step 12 since 14:05:07Z, and has ended" + Waiting,
            Heartbeat.NameLaggards(own, [(1, stopped with { Operation = Heartbeat.Ended }), (2, own with { Rank = 2 })]));
    }

    [Fact]
    public void Of_ranks_that_all_wait_the_one_that_has_done_least_is_named_or_the_network()
    {
        Heartbeat own = Rank(0, "all-gather", 5, s_now);
        Assert.StartsWith(
            "rank 1 (host a, pid 7) is in step 12 since 14:05:07Z, waiting in broadcast; the others wait in all-gather",
            Heartbeat.NameLaggards(own, [(1, Rank(1, "broadcast", 4, s_now)), (2, Rank(2, "all-gather", 5, s_now))]), StringComparison.Ordinal);
        Assert.Equal(
            "all 2 ranks wait in all-gather of step 12 since 14:05:07Z: look at the network between them",
            Heartbeat.NameLaggards(own, [(1, Rank(1, "all-gather", 5, s_now))]));
    }

    [Fact]
    public void A_torn_or_missing_heartbeat_is_none()
    {
        Assert.Null(Heartbeat.TryRead(_folder["run"], 1));
        using RankWatch watch = Watch(out _);
        File.WriteAllText(Heartbeat.PathOf(_folder["run"], 1), "{\"rank\":1");
        Assert.Null(Heartbeat.TryRead(_folder["run"], 1));
    }

    private static Heartbeat Rank(int rank, string? operation, long operations, DateTime since) => new(rank, 2, "a", 7, 12, operation, operations, since, s_now);

    private RankWatch Watch(out List<string> ends)
    {
        List<string> told = ends = [];
        return new RankWatch(_folder["run"], 0, 2, () => _progress, () => _step, TimeSpan.FromSeconds(120), told.Add, _clock);
    }

    private Heartbeat Read(int rank) => Heartbeat.TryRead(_folder["run"], rank)!;

    private sealed class Clock : TimeProvider
    {
        public DateTime Now { get; set; } = s_now;

        public override DateTimeOffset GetUtcNow() => new(Now);
    }
}
