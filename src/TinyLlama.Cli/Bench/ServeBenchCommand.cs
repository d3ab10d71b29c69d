using System.CommandLine;
using System.CommandLine.Parsing;
using System.Globalization;
using System.Net;
using System.Net.Http.Headers;
using Microsoft.AspNetCore.Builder;
using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Server;

namespace TinyLlama.Cli.Bench;

/// <summary><c>tinyllama bench serve</c>: clients that ask a server at the same time, one of its own or another.</summary>
internal sealed class ServeBenchCommand
{
    private readonly Argument<string> _model = new("MODEL")
    {
        Description = "A model, which is served in this process, or the address of a server, such as http://127.0.0.1:8080",
    };

    private readonly Option<int[]> _clients = new("--clients")
    {
        Description = "Clients that ask at the same time; a round for each number [default: 1,8,32]",
        HelpName = "N,N…",
        CustomParser = Counts,
    };

    private readonly Option<int?> _requests = Count("--requests", "Requests of each client, one after the other [default: 3]");
    private readonly Option<int?> _prompt = Count("--prompt", "Random tokens of a prompt [default: 128]");
    private readonly Option<int?> _tokens = Count("--tokens", "New tokens of a reply [default: 64]");
    private readonly Option<int?> _places = Count("--places", "Replies that a server of its own computes together [default: the most clients]");
    private readonly Option<string?> _key = new("--api-key") { Description = "The key of another server", HelpName = "KEY" };
    private readonly Option<Device?> _device = CommonOptions.Device();
    private readonly Option<int?> _threads = CommonOptions.Threads();
    private readonly Option<bool> _json = CommonOptions.Json();

    /// <summary>The verb.</summary>
    public static Command Create() => new ServeBenchCommand().Build();

    private static Option<int?> Count(string name, string description) =>
        CommonOptions.AtLeast(new Option<int?>(name) { Description = description, HelpName = "N" }, 1);

    private static int[] Counts(ArgumentResult result)
    {
        var counts = new List<int>();
        foreach (string word in result.Tokens.SelectMany(static token => token.Value.Split(',')))
        {
            if (!int.TryParse(word, NumberStyles.None, CultureInfo.InvariantCulture, out int count) || count == 0)
            {
                result.AddError($"--clients has '{word}', numbers above 0 with commas between them are needed");
                return [];
            }

            counts.Add(count);
        }

        return [.. counts];
    }

    private Command Build()
    {
        var command = new Command("serve", "Ask a server over HTTP and measure time to first token and tokens/s")
        {
            _model, _clients, _requests, _prompt, _tokens, _places, _key, _device, _threads, _json,
        };
        command.SetAction(RunAsync);
        return command;
    }

    private async Task<int> RunAsync(ParseResult parse, CancellationToken stop)
    {
        string model = parse.GetRequiredValue(_model);
        int[] clients = parse.GetValue(_clients) is { Length: > 0 } given ? given : [1, 8, 32];
        var load = new ServeLoad(parse.GetValue(_requests) ?? 3, parse.GetValue(_prompt) ?? 128, parse.GetValue(_tokens) ?? 64);
        if (Uri.TryCreate(model, UriKind.Absolute, out Uri? address) && address.Scheme is "http" or "https")
        {
            return await MeasureAsync(parse, address, clients, load, stop);
        }

        var options = new ServerOptions
        {
            Model = model,

            // Texts are asked for, no conversations: whether the model has a template of its own does not matter.
            ChatTemplate = "zephyr",
            Device = parse.GetValue(_device) ?? default,
            Threads = parse.GetValue(_threads) ?? 0,
            Places = parse.GetValue(_places) ?? clients.Max(),
            Queue = clients.Max(),
            Warn = line => parse.InvocationConfiguration.Error.WriteLine("warning: " + line),
        };
        await using WebApplication app = ServerHosting.Create(options, IPAddress.Loopback, 0);
        await app.StartAsync(stop);
        return await MeasureAsync(parse, new Uri(app.Urls.Single()), clients, load, stop);
    }

    private async Task<int> MeasureAsync(ParseResult parse, Uri server, int[] clients, ServeLoad load, CancellationToken stop)
    {
        using var http = new HttpClient { BaseAddress = server, Timeout = Timeout.InfiniteTimeSpan };
        http.DefaultRequestHeaders.Authorization = parse.GetValue(_key) is { } key ? new AuthenticationHeaderValue("Bearer", key) : null;
        ServeBench bench = await ServeBench.ConnectAsync(http, stop);

        // Unmeasured: code is compiled then.
        ServeRound first = await bench.RunAsync(1, load with { Requests = 1 }, static () => { }, stop);
        if (first.Failed.Any())
        {
            throw new UserErrorException($"{server}: {first.Requests[0].Failure}");
        }

        var rounds = new List<ServeRound>();
        long done = 0;
        using (ProgressDisplay progress = ProgressDisplay.Start("bench", clients.Sum() * (long)load.Requests, "requests"))
        {
            foreach (int count in clients)
            {
                rounds.Add(await bench.RunAsync(count, load, () => progress.Report(Interlocked.Increment(ref done)), stop));
            }
        }

        TextWriter output = parse.InvocationConfiguration.Output;
        if (parse.GetValue(_json))
        {
            output.WriteLine(ServeBench.ToJson(rounds).ToJsonString(JsonOutput.Options));
        }
        else
        {
            ServeBench.Write(output, rounds);
        }

        foreach (IGrouping<string?, ServedRequest> failures in rounds.SelectMany(static round => round.Failed).GroupBy(static request => request.Failure))
        {
            parse.InvocationConfiguration.Error.WriteLine($"warning: {failures.Count()} requests failed: {failures.Key}");
        }

        return rounds.Any(static round => round.Failed.Any()) ? ExitCode.Failure : ExitCode.Success;
    }
}
