using System.Diagnostics;
using TinyLlama.Checkpoints;
using TinyLlama.Cli;
using TinyLlama.Tests.Checkpoints;
using TinyLlama.Tests.Common;
using TinyLlama.Training;

namespace TinyLlama.Tests.Training;

/// <summary>The program itself as several ranks, however they are started: the weights of one rank, bit for bit.</summary>
public sealed class LaunchedRunTests : IDisposable
{
    private const int Steps = 40;
    private const int Deadline = 120_000;

    // 8 micro-batches a step, each a lane.
    private static readonly string[] s_lanes = ["--threads", "1", "--set", "batch.micro_sequences=1", "--set", "distribution.reduction_lanes=8"];

    private readonly TemporaryFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Theory]
    [InlineData("mpirun.openmpi", 2, "zero=1")]
    [InlineData("mpirun.openmpi", 4, "zero=3")]
    [InlineData("mpirun.openmpi", 4, "pipeline=2")]
    [InlineData("mpirun.mpich", 2, "zero=2")]
    [InlineData("mpirun.mpich", 2, "pipeline=2")]
    [InlineData("", 4, "zero=1")]
    [InlineData("", 2, "zero=3")]
    public void Weights_are_those_of_one_rank(string launcher, int ranks, string setting)
    {
        string[] launch = TinyRun.Launcher(launcher, ranks);
        TinyRun.Prepare(_folder, Steps);
        End(TinyRun.Start(_folder, "one", s_lanes));

        string[] stage = ["--set", $"distribution.{setting}"];
        string[] own = launcher.Length == 0 ? ["--ranks", $"{ranks}"] : [];
        End(TinyRun.Launch(launch, _folder, "many", [.. s_lanes, .. stage, .. own]));

        Assert.Equal(Weights("one"), Weights("many"));
        Assert.Equal(ranks, Directory.GetFiles(Path.Combine(_folder["many"], "ranks"), "*.json").Length);
    }

    [Theory]
    [InlineData("pmi2", "mpirun.mpich", 2)]
    [InlineData("pmix", "mpirun.openmpi", 1)]
    public void Weights_are_those_of_one_rank_under_slurm(string plugin, string launcherOfItsMpi, int zero)
    {
        Programs.Require(launcherOfItsMpi);
        using var cluster = SlurmCluster.Require();
        TinyRun.Prepare(_folder, Steps);
        End(TinyRun.Start(_folder, "one", s_lanes));
        End(TinyRun.Launch(cluster.Run(2, plugin), _folder, "many", [.. s_lanes, "--set", $"distribution.zero={zero}"]));
        Assert.Equal(Weights("one"), Weights("many"));
        Assert.Equal(2, Directory.GetFiles(Path.Combine(_folder["many"], "ranks"), "*.json").Length);
    }

    [Fact]
    public void Slurms_signal_before_the_time_is_up_saves_a_checkpoint()
    {
        Programs.Require("mpirun.mpich");
        using var cluster = SlurmCluster.Require();
        TinyRun.Prepare(_folder, steps: 1_000_000);
        Process run = TinyRun.Launch(cluster.Run(2, "pmi2"), _folder, "many", [.. s_lanes, "--set", "checkpoints.every_steps=1000000"]);
        Assert.True(SpinWait.SpinUntil(() => run.HasExited || Heartbeat.TryRead(_folder["many"], 1) is { Step: > 0 }, Deadline));
        cluster.Ask("scancel", "--signal=TERM", cluster.Ask("squeue", "-h", "-o", "%A"));
        End(run, ExitCode.Stopped);
        Assert.Empty(TrainingCheckpoint.Verify(Assert.Single(TrainingCheckpoint.List(_folder["many"])).Path));
    }

    private static void End(Process process, int exitCode = ExitCode.Success)
    {
        (int code, string said) = TinyRun.End(process);
        Assert.True(code == exitCode, $"exit code {code}: {said}");
    }

    private byte[] Weights(string run) => File.ReadAllBytes(Path.Combine(TrainingCheckpoint.PathOf(_folder[run], Steps), TrainingCheckpoint.ModelName));
}
