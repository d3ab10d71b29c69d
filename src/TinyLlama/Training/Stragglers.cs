namespace TinyLlama.Training;

/// <summary>Finds ranks that compute longer than the others: all wait for the slowest in every step.</summary>
/// <param name="ranks">The number of ranks.</param>
/// <param name="every">Steps that are judged together.</param>
public sealed class Stragglers(int ranks, int every = 100)
{
    /// <summary>A rank is one from this many times the median on.</summary>
    private const double Limit = 1.2;

    /// <summary>Steps that say something; the first ones of a process are slow.</summary>
    private const int Least = 20;

    private readonly double[] _seconds = new double[ranks];
    private long _steps;

    /// <summary>Adds a step.</summary>
    /// <param name="reports">Those of all ranks, rank after rank.</param>
    /// <returns>After every so many steps, a line that names the stragglers, if there are any.</returns>
    public string? Add(IReadOnlyList<RankReport> reports)
    {
        for (int rank = 0; rank < _seconds.Length; rank++)
        {
            _seconds[rank] += reports[rank].Seconds;
        }

        return ++_steps == every ? End() : null;
    }

    /// <summary>Judges the steps since the last line, as at the end of a run, unless they are too few to say anything.</summary>
    /// <returns>A line that names the stragglers, if there are any.</returns>
    public string? End()
    {
        if (_steps < Least)
        {
            return null;
        }

        double[] sorted = [.. _seconds.Order()];
        double median = (sorted[(sorted.Length - 1) / 2] + sorted[sorted.Length / 2]) / 2;
        string[] slow =
        [
            .. Enumerable.Range(0, _seconds.Length)
                .Where(rank => _seconds[rank] > Limit * median)
                .Select(rank => FormattableString.Invariant($"rank {rank} {_seconds[rank] / _steps:0.000} s")),
        ];
        string? line = slow.Length == 0 ? null : FormattableString.Invariant(
            $"slow ranks over {_steps} steps: {string.Join(", ", slow)} of computing a step, the median is {median / _steps:0.000} s");
        Array.Clear(_seconds);
        _steps = 0;
        return line;
    }
}
