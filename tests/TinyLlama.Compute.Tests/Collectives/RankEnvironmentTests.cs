using TinyLlama.Compute.Collectives;

namespace TinyLlama.Compute.Tests.Collectives;

public sealed class RankEnvironmentTests
{
    private static readonly TimeSpan s_timeout = TimeSpan.FromSeconds(5);

    [Theory]
    [InlineData("OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=1 PMIX_RANK=1", "libmpi.so.40", 4)]
    [InlineData("PMI_SIZE=8 PMI_RANK=0", "libmpi_abi.so.1", 8)]
    [InlineData("PMI_RANK=0 SLURM_STEP_NUM_TASKS=3", "libmpi_abi.so.1", 3)]
    [InlineData("PMIX_RANK=0 SLURM_STEP_NUM_TASKS=16", "libmpi.so.40", 16)]
    [InlineData("PMIX_RANK=0", "libmpi.so.40", null)]
    [InlineData("PMI_SIZE=2 TINYLLAMA_MPI=/opt/mpi/lib/libmpi.so.12", "/opt/mpi/lib/libmpi.so.12", 2)]
    [InlineData("TINYLLAMA_MPI=libmpi.so.40", "libmpi.so.40", null)]
    public void A_launchers_variables_tell_the_library_and_the_size(string variables, string library, int? size)
    {
        MpiWorld world = Assert.IsType<MpiWorld>(RankEnvironment.Mpi(Variables(variables)));
        Assert.Equal((library, size), (world.Libraries[0], world.Size));
    }

    [Fact]
    public void The_variables_of_torchrun_make_a_world_over_tcp()
    {
        const string Set = "RANK=3 WORLD_SIZE=4 MASTER_ADDR=node-1 MASTER_PORT=1234 TINYLLAMA_RUN_ID=a";
        Assert.Equal(new TcpWorld(3, 4, "node-1", 1234, "a", s_timeout), RankEnvironment.Tcp(Variables(Set), s_timeout));
        Assert.Equal(29500, RankEnvironment.Tcp(Variables("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a"), s_timeout)!.Port);
        Assert.Null(RankEnvironment.Mpi(Variables(Set)));
    }

    [Theory]
    [InlineData("")]
    [InlineData("WORLD_SIZE=1 RANK=0 MASTER_ADDR=a")]
    [InlineData("SLURM_STEP_NUM_TASKS=1 SLURM_NTASKS=8")]
    public void A_process_that_nobody_launched_with_others_is_alone(string variables)
    {
        using Collective world = RankEnvironment.Join(Variables(variables), s_timeout);
        Assert.IsType<SingleCollective>(world);
        Assert.Equal((0, 1, 0), (world.Rank, world.Size, world.LocalRank));
    }

    [Theory]
    [InlineData("WORLD_SIZE=2 MASTER_ADDR=a", "RANK is not set")]
    [InlineData("WORLD_SIZE=2 RANK=0", "MASTER_ADDR is not set")]
    [InlineData("WORLD_SIZE=2 RANK=2 MASTER_ADDR=a", "RANK is '2', which is no number from 0 to 1")]
    [InlineData("WORLD_SIZE=two", "WORLD_SIZE is 'two'")]
    [InlineData("WORLD_SIZE=2 RANK=0 MASTER_ADDR=a MASTER_PORT=99999", "MASTER_PORT is '99999', which is no number from 1 to 65535")]
    [InlineData("SLURM_STEP_NUM_TASKS=4", "add --mpi=pmix or --mpi=pmi2")]
    [InlineData("OMPI_COMM_WORLD_SIZE=2 TINYLLAMA_MPI=/nowhere/libmpi.so", "/nowhere/libmpi.so")]
    [InlineData("OMPI_COMM_WORLD_SIZE=2 TINYLLAMA_MPI=libc.so.6", "the MPI library has no MPI_Init_thread")]
    public void What_is_missing_or_wrong_is_told_in_one_line(string variables, string expected)
    {
        DeviceException refused = Assert.Throws<DeviceException>(() => RankEnvironment.Join(Variables(variables), s_timeout));
        Assert.Contains(expected, refused.Message, StringComparison.Ordinal);
        Assert.DoesNotContain('\n', refused.Message);
    }

    private static Func<string, string?> Variables(string set)
    {
        Dictionary<string, string> values = set.Split(' ', StringSplitOptions.RemoveEmptyEntries).Select(static pair => pair.Split('=')).ToDictionary(static pair => pair[0], static pair => pair[1]);
        return values.GetValueOrDefault;
    }
}
