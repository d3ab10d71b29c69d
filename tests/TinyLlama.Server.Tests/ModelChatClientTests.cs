using System.Text.Json;
using Microsoft.Extensions.AI;
using TinyLlama.Data;
using TinyLlama.Inference;

namespace TinyLlama.Server.Tests;

public sealed class ModelChatClientTests
{
    private static CancellationToken Stop => TestContext.Current.CancellationToken;

    [Fact]
    public async Task Three_lines_are_enough()
    {
        using LanguageModel model = LanguageModel.Load(TestModel.Folder, threads: 1);
        using IChatClient chat = model.AsChatClient();
        Assert.NotEmpty((await chat.GetResponseAsync("hello", new ChatOptions { MaxOutputTokens = 8 }, Stop)).Text);
    }

    [Fact]
    public async Task A_response_streams_and_tells_its_usage()
    {
        using LanguageModel model = LanguageModel.Load(TestModel.Folder, threads: 1);
        using IChatClient chat = model.AsChatClient("chatml");
        var options = new ChatOptions { MaxOutputTokens = 20, Temperature = 0, Instructions = "Be brief." };
        ChatResponse whole = await chat.GetResponseAsync([new ChatMessage(ChatRole.User, "hello")], options, Stop);
        Assert.Equal(ChatFinishReason.Length, whole.FinishReason);
        int prompt = model.CreateChat("chatml").Encode([new("system", "Be brief."), new("user", "hello")]).Length;
        Assert.Equal((prompt, 20L), (whole.Usage!.InputTokenCount, whole.Usage.OutputTokenCount));
        string text = "";
        int updates = 0;
        await foreach (ChatResponseUpdate update in chat.GetStreamingResponseAsync([new ChatMessage(ChatRole.User, "hello")], options, Stop))
        {
            text += update.Text;
            updates++;
        }

        Assert.Equal(whole.Text, text);
        Assert.True(updates > 5, $"{updates} updates");
        options.StopSequences = [text[3..6]];
        whole = await chat.GetResponseAsync([new ChatMessage(ChatRole.User, "hello")], options, Stop);
        Assert.Equal((text[..text.IndexOf(text[3..6], StringComparison.Ordinal)], ChatFinishReason.Stop), (whole.Text, whole.FinishReason));
    }

    [Fact]
    public async Task A_response_is_of_its_type()
    {
        using LanguageModel model = LanguageModel.Load(TestModel.Folder, threads: 1);
        using IChatClient chat = model.AsChatClient();
        var options = new ChatOptions { MaxOutputTokens = 200, Temperature = 0, ResponseFormat = ChatResponseFormat.ForJsonSchema<Answer>() };
        string text = (await chat.GetResponseAsync("hello", options, Stop)).Text;
        Answer answer = JsonSerializer.Deserialize<Answer>(text, JsonSerializerOptions.Web)!;
        Assert.Equal(text.Contains("true", StringComparison.Ordinal), answer.IsTrue);
    }

    [Fact]
    public async Task Who_stops_reading_frees_the_place()
    {
        using LanguageModel model = LanguageModel.Load(TestModel.Folder, threads: 1, contextLength: 16_384);
        using IChatClient chat = model.AsChatClient();
        BatchGenerator generator = chat.GetService<BatchGenerator>()!;
        await foreach (ChatResponseUpdate _ in chat.GetStreamingResponseAsync("hello", new ChatOptions { Temperature = 0 }, Stop))
        {
            break;
        }

        while (generator.Running > 0)
        {
            await Task.Delay(1, Stop);
        }

        Assert.InRange(generator.NewTokens, 1, 16_000);
    }

    [Fact]
    public async Task What_is_not_supported_is_refused()
    {
        using LanguageModel model = LanguageModel.Load(TestModel.Folder, threads: 1);
        using IChatClient chat = model.AsChatClient();
        async Task<string> Refusal(ChatMessage message, ChatOptions options) =>
            (await Assert.ThrowsAsync<UserErrorException>(() => chat.GetResponseAsync([message], options, Stop))).Message;
        var hello = new ChatMessage(ChatRole.User, "hello");
        Assert.Contains("tools", await Refusal(hello, new ChatOptions { Tools = [AIFunctionFactory.Create(() => 1)] }), StringComparison.Ordinal);
        Assert.Contains("top-p", await Refusal(hello, new ChatOptions { TopP = 3 }), StringComparison.Ordinal);
        Assert.Contains("UriContent", await Refusal(new ChatMessage(ChatRole.User, [new UriContent("http://x", "image/png")]), new ChatOptions()), StringComparison.Ordinal);
    }

    private sealed record Answer(bool IsTrue);
}
