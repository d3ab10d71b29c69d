using System.Diagnostics;
using TinyLlama.Compute.Collectives;
using TinyLlama.Tests.Common;

namespace TinyLlama.Compute.Tests.Collectives;

/// <summary>Ranks that are processes: this test program several times, each to run a method of <see cref="LaunchedRank"/>.</summary>
public sealed class LaunchedTests : IDisposable
{
    private readonly string _folder = Directory.CreateTempSubdirectory("tinyllama-ranks-").FullName;

    public void Dispose() => Directory.Delete(_folder, recursive: true);

    [Theory]
    [InlineData("mpirun.openmpi", 2, "Open MPI")]
    [InlineData("mpirun.openmpi", 4, "Open MPI")]
    [InlineData("mpirun.mpich", 2, "MPICH")]
    [InlineData("mpirun.mpich", 4, "MPICH")]
    public void Processes_of_a_launcher_do_as_every_transport(string launcher, int ranks, string library)
    {
        (int code, string output) = Launch(launcher, ranks, nameof(LaunchedRank.Passes_all_checks));
        Assert.True(code == 0, output);
        for (int rank = 0; rank < ranks; rank++)
        {
            Assert.StartsWith($"{rank} of {ranks}, {library}", File.ReadAllText(Path.Combine(_folder, $"{rank}")), StringComparison.Ordinal);
        }
    }

    [Theory]
    [InlineData("mpirun.openmpi")]
    [InlineData("mpirun.mpich")]
    public void A_rank_that_fails_while_the_others_wait_for_it_ends_them(string launcher)
    {
        (int code, string output) = Launch(launcher, 2, nameof(LaunchedRank.Fails_on_rank_1));
        Assert.True(code == 3, output);
    }

    [Fact]
    public void A_library_that_is_not_the_launchers_is_refused()
    {
        Programs.Require("mpirun.mpich");
        (int code, string output) = Launch("mpirun.openmpi", 2, nameof(LaunchedRank.Passes_all_checks), ("TINYLLAMA_MPI", "libmpich.so.12"));
        Assert.True(code != 0, output);
        Assert.Contains("the launcher has started 2 processes and MPICH", output, StringComparison.Ordinal);
        Assert.Contains("sees a world of 1: the library is not the launcher's; set TINYLLAMA_MPI", output, StringComparison.Ordinal);
    }

    [Fact]
    public void A_process_that_is_killed_is_named_by_all_others_at_once()
    {
        string port = $"{Ranks.FreePort()}";
        Running[] ranks =
        [
            .. Enumerable.Range(0, 3).Select(rank => Start(
                "dotnet", nameof(LaunchedRank.Waits_for_rank_1_which_is_killed), [],
                ("RANK", $"{rank}"), ("WORLD_SIZE", "3"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port), ("TINYLLAMA_RUN_ID", _folder))),
        ];
        (int Code, string Output)[] ends = [.. ranks.Select(Wait)];
        foreach (int rank in (int[])[0, 2])
        {
            Assert.True(ends[rank].Code != 0, ends[rank].Output);
            Assert.Matches($@"rank 1 \({Environment.MachineName}\) is gone \(.*\) while rank [02] .* was in all-gather of 1 bytes", ends[rank].Output);
        }
    }

    private (int Code, string Output) Launch(string launcher, int ranks, string test, params (string Name, string Value)[] variables)
    {
        Programs.Require(launcher);
        string[] options = launcher == "mpirun.openmpi" ? ["--oversubscribe", "--allow-run-as-root", "--bind-to", "none"] : [];
        return Wait(Start(launcher, test, [.. options, "-n", $"{ranks}", "dotnet"], variables));
    }

    private Running Start(string program, string test, string[] options, params (string Name, string Value)[] variables)
    {
        var start = new ProcessStartInfo(program, [
            .. options, typeof(LaunchedRank).Assembly.Location, "-explicit", "only", "-noColor", "-method", $"{typeof(LaunchedRank).FullName}.{test}",
        ])
        {
            UseShellExecute = false,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        };
        start.Environment[LaunchedRank.Folder] = _folder;

        // More ranks than cores, whose waiting would else keep the working from theirs.
        start.Environment["OMPI_MCA_mpi_yield_when_idle"] = "1";
        foreach ((string name, string value) in variables)
        {
            start.Environment[name] = value;
        }

        Process process = Process.Start(start)!;
        CancellationToken stop = TestContext.Current.CancellationToken;
        return new Running(process, process.StandardOutput.ReadToEndAsync(stop), process.StandardError.ReadToEndAsync(stop));
    }

    private static (int Code, string Output) Wait(Running running)
    {
        using Process process = running.Process;
        if (!process.WaitForExit(TimeSpan.FromMinutes(5)))
        {
            process.Kill(entireProcessTree: true);
            Assert.Fail("a process does not end");
        }

        return (process.ExitCode, running.Output.GetAwaiter().GetResult() + running.Error.GetAwaiter().GetResult());
    }

    private sealed record Running(Process Process, Task<string> Output, Task<string> Error);
}

/// <summary>What a rank does that a launcher has started.</summary>
public sealed class LaunchedRank
{
    /// <summary>The variable with the folder where ranks leave word.</summary>
    public const string Folder = "TINYLLAMA_TEST_RANKS";

    [Fact(Explicit = true)]
    public void Passes_all_checks()
    {
        // Pieces of an odd length, so that the larger tensors are several.
        using Collective world = MpiCollective.Join(RankEnvironment.Mpi(Environment.GetEnvironmentVariable)!, TimeSpan.FromSeconds(30), mostBytes: 654_321);
        try
        {
            foreach (Action<Collective> check in CollectiveChecks.All.Values)
            {
                check(world);
            }

            LeaveWord($"{world.Rank}", $"{world.Rank} of {world.Size}, {world.Description}");
        }
        catch (Exception e)
        {
            Console.Error.WriteLine(e);
            world.Abort(e.Message, 3);
        }
    }

    [Fact(Explicit = true)]
    public void Fails_on_rank_1()
    {
        using Collective world = Collective.Join(TimeSpan.FromSeconds(30));
        world.Barrier();
        if (world.Rank == 1)
        {
            while (!File.Exists(Path.Combine(Environment.GetEnvironmentVariable(Folder)!, "0 waits")))
            {
                Thread.Yield();
            }

            // While this rank's own lane waits for the other, too.
            Ticket ticket = world.Receive(new HostMemory().Take(1, 1), 0);
            world.Abort("a test", 3);
            ticket.Wait();
        }

        using var memory = new HostMemory();
        Ticket never = world.Receive(memory.Take(1, 1), 1);
        LeaveWord("0 waits", string.Empty);
        never.Wait();
    }

    [Fact(Explicit = true)]
    public void Waits_for_rank_1_which_is_killed()
    {
        using Collective world = Collective.Join(TimeSpan.FromSeconds(60));
        world.Barrier();
        if (world.Rank == 1)
        {
            // SIGKILL: nothing is said or closed by the program.
            using var self = Process.GetCurrentProcess();
            self.Kill();
        }

        world.Barrier();
    }

    private static void LeaveWord(string name, string text) => File.WriteAllText(Path.Combine(Environment.GetEnvironmentVariable(Folder)!, name), text);
}
