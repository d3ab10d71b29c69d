using System.Diagnostics;

namespace TinyLlama.Cli.Bench;

/// <summary>How long something takes, over several runs.</summary>
/// <param name="Best">Seconds of the fastest run.</param>
/// <param name="Median">Seconds of the run in the middle.</param>
/// <param name="Mean">Seconds of a run on average: means of parts add up.</param>
internal readonly record struct Duration(double Best, double Median, double Mean)
{
    private const int LeastRuns = 5;

    /// <summary>Of these runs.</summary>
    public static Duration Of(IEnumerable<double> runs)
    {
        double[] sorted = [.. runs.Order()];
        return new Duration(sorted[0], sorted[sorted.Length / 2], sorted.Average());
    }

    /// <summary>
    /// Runs something again and again; each run is a round of the backend. A quarter of the time goes before, unmeasured:
    /// code is compiled then and caches fill.
    /// </summary>
    /// <param name="backend">What the action calls.</param>
    /// <param name="seconds">How long to measure; at least five runs are.</param>
    /// <param name="action">What to measure.</param>
    /// <param name="stop">Ends it between two runs.</param>
    /// <returns>The time of a run by the clock, and the seconds of processor time that one took on average.</returns>
    public static (Duration Time, double ProcessorSeconds) Measure(
        TimedBackend backend, double seconds, Action action, CancellationToken stop)
    {
        Run(backend, seconds / 4, 2, action, stop);
        backend.TakeTimes();
        TimeSpan before = Environment.CpuUsage.TotalTime;
        List<double> runs = Run(backend, seconds, LeastRuns, action, stop);
        return (Of(runs), (Environment.CpuUsage.TotalTime - before).TotalSeconds / runs.Count);
    }

    private static List<double> Run(TimedBackend backend, double seconds, int least, Action action, CancellationToken stop)
    {
        List<double> runs = [];
        long begin = Stopwatch.GetTimestamp();
        while (runs.Count < least || Stopwatch.GetElapsedTime(begin).TotalSeconds < seconds)
        {
            stop.ThrowIfCancellationRequested();
            long start = Stopwatch.GetTimestamp();
            action();
            runs.Add(Stopwatch.GetElapsedTime(start).TotalSeconds);
            backend.EndRound();
        }

        return runs;
    }
}

/// <summary>An operation beside its floor: the time that its work takes at the ceilings measured around it.</summary>
/// <param name="Name">What was measured.</param>
/// <param name="Times">Time and work of its calls, round by round.</param>
/// <param name="Ceiling">What the machine can do at best.</param>
internal sealed record Measurement(string Name, OperationTimes Times, Ceiling Ceiling)
{
    /// <summary>Gets the time of the calls of a round.</summary>
    public Duration Time { get; } = Duration.Of(Times.Rounds);

    /// <summary>Gets the seconds of the floor: of the multiply-adds or of the bytes, whichever take longer.</summary>
    public double Floor => Math.Max(Times.Flops / (Ceiling.Flops * 1e9), Times.Bytes / (Ceiling.Bytes * 1e9));
}
