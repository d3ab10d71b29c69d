using TinyLlama.Compute.Collectives;
using TinyLlama.Compute.Native;

namespace TinyLlama.Training;

/// <summary>The end of a rank that cannot go on.</summary>
public static class RankEnd
{
    private static readonly TimeSpan s_patience = TimeSpan.FromSeconds(5);

    /// <summary>Says why, here and to the other ranks, as far as that can be done in a few seconds, and ends the process: nothing is disposed of, which would wait for ranks that do not come.</summary>
    /// <param name="ranks">All ranks.</param>
    /// <param name="say">Is told the reason, for this rank's log.</param>
    /// <param name="reason">One line.</param>
    /// <param name="exitCode">The process's exit code.</param>
    public static void Now(Collective ranks, Action<string> say, string reason, int exitCode)
    {
        // The disk of a log may hang, and a transport.
        Try(() => say(reason));
        Try(() => ranks.Abort(reason, exitCode));
        ProcessEnd.Now(exitCode);
    }

    private static void Try(Action action)
    {
        var thread = new Thread(() => action()) { IsBackground = true };
        thread.Start();
        thread.Join(s_patience);
    }
}
