using System.Diagnostics;
using System.Globalization;
using System.Net.ServerSentEvents;
using System.Text;
using System.Text.Json;
using System.Text.Json.Nodes;
using TinyLlama.Data;

namespace TinyLlama.Cli.Bench;

/// <summary>What each client of a server asks for.</summary>
/// <param name="Requests">Requests of a client, each sent when the one before is answered.</param>
/// <param name="PromptTokens">Random tokens of each prompt.</param>
/// <param name="NewTokens">Tokens asked for after them.</param>
internal readonly record struct ServeLoad(int Requests, int PromptTokens, int NewTokens);

/// <summary>How a request went.</summary>
/// <param name="FirstToken">Seconds from sending it to the first event of its stream.</param>
/// <param name="Seconds">Seconds from sending it to the end of its stream.</param>
/// <param name="Tokens">Tokens that came.</param>
/// <param name="Failure">Why it failed, or null.</param>
internal sealed record ServedRequest(double FirstToken, double Seconds, int Tokens, string? Failure = null);

/// <summary>How the requests of clients went that ran at the same time.</summary>
/// <param name="Clients">The number of clients.</param>
/// <param name="Seconds">Seconds from the first request to the last end.</param>
/// <param name="Requests">All their requests.</param>
internal sealed record ServeRound(int Clients, double Seconds, IReadOnlyList<ServedRequest> Requests)
{
    /// <summary>Gets the requests that failed.</summary>
    public IEnumerable<ServedRequest> Failed => Requests.Where(static request => request.Failure is not null);

    /// <summary>Gets the tokens that came in a second, of all clients together.</summary>
    public double TokensPerSecond => Answered.Sum(static request => request.Tokens) / Seconds;

    /// <summary>Gets the median over requests of the tokens in a second after the first one; 0 where none has two.</summary>
    public double ClientTokensPerSecond => Quantile(
        Answered.Where(static request => request.Tokens > 1).Select(static request => (request.Tokens - 1) / (request.Seconds - request.FirstToken)), 0.5);

    private IEnumerable<ServedRequest> Answered => Requests.Where(static request => request.Failure is null);

    /// <summary>The seconds within which a share of the answered requests had their first token (nearest rank); 0 where none was answered.</summary>
    public double FirstToken(double share) => Quantile(Answered.Select(static request => request.FirstToken), share);

    private static double Quantile(IEnumerable<double> values, double share)
    {
        double[] sorted = [.. values.Order()];
        return sorted.Length == 0 ? 0 : sorted[(int)Math.Ceiling(share * sorted.Length) - 1];
    }
}

/// <summary>Clients that read streams of <c>/v1/completions</c> over HTTP, as many at a time as are wanted.</summary>
internal sealed class ServeBench
{
    private readonly HttpClient _http;
    private readonly Random _random = new(1);
    private readonly string _model;
    private readonly int _vocabularySize;

    private ServeBench(HttpClient http, string model, int vocabularySize) => (_http, _model, _vocabularySize) = (http, model, vocabularySize);

    /// <summary>Asks a server what it serves.</summary>
    /// <param name="http">A client with its address, without <c>/v1</c>.</param>
    /// <param name="stop">Ends it.</param>
    /// <exception cref="UserErrorException">It does not answer, or does not tell its model and the size of its vocabulary.</exception>
    public static async Task<ServeBench> ConnectAsync(HttpClient http, CancellationToken stop)
    {
        try
        {
            JsonNode? answer = JsonNode.Parse(await http.GetStringAsync(new Uri("/v1/models", UriKind.Relative), stop));
            return answer?["data"]?.AsArray().FirstOrDefault() is { } model && (string?)model["id"] is { } name && (int?)model["meta"]?["n_vocab"] is { } size
                ? new ServeBench(http, name, size)
                : throw new UserErrorException($"{http.BaseAddress}v1/models does not tell 'id' and 'meta.n_vocab' of a model; random prompts are made with both");
        }
        catch (Exception e) when (e is HttpRequestException or JsonException or InvalidOperationException)
        {
            throw new UserErrorException($"{http.BaseAddress}: {e.Message}", e);
        }
    }

    /// <summary>Lets clients ask at the same time, each its next text as soon as it has the last.</summary>
    /// <param name="clients">Their number.</param>
    /// <param name="load">What each asks for.</param>
    /// <param name="answered">Is called after each request, from any thread.</param>
    /// <param name="stop">Ends it.</param>
    public async Task<ServeRound> RunAsync(int clients, ServeLoad load, Action answered, CancellationToken stop)
    {
        string[][] bodies = [.. Enumerable.Range(0, clients).Select(_ => Enumerable.Range(0, load.Requests).Select(_ => Body(load)).ToArray())];
        long start = Stopwatch.GetTimestamp();
        ServedRequest[][] all = await Task.WhenAll(bodies.Select(async own =>
        {
            var requests = new ServedRequest[own.Length];
            for (int i = 0; i < own.Length; i++)
            {
                requests[i] = await AskAsync(own[i], stop);
                answered();
            }

            return requests;
        }));
        return new ServeRound(clients, Stopwatch.GetElapsedTime(start).TotalSeconds, [.. all.SelectMany(static own => own)]);
    }

    // Prompts have nothing in common: none is in the server's cache.
    private string Body(ServeLoad load) => new JsonObject
    {
        ["model"] = _model,
        ["prompt"] = new JsonArray([.. Enumerable.Range(0, load.PromptTokens).Select(_ => (JsonNode)_random.Next(_vocabularySize))]),
        ["max_tokens"] = load.NewTokens,
        ["stream"] = true,
        ["stream_options"] = new JsonObject { ["include_usage"] = true },
    }.ToJsonString();

    private async Task<ServedRequest> AskAsync(string body, CancellationToken stop)
    {
        long start = Stopwatch.GetTimestamp();
        double Elapsed() => Stopwatch.GetElapsedTime(start).TotalSeconds;
        double? first = null;
        int? tokens = null;
        try
        {
            using var request = new HttpRequestMessage(HttpMethod.Post, new Uri("/v1/completions", UriKind.Relative))
            {
                Content = new StringContent(body, Encoding.UTF8, "application/json"),
            };
            using HttpResponseMessage response = await _http.SendAsync(request, HttpCompletionOption.ResponseHeadersRead, stop);
            if (!response.IsSuccessStatusCode)
            {
                JsonNode? answer = JsonNode.Parse(await response.Content.ReadAsStringAsync(stop));
                return Failed($"{(int)response.StatusCode}: {answer?["error"]?["message"]}");
            }

            await using Stream stream = await response.Content.ReadAsStreamAsync(stop);
            await foreach (SseItem<string> item in SseParser.Create(stream).EnumerateAsync(stop))
            {
                first ??= Elapsed();
                if (item.Data == "[DONE]")
                {
                    break;
                }

                JsonNode chunk = JsonNode.Parse(item.Data)!;
                if (chunk["error"] is { } error)
                {
                    return Failed($"{error["message"]}");
                }

                tokens = (int?)chunk["usage"]?["completion_tokens"] ?? tokens;
            }
        }
        catch (Exception e) when (e is HttpRequestException or IOException or JsonException)
        {
            return Failed(e.Message);
        }

        return tokens is { } came && first is { } begun ? new ServedRequest(begun, Elapsed(), came) : Failed("the stream ended before its usage");

        ServedRequest Failed(string why) => new(0, Elapsed(), 0, why);
    }

    /// <summary>Writes rounds for people.</summary>
    public static void Write(TextWriter output, IReadOnlyList<ServeRound> rounds)
    {
        output.WriteLine("clients  requests  failed  first token, s: median      p95  tokens/s: of a client   of all");
        foreach (ServeRound round in rounds)
        {
            output.WriteLine(string.Create(
                CultureInfo.InvariantCulture,
                $"{round.Clients,7} {round.Requests.Count,9} {round.Failed.Count(),7} {round.FirstToken(0.5),23:F3} {round.FirstToken(0.95),8:F3} {round.ClientTokensPerSecond,22:F1} {round.TokensPerSecond,8:F1}"));
        }
    }

    /// <summary>Rounds for <c>--json</c>.</summary>
    public static JsonArray ToJson(IReadOnlyList<ServeRound> rounds) => new([.. rounds.Select(static round => new JsonObject
    {
        ["clients"] = round.Clients,
        ["requests"] = round.Requests.Count,
        ["failed"] = round.Failed.Count(),
        ["seconds"] = round.Seconds,
        ["median_first_token_seconds"] = round.FirstToken(0.5),
        ["p95_first_token_seconds"] = round.FirstToken(0.95),
        ["client_tokens_per_second"] = round.ClientTokensPerSecond,
        ["tokens_per_second"] = round.TokensPerSecond,
    })]);
}
