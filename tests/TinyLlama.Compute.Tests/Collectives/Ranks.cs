using System.Net;
using System.Net.Sockets;
using TinyLlama.Compute.Collectives;

namespace TinyLlama.Compute.Tests.Collectives;

/// <summary>Ranks that are threads of the test, over one transport or another.</summary>
internal static class Ranks
{
    private static readonly TimeSpan s_timeout = TimeSpan.FromSeconds(30);

    /// <summary>Runs something on every rank.</summary>
    /// <returns>What each rank threw, or null.</returns>
    public static Exception?[] Run(int size, Func<int, Collective> join, Action<Collective> run)
    {
        var failures = new Exception?[size];
        Thread[] threads =
        [
            .. Enumerable.Range(0, size).Select(rank => new Thread(() => failures[rank] = Record.Exception(() =>
            {
                using Collective world = join(rank);
                try
                {
                    run(world);
                }
                catch (Exception e)
                {
                    world.Abort(e.Message, 1);
                    throw;
                }
            }))),
        ];
        Array.ForEach(threads, static thread => thread.Start());
        Array.ForEach(threads, static thread => Assert.True(thread.Join(2 * s_timeout), "a rank hangs"));
        return failures;
    }

    /// <summary>How ranks that are threads join.</summary>
    public static Func<int, Collective> Threads(int size)
    {
        Collective[] worlds = ThreadCollective.Create(size, s_timeout);
        return rank => worlds[rank];
    }

    /// <summary>How ranks with sockets on the loopback join: those of TCP, or those that ranks of one host use.</summary>
    public static Func<int, Collective> Sockets(int size, TimeSpan? timeout = null, bool near = false)
    {
        int port = FreePort();
        return rank => TcpCollective.Join(new TcpWorld(rank, size, "127.0.0.1", port, "a test", timeout ?? s_timeout, near));
    }

    /// <summary>A port that nobody listens at.</summary>
    public static int FreePort()
    {
        using var listener = new TcpListener(IPAddress.Loopback, 0);
        listener.Start();
        return ((IPEndPoint)listener.LocalEndpoint).Port;
    }
}
