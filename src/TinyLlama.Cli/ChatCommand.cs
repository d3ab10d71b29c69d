using System.CommandLine;
using TinyLlama.Compute;
using TinyLlama.Inference;

namespace TinyLlama.Cli;

/// <summary><c>tinyllama chat MODEL</c>: a conversation in the terminal, or of lines from standard input.</summary>
internal sealed class ChatCommand
{
    private readonly Argument<string> _model = CommonOptions.Model();
    private readonly Option<string?> _system = new("--system") { Description = "What the model is told before the conversation", HelpName = "TEXT" };
    private readonly Option<string?> _template = CommonOptions.ChatTemplate();

    private readonly Option<string[]> _set = new("--set")
    {
        Description = $"A setting of the replies, as by /set: {ChatSettings.Names}; may be repeated",
        HelpName = "KEY=VALUE",
        DefaultValueFactory = _ => [],
    };

    private readonly Option<string?> _lora = CommonOptions.Lora();
    private readonly Option<int?> _lookup = CommonOptions.Lookup();
    private readonly Option<int?> _context = CommonOptions.Context();
    private readonly Option<DType?> _cacheType = CommonOptions.CacheType();
    private readonly Option<Device?> _device = CommonOptions.Device();
    private readonly Option<int?> _threads = CommonOptions.Threads();

    /// <summary>The verb.</summary>
    public static Command Create() => new ChatCommand().Build();

    private Command Build()
    {
        var command = new Command("chat", "Talk with a model in the terminal") { _model, _system, _template, _set, _lora, _lookup, _context, _cacheType, _device, _threads };
        command.SetAction(RunAsync);
        return command;
    }

    private async Task<int> RunAsync(ParseResult parse, CancellationToken stop)
    {
        (TextWriter output, TextWriter error) = (parse.InvocationConfiguration.Output, parse.InvocationConfiguration.Error);
        void Warn(string line) => error.WriteLine("warning: " + line);
        var settings = new ChatSettings();
        foreach (string pair in parse.GetValue(_set)!)
        {
            int equals = pair.IndexOf('=', StringComparison.Ordinal);
            settings.Set(equals < 0 ? pair : pair[..equals], equals < 0 ? "" : pair[(equals + 1)..]);
        }

        using LanguageModel model = LanguageModel.Load(
            parse.GetRequiredValue(_model), parse.GetValue(_threads) ?? 0, parse.GetValue(_context), Warn, parse.GetValue(_lora), cacheType: parse.GetValue(_cacheType),
            device: parse.GetValue(_device) ?? default);
        ChatFormat chat = model.CreateChat(parse.GetValue(_template), Warn);
        using BatchGenerator generator = model.CreateBatch(places: 1, queue: 1, lookup: parse.GetValue(_lookup) ?? 0);
        bool isTerminal = !Console.IsInputRedirected && ReferenceEquals(output, Console.Out);
        var session = new ChatSession(chat, generator, settings, output, error, isTerminal) { SystemPrompt = parse.GetValue(_system) };

        // At a terminal Ctrl-C is for the reply; the program ends by /quit, by the end of its input, or by SIGTERM.
        using IDisposable? diversion = isTerminal ? StopSignals.DivertInterrupts(session.Interrupt) : null;
        using TextReader input = isTerminal ? Console.In : CommandLine.OpenInput();
        bool wentWell = await session.RunAsync(input, stop);
        return wentWell || isTerminal ? ExitCode.Success : ExitCode.UserError;
    }
}
