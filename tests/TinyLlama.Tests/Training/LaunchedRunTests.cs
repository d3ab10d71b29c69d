using System.Diagnostics;
using TinyLlama.Checkpoints;
using TinyLlama.Cli;
using TinyLlama.Tests.Checkpoints;

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
    [InlineData("mpirun.openmpi", 2, 1)]
    [InlineData("mpirun.openmpi", 4, 3)]
    [InlineData("mpirun.mpich", 2, 2)]
    [InlineData("", 4, 1)]
    [InlineData("", 2, 3)]
    public void Weights_are_those_of_one_rank(string launcher, int ranks, int zero)
    {
        string[] path = (Environment.GetEnvironmentVariable("PATH") ?? "").Split(Path.PathSeparator);
        Assert.SkipUnless(launcher.Length == 0 || path.Any(folder => File.Exists(Path.Combine(folder, launcher))), $"needs {launcher}");
        TinyRun.Prepare(_folder, Steps);
        End(TinyRun.Start(_folder, "one", s_lanes));

        string[] stage = ["--set", $"distribution.zero={zero}"];
        End(launcher switch
        {
            "mpirun.openmpi" => TinyRun.Launch(
                [launcher, "--oversubscribe", "--allow-run-as-root", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1", "-n", $"{ranks}"],
                _folder, "many", [.. s_lanes, .. stage]),
            "mpirun.mpich" => TinyRun.Launch([launcher, "-n", $"{ranks}"], _folder, "many", [.. s_lanes, .. stage]),
            _ => TinyRun.Start(_folder, "many", [.. s_lanes, .. stage, "--ranks", $"{ranks}"]),
        });

        Assert.Equal(Weights("one"), Weights("many"));
        Assert.Equal(ranks, Directory.GetFiles(Path.Combine(_folder["many"], "ranks"), "*.json").Length);
    }

    private static void End(Process process)
    {
        using (process)
        {
            Task<string> output = process.StandardOutput.ReadToEndAsync(), error = process.StandardError.ReadToEndAsync();
            if (!process.WaitForExit(Deadline))
            {
                process.Kill(entireProcessTree: true);
                Assert.Fail("it hangs");
            }

            Assert.True(process.ExitCode == ExitCode.Success, $"exit code {process.ExitCode}: {error.Result} {output.Result}");
        }
    }

    private byte[] Weights(string run) => File.ReadAllBytes(Path.Combine(TrainingCheckpoint.PathOf(_folder[run], Steps), TrainingCheckpoint.ModelName));
}
