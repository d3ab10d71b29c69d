using TinyLlama.Compute.Collectives;

namespace TinyLlama.Training;

/// <summary>
/// A thread beside a rank of a run: it writes the rank's <see cref="Heartbeat"/> once a second, and ends the process when a
/// collective operation has waited longer than the run allows. Whoever started the ranks ends the others then.
/// </summary>
/// <remarks>
/// One limit for every step, the first one included. It bounds how long the ranks wait for the slowest: what a rank does
/// alone must fit.
/// </remarks>
public sealed class RankWatch : IDisposable
{
    /// <summary>The exit code of a rank that lost the others.</summary>
    public const int ExitCode = 3;

    private readonly string _runFolder;
    private readonly int _rank;
    private readonly int _size;
    private readonly Func<CollectiveProgress> _progress;
    private readonly Func<long> _step;
    private readonly TimeSpan _timeout;
    private readonly Action<string> _end;
    private readonly TimeProvider _time;
    private readonly ManualResetEventSlim _ended = new();
    private readonly Thread _thread;
    private Heartbeat? _last;

    /// <summary>Begins to watch.</summary>
    /// <param name="runFolder">The run, made where it is missing.</param>
    /// <param name="collective">The ranks.</param>
    /// <param name="step">Tells the steps that are done; called from another thread.</param>
    /// <param name="timeout">How long an operation may wait.</param>
    /// <param name="warn">Is told the line that names the ranks that are late, just before the process ends.</param>
    public static RankWatch Start(string runFolder, Collective collective, Func<long> step, TimeSpan timeout, Action<string> warn)
    {
        var watch = new RankWatch(runFolder, collective.Rank, collective.Size, () => collective.Progress, step, timeout, End, TimeProvider.System);
        watch._thread.Start();
        return watch;

        void End(string line) => RankEnd.Now(collective, warn, line, ExitCode);
    }

    internal RankWatch(
        string runFolder, int rank, int size, Func<CollectiveProgress> progress, Func<long> step, TimeSpan timeout, Action<string> end, TimeProvider time)
    {
        (_runFolder, _rank, _size, _progress, _step, _timeout, _end, _time) = (runFolder, rank, size, progress, step, timeout, end, time);
        _thread = new Thread(Run) { IsBackground = true, Name = "rank watch" };
        Directory.CreateDirectory(Path.Combine(runFolder, Heartbeat.FolderName));
    }

    /// <summary>Ends the thread; the last heartbeat tells that the rank has ended.</summary>
    public void Dispose()
    {
        _ended.Set();
        if (_thread.IsAlive)
        {
            _thread.Join();
        }

        _ended.Dispose();
        DateTime now = Now();
        TryWrite(Beat(default, now) with { Operation = Heartbeat.Ended, Since = now });
    }

    /// <summary>Writes the heartbeat, and looks at how long the rank has waited.</summary>
    internal void Look()
    {
        CollectiveProgress progress = _progress();
        Heartbeat own = Beat(progress, Now());
        TryWrite(own);
        if (progress.Operation is not null && progress.Age > _timeout)
        {
            (int, Heartbeat?)[] others =
                [.. Enumerable.Range(0, _size).Where(rank => rank != _rank).Select(rank => (rank, Heartbeat.TryRead(_runFolder, rank)))];
            _end($"{Heartbeat.NameLaggards(own, others)}; distribution.timeout_seconds is {_timeout.TotalSeconds:0}, this rank ends");
        }
    }

    private void Run()
    {
        do
        {
            Look();
        }
        while (!_ended.Wait(TimeSpan.FromSeconds(1)));
    }

    private Heartbeat Beat(CollectiveProgress progress, DateTime now)
    {
        long step = _step();
        DateTime since = progress.Operation is not null ? now - progress.Age
            : _last is { Operation: null } last && last.Step == step && last.Operations == progress.Done ? last.Since
            : now;
        return _last = new Heartbeat(
            _rank, _size, Environment.MachineName, Environment.ProcessId, step, progress.Operation, progress.Done, since, now);
    }

    // A disk that fails here fails a checkpoint too, which tells of it.
    private void TryWrite(Heartbeat heartbeat)
    {
        try
        {
            heartbeat.Write(_runFolder);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
        }
    }

    private DateTime Now() => _time.GetUtcNow().UtcDateTime;
}
