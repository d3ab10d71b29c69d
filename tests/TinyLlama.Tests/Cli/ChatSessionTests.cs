using System.Text;
using System.Text.Json.Nodes;
using TinyLlama.Cli;
using TinyLlama.Inference;
using TinyLlama.Tests.Checkpoints;
using TinyLlama.Tests.Common;

namespace TinyLlama.Tests.Cli;

public sealed class ChatSessionTests : IDisposable
{
    private readonly TemporaryFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Fact]
    public async Task Replies_know_the_conversation_and_nothing_that_was_taken_back()
    {
        (string[] replies, _) = await TalkAsync(
            "Once upon a time", "/regen", "/undo", "Once upon a time", "Then", "/new", "Then", "/system Lily", "/regen");
        Assert.Equal(6, replies.Length);
        Assert.Equal(replies[0], replies[1]);
        Assert.Equal(replies[0], replies[2]);
        Assert.NotEqual(replies[3], replies[4]);
        Assert.NotEqual(replies[4], replies[5]);
    }

    [Fact]
    public async Task Each_reply_has_a_seed_and_a_seed_repeats()
    {
        (string[] replies, _) = await TalkAsync(
            "/set temperature 1", "/set seed 5", "Once", "/regen", "/set seed=5", "/regen", "/set seed 6", "/regen");
        Assert.Equal(replies[0], replies[2]);
        Assert.Equal(replies[1], replies[3]);
        Assert.NotEqual(replies[0], replies[1]);
    }

    [Fact]
    public async Task Lines_that_end_with_a_backslash_go_on_and_quit_ends()
    {
        (string[] replies, _) = await TalkAsync("Once \\", "", "/save " + _folder["a.json"], "/quit", "never said");
        Assert.Single(replies);
        JsonArray messages = JsonNode.Parse(await File.ReadAllTextAsync(_folder["a.json"]))!["messages"]!.AsArray();
        Assert.Equal(["Once", replies[0]], messages.Select(message => (string)message!["content"]!));
        Assert.Equal(["user", "assistant"], messages.Select(message => (string)message!["role"]!));
    }

    [Fact]
    public async Task A_conversation_is_saved_again_and_replaces_no_other_file()
    {
        string saved = _folder["a.json"], other = _folder["precious.txt"];
        await File.WriteAllTextAsync(other, "precious", TestContext.Current.CancellationToken);
        (string[] replies, string error) = await TalkAsync("Once", "/save " + saved, "Then", "/save " + saved, "/save " + other);
        Assert.Equal(4, JsonNode.Parse(await File.ReadAllTextAsync(saved, TestContext.Current.CancellationToken))!["messages"]!.AsArray().Count);
        Assert.Equal(2, replies.Length);
        Assert.Contains($"error: {other}: is there already", error, StringComparison.Ordinal);
        Assert.Equal("precious", await File.ReadAllTextAsync(other, TestContext.Current.CancellationToken));
    }

    [Theory]
    [InlineData("/nope", "there is no command /nope")]
    [InlineData("/set heat 1", "there is no setting 'heat'")]
    [InlineData("/set temperature hot", "temperature is 'hot', a number is needed")]
    [InlineData("/set top_p 2", "top-p is 2")]
    [InlineData("/set max_tokens -1", "a whole number is needed")]
    [InlineData("/save", "name a file")]
    [InlineData("/save /nowhere/at/all", "/nowhere/at")]
    [InlineData("/regen", "nothing to reply to")]
    public async Task A_mistake_is_a_line_and_the_conversation_goes_on(string line, string problem)
    {
        (string[] replies, string error) = await TalkAsync(line, "Once");
        Assert.Single(replies);
        Assert.Contains("error: ", error, StringComparison.Ordinal);
        Assert.Contains(problem, error, StringComparison.Ordinal);
    }

    [Fact]
    public async Task What_does_not_fit_the_context_is_not_said()
    {
        (string[] replies, string error) = await TalkAsync(new string('x', 600), "Once");
        Assert.Contains("the context 512", error, StringComparison.Ordinal);
        (string[] fresh, _) = await TalkAsync("Once");
        Assert.Equal(fresh, replies);
    }

    [Fact]
    public async Task A_reply_is_stopped_and_the_conversation_goes_on()
    {
        using LanguageModel model = Load();
        using BatchGenerator generator = model.CreateBatch(places: 1, queue: 1);
        var settings = new ChatSettings();
        ChatSession? session = null;
        using var output = new StoppingWriter(writes: 5, () => session!.Interrupt());
        using var error = new StringWriter();
        session = new ChatSession(model.CreateChat("chatml"), generator, settings, output, error, isTerminal: true);
        settings.Set("seed", "1");
        await session.RunAsync(new StringReader("Once upon a time\n/set max_tokens 2\nThen\n"), TestContext.Current.CancellationToken);
        string[] tokens = [.. error.ToString().Split('[').Skip(1).Select(part => part[..part.IndexOf(' ', StringComparison.Ordinal)])];
        Assert.Equal(2, tokens.Length);
        Assert.InRange(int.Parse(tokens[0], System.Globalization.CultureInfo.InvariantCulture), 5, 400);
        Assert.Equal("2", tokens[1]);
    }

    [Fact]
    public void An_interrupt_where_no_reply_comes_says_how_to_leave()
    {
        using LanguageModel model = Load();
        using BatchGenerator generator = model.CreateBatch(places: 1, queue: 1);
        using var error = new StringWriter { NewLine = "\n" };
        new ChatSession(model.CreateChat("chatml"), generator, new ChatSettings(), TextWriter.Null, error, isTerminal: true).Interrupt();
        Assert.Equal("\n/quit or Ctrl-D leaves\n> ", error.ToString());
    }

    private static LanguageModel Load() => LanguageModel.Load(SharedFiles.Require("oracles/stories260K/stories260K.bin"), threads: 1);

    // Replies of twelve greedy tokens, each between two marks.
    private static async Task<(string[] Replies, string Error)> TalkAsync(params string[] lines)
    {
        using LanguageModel model = Load();
        using BatchGenerator generator = model.CreateBatch(places: 1, queue: 1);
        var settings = new ChatSettings();
        settings.Set("max_tokens", "12");
        settings.Set("temperature", "0");
        using var output = new StringWriter { NewLine = "\u0001" };
        using var error = new StringWriter { NewLine = "\n" };
        var session = new ChatSession(model.CreateChat("chatml"), generator, settings, output, error, isTerminal: false);
        await session.RunAsync(new StringReader(string.Join('\n', lines)), TestContext.Current.CancellationToken);
        return (output.ToString().Split('\u0001')[..^1], error.ToString());
    }

    /// <summary>Does something when so much was written.</summary>
    private sealed class StoppingWriter(int writes, Action action) : TextWriter
    {
        private int _count;

        public override Encoding Encoding => Encoding.UTF8;

        public override void Write(char value)
        {
        }

        public override void Write(string? value)
        {
            if (++_count == writes)
            {
                action();
            }
        }
    }
}
