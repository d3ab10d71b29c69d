using TinyLlama.Compute.Collectives;

namespace TinyLlama.Compute.Tests.Collectives;

public sealed class CollectiveTests
{
    public static TheoryData<string, int> Checks
    {
        get
        {
            var all = new TheoryData<string, int>();
            foreach (string check in CollectiveChecks.All.Keys)
            {
                foreach (int size in (int[])[2, 3, 4])
                {
                    all.Add(check, size);
                }
            }

            return all;
        }
    }

    [Theory]
    [MemberData(nameof(Checks))]
    public void Threads_do_as_every_transport(string check, int size) =>
        Assert.All(Ranks.Run(size, Ranks.Threads(size), CollectiveChecks.All[check]), Assert.Null);

    [Theory]
    [MemberData(nameof(Checks))]
    public void Sockets_do_as_every_transport(string check, int size) =>
        Assert.All(Ranks.Run(size, Ranks.Sockets(size), CollectiveChecks.All[check]), Assert.Null);

    [Theory]
    [MemberData(nameof(Checks))]
    public void Sockets_of_one_host_do_as_every_transport(string check, int size) =>
        Assert.All(Ranks.Run(size, Ranks.Sockets(size, near: true), CollectiveChecks.All[check]), Assert.Null);

    [Fact]
    public void A_rank_that_fails_frees_threads_that_wait_for_it()
    {
        Exception?[] failures = Ranks.Run(3, Ranks.Threads(3), static world =>
        {
            if (world.Rank == 1)
            {
                throw new InvalidOperationException("the disk is full");
            }

            world.Barrier();
        });
        Assert.Equal("rank 1: the disk is full", Assert.IsType<CollectiveException>(failures[0]).Message);
        Assert.Equal("rank 1: the disk is full", Assert.IsType<CollectiveException>(failures[2]).Message);
    }

    [Fact]
    public void An_operation_that_does_not_end_in_time_is_named()
    {
        Collective[] worlds = ThreadCollective.Create(2, TimeSpan.FromSeconds(0.2));
        Exception?[] failures = Ranks.Run(2, rank => worlds[rank], static world =>
        {
            using var memory = new HostMemory();
            if (world.Rank == 0)
            {
                world.Receive(memory.Take(1, 1), 1).Wait();
            }
        });
        Assert.StartsWith("receive from rank 1 has not ended within", Assert.IsType<CollectiveException>(failures[0]).Message, StringComparison.Ordinal);
    }
}
