using System.Diagnostics;
using System.Net;
using System.Text.Json.Nodes;

namespace TinyLlama.Server.Tests;

/// <summary>The command as a process: what is served is asked, measured and ended by signals.</summary>
public sealed class CommandTests : IDisposable
{
    private const string Endless = """{"prompt":"the weather","max_tokens":15000,"temperature":0,"stream":true}""";

    private readonly List<Process> _processes = [];

    private static CancellationToken Stop => TestContext.Current.CancellationToken;

    public void Dispose()
    {
        foreach (Process process in _processes)
        {
            process.Kill();
            process.Dispose();
        }
    }

    [Fact]
    public async Task Sigterm_finishes_what_runs_and_refuses_the_rest()
    {
        (Process server, HttpClient http) = await ServeAsync("--max-tokens", "2000");
        using HttpResponseMessage reply = await http.SendAsync(Ask(), HttpCompletionOption.ResponseHeadersRead, Stop);
        using var events = new StreamReader(await reply.Content.ReadAsStreamAsync(Stop));
        Assert.StartsWith("data: {", await events.ReadLineAsync(Stop), StringComparison.Ordinal);
        await SignalAsync(server, "TERM");
        Assert.Equal("stopping; once more to abort", await server.StandardError.ReadLineAsync(Stop));
        using var other = new HttpClient { BaseAddress = http.BaseAddress };
        try
        {
            // The line is written as the signal comes, just before the server ends.
            HttpStatusCode health;
            do
            {
                health = (await other.GetAsync(new Uri("health", UriKind.Relative), Stop)).StatusCode;
            }
            while (health == HttpStatusCode.OK);

            Assert.Equal(HttpStatusCode.ServiceUnavailable, health);
            Assert.Equal(HttpStatusCode.ServiceUnavailable, (await other.SendAsync(Ask(), Stop)).StatusCode);
        }
        catch (HttpRequestException)
        {
            // Nobody listens any more.
        }

        string rest = await events.ReadToEndAsync(Stop);
        Assert.Contains("\"finish_reason\":\"length\"", rest, StringComparison.Ordinal);
        Assert.EndsWith("data: [DONE]\n\n", rest, StringComparison.Ordinal);
        await server.WaitForExitAsync(Stop);
        Assert.Equal(0, server.ExitCode);
    }

    [Theory]
    [InlineData("INT")]
    [InlineData("TERM")]
    public async Task A_second_signal_ends_at_once(string first)
    {
        Assert.SkipWhen(first == "INT" && IgnoresInterrupts(), "a job in the background ignores SIGINT");
        (Process server, HttpClient http) = await ServeAsync();
        using HttpResponseMessage reply = await http.SendAsync(Ask(), HttpCompletionOption.ResponseHeadersRead, Stop);
        await SignalAsync(server, first);
        Assert.Equal("stopping; once more to abort", await server.StandardError.ReadLineAsync(Stop));
        await SignalAsync(server, "TERM");
        await server.WaitForExitAsync(Stop);
        Assert.Equal(128 + 15, server.ExitCode);
        await Assert.ThrowsAsync<HttpRequestException>(() => reply.Content.CopyToAsync(Stream.Null, Stop));
    }

    [Fact]
    public async Task An_address_in_use_is_told_in_a_line()
    {
        (_, HttpClient http) = await ServeAsync();
        (int code, string output, string error) = await RunAsync(["serve", TestModel.Folder, "--chat-template", "zephyr", "--port", $"{http.BaseAddress!.Port}"]);
        Assert.Equal((2, ""), (code, output));
        Assert.Equal($"error: cannot listen to 127.0.0.1:{http.BaseAddress.Port}: Address already in use; --host and --port choose another address\n", error);
    }

    [Fact]
    public async Task Clients_are_measured_at_a_server_of_their_own_and_at_another()
    {
        JsonArray rounds = await MeasureAsync(TestModel.Folder, "--clients", "1,3", "--threads", "1");
        Assert.Equal([1, 3], rounds.Select(round => (int)round!["clients"]!));
        Assert.Equal([2, 6], rounds.Select(round => (int)round!["requests"]!));
        Assert.All(rounds, round =>
        {
            double Value(string key) => (double)round![key]!;
            Assert.Equal(0, Value("failed"));
            Assert.InRange(Value("median_first_token_seconds"), double.Epsilon, Value("p95_first_token_seconds"));
            Assert.InRange(Value("p95_first_token_seconds"), 0, Value("seconds"));
            Assert.True(Value("client_tokens_per_second") > 0);
            Assert.InRange(Math.Round(Value("tokens_per_second") * Value("seconds"), 6), 1, 5 * Value("requests"));
        });

        (_, HttpClient http) = await ServeAsync("--api-key", "secret", "--queue", "1", "--places", "1");
        Assert.Equal(0, (int)(await MeasureAsync($"{http.BaseAddress}", "--api-key", "secret", "--clients", "1"))[0]!["failed"]!);
        (int code, string output, string error) = await RunAsync(["bench", "serve", $"{http.BaseAddress}", "--api-key", "secret", "--clients", "8", "--tokens", "300", "--prompt", "5"]);
        Assert.Equal(1, code);
        Assert.Equal(2, output.TrimEnd().Split('\n').Length);
        Assert.Contains("requests failed: 429", error, StringComparison.Ordinal);

        async Task<JsonArray> MeasureAsync(params string[] arguments)
        {
            (int code, string output, string error) = await RunAsync(
                ["bench", "serve", "--requests", "2", "--prompt", "7", "--tokens", "5", "--json", .. arguments]);
            Assert.Equal((0, ""), (code, error));
            return JsonNode.Parse(output)!.AsArray();
        }
    }

    [Theory]
    [InlineData("--clients has '0', numbers above 0", "--clients", "1,0")]
    [InlineData("more than the context of 512", "--prompt", "500")]
    [InlineData("refused", "http://127.0.0.1:1/")]
    public async Task A_measurement_that_cannot_be_made_is_refused_in_a_line(string problem, params string[] arguments)
    {
        (int code, string output, string error) = await RunAsync(["bench", "serve", .. arguments[0].StartsWith("http", StringComparison.Ordinal) ? [] : (string[])[TestModel.Folder], .. arguments]);
        Assert.Equal((2, ""), (code, output));
        Assert.Contains(problem, error, StringComparison.Ordinal);
        Assert.Single(error.TrimEnd().Split('\n'));
    }

    private static HttpRequestMessage Ask() => new(HttpMethod.Post, new Uri("/v1/completions", UriKind.Relative))
    {
        Content = new StringContent(Endless, System.Text.Encoding.UTF8, "application/json"),
    };

    private static async Task SignalAsync(Process process, string signal)
    {
        Assert.SkipWhen(OperatingSystem.IsWindows(), "needs kill");
        using Process kill = System.Diagnostics.Process.Start("kill", [$"-{signal}", $"{process.Id}"]);
        await kill.WaitForExitAsync(Stop);
    }

    // Processes inherit it from a shell that put its job in the background.
    private static bool IgnoresInterrupts() => OperatingSystem.IsLinux() && File.ReadLines("/proc/self/status")
        .Where(static line => line.StartsWith("SigIgn:", StringComparison.Ordinal))
        .Any(static line => (Convert.ToUInt64(line[7..].Trim(), 16) & 0b10) != 0);

    private async Task<(Process Server, HttpClient Http)> ServeAsync(params string[] arguments)
    {
        Process server = Start(["serve", TestModel.Folder, "--port", "0", "--threads", "1", "--chat-template", "zephyr", "--ctx", "16384", .. arguments]);
        string line = await server.StandardOutput.ReadLineAsync(Stop) ?? throw new InvalidOperationException(await server.StandardError.ReadToEndAsync(Stop));
        Assert.EndsWith("is trained for 512 tokens of context; expect worse text beyond", await server.StandardError.ReadLineAsync(Stop), StringComparison.Ordinal);
        return (server, new HttpClient { BaseAddress = new Uri(line.Split(' ')[0]) });
    }

    private async Task<(int Code, string Output, string Error)> RunAsync(string[] arguments)
    {
        Process process = Start(arguments);
        Task<string> error = process.StandardError.ReadToEndAsync(Stop);
        string output = await process.StandardOutput.ReadToEndAsync(Stop);
        await process.WaitForExitAsync(Stop);
        return (process.ExitCode, output, await error);
    }

    private Process Start(string[] arguments)
    {
        var start = new ProcessStartInfo("dotnet", [Path.Combine(AppContext.BaseDirectory, "TinyLlama.Cli.dll"), .. arguments])
        {
            RedirectStandardOutput = true,
            RedirectStandardError = true,
            UseShellExecute = false,
        };
        Process process = Process.Start(start)!;
        _processes.Add(process);
        return process;
    }
}
