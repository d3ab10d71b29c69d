using TinyLlama.Data;
using TinyLlama.Inference;

namespace TinyLlama.Server;

/// <summary>A loaded model that many requests share.</summary>
public sealed class ServedModel : IDisposable
{
    private readonly LanguageModel _model;

    /// <summary>Loads the model and takes the memory for all its places.</summary>
    /// <exception cref="UserErrorException">An option is out of range, or there is no such model or template.</exception>
    public ServedModel(ServerOptions options)
    {
        ArgumentNullException.ThrowIfNull(options);
        options.Validate();
        _model = LanguageModel.Load(options.Model, options.Threads, options.ContextLength, options.Warn, options.Adapter);
        try
        {
            Chat = _model.CreateChat(options.ChatTemplate, line => options.Warn($"{options.Model}: {line}"));
            Generator = _model.CreateBatch(options.Places, options.Queue, options.CacheBytes);
        }
        catch
        {
            _model.Dispose();
            throw;
        }

        Name = options.Name ?? Path.GetFileNameWithoutExtension(Path.TrimEndingDirectorySeparator(Path.GetFullPath(options.Model)));
        Loaded = DateTimeOffset.UtcNow;
    }

    /// <summary>Gets the name that requests call it by.</summary>
    public string Name { get; }

    /// <summary>Gets when it was loaded.</summary>
    public DateTimeOffset Loaded { get; }

    /// <summary>Gets what computes.</summary>
    public BatchGenerator Generator { get; }

    /// <summary>Gets how conversations become prompts.</summary>
    public ChatFormat Chat { get; }

    /// <summary>Gets the number of parameters.</summary>
    public long ParameterCount => _model.Model.Config.ParameterCount;

    /// <summary>A client for other code of this process; its conversations are computed together with those of requests.</summary>
    public ModelChatClient CreateClient() => new(Chat, Generator);

    /// <inheritdoc/>
    public void Dispose()
    {
        Generator.Dispose();
        _model.Dispose();
    }
}
