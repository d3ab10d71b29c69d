using System.CommandLine;
using System.Diagnostics;
using System.Text.Json;
using TinyLlama.Cli;
using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Tests.Training;

namespace TinyLlama.Tests.Cli;

public sealed class CommandLineTests
{
    public static TheoryData<Exception, int, string[]> Endings => new()
    {
        { new UserErrorException("a.yaml:3:1: no"), 2, ["error: a.yaml:3:1: no"] },
        { new UserErrorException("one\ntwo\r\n"), 2, ["error: one", "error: two"] },
        { new UserErrorException("\u001b[31mred\a"), 2, ["error: ?[31mred?"] },
        { new DeviceException("too little memory"), 2, ["error: too little memory"] },
        { new FileNotFoundException("Could not find file '/x'."), 2, ["error: Could not find file '/x'."] },
        { new UnauthorizedAccessException("Access to '/x' is denied."), 2, ["error: Access to '/x' is denied."] },
        { new AggregateException(new AggregateException(new UserErrorException("deep"))), 2, ["error: deep"] },
    };

    [Theory]
    [MemberData(nameof(Endings))]
    public async Task What_the_user_can_mend_is_a_line_without_a_stack_trace(Exception exception, int code, string[] lines)
    {
        (int actual, string output, string error) = await Run(["fail"], _ => throw exception);
        Assert.Equal(code, actual);
        Assert.Equal("", output);
        Assert.Equal(lines, error.TrimEnd().Split(Environment.NewLine));
    }

    [Theory]
    [InlineData("env", "--nix")]
    [InlineData("generate", "missing")]
    public async Task Where_no_error_can_be_written_the_exit_code_tells(params string[] words)
    {
        using var output = new StringWriter();
        using var closed = new ClosedWriter();
        Assert.Equal(2, await CommandLine.RunAsync(Program.CreateRoot(), words, output, closed, CancellationToken.None));
        Assert.Equal("", output.ToString());
    }

    [Fact]
    public async Task Anything_else_is_a_defect_and_shows_where_it_happened()
    {
        (int code, _, string error) = await Run(["fail"], _ => throw new InvalidOperationException("broken invariant"));
        Assert.Equal(70, code);
        Assert.Contains("please report it", error, StringComparison.Ordinal);
        Assert.Contains("broken invariant", error, StringComparison.Ordinal);
        Assert.Contains(nameof(Anything_else_is_a_defect_and_shows_where_it_happened), error, StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_cancelled_verb_was_stopped_only_if_somebody_asked_for_it()
    {
        using var stop = new CancellationTokenSource();
        await stop.CancelAsync();
        (int code, _, string error) = await Run(["fail"], token => throw new OperationCanceledException(token), stop.Token);
        Assert.Equal((130, "stopped"), (code, error.Trim()));

        (code, _, _) = await Run(["fail"], _ => throw new OperationCanceledException());
        Assert.Equal(70, code);
    }

    [Fact]
    public async Task A_verb_returns_its_own_exit_code() => Assert.Equal(1, (await Run(["fail"], _ => 1)).Code);

    [Theory]
    [InlineData("nix", "error: Unrecognized command or argument 'nix'; see 'tinyllama --help'")]
    [InlineData("env --nix", "error: Unrecognized command or argument '--nix'; see 'tinyllama env --help'")]
    public async Task A_wrong_word_is_a_line_that_says_where_help_is(string words, string line)
    {
        (int code, string output, string error) = await Run(words.Split(' '), _ => 0);
        Assert.Equal((2, "", line), (code, output, error.TrimEnd()));
    }

    [Theory]
    [InlineData("--threads 0", "--threads is 0, which is less than 1")]
    [InlineData("--threads x", "--threads is 'x', a whole number is needed")]
    [InlineData("--threads 1.5", "--threads is '1.5', a whole number is needed")]
    [InlineData("--threads 99999999999", "--threads is 99999999999, which is out of range")]
    [InlineData("--max-steps x", "--max-steps is 'x', a whole number is needed")]
    [InlineData("--temperature x", "--temperature is 'x', a number is needed")]
    [InlineData("--temperature 0,5", "--temperature is '0,5', a number is needed")]
    [InlineData("--temperature -1", "--temperature is -1, which is less than 0")]
    [InlineData("--ctx 0", "--ctx is 0, which is less than 1")]
    [InlineData("--max-tokens -1", "--max-tokens is -1, which is less than 0")]
    [InlineData("--max-steps -1", "--max-steps is -1, which is less than 0")]
    [InlineData("--device gpu", "use cpu, cuda, cuda:N or auto")]
    [InlineData("--seed -1", "--seed is -1, which is out of range")]
    public async Task A_number_out_of_range_is_refused(string words, string message)
    {
        (int code, _, string error) = await Run(["fail", .. words.Split(' ')], _ => 0);
        Assert.Equal(2, code);
        Assert.Contains(message, error, StringComparison.Ordinal);
        Assert.Single(error.TrimEnd().Split('\n'));
    }

    [Fact]
    public async Task Without_words_it_shows_the_verbs()
    {
        (int code, string output, _) = await Run([], _ => 0);
        Assert.Equal(0, code);
        Assert.Contains("presets", output, StringComparison.Ordinal);
    }

    [Fact]
    public async Task Presets_and_env_speak_JSON()
    {
        using JsonDocument presets = JsonDocument.Parse((await Run(["presets", "--json"], _ => 0)).Output);
        Assert.Contains(presets.RootElement.EnumerateArray(), preset => preset.GetProperty("parameters").GetInt64() == 1_100_048_384);

        // In a process of its own: a process looks for NVIDIA's libraries once, and the emulator may come later in this one.
        (int code, string said) = TinyRun.End(TinyRun.Launch([], ["env", "--json"]));
        Assert.Equal(0, code);
        using JsonDocument env = JsonDocument.Parse(said);
        Assert.Equal(Environment.ProcessorCount, env.RootElement.GetProperty("cores").GetInt32());
    }

    [Fact]
    public async Task The_program_itself_ends_with_2_and_one_line_on_standard_error()
    {
        var start = new ProcessStartInfo("dotnet", [Path.Combine(AppContext.BaseDirectory, "TinyLlama.Cli.dll"), "env", "--nix"])
        {
            UseShellExecute = false,
            RedirectStandardError = true,
            RedirectStandardOutput = true,
        };
        using Process process = Process.Start(start)!;
        Task<string> output = process.StandardOutput.ReadToEndAsync();
        string error = await process.StandardError.ReadToEndAsync();
        await process.WaitForExitAsync();
        Assert.Equal(2, process.ExitCode);
        Assert.Equal("", await output);
        Assert.StartsWith("error: ", Assert.Single(error.TrimEnd().Split('\n')), StringComparison.Ordinal);
    }

    [Theory]
    [InlineData(50, 200, 10, "", "encode: 25 % · 50 rows · 5.0 rows/s · 30 s left")]
    [InlineData(50, 0, 10, "loss 3.2", "encode: 50 rows · 5.0 rows/s · loss 3.2")]
    [InlineData(0, 200, 10, "", "encode: 0 % · 0 rows")]
    [InlineData(200, 200, 10, "", "encode: 100 % · 200 rows · 20 rows/s")]
    [InlineData(100, 1_000_000, 100, "", "encode: 0 % · 100 rows · 1.0 rows/s · 11 d 13 h left")]
    public void Progress_says_share_rate_and_time_left(long done, long total, double seconds, string detail, string line) =>
        Assert.Equal(line, ProgressDisplay.Describe("encode", done, total, "rows", TimeSpan.FromSeconds(seconds), detail));

    /// <summary>Runs the command with one verb more, <c>fail</c>, that does what a test wants.</summary>
    private static async Task<(int Code, string Output, string Error)> Run(
        string[] words, Func<CancellationToken, int> verb, CancellationToken stop = default)
    {
        var fail = new Command("fail")
        {
            CommonOptions.Threads(), CommonOptions.Temperature(), CommonOptions.Context(), CommonOptions.Device(),
            CommonOptions.MaxTokens(""), CommonOptions.MaxSteps(), CommonOptions.Seed(),
        };
        fail.SetAction((_, token) => Task.FromResult(verb(token)));
        RootCommand root = Program.CreateRoot();
        root.Add(fail);
        using var output = new StringWriter();
        using var error = new StringWriter();
        int code = await CommandLine.RunAsync(root, words, output, error, stop);
        return (code, output.ToString(), error.ToString());
    }

    /// <summary>A standard error that is closed.</summary>
    private sealed class ClosedWriter : StringWriter
    {
        public override void Write(char value) => throw new UnauthorizedAccessException("Bad file descriptor");

        public override void Write(string? value) => throw new UnauthorizedAccessException("Bad file descriptor");

        public override void WriteLine(string? value) => throw new UnauthorizedAccessException("Bad file descriptor");
    }
}
