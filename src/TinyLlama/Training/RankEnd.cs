using TinyLlama.Compute.Collectives;
using TinyLlama.Compute.Native;

namespace TinyLlama.Training;

/// <summary>The end of a rank that cannot go on.</summary>
public static class RankEnd
{
    private static readonly TimeSpan s_patience = TimeSpan.FromSeconds(5);

    /// <summary>Tells the other ranks why, if they can be told in a few seconds, and ends the process: nothing is disposed of, which would wait for ranks that do not come.</summary>
    /// <param name="ranks">All ranks.</param>
    /// <param name="reason">One line.</param>
    /// <param name="exitCode">The process's exit code.</param>
    public static void Now(Collective ranks, string reason, int exitCode)
    {
        // A transport may hang in this too.
        var telling = new Thread(() => ranks.Abort(reason, exitCode)) { IsBackground = true };
        telling.Start();
        telling.Join(s_patience);
        ProcessEnd.Now(exitCode);
    }
}
