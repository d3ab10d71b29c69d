using System.Diagnostics;
using System.Globalization;
using TinyLlama.Checkpoints;
using TinyLlama.Cli;
using TinyLlama.Tests.Checkpoints;
using TinyLlama.Training;

namespace TinyLlama.Tests.Training;

/// <summary>
/// The program itself as several ranks, one of which is lost at a random moment, while checkpoints are damaged and the number
/// of ranks changes. Three kills by default; <c>TINYLLAMA_KILLS</c> asks for more, <c>TINYLLAMA_KILL_SEED</c> for other moments.
/// </summary>
public sealed class LostRankTests : IDisposable
{
    /// <summary>Longer than ranks wait for one that hangs, and than a start takes on a busy machine.</summary>
    private const int Deadline = 120_000;

    private const int Steps = 1000;

    private static readonly int[] s_sizes = [1, 2, 4];

    private readonly TemporaryFolder _folder = new();

    public static bool HasProcessList => OperatingSystem.IsLinux();

    public void Dispose() => _folder.Dispose();

    [Fact(SkipUnless = nameof(HasProcessList), Skip = "/proc is needed")]
    public void A_run_that_loses_ranks_and_checkpoints_ends_with_the_bits_of_one_that_does_not()
    {
        int kills = TinyRun.FromEnvironment("TINYLLAMA_KILLS", 3);
        var random = new Random(TinyRun.FromEnvironment("TINYLLAMA_KILL_SEED", 1));
        TinyRun.Prepare(_folder, steps: Steps);
        using (Process whole = Start("whole"))
        {
            Assert.Equal(ExitCode.Success, End(whole));
        }

        int killed = 0;
        for (int run = 0; killed < kills; run++)
        {
            string name = $"killed-{run}";
            var history = new List<string>();
            while (!Survives(name, random, history, kills - killed))
            {
                killed++;
                if (random.Next(2) == 0)
                {
                    history.Add(DamageNewestCheckpoint(name, random));
                }
            }

            Assert.Equal(Steps, EndRecord.Find(_folder[name])?.Step);
            Assert.True(Weights("whole") == Weights(name), string.Join('\n', history));
        }
    }

    [Fact(SkipUnless = nameof(HasProcessList), Skip = "/proc is needed")]
    public async Task A_rank_that_is_stopped_is_named_and_the_run_goes_on_without_it()
    {
        TinyRun.Prepare(_folder, steps: Steps);
        using Process process = Start("stopped", "--ranks", "2", "--restarts", "1", "--set", "distribution.timeout_seconds=10", "--set", "checkpoints.every_steps=500");
        Task<string> terminal = process.StandardError.ReadToEndAsync();
        int stopped = WaitUntilItTrains("stopped", 1, process);
        Signal("STOP", stopped);
        Assert.Equal(ExitCode.Success, End(process));
        Assert.Matches($@"rank 1 \(host \S+, pid {stopped}\) is in step \d+ since \S+, [^;]+; the others wait in ", await terminal);
        Assert.Throws<ArgumentException>(() => Process.GetProcessById(stopped));
    }

    [Fact(SkipUnless = nameof(HasProcessList), Skip = "/proc is needed")]
    public async Task Ranks_that_are_asked_to_stop_save_a_checkpoint_together()
    {
        TinyRun.Prepare(_folder, steps: 1_000_000);
        using Process process = Start("stopped", "--ranks", "2", "--set", "checkpoints.every_steps=1000000");
        Task<string> result = process.StandardOutput.ReadToEndAsync();
        _ = process.StandardError.ReadToEndAsync();
        WaitUntilItTrains("stopped", 1, process);
        Signal("TERM", process.Id);

        Assert.Equal(ExitCode.Stopped, End(process));
        (long step, string path) = TrainingCheckpoint.List(_folder["stopped"])[^1];
        Assert.Contains($"stopped after step {step:N0} of", await result, StringComparison.Ordinal);
        Assert.Empty(TrainingCheckpoint.Verify(path));
    }

    private int WaitUntilItTrains(string run, int rank, Process process)
    {
        while (true)
        {
            if (Heartbeat.TryRead(_folder[run], rank) is { Step: > 0 } heartbeat)
            {
                return heartbeat.Pid;
            }

            Assert.False(process.WaitForExit(100));
        }
    }

    private static void Signal(string name, int pid)
    {
        using var kill = Process.Start("kill", [$"-{name}", $"{pid}"]);
        kill.WaitForExit();
    }

    /// <summary>Starts the run with a random number of ranks and kills one, or the supervisor, at a random moment.</summary>
    /// <returns>Whether it came to its end before.</returns>
    private bool Survives(string run, Random random, List<string> history, int killsLeft)
    {
        int size = s_sizes[random.Next(s_sizes.Length)];
        using Process supervisor = Start(run, "--ranks", $"{size}");
        Listen(supervisor, history);
        if (killsLeft == 0 || supervisor.WaitForExit(random.Next(500, 8000)))
        {
            Assert.True(End(supervisor) == ExitCode.Success, string.Join('\n', history));
            return true;
        }

        int[] ranks = ChildrenOf(supervisor.Id);
        int victim = random.Next(-1, ranks.Length);
        history.Add($"=== {(victim < 0 ? "the supervisor" : "a rank")} of {size} ranks is killed");
        using Process killed = Process.GetProcessById(victim < 0 ? supervisor.Id : ranks[victim]);
        killed.Kill();
        Assert.NotEqual(ExitCode.Success, End(supervisor));
        foreach (int rank in ranks)
        {
            Assert.True(IsGone(rank), $"rank {rank} outlives its supervisor");
        }

        return false;
    }

    private static bool IsGone(int pid)
    {
        try
        {
            using Process process = Process.GetProcessById(pid);
            return process.WaitForExit(Deadline);
        }
        catch (ArgumentException)
        {
            return true;
        }
    }

    private static int[] ChildrenOf(int pid) =>
    [
        .. Directory.GetDirectories($"/proc/{pid}/task")
            .SelectMany(static thread => File.ReadAllText(Path.Combine(thread, "children")).Split(' ', StringSplitOptions.RemoveEmptyEntries))
            .Select(static child => int.Parse(child, CultureInfo.InvariantCulture)),
    ];

    private string DamageNewestCheckpoint(string run, Random random)
    {
        if (TrainingCheckpoint.List(_folder[run]) is not [.., (long step, string path)])
        {
            return "=== there is no checkpoint to damage";
        }

        string[] files = Directory.GetFiles(path);
        string file = random.Next(4) == 0 ? Path.Combine(path, TrainingCheckpoint.ManifestName) : files[random.Next(files.Length)];
        byte[] bytes = File.ReadAllBytes(file);
        switch (random.Next(3))
        {
            case 0:
                File.Delete(file);
                break;
            case 1:
                File.WriteAllBytes(file, bytes[..(bytes.Length / 2)]);
                break;
            default:
                bytes[random.Next(bytes.Length)] ^= (byte)(1 << random.Next(8));
                File.WriteAllBytes(file, bytes);
                break;
        }

        return $"=== {Path.GetFileName(file)} of step {step} is damaged";
    }

    private Process Start(string run, params string[] options) =>
        TinyRun.Start(_folder, run, ["--set", "batch.micro_sequences=2", "--set", "distribution.reduction_lanes=4", .. options]);

    /// <summary>Follows what a process says, which may be why a test fails.</summary>
    private static void Listen(Process process, List<string> history)
    {
        process.ErrorDataReceived += (_, line) =>
        {
            if (line.Data is { Length: > 0 } text)
            {
                lock (history)
                {
                    history.Add(text);
                }
            }
        };
        process.BeginErrorReadLine();
        process.BeginOutputReadLine();
    }

    /// <summary>Waits for a process that must not hang.</summary>
    private static int End(Process process)
    {
        bool ended = process.WaitForExit(Deadline);
        if (!ended)
        {
            process.Kill(entireProcessTree: true);
        }

        Assert.True(ended, "it hangs");
        return process.ExitCode;
    }

    private string Weights(string run)
    {
        using ModelSource model = ModelSource.Open(TrainingCheckpoint.List(_folder[run])[^1].Path, Assert.Fail);
        return model.Hash();
    }
}
