using System.Diagnostics;
using System.Text.RegularExpressions;
using TinyLlama.Cli;
using TinyLlama.Data.Documents;
using TinyLlama.Data.Shards;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Tests.Checkpoints;
using TinyLlama.Tests.Common;
using TinyLlama.Training;

namespace TinyLlama.Tests.Training;

/// <summary>The program itself as several ranks that prepare data: the folder of one process, byte for byte.</summary>
public sealed partial class LaunchedPreparationTests : IDisposable
{
    private readonly TemporaryFolder _folder = new();

    public static bool HasProcessList => OperatingSystem.IsLinux();

    public void Dispose() => _folder.Dispose();

    [Theory]
    [InlineData("mpirun.openmpi", 2)]
    [InlineData("mpirun.mpich", 3)]
    [InlineData("", 2)]
    public void The_folder_is_that_of_one_process(string launcher, int ranks)
    {
        string[] launch = TinyRun.Launcher(launcher, ranks);
        Prepare(lines: 50);
        (int code, string said) = TinyRun.End(TinyRun.Launch(launch, [.. Command(), .. Own(launcher, ranks)]));
        Assert.True(code == ExitCode.Success, said);
        Assert.Single(Regex.Matches(said, "^train ", RegexOptions.Multiline | RegexOptions.ExplicitCapture, TimeSpan.FromSeconds(1)));
        AssertSame();
    }

    [Fact]
    public void The_folder_is_that_of_one_process_under_slurm()
    {
        Programs.Require("mpirun.mpich");
        using var cluster = SlurmCluster.Require();
        Prepare(lines: 50);
        (int code, string said) = TinyRun.End(TinyRun.Launch(cluster.Run(2, "pmi2"), Command()));
        Assert.True(code == ExitCode.Success, said);
        AssertSame();
    }

    [Theory]
    [InlineData("mpirun.openmpi")]
    [InlineData("")]
    public void A_file_that_a_rank_cannot_read_is_named_with_the_rank(string launcher)
    {
        string[] launch = TinyRun.Launcher(launcher, 2);
        Prepare(lines: 50);
        File.WriteAllText(Path.Combine(_folder["text"], "z.txt.gz"), "this is no gzip");
        (int code, string said) = TinyRun.End(TinyRun.Launch(launch, [.. Command(), .. Own(launcher, 2)]));
        Assert.Equal(ExitCode.UserError, code);
        Assert.Matches(@"(?m)^error: \S+z\.txt\.gz: [^\n]+ \(rank 1", said);
    }

    [Fact(SkipUnless = nameof(HasProcessList), Skip = "SIGTERM is needed")]
    public void Ranks_that_are_asked_to_stop_go_on_from_there()
    {
        Prepare(lines: 20_000);
        using (Process process = Start())
        {
            WaitForLog(process);
            using (var kill = Process.Start("kill", ["-TERM", $"{process.Id}"]))
            {
                kill.WaitForExit();
            }

            Assert.Equal(ExitCode.Stopped, TinyRun.End(process).Code);
        }

        Assert.False(File.Exists(_folder["many/manifest.json"]));
        Assert.Equal(ExitCode.Success, TinyRun.End(Start()).Code);
        AssertSame();
    }

    /// <summary>Two kills by default; <c>TINYLLAMA_KILLS</c> asks for more, <c>TINYLLAMA_KILL_SEED</c> for other moments.</summary>
    [Fact(SkipUnless = nameof(HasProcessList), Skip = "/proc is needed")]
    public void A_preparation_that_loses_ranks_ends_with_the_bytes_of_one_that_does_not()
    {
        int kills = TinyRun.FromEnvironment("TINYLLAMA_KILLS", 2);
        var random = new Random(TinyRun.FromEnvironment("TINYLLAMA_KILL_SEED", 1));
        Prepare(lines: 20_000);
        for (int killed = 0; killed < kills;)
        {
            using Process process = Start();
            int rank = WaitForLog(process);
            if (process.WaitForExit(random.Next(3000)))
            {
                // It was finished before: the next one begins anew.
                AssertSame();
                Directory.Delete(_folder["many"], recursive: true);
                continue;
            }

            using (Process victim = Process.GetProcessById(rank))
            {
                victim.Kill();
            }

            (int code, string said) = TinyRun.End(process);
            Assert.True(code == 128 + 9, said);
            Assert.Contains("rank 1", said, StringComparison.Ordinal);
            killed++;
        }

        Assert.Equal(ExitCode.Success, TinyRun.End(Start()).Code);
        AssertSame();
    }

    /// <summary>Writes text, and what one process makes of it.</summary>
    private void Prepare(int lines)
    {
        Directory.CreateDirectory(_folder["text"]);
        for (int i = 0; i < 12; i++)
        {
            File.WriteAllLines(Path.Combine(_folder["text"], $"{i:00}.txt"), Enumerable.Range(0, lines).Select(n => $"{n % (lines - i)} times a word is not {n * i}"));
        }

        DataPreparation.Run(
            _folder["one"], TextFiles.Find([_folder["text"]], new TextFileOptions { Lines = true }), new ByteTokenizer(), new PreparationOptions { Deduplicate = true });
    }

    private string[] Command() =>
        ["data", "prepare", "--text", _folder["text"], "--lines", "--deduplicate", "--tokenizer", "bytes", "--out", _folder["many"], "--threads", "1"];

    private static string[] Own(string launcher, int ranks) => launcher.Length == 0 ? ["--ranks", $"{ranks}"] : [];

    private Process Start() => TinyRun.Launch([], [.. Command(), "--ranks", "2"]);

    /// <returns>The process of rank 1.</returns>
    private int WaitForLog(Process process)
    {
        string log = Heartbeat.PathOf(_folder["many"], 1, "log");
        while (true)
        {
            if (File.Exists(log) && Pid().Matches(ReadShared(log)) is { Count: > 0 } starts && !Exited(starts[^1]))
            {
                return int.Parse(starts[^1].Groups["pid"].Value, System.Globalization.CultureInfo.InvariantCulture);
            }

            Assert.False(process.WaitForExit(50), "it ends before its ranks are started");
        }
    }

    private static bool Exited(Match start) => !Directory.Exists($"/proc/{start.Groups["pid"].Value}");

    private static string ReadShared(string path)
    {
        using StreamReader reader = new(new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.ReadWrite));
        return reader.ReadToEnd();
    }

    private void AssertSame()
    {
        string[] expected = Names("one");
        Assert.Equal(expected, Names("many"));
        Assert.All(expected, name => Assert.Equal(File.ReadAllBytes(Path.Combine(_folder["one"], name)), File.ReadAllBytes(Path.Combine(_folder["many"], name))));
    }

    private string[] Names(string folder) =>
        [.. Directory.GetFileSystemEntries(_folder[folder]).Select(path => Path.GetFileName(path)!).Order(StringComparer.Ordinal)];

    [GeneratedRegex(@"rank 1 of 2, host \S+, pid (?<pid>\d+)\n", RegexOptions.ExplicitCapture, 1000)]
    private static partial Regex Pid();
}
