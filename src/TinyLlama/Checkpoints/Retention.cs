namespace TinyLlama.Checkpoints;

/// <summary>Which checkpoints of a run are kept.</summary>
/// <param name="KeepLast">The newest this many; at least 1.</param>
/// <param name="KeepEvery">Those whose step is a multiple of this; 0 for none.</param>
/// <param name="KeepBest">Whether the one with the least validation loss is kept.</param>
public sealed record Retention(int KeepLast, long KeepEvery = 0, bool KeepBest = true)
{
    /// <summary>Deletes the checkpoints of a run that no rule keeps.</summary>
    /// <param name="runFolder">The run.</param>
    /// <param name="validationLosses">The validation loss of each step that has one, in nats per token.</param>
    /// <exception cref="IOException">A folder cannot be deleted.</exception>
    public void Apply(string runFolder, IReadOnlyDictionary<long, double> validationLosses)
    {
        IReadOnlyList<(long Step, string Path)> checkpoints = TrainingCheckpoint.List(runFolder);
        HashSet<long> kept = Kept([.. checkpoints.Select(static checkpoint => checkpoint.Step)], validationLosses);
        foreach ((long step, string path) in checkpoints)
        {
            if (!kept.Contains(step))
            {
                TrainingCheckpoint.Delete(path);
            }
        }
    }

    /// <summary>The steps that are kept of those, which ascend.</summary>
    internal HashSet<long> Kept(IReadOnlyList<long> steps, IReadOnlyDictionary<long, double> validationLosses)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(KeepLast, 1);
        ArgumentOutOfRangeException.ThrowIfNegative(KeepEvery);
        HashSet<long> kept = [.. steps.TakeLast(KeepLast)];
        if (KeepEvery > 0)
        {
            kept.UnionWith(steps.Where(step => step % KeepEvery == 0));
        }

        if (KeepBest && Best(steps, validationLosses) is { } best)
        {
            kept.Add(best);
        }

        return kept;
    }

    /// <summary>The step with the least validation loss, the newest of equals; null where none has one.</summary>
    internal static long? Best(IEnumerable<long> steps, IReadOnlyDictionary<long, double> validationLosses) =>
        steps
            .Where(step => validationLosses.TryGetValue(step, out double loss) && double.IsFinite(loss))
            .OrderBy(step => validationLosses[step])
            .ThenByDescending(static step => step)
            .Select(static step => (long?)step)
            .FirstOrDefault();
}
