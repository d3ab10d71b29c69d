using System.Diagnostics;
using System.Text.RegularExpressions;
using TinyLlama.Cli;
using TinyLlama.Tests.Checkpoints;
using TinyLlama.Tests.Training;
using TinyLlama.Training;

namespace TinyLlama.Tests.Cli;

/// <summary>The supervisor over ranks that are a few lines of shell.</summary>
public sealed partial class RankSupervisorTests : IDisposable
{
    private readonly TemporaryFolder _folder = new();
    private readonly StringWriter _terminal = new();

    public static bool HasShell => !OperatingSystem.IsWindows();

    public void Dispose() => _folder.Dispose();

    [Fact(SkipUnless = nameof(HasShell), Skip = "a shell is needed")]
    public async Task Ranks_that_end_well_are_a_success_only_where_the_run_proves_it()
    {
        const string Script = "echo $RANK of $WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT, $LOCAL_RANK, $TERM";
        Assert.Equal(ExitCode.Success, await Run(2, 0, Script, isDone: true));
        Assert.Equal("", _terminal.ToString());
        Assert.Matches(@"^[^\n]+: start 1, rank 1 of 2, host \S+, pid \d+\n1 of 2 at 127\.0\.0\.1:\d+, 1, dumb\n$", Log(1));

        Assert.Equal(ExitCode.Failure, await Run(2, 0, Script, isDone: false));
        Assert.Contains("finished.json does not prove that all is done", _terminal.ToString(), StringComparison.Ordinal);
    }

    [Fact(SkipUnless = nameof(HasShell), Skip = "a shell is needed")]
    public async Task A_rank_that_is_killed_is_named_and_the_others_are_ended()
    {
        int code = await Run(3, 0, "if [ $RANK = 1 ]; then kill -9 $$; fi; if [ $RANK = 0 ]; then exit 3; fi; exec sleep 600", isDone: true);

        Assert.Equal(128 + 9, code);
        Assert.Matches(@"^rank 1 \(host \S+, pid \d+\): signal 9 ended it \(\S+00001\.log\)\n$", _terminal.ToString());
        AssertGone(2);
    }

    [Fact(SkipUnless = nameof(HasShell), Skip = "a shell is needed")]
    public async Task What_a_killed_rank_was_doing_is_told_from_its_heartbeat()
    {
        string heartbeat = """{"rank":1,"size":2,"host":"a","pid":'$$',"step":12,"operation":"all-gather","operations":7,"since":"2026-01-02T03:04:05Z","time":"2026-01-02T03:04:06Z"}""";
        await Run(2, 0, $"if [ $RANK = 1 ]; then echo '{heartbeat}' > '{Heartbeat.PathOf(_folder["run"], 1)}'; kill -9 $$; fi; exit 3", isDone: false);

        Assert.Matches(@"^rank 1 \(host a, pid \d+\) is in step 12 since 03:04:05Z, waiting in all-gather; signal 9 ended it", _terminal.ToString());
    }

    [Fact(SkipUnless = nameof(HasShell), Skip = "a shell is needed")]
    public async Task A_mistake_of_the_user_is_told_once_and_not_tried_again()
    {
        int code = await Run(2, 5, "if [ $RANK = 1 ]; then echo 'error: no such file' >&2; exit 2; fi; exit 3", isDone: false);
        Assert.Equal(ExitCode.UserError, code);
        Assert.Matches(@"^error: no such file \(rank 1, \S+00001\.log\)\n$", _terminal.ToString());

        // The first rank's standard error is the terminal's: it has said it there.
        _terminal.GetStringBuilder().Clear();
        Assert.Equal(ExitCode.UserError, await Run(2, 5, "echo 'error: no such file' >&2; exit 2", isDone: false));
        Assert.Equal("", _terminal.ToString());
    }

    [Fact(SkipUnless = nameof(HasShell), Skip = "a shell is needed")]
    public async Task A_defect_of_a_rank_is_told_with_its_last_line()
    {
        Assert.Equal(70, await Run(2, 0, "if [ $RANK = 1 ]; then echo first >&2; echo last >&2; exit 70; fi; exit 3", isDone: false));
        Assert.Matches(@"^rank 1 \(host \S+, pid \d+\): it ended with exit code 70: last \(\S+00001\.log\)\n$", _terminal.ToString());
    }

    [Fact(SkipUnless = nameof(HasShell), Skip = "a shell is needed")]
    public async Task A_rank_that_hangs_is_ended_when_another_says_so()
    {
        int code = await Run(2, 0, "if [ $RANK = 1 ]; then echo rank 0 is late >&2; exit 3; fi; trap '' TERM; exec sleep 600", isDone: false);

        Assert.Equal(ExitCode.RanksLost, code);
        Assert.Matches(@"^rank 0 is late \(rank 1, \S+00001\.log\)\n$", _terminal.ToString());
    }

    [Fact(SkipUnless = nameof(HasShell), Skip = "a shell is needed")]
    public async Task Ranks_are_started_again_as_often_as_allowed()
    {
        string script = $"if [ $RANK = 1 ]; then echo $MASTER_PORT $TINYLLAMA_RUN_ID >> '{_folder["starts"]}'; kill -9 $$; fi; exec sleep 600";
        Assert.Equal(128 + 9, await Run(2, 2, script, isDone: false));

        string[] starts = File.ReadAllLines(_folder["starts"]);
        Assert.Equal(3, starts.Length);
        Assert.Equal(3, starts.Select(static line => line.Split(' ')[1]).Distinct().Count());
        Assert.Equal(["start 1", "start 2", "start 3"], StartNumber().Matches(Log(1)).Select(static match => match.Value));
        Assert.Contains("starting all ranks again; 1 restarts left", _terminal.ToString(), StringComparison.Ordinal);
        Assert.DoesNotContain("-1 restarts", _terminal.ToString(), StringComparison.Ordinal);
    }

    [Fact(SkipUnless = nameof(HasShell), Skip = "a shell is needed")]
    public async Task Ranks_go_on_after_a_restart()
    {
        string script = $"if [ $RANK = 1 ] && [ ! -e '{_folder["again"]}' ]; then touch '{_folder["again"]}'; kill -9 $$; fi; if [ -e '{_folder["again"]}' ]; then exit 0; fi; exit 3";
        Assert.Equal(ExitCode.Success, await Run(2, 1, script, isDone: true));
    }

    [Fact(SkipUnless = nameof(HasShell), Skip = "a shell is needed")]
    public async Task A_stop_reaches_every_rank_and_nothing_is_started_again()
    {
        using var stop = new CancellationTokenSource();
        Task<int> running = Run(2, 3, "read line; echo stopped; exit 130", isDone: false, stop.Token);
        await stop.CancelAsync();
        Assert.Equal(ExitCode.Stopped, await running);
        Assert.EndsWith("stopped\n", Log(1), StringComparison.Ordinal);
    }

    [Fact]
    public void A_rank_saves_and_ends_when_asked_through_the_pipe()
    {
        using Process rank = StartRank();
        rank.StandardInput.WriteLine();
        Assert.True(rank.WaitForExit(60_000));
        Assert.Equal(ExitCode.Stopped, rank.ExitCode);
    }

    [Fact]
    public void A_rank_does_not_outlive_its_supervisor()
    {
        using Process rank = StartRank();
        rank.StandardInput.Close();
        Assert.True(rank.WaitForExit(60_000));
        Assert.Equal(ExitCode.RanksLost, rank.ExitCode);
    }

    /// <summary>The program itself as a rank, whose supervisor is this test; it trains when this returns.</summary>
    private Process StartRank()
    {
        TinyRun.Prepare(_folder, steps: 1_000_000);
        var start = new ProcessStartInfo("dotnet", [typeof(CommandLine).Assembly.Location, "pretrain", "--recipe", _folder["tiny.yaml"], "--out", _folder["run"]])
        {
            UseShellExecute = false,
            RedirectStandardInput = true,
            RedirectStandardError = true,
            RedirectStandardOutput = true,
        };
        start.Environment["TINYLLAMA_SUPERVISED"] = "1";
        Process rank = Process.Start(start)!;
        Assert.Contains("parameters", rank.StandardError.ReadLine(), StringComparison.Ordinal);
        _ = rank.StandardError.ReadToEndAsync();
        _ = rank.StandardOutput.ReadToEndAsync();
        return rank;
    }

    private Task<int> Run(int ranks, int restarts, string script, bool isDone, CancellationToken stop = default)
    {
        string entry = $"echo $$ > '{_folder["pid"]}'$RANK; {script}";
        var supervisor = new RankSupervisor(ranks, restarts, _folder["run"], EndRecord.FileName, () => new ProcessStartInfo("sh", ["-c", entry]), () => isDone, _terminal)
        {
            Grace = TimeSpan.FromSeconds(1),
        };
        return supervisor.RunAsync(stop);
    }

    private string Log(int rank) => File.ReadAllText(Heartbeat.PathOf(_folder["run"], rank, "log"));

    private void AssertGone(int rank)
    {
        int pid = int.Parse(File.ReadAllText(_folder[$"pid{rank}"]), System.Globalization.CultureInfo.InvariantCulture);
        Assert.Throws<ArgumentException>(() => Process.GetProcessById(pid));
    }

    [GeneratedRegex(@"start \d", RegexOptions.ExplicitCapture, 1000)]
    private static partial Regex StartNumber();
}
