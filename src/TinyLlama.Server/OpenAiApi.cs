using System.Text.Json;
using System.Text.Json.Serialization.Metadata;
using Microsoft.AspNetCore.Http;
using Microsoft.AspNetCore.Http.Features;
using Microsoft.Extensions.Hosting;
using Microsoft.Extensions.Logging;
using TinyLlama.Chat;
using TinyLlama.Data;
using TinyLlama.Inference;

namespace TinyLlama.Server;

/// <summary>The routes of OpenAI's API, and the two of llama.cpp for tokens.</summary>
internal sealed class OpenAiApi(ServedModel model, ServerOptions options, ServerMetrics metrics, ApiKeys keys, IHostApplicationLifetime lifetime, ILogger<OpenAiApi> log)
{
    private const int MostEmbeddings = 2048;

    private static readonly Action<ILogger, string, Exception> s_logDefect =
        LoggerMessage.Define<string>(LogLevel.Error, new EventId(1, "Defect"), "{Route} failed");

    private readonly Replies _replies = new(model, options, metrics);
    private readonly Embeddings _embeddings = new(model, options);
    private readonly ResponseFormats _formats = new();

    /// <summary>Gets a value indicating whether the server ends: what runs is finished, nothing new begins.</summary>
    public bool IsEnding => lifetime.ApplicationStopping.IsCancellationRequested;

    /// <summary>A handler that lets in who may, and answers every error in OpenAI's shape.</summary>
    /// <param name="route">The route, for the metrics.</param>
    /// <param name="handler">What answers the request.</param>
    /// <param name="open">Whether no key is needed.</param>
    /// <param name="method">The HTTP method that is answered; null for any. HEAD is answered as GET.</param>
    public RequestDelegate Guard(string route, RequestDelegate handler, bool open = false, string? method = null) => async context =>
    {
        try
        {
            if (!open && !keys.Admit(context.Request))
            {
                throw ApiException.Unauthorized();
            }

            string asked = HttpMethods.IsHead(context.Request.Method) ? HttpMethods.Get : context.Request.Method;
            if (method is not null && !HttpMethods.Equals(asked, method))
            {
                context.Response.Headers.Allow = method;
                throw ApiException.WrongMethod(context.Request.Method, route, method);
            }

            if (context.Features.Get<IHttpMaxRequestBodySizeFeature>() is { IsReadOnly: false } body)
            {
                body.MaxRequestBodySize = options.MaxBodyBytes;
            }

            await handler(context);
        }
        catch (Exception) when (context.RequestAborted.IsCancellationRequested)
        {
            // Nobody is there to be told; the metrics are.
            if (!context.Response.HasStarted)
            {
                context.Response.StatusCode = StatusCodes.Status499ClientClosedRequest;
            }
        }
        catch (ApiException e)
        {
            await e.WriteAsync(context.Response);
        }
        catch (BadHttpRequestException e)
        {
            await ApiException.Invalid(e.Message).WriteAsync(context.Response);
        }
#pragma warning disable CA1031 // A defect in one request must not be the client's puzzle, nor end the server.
        catch (Exception e)
#pragma warning restore CA1031
        {
            s_logDefect(log, route, e);
            if (context.Response.HasStarted)
            {
                context.Abort();
            }
            else
            {
                await ApiException.Defect(e is UserErrorException ? e.Message : "the server has a defect; its log tells more").WriteAsync(context.Response);
            }
        }
        finally
        {
            metrics.CountRequest(route, context.Response.StatusCode);
        }
    };

    /// <summary><c>GET /v1/models</c>.</summary>
    public Task ModelsAsync(HttpContext context) => context.Response.WriteAsJsonAsync(new ModelList([Info()]), ServerJson.Readable.ModelList);

    /// <summary><c>GET /v1/models/{id}</c>.</summary>
    public Task ModelAsync(HttpContext context)
    {
        // A slash in a name comes as itself or escaped.
        RequireModel(Uri.UnescapeDataString((string)context.Request.RouteValues["id"]!));
        return context.Response.WriteAsJsonAsync(Info(), ServerJson.Readable.ModelInfo);
    }

    /// <summary><c>POST /v1/chat/completions</c>.</summary>
    public async Task ChatAsync(HttpContext context)
    {
        ChatCompletionRequest request = await ReadAsync(context, ServerJson.Readable.ChatCompletionRequest);
        if (IsGiven(request.Tools) || IsGiven(request.Functions))
        {
            throw ApiException.Invalid("tools are not supported: this model was not taught to call them", IsGiven(request.Tools) ? "tools" : "functions", "unsupported_parameter");
        }

        if (request.TopLogprobs is < 0 or > 20 || (request.TopLogprobs is not null && request.Logprobs != true))
        {
            throw ApiException.Invalid("'top_logprobs' is from 0 to 20, and needs 'logprobs': true", "top_logprobs");
        }

        int[] prompt;
        try
        {
            prompt = model.Chat.Encode(Messages(request.Messages));
        }
        catch (UserErrorException e)
        {
            throw ApiException.Invalid(e.Message, "messages");
        }

        GenerationOptions generation = model.Chat.EndingTurn(GenerationSettings.Read(
            request,
            request.MaxCompletionTokens ?? request.MaxTokens,
            options.MaxTokens,
            request.Logprobs == true ? request.TopLogprobs ?? 0 : null,
            _formats.Read(request.ResponseFormat),
            model.Chat.Tokenizer.VocabularySize));
        await AnswerAsync(context, request, [prompt], echo: null, generation, new ChatForm(model.Chat.Tokenizer));
    }

    /// <summary><c>POST /v1/completions</c>.</summary>
    public async Task CompleteAsync(HttpContext context)
    {
        CompletionRequest request = await ReadAsync(context, ServerJson.Readable.CompletionRequest);
        if (!string.IsNullOrEmpty(request.Suffix))
        {
            throw ApiException.Invalid("'suffix' is not supported: the model continues texts only", "suffix", "unsupported_parameter");
        }

        if (request.BestOf is { } best && best != (request.N ?? 1))
        {
            throw ApiException.Invalid("'best_of' is not supported beyond 'n'", "best_of", "unsupported_parameter");
        }

        if (request.Logprobs is < 0 or > 20)
        {
            throw ApiException.Invalid($"'logprobs' is {request.Logprobs}, it must be from 0 to 20", "logprobs");
        }

        if (request.Echo == true && request.Logprobs is not null)
        {
            throw ApiException.Invalid("'echo' and 'logprobs' together are not supported: a prompt's log-probabilities are not kept", "echo", "unsupported_parameter");
        }

        IReadOnlyList<int[]> prompts = Texts(request.Prompt, "prompt", GenerationSettings.MostCompletions);
        IReadOnlyList<string>? echo = request.Echo == true ? [.. prompts.Select(prompt => model.Chat.Tokenizer.Decode(prompt))] : null;
        GenerationOptions generation = GenerationSettings.Read(
            request,
            request.MaxTokens ?? 16,
            options.MaxTokens,
            request.Logprobs,
            _formats.Read(request.ResponseFormat),
            model.Chat.Tokenizer.VocabularySize);
        await AnswerAsync(context, request, prompts, echo, generation, new TextForm(model.Chat.Tokenizer));
    }

    /// <summary><c>POST /v1/embeddings</c>.</summary>
    public async Task EmbedAsync(HttpContext context)
    {
        EmbeddingRequest request = await ReadAsync(context, ServerJson.Readable.EmbeddingRequest);
        RequireModel(request.Model);
        if (request.Dimensions is not null)
        {
            throw ApiException.Invalid("'dimensions' is not supported: a vector has a number for each channel of the model", "dimensions", "unsupported_parameter");
        }

        if (request.EncodingFormat is not (null or "float" or "base64"))
        {
            throw ApiException.Invalid($"'encoding_format' is '{request.EncodingFormat}', it must be float or base64", "encoding_format");
        }

        IReadOnlyList<int[]> texts = Texts(request.Input, "input", MostEmbeddings);
        await WithinTimeAsync(context, stop => _embeddings.AnswerAsync(context.Response, texts, request.EncodingFormat == "base64", stop));
    }

    /// <summary><c>POST /tokenize</c>.</summary>
    public async Task TokenizeAsync(HttpContext context)
    {
        TokenizeRequest request = await ReadAsync(context, ServerJson.Readable.TokenizeRequest);
        string text = request.Content ?? throw ApiException.Invalid("'content' is missing", "content");
        List<int> tokens = [];
        model.Chat.Tokenizer.Encode(text, tokens);
        TokenList reply = new(request.AddSpecial == true ? model.Generator.Encode(text) : tokens);
        await context.Response.WriteAsJsonAsync(reply, ServerJson.Readable.TokenList);
    }

    /// <summary><c>POST /detokenize</c>.</summary>
    public async Task DetokenizeAsync(HttpContext context)
    {
        DetokenizeRequest request = await ReadAsync(context, ServerJson.Readable.DetokenizeRequest);
        int[] tokens = request.Tokens ?? throw ApiException.Invalid("'tokens' is missing", "tokens");
        RequireIds(tokens, "tokens");
        await context.Response.WriteAsJsonAsync(new TextContent(model.Chat.Tokenizer.Decode(tokens)), ServerJson.Readable.TextContent);
    }

    /// <summary><c>GET /health</c>.</summary>
    public Task HealthAsync(HttpContext context) => IsEnding
        ? throw Ending()
        : context.Response.WriteAsJsonAsync(new Status("ok"), ServerJson.Readable.Status);

    /// <summary><c>GET /metrics</c>.</summary>
    public Task MetricsAsync(HttpContext context)
    {
        context.Response.ContentType = "text/plain; version=0.0.4; charset=utf-8";
        return context.Response.WriteAsync(metrics.Write());
    }

    /// <summary>What is at no route.</summary>
    public static Task NothingAsync(HttpContext context) =>
        throw ApiException.NotFound($"there is nothing at {context.Request.Method} {context.Request.Path}", null, "not_found");

    private static ApiException Ending() => ApiException.Unavailable("the server is ending", "ending");

    private static bool IsGiven(JsonElement? value) => value switch
    {
        null or { ValueKind: JsonValueKind.Null } => false,
        { ValueKind: JsonValueKind.Array } list => list.GetArrayLength() > 0,
        _ => true,
    };

    private static List<ChatMessage> Messages(List<RequestMessage>? messages)
    {
        if (messages is null or [])
        {
            throw ApiException.Invalid("'messages' is missing or empty", "messages");
        }

        return [.. messages.Select(static (message, i) => new ChatMessage(
            message?.Role switch
            {
                "system" or "developer" => "system",
                "user" => "user",
                "assistant" => "assistant",
                var role => throw ApiException.Invalid(
                    $"'messages[{i}].role' is {(role is null ? "missing" : $"'{role}'")}; it must be system, developer, user or assistant", $"messages[{i}].role"),
            },
            Content(message.Content, $"messages[{i}].content")))];
    }

    private static string Content(JsonElement? content, string key)
    {
        switch (content)
        {
            case { ValueKind: JsonValueKind.String } text:
                return RequestReader.Text(text, key);
            case { ValueKind: JsonValueKind.Array } parts:
                return string.Concat(parts.EnumerateArray().Select(part =>
                    part.ValueKind == JsonValueKind.Object
                    && part.TryGetProperty("type", out JsonElement type) && type.ValueKind == JsonValueKind.String && type.ValueEquals("text")
                    && part.TryGetProperty("text", out JsonElement text) && text.ValueKind == JsonValueKind.String
                        ? RequestReader.Text(text, key)
                        : throw ApiException.Invalid($"'{key}' has a part that is no text; only text is supported", key)));
            default:
                throw ApiException.Invalid($"'{key}' must be a string or an array of text parts", key);
        }
    }

    private ModelInfo Info() => new(model.Name, model.Loaded.ToUnixTimeSeconds(), new ModelMeta(model.ParameterCount, model.Generator.ContextLength, model.Chat.Tokenizer.VocabularySize));

    private async Task<T> ReadAsync<T>(HttpContext context, JsonTypeInfo<T> type) => IsEnding
        ? throw Ending()
        : await RequestReader.ReadAsync(context.Request, type, options.MaxBodyBytes);

    private Task AnswerAsync(
        HttpContext context, GenerationRequest request, IReadOnlyList<int[]> prompts, IReadOnlyList<string>? echo, GenerationOptions generation, ReplyForm form)
    {
        RequireModel(request.Model);
        var work = new Work(prompts, echo, generation, request.N ?? 1, request.Stream == true, request.StreamOptions?.IncludeUsage == true);
        long replies = (long)prompts.Count * work.Completions, most = (long)options.Places + options.Queue;
        if (replies > most)
        {
            throw ApiException.Invalid($"{replies} replies are asked for at once, this server takes {most} (--places and --queue)", "n");
        }

        return WithinTimeAsync(context, stop => _replies.AnswerAsync(context.Response, work, form, stop));
    }

    private async Task WithinTimeAsync(HttpContext context, Func<CancellationToken, Task> answer)
    {
        // However this ends, nothing goes on that nobody reads.
        using var end = CancellationTokenSource.CreateLinkedTokenSource(context.RequestAborted);
        end.CancelAfter(options.Timeout);
        try
        {
            await answer(end.Token);
        }
        catch (OperationCanceledException) when (end.IsCancellationRequested && !context.RequestAborted.IsCancellationRequested)
        {
            throw ApiException.Unavailable($"the reply took longer than {options.Timeout.TotalSeconds:0} s", "timeout");
        }
        finally
        {
            await end.CancelAsync();
        }
    }

    private void RequireModel(string? name)
    {
        if (name is not null && name != model.Name)
        {
            throw ApiException.NotFound($"there is no model '{name}'; '{model.Name}' is served", "model", "model_not_found");
        }
    }

    private List<int[]> Texts(JsonElement? value, string key, int most)
    {
        switch (value)
        {
            case { ValueKind: JsonValueKind.String } text:
                return [model.Generator.Encode(RequestReader.Text(text, key))];
            case { ValueKind: JsonValueKind.Array } list when list.GetArrayLength() > 0:
                JsonElement[] items = [.. list.EnumerateArray()];
                return items[0].ValueKind == JsonValueKind.Number ? [Ids(list, key)]
                    : items.Length > most
                    ? throw ApiException.Invalid($"'{key}' has {items.Length} texts, at most {most} are allowed", key)
                    : [.. items.Select(item => item.ValueKind == JsonValueKind.String ? model.Generator.Encode(RequestReader.Text(item, key)) : Ids(item, key))];
            default:
                throw NoTexts(key);
        }
    }

    private int[] Ids(JsonElement list, string key)
    {
        if (list.ValueKind != JsonValueKind.Array || list.GetArrayLength() == 0)
        {
            throw NoTexts(key);
        }

        int[] ids = [.. list.EnumerateArray().Select(static item => item.ValueKind == JsonValueKind.Number && item.TryGetInt32(out int id) ? id : -1)];
        RequireIds(ids, key);
        return ids;
    }

    private static ApiException NoTexts(string key) => ApiException.Invalid($"'{key}' must be a string, an array of strings, or token ids", key);

    private void RequireIds(int[] ids, string key)
    {
        int size = model.Chat.Tokenizer.VocabularySize;
        if (Array.Exists(ids, id => (uint)id >= (uint)size))
        {
            throw ApiException.Invalid($"'{key}' has what is no token; tokens are 0 to {size - 1}", key);
        }
    }
}
