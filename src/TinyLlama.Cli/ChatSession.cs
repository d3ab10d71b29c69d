using System.Diagnostics;
using System.Globalization;
using System.Text;
using System.Text.Json.Nodes;
using TinyLlama.Chat;
using TinyLlama.Data;
using TinyLlama.Inference;

namespace TinyLlama.Cli;

/// <summary>A conversation by lines: each is a message, or a command that begins with a slash.</summary>
/// <param name="chat">How conversations become prompts.</param>
/// <param name="generator">What computes the replies.</param>
/// <param name="settings">How they are sampled.</param>
/// <param name="output">Where replies go.</param>
/// <param name="error">Where everything else goes.</param>
/// <param name="isTerminal">Whether a person sits at it: shows a prompt, and what a reply took.</param>
internal sealed class ChatSession(
    ChatFormat chat, BatchGenerator generator, ChatSettings settings, TextWriter output, TextWriter error, bool isTerminal)
{
    private const string Help = """
        A line is a message; a line that ends with \ goes on in the next. Ctrl-C stops a reply.
          /system [TEXT]     what the model is told before the conversation
          /regen             another reply to the last message
          /undo              forget the last message and its reply
          /new               forget the whole conversation
          /set [KEY VALUE]   a setting of the replies, or all of them
          /save FILE         write the conversation as JSON
          /quit              leave; /exit and /bye do too
        """;

    private readonly List<ChatMessage> _messages = [];
    private readonly HashSet<string> _saved = [];
    private CancellationTokenSource? _reply;

    /// <summary>Gets or sets what the model is told before the conversation; null for nothing.</summary>
    public string? SystemPrompt { get; set; }

    /// <summary>Talks until the input ends or <c>/quit</c>.</summary>
    /// <param name="input">The lines.</param>
    /// <param name="stop">Ends it at once.</param>
    /// <returns>Whether there was no mistake.</returns>
    public async Task<bool> RunAsync(TextReader input, CancellationToken stop)
    {
        if (isTerminal)
        {
            error.WriteLine("/help shows the commands");
        }

        bool wentWell = true;
        while (await ReadAsync(input, stop) is { } line && line.Split(' ')[0] is not ("/quit" or "/exit" or "/bye"))
        {
            try
            {
                await (line.StartsWith('/') ? CommandAsync(line, stop) : SayAsync(line, stop));
            }
            catch (Exception e) when (e is UserErrorException or IOException or UnauthorizedAccessException)
            {
                error.WriteLine($"error: {e.Message}");
                wentWell = false;
            }
        }

        return wentWell;
    }

    /// <summary>Stops the reply that is being written; where there is none, says how to leave.</summary>
    public void Interrupt()
    {
        if (_reply is not { } reply)
        {
            error.Write($"{error.NewLine}/quit or Ctrl-D leaves{error.NewLine}> ");
            return;
        }

        try
        {
            reply.Cancel();
        }
        catch (ObjectDisposedException)
        {
            // It ended in this moment.
        }
    }

    // What a model says cannot steer the terminal.
    private static string Printable(string text) => string.Concat(text.Select(static c => char.IsControl(c) && c is not ('\n' or '\t') ? '\uFFFD' : c));

    private async Task<string?> ReadAsync(TextReader input, CancellationToken stop)
    {
        var message = new StringBuilder();
        while (true)
        {
            if (isTerminal)
            {
                error.Write(message.Length == 0 ? "> " : "… ");
            }

            // A read of the terminal cannot be cancelled: it is left behind.
            string? line = await Task.Run(input.ReadLine, stop).WaitAsync(stop);
            if (line is null || !line.EndsWith('\\'))
            {
                message.Append(line);
                string text = message.ToString().Trim();
                if (text.Length > 0)
                {
                    return text;
                }

                if (line is null)
                {
                    if (isTerminal)
                    {
                        error.WriteLine();
                    }

                    return null;
                }

                message.Clear();
                continue;
            }

            message.Append(line, 0, line.Length - 1).Append('\n');
        }
    }

    private async Task CommandAsync(string line, CancellationToken stop)
    {
        string[] words = line.Split(' ', 2, StringSplitOptions.TrimEntries | StringSplitOptions.RemoveEmptyEntries);
        string rest = words.Length > 1 ? words[1] : "";
        switch (words[0])
        {
            case "/help":
                error.WriteLine(Help);
                break;
            case "/system":
                SystemPrompt = rest.Length > 0 ? rest : null;
                error.WriteLine(SystemPrompt is null ? "no system prompt" : "system prompt set");
                break;
            case "/regen":
                await RegenerateAsync(stop);
                break;
            case "/undo":
                error.WriteLine(TakeBack() is { } taken ? $"forgotten: {taken}" : "there is nothing to undo");
                break;
            case "/new":
                _messages.Clear();
                error.WriteLine("a new conversation");
                break;
            case "/set":
                Set(rest);
                break;
            case "/save":
                Save(rest);
                break;
            default:
                throw new UserErrorException($"there is no command {words[0]}; /help shows them all");
        }
    }

    private async Task SayAsync(string text, CancellationToken stop)
    {
        _messages.Add(new ChatMessage("user", text));
        try
        {
            await ReplyAsync(stop);
        }
        catch (UserErrorException)
        {
            // It cannot be answered, so that it is not said.
            _messages.RemoveAt(_messages.Count - 1);
            throw;
        }
    }

    private async Task RegenerateAsync(CancellationToken stop)
    {
        string text = TakeBack() ?? throw new UserErrorException("there is nothing to reply to");
        await SayAsync(text, stop);
    }

    private async Task ReplyAsync(CancellationToken stop)
    {
        using var reply = CancellationTokenSource.CreateLinkedTokenSource(stop);
        _reply = reply;
        var text = new StringBuilder();
        long start = Stopwatch.GetTimestamp();
        BatchGeneration generation = generator.TrySubmit(Prompt(), chat.EndingTurn(settings.Next()), stop: reply.Token)![0];
        try
        {
            await foreach (GeneratedToken token in generation)
            {
                text.Append(token.Text);
                output.Write(isTerminal ? Printable(token.Text) : token.Text);
                output.Flush();
            }
        }
        catch (OperationCanceledException) when (!stop.IsCancellationRequested)
        {
            // What was said so far stays.
        }
        finally
        {
            _reply = null;
            output.WriteLine();
        }

        _messages.Add(new ChatMessage("assistant", text.ToString()));
        if (isTerminal)
        {
            double rate = generation.NewTokens / Stopwatch.GetElapsedTime(start).TotalSeconds;
            error.WriteLine(string.Create(
                CultureInfo.InvariantCulture,
                $"[{generation.NewTokens} tokens, {rate:N1} tokens/s, {generation.PromptTokens + generation.NewTokens} of {generator.ContextLength}]"));
        }
    }

    private int[] Prompt()
    {
        int[] prompt = chat.Encode(Conversation());
        return prompt.Length < generator.ContextLength
            ? prompt
            : throw new UserErrorException(
                $"the conversation has {prompt.Length} tokens, the context {generator.ContextLength}; say less, take back some of it (/undo), or begin anew (/new)");
    }

    private List<ChatMessage> Conversation() => SystemPrompt is null ? _messages : [new ChatMessage("system", SystemPrompt), .. _messages];

    // The last message, which is gone with its reply.
    private string? TakeBack()
    {
        int last = _messages.FindLastIndex(static message => message.Role == "user");
        if (last < 0)
        {
            return null;
        }

        string text = _messages[last].Content;
        _messages.RemoveRange(last, _messages.Count - last);
        return text;
    }

    private void Set(string rest)
    {
        string[] words = rest.Split([' ', '='], 2, StringSplitOptions.TrimEntries | StringSplitOptions.RemoveEmptyEntries);
        if (words.Length > 0)
        {
            settings.Set(words[0], words.Length > 1 ? words[1] : "");
        }

        error.WriteLine(settings.ToString());
    }

    private void Save(string path)
    {
        if (path.Length == 0)
        {
            throw new UserErrorException("name a file: /save FILE");
        }

        var conversation = new JsonObject
        {
            ["messages"] = new JsonArray([.. Conversation().Select(static message => new JsonObject { ["role"] = message.Role, ["content"] = message.Content })]),
        };

        // A conversation that goes on is saved again.
        if (!_saved.Contains(path) && File.Exists(path))
        {
            throw new UserErrorException($"{path}: is there already; name another file");
        }

        File.WriteAllText(path, conversation.ToJsonString(JsonOutput.Options) + "\n");
        _saved.Add(path);
        error.WriteLine($"saved {_messages.Count} messages to {path}");
    }
}
