using System.Net;
using System.Net.Sockets;
using TinyLlama.Compute.Collectives;

namespace TinyLlama.Compute.Tests.Collectives;

public sealed class TcpTests
{
    private static readonly string s_host = Environment.MachineName;

    [Fact]
    public void Ranks_that_call_different_operations_are_told_both()
    {
        Exception?[] failures = Ranks.Run(2, Ranks.Sockets(2), static world =>
        {
            using var memory = new HostMemory();
            Tensor values = memory.Take(2, 8);
            if (world.Rank == 0)
            {
                world.Broadcast(values, 0).Wait();
                world.Barrier();
            }
            else
            {
                world.AllGather(values, values.RowRange(1, 1)).Wait();
            }
        });

        // Rank 0 has done its part of the broadcast, and may see first what rank 1 sends into its next operation.
        Assert.Equal(
            $"the ranks are out of step: rank 0 ({s_host}) called broadcast of 64 bytes (number 0 of group 0), rank 1 ({s_host}) called all-gather of 32 bytes (number 0 of group 0)",
            Assert.IsType<CollectiveException>(failures[1]).Message);
        Assert.StartsWith("the ranks are out of step: rank", Assert.IsType<CollectiveException>(failures[0]).Message, StringComparison.Ordinal);
    }

    [Fact]
    public void Ranks_that_have_left_out_an_operation_are_told()
    {
        Exception?[] failures = Ranks.Run(2, Ranks.Sockets(2), static world =>
        {
            using Collective part = world.Split(0, 0);
            if (world.Rank == 0)
            {
                part.Barrier();
            }

            world.Barrier();
        });
        Assert.All(failures, static failure => Assert.Contains("(number 0 of group 1)", Assert.IsType<CollectiveException>(failure).Message, StringComparison.Ordinal));
        Assert.All(failures, static failure => Assert.Contains("of group 0)", failure!.Message, StringComparison.Ordinal));
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void A_rank_that_fails_tells_all_others_why(bool near)
    {
        Exception?[] failures = Ranks.Run(4, Ranks.Sockets(4, near: near), static world =>
        {
            world.Barrier();
            if (world.Rank == 2)
            {
                throw new InvalidOperationException("the disk is full");
            }

            world.Barrier();
        });
        foreach (int rank in (int[])[0, 1, 3])
        {
            Assert.Equal($"rank 2 ({s_host}): the disk is full", Assert.IsType<CollectiveException>(failures[rank]).Message);
        }
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void What_a_rank_fails_of_is_told_before_it_ends(bool waits)
    {
        using var told = new CountdownEvent(1);
        Exception?[] failures = Ranks.Run(3, Ranks.Sockets(3), world =>
        {
            using var memory = new HostMemory();
            if (world.Rank == 0)
            {
                if (waits)
                {
                    world.Receive(memory.Take(1, 1), 2);
                }

                // The process would end after this: what is to be told has been told when it returns.
                world.Abort("the disk is full", 1);
            }
            else if (world.Rank == 1)
            {
                Exception? failure = Record.Exception(world.Barrier);
                told.Signal();
                throw failure!;
            }

            Assert.True(told.Wait(TimeSpan.FromSeconds(10), TestContext.Current.CancellationToken), "rank 1 is not told");
        });
        Assert.Null(failures[0]);
        Assert.Equal($"rank 0 ({s_host}): the disk is full", Assert.IsType<CollectiveException>(failures[1]).Message);
    }

    [Fact]
    public void A_rank_that_leaves_early_is_named()
    {
        Exception?[] failures = Ranks.Run(3, Ranks.Sockets(3), static world =>
        {
            if (world.Rank != 1)
            {
                world.Barrier();
            }
        });
        Assert.All((int[])[0, 2], rank => Assert.StartsWith(
            $"rank 1 ({s_host}) left before all-gather of 1 bytes", Assert.IsType<CollectiveException>(failures[rank]).Message, StringComparison.Ordinal));
    }

    [Fact]
    public void A_rank_that_does_not_come_is_named_when_the_time_is_up()
    {
        using var done = new CountdownEvent(2);
        Exception?[] failures = Ranks.Run(3, Ranks.Sockets(3, TimeSpan.FromSeconds(10)), world =>
        {
            if (world.Rank == 1)
            {
                done.Wait(TimeSpan.FromSeconds(30), TestContext.Current.CancellationToken);
                return;
            }

            try
            {
                world.Barrier();
            }
            finally
            {
                done.Signal();
            }
        });
        Assert.All((int[])[0, 2], rank => Assert.Contains(
            $"rank 1 ({s_host}) did not come to all-gather of 1 bytes (number 0 of group 0)", Assert.IsType<CollectiveException>(failures[rank]).Message, StringComparison.Ordinal));
    }

    [Fact]
    public void What_fails_fails_for_good()
    {
        Exception?[] failures = Ranks.Run(2, Ranks.Sockets(2), static world =>
        {
            if (world.Rank == 0)
            {
                Assert.Throws<CollectiveException>(world.Barrier);
                throw Record.Exception(world.Barrier)!;
            }
        });
        Assert.Contains("rank 1", Assert.IsType<CollectiveException>(failures[0]).Message, StringComparison.Ordinal);
        Assert.Null(failures[1]);
    }

    [Fact]
    public void Strangers_at_the_port_are_dropped_and_hold_nobody_up()
    {
        int port = Ranks.FreePort();
        Task<Collective> rank0 = Task.Run(() => TcpCollective.Join(World(0, 2, port)));
        using Socket silent = Stranger(port, []), browser = Stranger(port, "GET / HTTP/1.1\r\n\r\n"u8), half = Stranger(port, "tllra"u8), other = Stranger(port, new byte[4096]);
        using Socket gone = Stranger(port, "tllranks"u8);
        gone.Dispose();
        browser.ReceiveTimeout = 10_000;
        Assert.Equal(0, browser.Receive(new byte[1], SocketFlags.None, out SocketError error));
        Assert.NotEqual(SocketError.WouldBlock, error);
        Assert.NotEqual(SocketError.TimedOut, error);
        using Collective rank1 = TcpCollective.Join(World(1, 2, port));
#pragma warning disable xUnit1031 // The rank has joined: rank 1 has met it.
        using Collective first = rank0.Result;
#pragma warning restore xUnit1031
        Assert.Equal((0, 1), (first.Rank, rank1.Rank));
    }

    [Fact]
    public void A_number_of_ranks_that_differs_is_refused_on_both()
    {
        int port = Ranks.FreePort();
        Exception?[] failures = Join(World(0, 2, port), World(1, 3, port));
        string expected = $"rank 1 ({s_host}) was started for 3 ranks, rank 0 ({s_host}) for 2: WORLD_SIZE must be the same everywhere";
        Assert.All(failures, failure => Assert.Equal(expected, Assert.IsType<DeviceException>(failure).Message));
    }

    [Fact]
    public void A_rank_that_was_started_twice_is_refused_on_all()
    {
        int port = Ranks.FreePort();
        Exception?[] failures = Join(World(0, 3, port), World(1, 3, port), World(1, 3, port));
        string expected = $"rank 1 was started twice, on {s_host} and on {s_host}: every process needs a RANK of its own";
        Assert.All(failures, failure => Assert.Equal(expected, Assert.IsType<DeviceException>(failure).Message));
    }

    [Fact]
    public void A_rank_of_another_run_is_sent_away_and_this_run_goes_on()
    {
        int port = Ranks.FreePort();
        Task<Exception?> rank0 = Task.Run(() => Join(World(0, 2, port))[0]);

        // The rank of this run comes only then: with all of its ranks there, rank 0 listens no longer.
        Exception? sentAway = Join(World(1, 2, port) with { RunId = "another" })[0];
        Assert.Contains("belongs to another run", Assert.IsType<DeviceException>(sentAway).Message, StringComparison.Ordinal);
        Assert.Null(Join(World(1, 2, port))[0]);
#pragma warning disable xUnit1031 // Rank 1 has met it.
        Assert.Null(rank0.Result);
#pragma warning restore xUnit1031
    }

    [Fact]
    public void Ranks_that_do_not_come_are_named_to_those_that_have()
    {
        int port = Ranks.FreePort();
        Exception?[] failures = Join(
            World(0, 4, port) with { Timeout = TimeSpan.FromSeconds(10) }, World(2, 4, port) with { Timeout = TimeSpan.FromSeconds(25) });
        string expected = $"not all ranks came to rank 0 ({s_host}) within 10 s: 1, 3 of 4 are missing";
        Assert.All(failures, failure => Assert.Equal(expected, Assert.IsType<CollectiveException>(failure).Message));
    }

    [Fact]
    public void A_rank_0_that_nobody_finds_is_named_with_its_address()
    {
        int port = Ranks.FreePort();
        Exception? failure = Join(World(1, 2, port) with { Timeout = TimeSpan.FromSeconds(0.5) })[0];
        Assert.Contains($"rank 1 ({s_host}) cannot reach rank 0 at 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT)", Assert.IsType<CollectiveException>(failure).Message, StringComparison.Ordinal);
    }

    [Fact]
    public void A_port_that_is_taken_is_named()
    {
        using var listener = new TcpListener(IPAddress.Loopback, 0);
        listener.Start();
        int port = ((IPEndPoint)listener.LocalEndpoint).Port;
        Exception? failure = Join(World(0, 2, port))[0];
        Assert.Contains($"rank 0 cannot listen at port {port} of {s_host} (MASTER_PORT)", Assert.IsType<DeviceException>(failure).Message, StringComparison.Ordinal);
    }

    [Fact]
    public void What_answers_and_is_no_rank_is_not_believed()
    {
        using var listener = new TcpListener(IPAddress.Loopback, 0);
        listener.Start();
        int port = ((IPEndPoint)listener.LocalEndpoint).Port;
        Task<Exception?> rank1 = Task.Run(() => Join(World(1, 2, port))[0]);
        using Socket impostor = listener.AcceptSocket();

        // Welcome, and two billion bytes.
        impostor.Send([0, 0xFF, 0xFF, 0xFF, 0x7F]);
#pragma warning disable xUnit1031 // A rank that reads on would time out.
        Assert.Contains("is no rank of this program", Assert.IsType<DeviceException>(rank1.Result).Message, StringComparison.Ordinal);
#pragma warning restore xUnit1031
    }

    private static TcpWorld World(int rank, int size, int port) => new(rank, size, "127.0.0.1", port, "a test", TimeSpan.FromSeconds(20));

    // Lets ranks join, each on a thread of its own and in no order; they leave at once.
    private static Exception?[] Join(params TcpWorld[] worlds)
    {
        var failures = new Exception?[worlds.Length];
        Thread[] threads =
        [
            .. worlds.Select((world, i) => new Thread(() => failures[i] = Record.Exception(() => TcpCollective.Join(world).Dispose()))),
        ];
        Array.ForEach(threads, static thread => thread.Start());
        Array.ForEach(threads, static thread => Assert.True(thread.Join(TimeSpan.FromSeconds(30)), "a rank hangs"));
        return failures;
    }

    private static Socket Stranger(int port, ReadOnlySpan<byte> says)
    {
        while (true)
        {
            var socket = new Socket(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
            try
            {
                socket.Connect(IPAddress.Loopback, port);
                socket.Send(says);
                return socket;
            }
            catch (SocketException)
            {
                // Rank 0 does not listen yet.
                socket.Dispose();
                Thread.Yield();
            }
        }
    }
}
