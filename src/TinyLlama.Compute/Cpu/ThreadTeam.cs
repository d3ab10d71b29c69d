namespace TinyLlama.Compute.Cpu;

/// <summary>A job that a <see cref="ThreadTeam"/> splits: tasks fixed by shape, claimed by threads as they come.</summary>
internal interface IWork
{
    /// <summary>Does one task. What it writes must depend on <paramref name="task"/> alone.</summary>
    /// <param name="task">0 … tasks-1.</param>
    /// <param name="thread">0 … threads-1: whose scratch to use.</param>
    void Run(int task, int thread);
}

/// <summary>Persistent threads that claim the tasks of one job after another. Placeholder: one thread.</summary>
internal sealed class ThreadTeam(int threads) : IDisposable
{
    /// <summary>Gets the number of threads, the caller's included.</summary>
    public int Threads { get; } = threads;

    /// <summary>Runs all tasks; returns when the last has ended. The job may live on the caller's stack.</summary>
    public void Run<TWork>(ref TWork work, int tasks)
        where TWork : struct, IWork
    {
        _ = Threads;
        for (int task = 0; task < tasks; task++)
        {
            work.Run(task, 0);
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
    }
}
