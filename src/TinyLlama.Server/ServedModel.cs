using TinyLlama.Data;
using TinyLlama.Inference;

namespace TinyLlama.Server;

/// <summary>A loaded model that many requests share.</summary>
public sealed class ServedModel : IDisposable
{
    private readonly LanguageModel _model;
    private readonly int _queue;

    /// <summary>Loads the model and takes the memory for all its places.</summary>
    /// <exception cref="UserErrorException">An option is out of range, or there is no such model or template.</exception>
    public ServedModel(ServerOptions options)
    {
        ArgumentNullException.ThrowIfNull(options);
        options.Validate();
        _model = LanguageModel.Load(
            options.Model, options.Threads, options.ContextLength, options.Warn, options.Adapter, cacheType: options.CacheType, device: options.Device);
        try
        {
            Chat = _model.CreateChat(options.ChatTemplate, line => options.Warn($"{options.Model}: {line}"));
            Generator = _model.CreateBatch(options.Places, options.Queue, options.CacheBytes, options.Lookup);
        }
        catch
        {
            _model.Dispose();
            throw;
        }

        _queue = options.Queue;
        Name = options.Name ?? NameOf(Path.TrimEndingDirectorySeparator(Path.GetFullPath(options.Model)));
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

    /// <summary>Puts work in line.</summary>
    /// <param name="submit">Asks the generator for it; null says that the queue is full.</param>
    /// <exception cref="ApiException">The queue is full, or the generator refuses the work.</exception>
    internal T Enqueue<T>(Func<BatchGenerator, T?> submit)
        where T : class
    {
        try
        {
            return submit(Generator) ?? throw ApiException.QueueFull(_queue);
        }
        catch (UserErrorException e)
        {
            throw ApiException.Invalid(e.Message);
        }
        catch (ObjectDisposedException)
        {
            throw ApiException.Unavailable("the model has stopped", "model_stopped");
        }
    }

    // A folder's name has no ending, though it may have dots: TinyLlama-1.1B-Chat-v1.0.
    private static string NameOf(string path) => Directory.Exists(path) ? Path.GetFileName(path) : Path.GetFileNameWithoutExtension(path);

    /// <inheritdoc/>
    public void Dispose()
    {
        Generator.Dispose();
        _model.Dispose();
    }
}
