using System.Diagnostics;
using System.Globalization;
using TinyLlama.Compute.Collectives;

namespace TinyLlama.Compute.Tests.Collectives;

/// <summary>
/// What a transport moves, measured by hand: started as ranks are, by <c>mpirun</c> or with RANK and WORLD_SIZE, as
/// <c>dotnet TinyLlama.Compute.Tests.dll -explicit only -showLiveOutput -class "*.CollectiveSpeed"</c>.
/// </summary>
public sealed class CollectiveSpeed(ITestOutputHelper output)
{
    private const int Rounds = 15;

    [Fact(Explicit = true)]
    public void Measure()
    {
        using Collective world = Collective.Join();
        foreach (int mebibytes in (int[])[1, 16, 64])
        {
            using var memory = new HostMemory();
            Tensor source = memory.Take(mebibytes * 16, 1 << 14), destination = memory.Take(mebibytes * 16, 1 << 14);
            int rows = source.Rows / world.Size;
            Report(world, $"all-to-all of {mebibytes} MiB", source, () => world.AllToAll(destination, source).Wait());
            Report(world, $"all-gather of {mebibytes} MiB", source, () => world.AllGather(destination, destination.RowRange(world.Rank * rows, rows)).Wait());
        }

        Report(world, "100 barriers", default, () =>
        {
            for (int i = 0; i < 100; i++)
            {
                world.Barrier();
            }
        });
    }

    // The median of the slowest rank's times; what each rank receives of the others.
    private void Report(Collective world, string what, Tensor tensor, Action run)
    {
        double[] seconds = new double[Rounds], all = new double[world.Size];
        for (int i = 0; i < Rounds; i++)
        {
            world.Barrier();
            long start = Stopwatch.GetTimestamp();
            run();
            world.AllGather(all, [Stopwatch.GetElapsedTime(start).TotalSeconds]);
            seconds[i] = all.Max();
        }

        if (world.Rank == 0)
        {
            Array.Sort(seconds);
            double received = tensor.Count * sizeof(float) * (world.Size - 1.0) / world.Size;
            output.WriteLine(string.Create(
                CultureInfo.InvariantCulture,
                $"{world.Description}, {world.Size} ranks, {what}: {seconds[Rounds / 2] * 1e3:F2} ms (least {seconds[0] * 1e3:F2}), {received / seconds[Rounds / 2] / 1e9:F2} GB/s"));
        }
    }
}
