using System.Runtime.InteropServices;
using TinyLlama.Compute.Collectives;
using TinyLlama.Compute.Cuda;
using TinyLlama.Compute.Tests.Cuda;
using TinyLlama.Tests.Common;

namespace TinyLlama.Compute.Tests.Collectives;

/// <summary>Collectives of GPUs: over the emulator several, each rank with a backend of its own; on a machine with a GPU a rank alone.</summary>
[Collection(nameof(CudaDeviceTests.Alone))]
public sealed unsafe class NcclTests
{
    private static readonly TimeSpan s_limit = TimeSpan.FromSeconds(30);

    public static TheoryData<string, int> Checks
    {
        get
        {
            var all = new TheoryData<string, int>();
            foreach (string check in CollectiveChecks.All.Keys.Where(check => !check.StartsWith("more than the system", StringComparison.Ordinal)))
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
    public void GPUs_do_as_every_transport(string check, int size)
    {
        CudaEmulator.RequireEmulated();
        Assert.All(Ranks.Run(size, Gpus(size), CollectiveChecks.All[check]), Assert.Null);
    }

    [Theory]
    [InlineData("all-gather in place")]
    [InlineData("reduce-scatter of F32")]
    [InlineData("reduce-scatter of BF16")]
    [InlineData("broadcast")]
    [InlineData("a few values")]
    public void A_GPU_alone_does_too(string check)
    {
        CudaEmulator.Require();
        Assert.SkipWhen(NcclLibrary.Found.Fault is not null, NcclLibrary.Found.Fault ?? "");
        Assert.All(Ranks.Run(1, Gpus(1), CollectiveChecks.All[check]), Assert.Null);
    }

    [Fact]
    public void What_the_GPU_computes_next_waits_for_a_ticket_and_not_before()
    {
        CudaEmulator.RequireEmulated();
        Assert.All(Ranks.Run(2, Gpus(2, (backend, world) =>
        {
            using Arena arena = backend.Allocate("test", 1 << 12);
            Tensor own = arena.Take(1, 64), all = arena.Take(2, 64), copy = arena.Take(2, 64);
            float[] values = new float[64], gathered = new float[128];
            Array.Fill(values, world.Rank + 1f);
            backend.Write<float>(own, values);
            Ticket ticket = world.AllGather(all, own);
            backend.Read(gathered, all);
            Assert.Equal(0, gathered[64 - (64 * world.Rank)]);
            ticket.Wait();
            backend.Copy(copy, all);
            backend.Read(gathered, copy);
            Assert.Equal([1, 2], [gathered[0], gathered[64]]);
        }), static _ => { }), Assert.Null);
    }

    // Ranks 0 and 2, 1 and 3, the later ones first; what the world queued before comes before what a part does.
    [Fact]
    public void Parts_of_a_world_talk_among_themselves_in_its_order()
    {
        CudaEmulator.RequireEmulated();
        Assert.All(Ranks.Run(4, Gpus(4), static world =>
        {
            using var memory = new HostMemory();
            using Collective part = world.Split(world.Rank % 2, -world.Rank);
            Tensor values = memory.Take(1, 4), all = memory.Take(2, 4);
            values.HostSpan<float>().Fill(world.Rank);
            world.Broadcast(values, 3).Wait();
            values.HostSpan<float>().Fill(10 + world.Rank);
            part.AllGather(all, values).Wait();
            Assert.Equal([12f + (world.Rank % 2), 10f + (world.Rank % 2)], (float[])[all.HostSpan<float>()[0], all.HostSpan<float>()[4]]);
        }), Assert.Null);
    }

    [Fact]
    public void Ranks_that_call_different_operations_end_with_both_named()
    {
        CudaEmulator.RequireEmulated();
        Exception?[] failures = Ranks.Run(2, Gpus(2), static world =>
        {
            using var memory = new HostMemory();
            Tensor values = memory.Take(2, 8);
            (world.Rank == 0 ? world.Broadcast(values, 0) : world.AllGather(values, values.RowRange(1, 1))).Wait();
            world.Barrier();
        });
        Assert.All(failures, static failure => Assert.Matches(
            @"^rank [01] \(.*\): NCCL: .*: invalid usage \(5\): rank [01] calls (broadcast of 64 bytes, rank 1 all-gather of 32|all-gather of 32 bytes, rank 0 broadcast of 64)$",
            Assert.IsType<CollectiveException>(failure).Message));
    }

    [Fact]
    public void A_rank_that_waits_in_vain_ends_and_names_the_operation()
    {
        CudaEmulator.RequireEmulated();
        using var ended = new ManualResetEventSlim();
        Exception?[] failures = Ranks.Run(2, Gpus(2, limit: TimeSpan.FromSeconds(0.5)), world =>
        {
            if (world.Rank == 1)
            {
                Assert.True(ended.Wait(s_limit, TestContext.Current.CancellationToken));
                return;
            }

            using var memory = new HostMemory();
            Tensor values = memory.Take(2, 8);
            try
            {
                world.AllGather(values, values.RowRange(0, 1)).Wait();
                world.Barrier();
            }
            finally
            {
                ended.Set();
            }
        });
        Assert.Matches(
            @"^rank 0 \(.*\): NCCL: all-gather has taken more than 0\.5 s: another rank is gone, or far behind$",
            Assert.IsType<CollectiveException>(failures[0]).Message);
    }

    [Fact]
    public void An_error_that_NCCL_finds_by_itself_ends_the_world()
    {
        CudaEmulator.RequireEmulated();
        Exception?[] failures = Ranks.Run(
            1, Gpus(1), static world => CudaDeviceTests.With("TINYLLAMA_CUDA_FAIL", "ncclCommGetAsyncError 0 6", world.Barrier));

        // After it stands what NCCL said last in this process, which may be another world's.
        Assert.Contains(
            "NCCL: between operations: remote process exited or there was a network error (6)",
            Assert.IsType<CollectiveException>(failures[0]).Message, StringComparison.Ordinal);
    }

    [Fact]
    public void A_rank_that_finds_no_network_is_named_to_all()
    {
        CudaEmulator.RequireEmulated();
        CudaDeviceTests.With("TINYLLAMA_CUDA_FAIL", "ncclGetUniqueId 0 2", () => Assert.All(
            Ranks.Run(2, Gpus(2), static _ => { }),
            static failure => Assert.StartsWith("NCCL of rank 0 finds no network to meet by", Assert.IsType<DeviceException>(failure).Message, StringComparison.Ordinal)));
    }

    [Theory]
    [InlineData(21_800, "2.18.0")]
    [InlineData(23_007, "2.30.7")]
    public void A_version_reads_as_people_write_it(int version, string text) => Assert.Equal(text, NcclLibrary.Text(version));

    [Fact]
    public void The_library_exports_all_that_is_declared()
    {
        CudaEmulator.Require();
        Assert.SkipWhen(NcclLibrary.Found.Fault is not null, NcclLibrary.Found.Fault ?? "");
        string[] names = [.. typeof(Nccl).GetMethods().Select(method => method.Name).Where(name => name.StartsWith("nccl", StringComparison.Ordinal))];
        Assert.True(names.Length >= 15);
        Assert.All(names, name => Assert.True(NativeLibrary.TryGetExport(NcclLibrary.Found.Handle, name, out _), name));
        Assert.EndsWith(NcclLibrary.Text(NcclLibrary.Found.Version), NcclLibrary.Found.Description, StringComparison.Ordinal);
    }

    // By value an id is 128 bytes on the stack; a configuration of 2.17 has 48.
    [Fact]
    public void Structures_have_the_sizes_of_the_header() => Assert.Equal((128, 48), (sizeof(Nccl.UniqueId), sizeof(Nccl.Config)));

    private static Func<int, Collective> Gpus(int size, TimeSpan? limit = null) => Gpus(size, null, limit);

    private static Func<int, Collective> Gpus(int size, Action<CudaBackend, Collective>? use, TimeSpan? limit = null)
    {
        Func<int, Collective> join = Ranks.Threads(size);
        return rank =>
        {
            Collective bootstrap = join(rank);
            CudaBackend backend = CudaBackend.Create();
            try
            {
                Collective world = NcclCollective.Create(backend, bootstrap, limit ?? s_limit);
                use?.Invoke(backend, world);
                return new DeviceCollective(world, backend, () =>
                {
                    backend.Dispose();
                    bootstrap.Dispose();
                });
            }
            catch
            {
                backend.Dispose();
                bootstrap.Dispose();
                throw;
            }
        };
    }
}
