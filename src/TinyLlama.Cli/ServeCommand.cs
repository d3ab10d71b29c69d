using System.CommandLine;
using System.Net;
using System.Net.Sockets;
using Microsoft.AspNetCore.Builder;
using Microsoft.AspNetCore.Hosting.Server;
using Microsoft.AspNetCore.Hosting.Server.Features;
using Microsoft.Extensions.DependencyInjection;
using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Server;

namespace TinyLlama.Cli;

/// <summary><c>tinyllama serve MODEL</c>: OpenAI's API and a chat page over HTTP, until it is stopped.</summary>
internal sealed class ServeCommand
{
    private readonly Argument<string> _model = CommonOptions.Model();

    private readonly Option<string> _host = new("--host")
    {
        Description = "The address to listen on; 0.0.0.0 for all of this machine's",
        HelpName = "ADDRESS",
        DefaultValueFactory = _ => "127.0.0.1",
    };

    private readonly Option<int> _port = new("--port")
    {
        Description = "The port to listen on; 0 for any that is free",
        HelpName = "N",
        DefaultValueFactory = _ => 8080,
    };

    private readonly Option<string?> _name = new("--name") { Description = "What requests call the model [default: its file or folder]", HelpName = "NAME" };
    private readonly Option<string?> _template = CommonOptions.ChatTemplate();

    private readonly Option<string?> _lora = CommonOptions.Lora();

    private readonly Option<string[]> _keys = new("--api-key")
    {
        Description = "A key that lets requests in; may be repeated [default: none is needed]",
        HelpName = "KEY",
        DefaultValueFactory = _ => [],
    };

    private readonly Option<string?> _keyFile = new("--api-key-file") { Description = "A file of keys, one a line, which other users of this machine cannot see", HelpName = "FILE" };

    private readonly Option<string[]> _origins = new("--cors")
    {
        Description = "An origin whose web pages may use the server, * for all; may be repeated [default: its own alone]",
        HelpName = "ORIGIN",
        DefaultValueFactory = _ => [],
    };

    private readonly Option<int?> _places = Count("--places", "Replies that are computed together [default: 16]");
    private readonly Option<int?> _queue = Count("--queue", "Replies that may wait; more are refused [default: 256]");
    private readonly Option<int?> _cache = Count("--cache", "Memory for keys and values, in MiB [default: 1024, or less where all places need less]");
    private readonly Option<int?> _lookup = CommonOptions.Lookup();
    private readonly Option<int?> _maxTokens = CommonOptions.AtLeast(new Option<int?>("--max-tokens") { Description = "Most new tokens of a reply [default: as many as the context holds]", HelpName = "N" }, 1);
    private readonly Option<int?> _timeout = Count("--timeout", "Most seconds that a reply may take, its waiting included [default: 600]");
    private readonly Option<int?> _maxBody = Count("--max-body", "Most bytes of a request [default: 2097152]");
    private readonly Option<int?> _context = CommonOptions.Context();
    private readonly Option<DType?> _cacheType = CommonOptions.CacheType();
    private readonly Option<Device?> _device = CommonOptions.Device();
    private readonly Option<int?> _threads = CommonOptions.Threads();

    /// <summary>The verb.</summary>
    public static Command Create() => new ServeCommand().Build();

    private static Option<int?> Count(string name, string description) =>
        CommonOptions.AtLeast(new Option<int?>(name) { Description = description, HelpName = "N" }, 1);

    private Command Build()
    {
        var command = new Command("serve", "Serve a model over HTTP: OpenAI's API and a chat page")
        {
            _model, _host, _port, _name, _template, _lora, _keys, _keyFile, _origins, _places, _queue, _cache, _cacheType, _lookup, _maxTokens, _timeout, _maxBody, _context, _device, _threads,
        };
        command.SetAction(RunAsync);
        return command;
    }

    private async Task<int> RunAsync(ParseResult parse, CancellationToken stop)
    {
        (TextWriter output, TextWriter error) = (parse.InvocationConfiguration.Output, parse.InvocationConfiguration.Error);
        void Warn(string line) => error.WriteLine("warning: " + line);
        string host = parse.GetRequiredValue(_host);
        IPAddress address = host == "localhost" ? IPAddress.Loopback
            : IPAddress.TryParse(host, out IPAddress? parsed) ? parsed
            : throw new UserErrorException($"--host is '{host}', an IP address is needed, such as 127.0.0.1 or 0.0.0.0");
        int port = parse.GetValue(_port);
        if (port is < IPEndPoint.MinPort or > IPEndPoint.MaxPort)
        {
            throw new UserErrorException($"--port is {port}, it must be from 0 to {IPEndPoint.MaxPort}");
        }

        ServerOptions options = Options(parse, Warn);
        if (!IPAddress.IsLoopback(address) && options.ApiKeys.Count == 0)
        {
            Warn($"whoever reaches {host} can use the server; --api-key lets in those alone who have the key");
        }

        await using WebApplication app = ServerHosting.Create(options, address, port);
        try
        {
            await app.StartAsync(stop);
        }
        catch (Exception e) when (e is IOException or SocketException)
        {
            throw new UserErrorException($"cannot listen to {host}:{port}: {(e.InnerException ?? e).Message}; --host and --port choose another address", e);
        }

        ServedModel model = app.Services.GetRequiredService<ServedModel>();
        string url = app.Services.GetRequiredService<IServer>().Features.Get<IServerAddressesFeature>()!.Addresses.Single();
        output.WriteLine($"{url}  {model.Name}: {model.ParameterCount:N0} parameters, context {model.Generator.ContextLength}, chat template {model.Chat.Template.Name}");
        output.Flush();
        var stopped = new TaskCompletionSource();
        await using (stop.Register(stopped.SetResult))
        {
            await stopped.Task;
        }

        // What runs is finished; nothing new begins.
        await app.StopAsync(CancellationToken.None);
        return ExitCode.Success;
    }

    private ServerOptions Options(ParseResult parse, Action<string> warn)
    {
        var options = new ServerOptions
        {
            Model = parse.GetRequiredValue(_model),
            Name = parse.GetValue(_name),
            ChatTemplate = parse.GetValue(_template),
            Adapter = parse.GetValue(_lora),
            Device = parse.GetValue(_device) ?? default,
            Threads = parse.GetValue(_threads) ?? 0,
            ContextLength = parse.GetValue(_context),
            CacheType = parse.GetValue(_cacheType),
            CacheBytes = parse.GetValue(_cache) is { } mebibytes ? (long)mebibytes << 20 : null,
            Lookup = parse.GetValue(_lookup) ?? 0,
            MaxTokens = parse.GetValue(_maxTokens),
            Warn = warn,
        };
        options.Places = parse.GetValue(_places) ?? options.Places;
        options.Queue = parse.GetValue(_queue) ?? options.Queue;
        options.MaxBodyBytes = parse.GetValue(_maxBody) ?? options.MaxBodyBytes;
        options.Timeout = parse.GetValue(_timeout) is { } seconds ? TimeSpan.FromSeconds(seconds) : options.Timeout;
        string[] fileKeys = parse.GetValue(_keyFile) is { } file
            ? [.. File.ReadLines(file).Select(static line => line.Trim()).Where(static line => line.Length > 0)]
            : [];
        foreach (string key in fileKeys.Concat(parse.GetValue(_keys)!))
        {
            options.ApiKeys.Add(key);
        }

        foreach (string origin in parse.GetValue(_origins)!)
        {
            options.CorsOrigins.Add(origin);
        }

        return parse.GetValue(_keyFile) is { } empty && fileKeys.Length == 0
            ? throw new UserErrorException($"{empty}: holds no key; write one a line")
            : options;
    }
}
