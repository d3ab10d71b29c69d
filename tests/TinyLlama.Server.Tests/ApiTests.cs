using System.Net;
using System.Net.Http.Headers;
using System.Net.Http.Json;
using System.Net.Sockets;
using System.Text;
using System.Text.Json.Nodes;

namespace TinyLlama.Server.Tests;

/// <summary>What goes over the wire, and what a client can do wrong.</summary>
public sealed class ApiTests
{
    private const string Chat = "/v1/chat/completions";
    private const string Text = "/v1/completions";
    private const string Embeddings = "/v1/embeddings";

    private static CancellationToken Stop => TestContext.Current.CancellationToken;

    [Fact]
    public async Task Events_are_those_of_the_protocol_to_the_byte()
    {
        await using RunningServer server = await RunningServer.StartAsync();
        const string Request = """{"model":"random","messages":[{"role":"user","content":"hi"}],"max_tokens":2,"temperature":0,"stream":true,"stream_options":{"include_usage":true}}""";
        using var content = new StringContent(Request, Encoding.UTF8, "application/json");
        using HttpResponseMessage response = await server.Http.PostAsync(new Uri(Chat, UriKind.Relative), content, Stop);
        Assert.Equal("text/event-stream", response.Content.Headers.ContentType!.MediaType);
        string[] events = (await response.Content.ReadAsStringAsync(Stop)).Split("\n\n");
        Assert.Equal("", events[^1]);
        Assert.Equal("data: [DONE]", events[^2]);
        JsonNode[] chunks = [.. events[..^2].Select(line => JsonNode.Parse(line["data: ".Length..])!)];
        Assert.All(chunks, chunk => Assert.Equal("chat.completion.chunk", (string)chunk["object"]!));
        Assert.Equal("""{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}""", chunks[0]["choices"]![0]!.ToJsonString());
        Assert.Equal("""{"index":0,"delta":{},"finish_reason":"length"}""", chunks[^2]["choices"]![0]!.ToJsonString());
        Assert.Empty(chunks[^1]["choices"]!.AsArray());
        Assert.Equal(2, (int)chunks[^1]["usage"]!["completion_tokens"]!);
        Assert.Single(chunks.Select(chunk => (string)chunk["id"]!).Distinct());
    }

    [Fact]
    public async Task Completions_take_texts_and_tokens_and_can_echo()
    {
        await using RunningServer server = await RunningServer.StartAsync();
        (_, JsonNode tokens) = await server.PostAsync("/tokenize", """{"content":"the weather","add_special":true}""");
        string ids = tokens["tokens"]!.ToJsonString();
        (_, JsonNode text) = await server.PostAsync("/detokenize", $$"""{"tokens":{{ids}}}""");
        Assert.Equal("the weather", (string)text["content"]!);
        async Task<string[]> Complete(string prompt, string more = "") =>
            [.. (await server.PostAsync(Text, $$"""{"prompt":{{prompt}},"max_tokens":8,"temperature":0{{more}}}""")).Body["choices"]!.AsArray().Select(choice => (string)choice!["text"]!)];
        string[] reply = await Complete("\"the weather\"");
        Assert.Single(reply);
        Assert.Equal(reply, await Complete(ids));
        Assert.Equal(["the weather" + reply[0]], await Complete(ids, ",\"echo\":true"));
        string[] both = await Complete("[\"the weather\", \"today\"]", ",\"n\":2");
        Assert.Equal([reply[0], reply[0]], both[..2]);
        Assert.Equal(4, both.Length);
        Assert.Equal(both[2], both[3]);
        Assert.NotEqual(both[0], both[2]);
    }

    [Fact]
    public async Task Completions_tell_log_probabilities_by_token_and_place()
    {
        await using RunningServer server = await RunningServer.StartAsync();
        (_, JsonNode reply) = await server.PostAsync(Text, """{"prompt":"the","max_tokens":10,"temperature":0,"logprobs":2}""");
        JsonNode choice = reply["choices"]![0]!;
        JsonNode logprobs = choice["logprobs"]!;
        Assert.Equal([10, 10, 10, 10], (int[])[.. ((string[])["tokens", "token_logprobs", "top_logprobs", "text_offset"]).Select(key => logprobs[key]!.AsArray().Count)]);
        Assert.Equal(0, (int)logprobs["text_offset"]![0]!);
        Assert.InRange((int)logprobs["text_offset"]![9]!, 0, ((string)choice["text"]!).Length);
        double largest = logprobs["top_logprobs"]![3]!.AsObject().Max(pair => (double)pair.Value!);
        Assert.Equal(largest, (double)logprobs["token_logprobs"]![3]!);
    }

    [Fact]
    public async Task Several_replies_have_seeds_of_their_own()
    {
        await using RunningServer server = await RunningServer.StartAsync();
        (_, JsonNode reply) = await server.PostAsync(Chat, """{"messages":[{"role":"user","content":"hi"}],"max_completion_tokens":12,"n":3,"seed":7}""");
        string[] texts = [.. reply["choices"]!.AsArray().Select(choice => (string)choice!["message"]!["content"]!)];
        Assert.Equal(3, texts.Distinct().Count());
        Assert.Equal([0, 1, 2], reply["choices"]!.AsArray().Select(choice => (int)choice!["index"]!));
        Assert.Equal(36, (int)reply["usage"]!["completion_tokens"]!);
        (_, JsonNode second) = await server.PostAsync(Chat, """{"messages":[{"role":"user","content":"hi"}],"max_completion_tokens":12,"seed":8}""");
        Assert.Equal(texts[1], (string)second["choices"]![0]!["message"]!["content"]!);
    }

    [Theory]
    [InlineData(Chat, "{", 400, "line 1", null)]
    [InlineData(Chat, "[]", 400, "no JSON object", null)]
    [InlineData(Chat, "null", 400, "null", null)]
    [InlineData(Chat, "{}", 400, "'messages' is missing", "messages")]
    [InlineData(Chat, """{"messages":[]}""", 400, "'messages' is missing or empty", "messages")]
    [InlineData(Chat, """{"messages":[null]}""", 400, "role' is missing", "messages[0].role")]
    [InlineData(Chat, """{"messages":"hi"}""", 400, "'messages' is of the wrong type", "messages")]
    [InlineData(Chat, """{"messages":[{"role":"robot","content":"x"}]}""", 400, "'robot'", "messages[0].role")]
    [InlineData(Chat, """{"messages":[{"role":"user","content":5}]}""", 400, "must be a string", "messages[0].content")]
    [InlineData(Chat, """{"messages":[{"role":"user","content":"\ud800"}]}""", 400, "not sound Unicode", "messages[0].content")]
    [InlineData(Chat, """{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}""", 400, "only text", "messages[0].content")]
    [InlineData(Chat, """{"messages":[{"role":"user","content":"x"}],"temperature":"hot"}""", 400, "'temperature' is of the wrong type", "temperature")]
    [InlineData(Chat, """{"messages":[{"role":"user","content":"x"}],"temperature":-1}""", 400, "temperature is -1", "temperature")]
    [InlineData(Chat, """{"messages":[{"role":"user","content":"x"}],"top_p":0}""", 400, "top-p is 0", "top_p")]
    [InlineData(Chat, """{"messages":[{"role":"user","content":"x"}],"n":1000}""", 400, "'n' is 1000", "n")]
    [InlineData(Chat, """{"messages":[{"role":"user","content":"x"}],"stop":[1]}""", 400, "'stop' must be", "stop")]
    [InlineData(Chat, """{"messages":[{"role":"user","content":"x"}],"stop":""}""", 400, "a stop string is empty", "stop")]
    [InlineData(Chat, """{"messages":[{"role":"user","content":"x"}],"logit_bias":{"a":1}}""", 400, "'logit_bias' has 'a'", "logit_bias")]
    [InlineData(Chat, """{"messages":[{"role":"user","content":"x"}],"logit_bias":{"99999":1}}""", 400, "the token 99999", "logit_bias")]
    [InlineData(Chat, """{"messages":[{"role":"user","content":"x"}],"top_logprobs":2}""", 400, "'top_logprobs'", "top_logprobs")]
    [InlineData(Chat, """{"messages":[{"role":"user","content":"x"}],"max_tokens":-1}""", 400, "max tokens is -1", "max_tokens")]
    [InlineData(Chat, """{"messages":[{"role":"user","content":"x"}],"max_tokens":9999999999}""", 400, "'max_tokens' is of the wrong type", "max_tokens")]
    [InlineData(Chat, """{"messages":[{"role":"user","content":"x"}],"tools":[{"type":"function"}]}""", 400, "tools are not supported", "tools")]
    [InlineData(Chat, """{"messages":[{"role":"user","content":"x"}],"response_format":{"type":"xml"}}""", 400, "'xml' is not supported", "response_format")]
    [InlineData(Chat, """{"messages":[{"role":"user","content":"x"}],"response_format":{"type":"json_schema"}}""", 400, "schema' is missing", "response_format")]
    [InlineData(Chat, """{"messages":[{"role":"user","content":"x"}],"response_format":{"type":"json_schema","json_schema":{"schema":{"pattern":"a"}}}}""", 400, "pattern", "response_format")]
    [InlineData(Chat, """{"messages":[{"role":"user","content":"x"}],"grammar":"root ::= \"yes\""}""", 400, "'grammar' is not supported", "grammar")]
    [InlineData(Chat, """{"messages":[{"role":"user","content":"x"}],"ignore_eos":false,"min_tokens":0,"guided_json":{}}""", 400, "'guided_json' is not supported", "guided_json")]
    [InlineData(Chat, """{"messages":[{"role":"user","content":"x"}],"best_of":1,"repeat_penalty":1.1}""", 400, "it is 'repetition_penalty' here", "repeat_penalty")]
    [InlineData(Chat, """{"messages":[{"role":"user","content":"x"}],"grammar":"\ud800"}""", 400, "'grammar' is not supported", "grammar")]
    [InlineData(Text, """{"prompt":"x","stop_token_ids":[5]}""", 400, "'stop_token_ids' is not supported", "stop_token_ids")]
    [InlineData(Chat, """{"model":"other","messages":[{"role":"user","content":"x"}]}""", 404, "'random' is served", "model")]
    [InlineData(Text, """{"prompt":[]}""", 400, "'prompt' must be", "prompt")]
    [InlineData(Text, """{"prompt":[1,"a"]}""", 400, "what is no token", "prompt")]
    [InlineData(Text, """{"prompt":[[1],[99999]]}""", 400, "what is no token", "prompt")]
    [InlineData(Text, """{"prompt":"x","suffix":"y"}""", 400, "'suffix' is not supported", "suffix")]
    [InlineData(Embeddings, "{}", 400, "'input' must be", "input")]
    [InlineData(Embeddings, """{"input":"x","encoding_format":"int8"}""", 400, "it must be float or base64", "encoding_format")]
    [InlineData(Embeddings, """{"input":"x","dimensions":8}""", 400, "'dimensions' is not supported", "dimensions")]
    [InlineData(Embeddings, """{"input":[[99999]]}""", 400, "what is no token", "input")]
    [InlineData(Embeddings, """{"input":"x","model":"other"}""", 404, "'random' is served", "model")]
    [InlineData("/detokenize", """{"tokens":[-1]}""", 400, "what is no token", "tokens")]
    [InlineData("/tokenize", "{}", 400, "'content' is missing", "content")]
    [InlineData("/v1/audio", "{}", 404, "nothing at POST /v1/audio", null)]
    public async Task Mistakes_are_told_with_their_key(string route, string json, int status, string message, string? param)
    {
        await using RunningServer server = await RunningServer.StartAsync();
        (HttpStatusCode code, JsonNode body) = await server.PostAsync(route, json);
        Assert.Equal(status, (int)code);
        Assert.Contains(message, (string)body["error"]!["message"]!, StringComparison.Ordinal);
        Assert.Equal("invalid_request_error", (string)body["error"]!["type"]!);
        Assert.Equal(param, (string?)body["error"]!["param"]);
    }

    [Fact]
    public async Task Too_long_and_too_large_and_undecodable_requests_are_refused()
    {
        await using RunningServer server = await RunningServer.StartAsync(options => options.MaxBodyBytes = 100_000);
        string Long(int characters) => $$"""{"messages":[{"role":"user","content":"{{new string('x', characters)}}"}]}""";
        (HttpStatusCode code, JsonNode body) = await server.PostAsync(Chat, Long(50_000));
        Assert.Equal((HttpStatusCode.BadRequest, "context_length_exceeded"), (code, (string)body["error"]!["code"]!));
        (code, body) = await server.PostAsync(Embeddings, $$"""{"input":["short","{{new string('x', 5000)}}"]}""");
        Assert.Equal((HttpStatusCode.BadRequest, "context_length_exceeded"), (code, (string)body["error"]!["code"]!));
        (code, body) = await server.PostAsync(Chat, Long(200_000));
        Assert.Equal((HttpStatusCode.RequestEntityTooLarge, "request_too_large"), (code, (string)body["error"]!["code"]!));

        using var bytes = new ByteArrayContent([.. """{"messages":[{"role":"user","content":"""u8, (byte)'"', 0xFF, 0xFE, .. "\"}]}"u8]);
        bytes.Headers.ContentType = new MediaTypeHeaderValue("application/json");
        using HttpResponseMessage undecodable = await server.Http.PostAsync(new Uri(Chat, UriKind.Relative), bytes, Stop);
        Assert.Equal(HttpStatusCode.BadRequest, undecodable.StatusCode);

        using var form = new StringContent(Long(1), Encoding.UTF8, "text/plain");
        using HttpResponseMessage plain = await server.Http.PostAsync(new Uri(Chat, UriKind.Relative), form, Stop);
        Assert.Contains("application/json", await plain.Content.ReadAsStringAsync(Stop), StringComparison.Ordinal);
        Assert.Equal(HttpStatusCode.BadRequest, plain.StatusCode);
    }

    [Fact]
    public async Task Errors_are_readable_and_name_the_method_that_a_route_has()
    {
        await using RunningServer server = await RunningServer.StartAsync(options => options.Name = "org/größe-1.1b");
        async Task<(int Status, string Allow, string Body)> Ask(string method, string path)
        {
            using var request = new HttpRequestMessage(new HttpMethod(method), new Uri(path, UriKind.Relative));
            using HttpResponseMessage response = await server.Http.SendAsync(request, Stop);
            return ((int)response.StatusCode, string.Join(' ', response.Content.Headers.Allow), await response.Content.ReadAsStringAsync(Stop));
        }

        Assert.Contains("\"there is no model 'nix'; 'org/größe-1.1b' is served\"", (await Ask("GET", "/v1/models/nix")).Body, StringComparison.Ordinal);
        Assert.Equal(200, (await Ask("GET", "/v1/models/org/größe-1.1b")).Status);
        Assert.Equal(200, (await Ask("GET", "/v1/models/org%2Fgr%C3%B6%C3%9Fe-1.1b")).Status);
        (int status, string allow, string body) = await Ask("GET", Chat);
        Assert.Equal((405, "POST"), (status, allow));
        Assert.Contains($"{Chat} is asked with POST, not GET", body, StringComparison.Ordinal);
        Assert.Equal((200, "", ""), await Ask("HEAD", "/health"));
        Assert.Equal((200, "", ""), await Ask("HEAD", "/"));
        (status, _, body) = await Ask("GET", "/nothing.txt");
        Assert.Equal(404, status);
        Assert.Contains("there is nothing at GET /nothing.txt", body, StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_model_in_a_folder_has_its_whole_name()
    {
        string root = Directory.CreateTempSubdirectory("tinyllama-test-").FullName;
        try
        {
            string folder = Directory.CreateDirectory(Path.Combine(root, "TinyLlama-1.1B-Chat-v1.0")).FullName;
            foreach (string file in Directory.GetFiles(TestModel.Folder))
            {
                File.Copy(file, Path.Combine(folder, Path.GetFileName(file)));
            }

            await using RunningServer server = await RunningServer.StartAsync(options => options.Model = folder + "/");
            Assert.Equal("TinyLlama-1.1B-Chat-v1.0", server.Model.Name);
        }
        finally
        {
            Directory.Delete(root, recursive: true);
        }
    }

    [Theory]
    [InlineData("example.com")]
    [InlineData("https://example.com/page")]
    public void What_is_no_origin_is_refused(string origin)
    {
        var options = new ServerOptions { Model = "x" };
        options.CorsOrigins.Add(origin);
        Assert.Contains($"'{origin}' is no origin", Assert.Throws<Data.UserErrorException>(options.Validate).Message, StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_full_queue_answers_429_and_the_end_of_the_wait_503()
    {
        await using RunningServer server = await RunningServer.StartAsync(options =>
            (options.Places, options.Queue, options.ContextLength, options.Timeout) = (1, 1, 16_384, TimeSpan.FromSeconds(2)));
        const string Endless = """{"messages":[{"role":"user","content":"x"}],"max_tokens":16000,"temperature":0}""";
        Task<(HttpStatusCode Status, JsonNode Body)> running = server.PostAsync(Chat, Endless);
        while (server.Model.Generator.Running == 0)
        {
            await Task.Delay(1, Stop);
        }

        Task<(HttpStatusCode Status, JsonNode Body)> waiting = server.PostAsync(Chat, Endless);
        while (server.Model.Generator.Waiting == 0)
        {
            await Task.Delay(1, Stop);
        }

        (HttpStatusCode code, JsonNode body) = await server.PostAsync(Chat, Endless);
        Assert.Equal((HttpStatusCode.TooManyRequests, "queue_full"), (code, (string)body["error"]!["code"]!));
        (code, body) = await running;
        Assert.Equal((HttpStatusCode.ServiceUnavailable, "timeout"), (code, (string)body["error"]!["code"]!));
        Assert.Equal(HttpStatusCode.ServiceUnavailable, (await waiting).Status);
        await server.UntilIdleAsync();
    }

    [Fact]
    public async Task An_idle_server_takes_what_places_and_queue_hold_and_never_more_at_once()
    {
        await using RunningServer server = await RunningServer.StartAsync(options => (options.Places, options.Queue) = (4, 2));
        await using RunningServer boundless = await RunningServer.StartAsync(options => options.Queue = int.MaxValue);
        Assert.Equal(HttpStatusCode.OK, (await boundless.PostAsync(Chat, """{"messages":[{"role":"user","content":"x"}],"max_tokens":1}""")).Status);
        (HttpStatusCode code, JsonNode body) = await server.PostAsync(Chat, """{"messages":[{"role":"user","content":"x"}],"max_tokens":2,"n":6}""");
        Assert.Equal((HttpStatusCode.OK, 6), (code, body["choices"]!.AsArray().Count));
        await server.UntilIdleAsync();
        (code, body) = await server.PostAsync(Chat, """{"messages":[{"role":"user","content":"x"}],"max_tokens":2,"n":7}""");
        Assert.Equal((HttpStatusCode.BadRequest, "n"), (code, (string)body["error"]!["param"]!));
        Assert.Contains("this server takes 6", (string)body["error"]!["message"]!, StringComparison.Ordinal);
    }

    [Fact]
    public async Task An_ending_server_finishes_what_runs_and_refuses_the_rest()
    {
        await using RunningServer server = await RunningServer.StartAsync(options => options.ContextLength = 4096);
        Task<(HttpStatusCode Status, JsonNode Body)> running = server.PostAsync(Chat, """{"messages":[{"role":"user","content":"x"}],"max_tokens":3000,"temperature":0}""");
        while (server.Model.Generator.NewTokens == 0)
        {
            await Task.Delay(1, Stop);
        }

        // A connection that is open already can still ask.
        using var late = new TcpClient();
        await late.ConnectAsync("127.0.0.1", server.Address.Port, Stop);
        NetworkStream stream = late.GetStream();
        await stream.WriteAsync("GET /health HTTP/1.1\r\nHost: localhost\r\n"u8.ToArray(), Stop);
        await Task.Delay(50, Stop);
        Task stopping = server.App.StopAsync(Stop);
        await stream.WriteAsync("\r\n"u8.ToArray(), Stop);
        using var reader = new StreamReader(stream);
        string? status = await reader.ReadLineAsync(Stop);
        Assert.True(status is null or "HTTP/1.1 503 Service Unavailable", status);
        (HttpStatusCode code, JsonNode body) = await running;
        Assert.Equal(HttpStatusCode.OK, code);
        Assert.Equal(3000, (int)body["usage"]!["completion_tokens"]!);
        await stopping;
        await Assert.ThrowsAsync<HttpRequestException>(() => server.PostAsync(Chat, "{}"));
    }

    [Fact]
    public async Task A_reply_that_tries_what_followed_before_is_the_same()
    {
        const string Request = """{"messages":[{"role":"user","content":"hi"}],"max_tokens":40,"temperature":0.8,"seed":5,"frequency_penalty":-2,"logprobs":true}""";
        var replies = new List<string>();
        foreach (int lookup in (int[])[0, 8])
        {
            await using RunningServer server = await RunningServer.StartAsync(options => options.Lookup = lookup);
            replies.Add((await server.PostAsync(Chat, Request)).Body["choices"]!.ToJsonString());
            Assert.Equal(lookup > 0, server.Model.Generator.AcceptedTokens > 0);
            string metrics = await server.Http.GetStringAsync(new Uri("/metrics", UriKind.Relative), Stop);
            Assert.Contains($"\ntinyllama_proposed_tokens_total {server.Model.Generator.ProposedTokens}\n", metrics, StringComparison.Ordinal);
            Assert.Contains($"\ntinyllama_accepted_tokens_total {server.Model.Generator.AcceptedTokens}\n", metrics, StringComparison.Ordinal);
        }

        Assert.Equal(replies[0], replies[1]);
    }

    [Fact]
    public async Task Metrics_and_health_tell_how_it_goes()
    {
        await using RunningServer server = await RunningServer.StartAsync(options => options.ApiKeys.Add("secret"));
        Assert.Equal("ok", (string)(await server.Http.GetFromJsonAsync<JsonNode>("/health", Stop))!["status"]!);
        Assert.Equal(HttpStatusCode.Unauthorized, (await server.Http.GetAsync(new Uri("/metrics", UriKind.Relative), Stop)).StatusCode);
        server.Http.DefaultRequestHeaders.Authorization = new AuthenticationHeaderValue("Bearer", "secret");
        await server.PostAsync(Chat, """{"messages":[{"role":"user","content":"x"}],"max_tokens":5,"temperature":0}""");
        string metrics = await server.Http.GetStringAsync(new Uri("/metrics", UriKind.Relative), Stop);
        Assert.Contains("\ntinyllama_requests_total{route=\"/metrics\",code=\"401\"} 1\n", metrics, StringComparison.Ordinal);
        Assert.Contains("\ntinyllama_requests_total{route=\"/v1/chat/completions\",code=\"200\"} 1\n", metrics, StringComparison.Ordinal);
        Assert.Contains("\ntinyllama_generated_tokens_total 5\n", metrics, StringComparison.Ordinal);
        Assert.Contains("\ntinyllama_time_to_first_token_seconds_count 1\n", metrics, StringComparison.Ordinal);
        Assert.Contains("_bucket{le=\"+Inf\"} 1\n", metrics, StringComparison.Ordinal);
        Assert.Contains("\ntinyllama_requests_running 0\n", metrics, StringComparison.Ordinal);
        Assert.All(metrics.TrimEnd('\n').Split('\n'), line => Assert.Matches("^(# (HELP|TYPE) tinyllama_[a-z_]+ .+|tinyllama_[a-z_]+(\\{[^}]+\\})? [0-9.E+-]+)$", line));
    }

    [Fact]
    public async Task Other_origins_are_let_in_only_where_they_are_named()
    {
        await using RunningServer server = await RunningServer.StartAsync(options => options.CorsOrigins.Add("https://app.example"));
        async Task<string?> Allowed(string origin)
        {
            using var request = new HttpRequestMessage(HttpMethod.Get, "/v1/models");
            request.Headers.Add("Origin", origin);
            using HttpResponseMessage response = await server.Http.SendAsync(request, Stop);
            return response.Headers.TryGetValues("Access-Control-Allow-Origin", out IEnumerable<string>? values) ? values.Single() : null;
        }

        Assert.Equal("https://app.example", await Allowed("https://app.example"));
        Assert.Null(await Allowed("https://evil.example"));
        using var rebound = new HttpRequestMessage(HttpMethod.Get, "/v1/models");
        rebound.Headers.Host = "evil.example";
        Assert.Equal(HttpStatusCode.BadRequest, (await server.Http.SendAsync(rebound, Stop)).StatusCode);
        await using RunningServer closed = await RunningServer.StartAsync();
        using var preflight = new HttpRequestMessage(HttpMethod.Options, new Uri(closed.Address, Chat));
        preflight.Headers.Add("Origin", "https://evil.example");
        preflight.Headers.Add("Access-Control-Request-Method", "POST");
        using HttpResponseMessage answer = await closed.Http.SendAsync(preflight, Stop);
        Assert.False(answer.Headers.Contains("Access-Control-Allow-Origin"));
    }

    [Fact]
    public async Task A_slow_reader_delays_nobody_else()
    {
        await using RunningServer server = await RunningServer.StartAsync(options => (options.Places, options.ContextLength) = (2, 16_384));
        const string Body = """{"messages":[{"role":"user","content":"x"}],"max_tokens":8000,"temperature":0,"stream":true,"logprobs":true,"top_logprobs":20}""";
        using var slow = new TcpClient { ReceiveBufferSize = 4096 };
        await slow.ConnectAsync("127.0.0.1", server.Address.Port, Stop);
        await slow.GetStream().WriteAsync(Encoding.ASCII.GetBytes(
            $"POST {Chat} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {Body.Length}\r\n\r\n{Body}"), Stop);
        await slow.GetStream().ReadExactlyAsync(new byte[10], Stop);
        for (int i = 0; i < 5; i++)
        {
            (HttpStatusCode code, _) = await server.PostAsync(Chat, """{"messages":[{"role":"user","content":"x"}],"max_tokens":20}""");
            Assert.Equal(HttpStatusCode.OK, code);
        }

        // It has not read, and its text is computed all the same: it holds no place.
        await server.UntilIdleAsync();
    }
}
