using System.ClientModel;
using System.Text;
using System.Text.Json.Nodes;
using OpenAI.Chat;
using OpenAI.Embeddings;

namespace TinyLlama.Server.Tests;

/// <summary>OpenAI's own client talks to the server.</summary>
public sealed class OpenAiClientTests
{
    private static readonly ChatMessage[] s_hello = [ChatMessage.CreateSystemMessage("Be kind."), ChatMessage.CreateUserMessage("hello")];

    private static CancellationToken Stop => TestContext.Current.CancellationToken;

    [Fact]
    public async Task A_chat_comes_whole_with_its_usage()
    {
        await using RunningServer server = await RunningServer.StartAsync();
        ChatClient client = server.Client().GetChatClient(TestModel.Name);
        ChatCompletion reply = await client.CompleteChatAsync(s_hello, Options(12), Stop);
        Assert.Equal(ChatFinishReason.Length, reply.FinishReason);
        Assert.Equal(ChatMessageRole.Assistant, reply.Role);
        Assert.Equal(TestModel.Name, reply.Model);
        Assert.StartsWith("chatcmpl-", reply.Id, StringComparison.Ordinal);
        Assert.NotEmpty(reply.Content[0].Text);
        int prompt = server.Model.Chat.Encode([new("system", "Be kind."), new("user", "hello")]).Length;
        Assert.Equal((prompt, 12, prompt + 12), (reply.Usage.InputTokenCount, reply.Usage.OutputTokenCount, reply.Usage.TotalTokenCount));

        // The same request gets the same reply, alone or among others.
        ChatCompletion[] again = await Task.WhenAll(Enumerable.Range(0, 8).Select(async _ =>
            (await client.CompleteChatAsync(s_hello, Options(12), Stop)).Value));
        Assert.All(again, other => Assert.Equal(reply.Content[0].Text, other.Content[0].Text));
    }

    [Fact]
    public async Task A_stream_is_the_whole_reply_in_parts()
    {
        await using RunningServer server = await RunningServer.StartAsync();
        ChatClient client = server.Client().GetChatClient(TestModel.Name);
        ChatCompletion whole = await client.CompleteChatAsync(s_hello, Options(40), Stop);
        var text = new StringBuilder();
        ChatFinishReason? finish = null;
        ChatTokenUsage? usage = null;
        int updates = 0;
        await foreach (StreamingChatCompletionUpdate update in client.CompleteChatStreamingAsync(s_hello, Options(40), Stop))
        {
            updates++;
            finish ??= update.FinishReason;
            usage ??= update.Usage;
            text.Append(string.Concat(update.ContentUpdate.Select(part => part.Text)));
        }

        Assert.Equal(whole.Content[0].Text, text.ToString());
        Assert.Equal(ChatFinishReason.Length, finish);
        Assert.True(updates > 10, $"{updates} updates");

        // The client asks for the usage of every stream.
        Assert.Equal((whole.Usage.InputTokenCount, 40), (usage!.InputTokenCount, usage.OutputTokenCount));
    }

    [Fact]
    public async Task Stop_strings_end_a_reply_before_them()
    {
        await using RunningServer server = await RunningServer.StartAsync();
        ChatClient client = server.Client().GetChatClient(TestModel.Name);
        string text = ((ChatCompletion)await client.CompleteChatAsync(s_hello, Options(40), Stop)).Content[0].Text;
        string stop = text.Substring(text.Length / 2, 3);
        ChatCompletionOptions options = Options(40);
        options.StopSequences.Add("never said");
        options.StopSequences.Add(stop);
        ChatCompletion reply = await client.CompleteChatAsync(s_hello, options, Stop);
        Assert.Equal(text[..text.IndexOf(stop, StringComparison.Ordinal)], reply.Content[0].Text);
        Assert.Equal(ChatFinishReason.Stop, reply.FinishReason);
    }

    [Fact]
    public async Task Log_probabilities_come_with_each_token()
    {
        await using RunningServer server = await RunningServer.StartAsync();
        ChatClient client = server.Client().GetChatClient(TestModel.Name);
        ChatCompletionOptions options = Options(6);
        options.IncludeLogProbabilities = true;
        options.TopLogProbabilityCount = 3;
        ChatCompletion reply = await client.CompleteChatAsync(s_hello, options, Stop);
        Assert.Equal(6, reply.ContentTokenLogProbabilities.Count);
        byte[] bytes = [.. reply.ContentTokenLogProbabilities.SelectMany(token => token.Utf8Bytes!.Value.ToArray())];
        Assert.Equal(reply.Content[0].Text, Encoding.UTF8.GetString(bytes));
        foreach (ChatTokenLogProbabilityDetails token in reply.ContentTokenLogProbabilities)
        {
            // Greedy: the token chosen is the likeliest.
            Assert.Equal(3, token.TopLogProbabilities.Count);
            Assert.Equal(token.LogProbability, token.TopLogProbabilities[0].LogProbability);
            Assert.True(token.LogProbability < 0 && token.TopLogProbabilities[1].LogProbability <= token.LogProbability);
        }

        var streamed = new List<float>();
        await foreach (StreamingChatCompletionUpdate update in client.CompleteChatStreamingAsync(s_hello, options, Stop))
        {
            streamed.AddRange(update.ContentTokenLogProbabilities.Select(token => token.LogProbability));
        }

        Assert.Equal(reply.ContentTokenLogProbabilities.Select(token => token.LogProbability), streamed);
    }

    [Fact]
    public async Task A_bias_decides_and_a_seed_repeats()
    {
        await using RunningServer server = await RunningServer.StartAsync();
        ChatClient client = server.Client().GetChatClient(TestModel.Name);
        List<int> ids = [];
        server.Model.Chat.Tokenizer.Encode("the", ids);
        ChatCompletionOptions options = Options(5);
        options.LogitBiases[ids[0]] = 100;
        ChatCompletion reply = await client.CompleteChatAsync(s_hello, options, Stop);
        Assert.Equal(" the the the the the", reply.Content[0].Text);

#pragma warning disable OPENAI001 // The seed is marked as experimental by the client.
        var random = new ChatCompletionOptions { MaxOutputTokenCount = 20, Temperature = 1, Seed = 5 };
        ChatCompletion one = await client.CompleteChatAsync(s_hello, random, Stop);
        ChatCompletion same = await client.CompleteChatAsync(s_hello, random, Stop);
        random.Seed = 6;
#pragma warning restore OPENAI001
        ChatCompletion other = await client.CompleteChatAsync(s_hello, random, Stop);
        Assert.Equal(one.Content[0].Text, same.Content[0].Text);
        Assert.NotEqual(one.Content[0].Text, other.Content[0].Text);
    }

    [Fact]
    public async Task A_format_is_kept()
    {
        await using RunningServer server = await RunningServer.StartAsync();
        ChatClient client = server.Client().GetChatClient(TestModel.Name);
        ChatCompletionOptions options = Options(100);
        options.ResponseFormat = ChatResponseFormat.CreateJsonSchemaFormat(
            "weather", BinaryData.FromString("""{"type":"object","properties":{"sunny":{"type":"boolean"},"wind":{"enum":["north","south"]}},"required":["sunny","wind"],"additionalProperties":false}"""));
        for (int i = 0; i < 3; i++)
        {
            ChatCompletion reply = await client.CompleteChatAsync(s_hello, options, Stop);
            Assert.Equal(ChatFinishReason.Stop, reply.FinishReason);
            Assert.Matches("""^\s*\{\s*"sunny"\s*:\s*(true|false)\s*,\s*"wind"\s*:\s*"(north|south)"\s*\}\s*$""", reply.Content[0].Text);
        }

        options.ResponseFormat = ChatResponseFormat.CreateJsonObjectFormat();
        options.Temperature = 1;
        ChatCompletion any = await client.CompleteChatAsync(s_hello, options, Stop);
        Assert.Equal('{', any.Content[0].Text.TrimStart()[0]);
    }

    [Fact]
    public async Task Embeddings_come_in_order_as_floats_and_in_base64()
    {
        await using RunningServer server = await RunningServer.StartAsync(options => (options.Places, options.Queue) = (2, 3));
        EmbeddingClient client = server.Client().GetEmbeddingClient(TestModel.Name);
        string[] texts = [.. Enumerable.Range(1, 12).Select(i => new string('a', i) + " the weather")];
        OpenAIEmbeddingCollection all = await client.GenerateEmbeddingsAsync(texts, cancellationToken: Stop);
        Assert.Equal(Enumerable.Range(0, 12), all.Select(embedding => embedding.Index));
        Assert.Equal(texts.Sum(text => server.Model.Generator.Encode(text).Length), all.Usage.InputTokenCount);
        Assert.Equal(all.Usage.InputTokenCount, all.Usage.TotalTokenCount);
        foreach (int i in (int[])[0, 7, 11])
        {
            float[] vector = all[i].ToFloats().ToArray();
            Assert.Equal(1, vector.Sum(x => (double)x * x), 1e-6);
            Assert.Equal(vector, await server.Model.Generator.TryEmbed(server.Model.Generator.Encode(texts[i]), Stop)!.Vector);

            // The client asks for base64; by default it is numbers.
            (_, JsonNode reply) = await server.PostAsync("/v1/embeddings", $$"""{"input":"{{texts[i]}}"}""");
            Assert.Equal(vector, reply["data"]![0]!["embedding"]!.AsArray().Select(x => (float)x!));
        }

        Assert.Equal(all[0].ToFloats().ToArray(), (await client.GenerateEmbeddingAsync(texts[0], cancellationToken: Stop)).Value.ToFloats().ToArray());
    }

    [Fact]
    public async Task Errors_are_of_the_kind_that_the_client_knows()
    {
        await using RunningServer server = await RunningServer.StartAsync(options => options.ApiKeys.Add("secret"));
        Assert.Equal(401, await StatusAsync(server, "wrong", TestModel.Name, Options(2)));
        Assert.Equal(401, await StatusAsync(server, "secre", TestModel.Name, Options(2)));
        Assert.Equal(404, await StatusAsync(server, "secret", "gpt-4", Options(2)));
        Assert.Equal(400, await StatusAsync(server, "secret", TestModel.Name, Options(TestModel.ContextLength)));
        ChatCompletionOptions tools = Options(2);
        tools.Tools.Add(ChatTool.CreateFunctionTool("f", "d", BinaryData.FromString("{}")));
        Assert.Equal(400, await StatusAsync(server, "secret", TestModel.Name, tools));
        Assert.Equal(200, await StatusAsync(server, "secret", TestModel.Name, Options(2)));
        Assert.Equal([TestModel.Name], (await server.Client("secret").GetOpenAIModelClient().GetModelsAsync(Stop)).Value.Select(model => model.Id));
    }

    [Fact]
    public async Task A_client_that_goes_away_frees_its_place()
    {
        await using RunningServer server = await RunningServer.StartAsync(options => (options.Places, options.ContextLength) = (1, 16_384));
        ChatClient client = server.Client().GetChatClient(TestModel.Name);
        for (int i = 0; i < 3; i++)
        {
            using var leave = CancellationTokenSource.CreateLinkedTokenSource(Stop);
            int updates = 0;
            await Assert.ThrowsAnyAsync<OperationCanceledException>(async () =>
            {
                await foreach (StreamingChatCompletionUpdate _ in client.CompleteChatStreamingAsync(s_hello, Options(16_000), leave.Token))
                {
                    if (++updates == 3)
                    {
                        await leave.CancelAsync();
                    }
                }
            });
        }

        await server.UntilIdleAsync();
        Assert.InRange(server.Model.Generator.NewTokens, 3, 40_000);
        Assert.Equal(ChatFinishReason.Length, ((ChatCompletion)await client.CompleteChatAsync(s_hello, Options(4), Stop)).FinishReason);
    }

    private static ChatCompletionOptions Options(int tokens) => new() { MaxOutputTokenCount = tokens, Temperature = 0 };

    private static async Task<int> StatusAsync(RunningServer server, string key, string model, ChatCompletionOptions options)
    {
        try
        {
            ClientResult<ChatCompletion> result = await server.Client(key).GetChatClient(model).CompleteChatAsync(s_hello, options, Stop);
            return result.GetRawResponse().Status;
        }
        catch (ClientResultException e)
        {
            return e.Status;
        }
    }
}
