using TinyLlama.Compute.Collectives;

namespace TinyLlama.Tests.Training;

/// <summary>Ranks that are threads of the test.</summary>
internal static class OnThreads
{
    /// <summary>Runs something on every rank and gives back what each returned, in the order of ranks.</summary>
    public static T[] Run<T>(int ranks, Func<Collective, T> run)
    {
        var results = new T[ranks];
        var failures = new Exception?[ranks];
        Thread[] threads =
        [
            .. ThreadCollective.Create(ranks).Select(world => new Thread(() => failures[world.Rank] = Record.Exception(() =>
            {
                using (world)
                {
                    results[world.Rank] = run(world);
                }
            })) { IsBackground = true }),
        ];
        Array.ForEach(threads, static thread => thread.Start());
        Array.ForEach(threads, thread => Assert.True(thread.Join(TimeSpan.FromMinutes(5)), $"a rank hangs; failures: {string.Join("; ", failures.OfType<Exception>())}"));
        Assert.All(failures, Assert.Null);
        return results;
    }
}
