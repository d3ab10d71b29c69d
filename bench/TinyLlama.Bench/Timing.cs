using System.Diagnostics;

namespace TinyLlama.Bench;

/// <summary>How long something takes, measured again and again.</summary>
internal static class Timing
{
    /// <summary>Seconds of the fastest run and of the one in the middle.</summary>
    /// <param name="seconds">How long to measure; at least five runs are made.</param>
    /// <param name="action">What to measure. Runs twice before.</param>
    public static (double Best, double Median) Of(double seconds, Action action)
    {
        action();
        action();
        List<double> runs = [];
        long start = Stopwatch.GetTimestamp();
        while (runs.Count < 5 || Stopwatch.GetElapsedTime(start).TotalSeconds < seconds)
        {
            long before = Stopwatch.GetTimestamp();
            action();
            runs.Add(Stopwatch.GetElapsedTime(before).TotalSeconds);
        }

        runs.Sort();
        return (runs[0], runs[runs.Count / 2]);
    }
}
