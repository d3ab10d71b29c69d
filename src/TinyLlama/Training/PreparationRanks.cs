using TinyLlama.Compute.Collectives;
using TinyLlama.Data.Shards;

namespace TinyLlama.Training;

/// <summary>The ranks of a <see cref="Collective"/> as those that prepare a folder of token shards.</summary>
/// <param name="world">The ranks.</param>
public sealed class PreparationRanks(Collective world) : IPreparationRanks
{
    private static readonly TimeSpan s_meeting = TimeSpan.FromMilliseconds(100);

    /// <inheritdoc/>
    public int Rank => world.Rank;

    /// <inheritdoc/>
    public int Size => world.Size;

    /// <inheritdoc/>
    /// <remarks>
    /// The part runs on a thread of its own. Meanwhile the ranks meet again and again, so that none takes another one's long
    /// work for its end, and all learn of a stop.
    /// </remarks>
    /// <exception cref="CollectiveException">A rank is lost; the part was stopped.</exception>
    public byte[][] Run(Func<CancellationToken, byte[]> part, CancellationToken stop)
    {
        using var stopAll = CancellationTokenSource.CreateLinkedTokenSource(stop);
        Task<byte[]> own = Task.Factory.StartNew(() => part(stopAll.Token), CancellationToken.None, TaskCreationOptions.LongRunning, TaskScheduler.Default);
        try
        {
            Meet(own, stopAll, stop);
        }
        finally
        {
            stopAll.Cancel();
            Task.WaitAny([own], CancellationToken.None);
        }

        return Gather(own.GetAwaiter().GetResult());
    }

    /// <summary>Returns when every rank has done its part, or when this one has failed.</summary>
    private void Meet(Task<byte[]> own, CancellationTokenSource stopAll, CancellationToken stop)
    {
        var all = new (bool IsDone, bool Stops)[Size];
        bool isDone = false;
        do
        {
            if (isDone)
            {
                // At the meeting it would wait as long, over MPI spinning.
                Thread.Sleep(s_meeting);
            }

            isDone = Task.WaitAny([own], (int)s_meeting.TotalMilliseconds, CancellationToken.None) == 0;
            if (own.IsFaulted)
            {
                return;
            }

            world.AllGather<(bool, bool)>(all, [(isDone, stop.IsCancellationRequested)]);
            if (all.Any(static rank => rank.Stops))
            {
                stopAll.Cancel();
            }
        }
        while (!all.All(static rank => rank.IsDone));
    }

    private byte[][] Gather(byte[] own)
    {
        int[] lengths = new int[Size];
        world.AllGather<int>(lengths, [own.Length]);
        int longest = Math.Max(1, lengths.Max());
        byte[] all = new byte[Size * longest];
        Array.Resize(ref own, longest);
        world.AllGather<byte>(all, own);
        return [.. lengths.Select((length, rank) => all[(rank * longest)..((rank * longest) + length)])];
    }
}
