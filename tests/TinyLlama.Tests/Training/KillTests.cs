using System.Diagnostics;
using System.Security.Cryptography;
using TinyLlama.Checkpoints;
using TinyLlama.Tests.Checkpoints;
using TinyLlama.Training;

namespace TinyLlama.Tests.Training;

/// <summary>
/// The program itself, killed without warning at random moments. Three kills by default; <c>TINYLLAMA_KILLS</c> asks for
/// more, <c>TINYLLAMA_KILL_SEED</c> for other moments.
/// </summary>
public sealed class KillTests : IDisposable
{
    private readonly TemporaryFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Fact]
    public void A_run_that_is_killed_at_random_moments_ends_with_the_bits_of_one_that_is_not()
    {
        int kills = TinyRun.FromEnvironment("TINYLLAMA_KILLS", 3);
        var random = new Random(TinyRun.FromEnvironment("TINYLLAMA_KILL_SEED", 1));
        TinyRun.Prepare(_folder, steps: 800);

        using (Process whole = Start("whole"))
        {
            whole.WaitForExit();
            Assert.Equal(0, whole.ExitCode);
        }

        int killed = 0;
        for (int sitting = 0; killed < kills; sitting++)
        {
            // A run of its own for every few kills: each must fall while the program trains, saves or starts.
            string run = $"killed-{sitting}";
            while (killed < kills)
            {
                using Process process = Start(run);
                if (process.WaitForExit(random.Next(200, 4000)))
                {
                    break;
                }

                process.Kill();
                process.WaitForExit();
                killed++;
            }

            using Process last = Start(run);
            last.WaitForExit();
            Assert.Equal(0, last.ExitCode);
            Assert.Equal(Bits("whole"), Bits(run));
            Assert.Equal(Losses("whole"), Losses(run));
        }
    }

    private Process Start(string run)
    {
        Process process = TinyRun.Start(_folder, run);
        process.BeginErrorReadLine();
        process.BeginOutputReadLine();
        return process;
    }

    private string Bits(string run)
    {
        string newest = TrainingCheckpoint.List(_folder[run])[^1].Path;
        return string.Join(' ', new[] { TrainingCheckpoint.ModelName, TrainingCheckpoint.OptimizerName }
            .Select(name => Convert.ToHexStringLower(SHA256.HashData(File.ReadAllBytes(Path.Combine(newest, name))))));
    }

    private double[] Losses(string run) =>
        [.. MetricsLog.Read(Path.Combine(_folder[run], MetricsLog.FileName)).OfType<StepMetrics>().Select(step => step.Loss)];
}
