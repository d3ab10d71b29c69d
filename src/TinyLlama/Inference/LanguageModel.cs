using Microsoft.Extensions.AI;
using TinyLlama.Chat;
using TinyLlama.Checkpoints;
using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Model;

namespace TinyLlama.Inference;

/// <summary>A trained model from files, with its tokenizer, ready to continue texts.</summary>
/// <example>
/// <code>
/// using LanguageModel model = LanguageModel.Load("runs/quickstart");
/// foreach (string piece in model.Generate("Once upon a time", new() { Temperature = 0.8, MaxTokens = 100 }))
/// {
///     Console.Write(piece);
/// }
/// </code>
/// </example>
public sealed class LanguageModel : IDisposable
{
    // More keys and values than any machine holds, and positions that an int counts with room to spare.
    private const int MostContext = 1 << 24;

    // Open only where the model reads weights in its files.
    private readonly ModelSource _source;
    private readonly Lazy<ChatTemplate?> _chatTemplate;
    private readonly PromptCache? _promptCache;
    private TextGenerator? _generator;

    private LanguageModel(ModelSource source, Backend backend, LlamaModel model, BpeTokenizer tokenizer, bool addsBos, Func<ChatTemplate?> chatTemplate,
        int contextLength, PromptCache? promptCache)
    {
        (_source, Backend, Model, Tokenizer, AddsBos, ContextLength) = (source, backend, model, tokenizer, addsBos, contextLength);
        (_chatTemplate, _promptCache) = (new Lazy<ChatTemplate?>(chatTemplate), promptCache);
    }

    /// <summary>Gets the device.</summary>
    public Backend Backend { get; }

    /// <summary>Gets the model.</summary>
    public LlamaModel Model { get; }

    /// <summary>Gets the tokenizer that came with the model.</summary>
    public BpeTokenizer Tokenizer { get; }

    /// <summary>Gets a value indicating whether a text begins with BOS, where the vocabulary has one.</summary>
    public bool AddsBos { get; }

    /// <summary>Gets the most tokens of a text.</summary>
    public int ContextLength { get; }

    /// <summary>Gets what keys and values of texts are rounded to.</summary>
    public DType CacheType { get; private init; }

    /// <summary>Gets or sets what proposes tokens to <see cref="Generate"/>; null for nothing. Its owner disposes of it.</summary>
    public Draft? Draft { get; set; }

    /// <summary>Gets the chat template that came with the model, or null where none did.</summary>
    /// <exception cref="UserErrorException">It uses what is not supported; the message names it.</exception>
    public ChatTemplate? ChatTemplate => _chatTemplate.Value;

    /// <summary>Loads a model and its tokenizer.</summary>
    /// <param name="path">A run (its newest checkpoint), a checkpoint, a Hugging Face folder, a <c>.gguf</c> file, or a <c>.bin</c> file of llama2.c.</param>
    /// <param name="threads">Threads to compute with; 0 for one a core.</param>
    /// <param name="contextLength">Most tokens of a text; by default what the model is trained for.</param>
    /// <param name="warn">Is told, in one line, what is wrong but can be worked around.</param>
    /// <param name="adapter">A folder in which PEFT saved a LoRA adapter, which is added to the weights; null for none. Not of a quantized model.</param>
    /// <param name="promptCache">
    /// A file for the keys and values of the last prompt given to <see cref="Generate"/>, so that a prompt that begins alike
    /// is not computed again; null for none. The weights are hashed, to tell models apart.
    /// </param>
    /// <param name="cacheType">What keys and values of texts are rounded to; by default what the device likes best (<see cref="Backend.CacheType"/>).</param>
    /// <param name="device">What to compute on.</param>
    /// <exception cref="UserErrorException">There is no such model or adapter, it is damaged, or the model has no tokenizer.</exception>
    /// <exception cref="DeviceException">There is no such device, or it has too little memory.</exception>
    public static LanguageModel Load(string path, int threads = 0, int? contextLength = null, Action<string>? warn = null, string? adapter = null,
        string? promptCache = null, DType? cacheType = null, Device device = default)
    {
        if (contextLength is < 1 or > MostContext)
        {
            throw new UserErrorException($"a context of {contextLength} tokens is asked for, it must be from 1 to {MostContext}");
        }

        warn ??= static _ => { };
        ModelSource source = adapter is null ? ModelSource.Open(path, warn) : ModelSource.Open(path, adapter, warn);
        Backend? backend = null;
        LlamaModel? model = null;
        try
        {
            if (contextLength > source.Config.ContextLength)
            {
                warn($"{source.Path}: is trained for {source.Config.ContextLength} tokens of context; expect worse text beyond");
            }

            BpeTokenizer tokenizer = source.LoadTokenizer()
                ?? throw new UserErrorException($"{source.Path}: has no tokenizer; {source.TokenizerAdvice}");
            backend = device.Open(threads, warn: warn);
            model = LlamaModel.AllocateFrozen(source.Config, backend, source.FrozenStorageOf);
            source.CopyTo(backend, model.Parameters);
            (string? template, string origin) = (source.ChatTemplate, source.Path);
            var loaded = new LanguageModel(
                source,
                backend,
                model,
                tokenizer,
                source.AddsBos,
                () => template is null ? null : Chat.ChatTemplate.Parse(template, origin),
                contextLength ?? source.Config.ContextLength,
                promptCache is null ? null : new PromptCache(promptCache, $"{source.Hash()} {backend.Arithmetic} {cacheType ?? backend.CacheType}"))
            {
                CacheType = cacheType ?? backend.CacheType,
            };
            if (!model.Parameters.Any(static parameter => parameter.IsInPlace))
            {
                source.Dispose();
            }

            return loaded;
        }
        catch
        {
            model?.Dispose();
            backend?.Dispose();
            source.Dispose();
            throw;
        }
    }

    /// <summary>Prepares a continuation of a text; its pieces are computed as they are enumerated.</summary>
    /// <param name="prompt">The text to continue.</param>
    /// <param name="options">How to continue; by default from the whole distribution to the end of the context.</param>
    /// <param name="stop">Ends the enumeration with <see cref="OperationCanceledException"/>.</param>
    /// <exception cref="UserErrorException">An option is out of range, or prompt and new tokens do not fit the context.</exception>
    public Generation Generate(string prompt, GenerationOptions? options = null, CancellationToken stop = default)
    {
        _generator ??= new TextGenerator(Model, Backend, Tokenizer, AddsBos, ContextLength, CacheType);
        (_generator.Draft, _generator.PromptCache) = (Draft, _promptCache);
        return _generator.Generate(prompt, options, stop);
    }

    /// <summary>Searches for the likeliest continuations of a text (beam search).</summary>
    /// <param name="prompt">The text to continue.</param>
    /// <param name="options">What to search for.</param>
    /// <param name="progress">Is told the number of tokens of the texts that are followed.</param>
    /// <param name="stop">Ends it with <see cref="OperationCanceledException"/>.</param>
    /// <returns>As many texts as there are beams, or as there are at all; the best first.</returns>
    /// <exception cref="UserErrorException">An option is out of range, or prompt and new tokens do not fit the context.</exception>
    /// <exception cref="DeviceException">The machine has too little memory for it.</exception>
    public IReadOnlyList<BeamText> Search(
        string prompt, BeamSearchOptions? options = null, Action<int>? progress = null, CancellationToken stop = default)
    {
        options ??= new BeamSearchOptions();
        options.Validate();
        var prompts = new PromptReader(Tokenizer, AddsBos, ContextLength, Model.Config.VocabularySize);
        int[] tokens = prompts.Encode(prompt);
        prompts.Check(tokens, new GenerationOptions { MaxTokens = options.MaxTokens, StopTokens = options.StopTokens });
        return BeamSearch.Run(Model, Backend, Tokenizer, ContextLength, CacheType, tokens, options, progress, stop);
    }

    /// <summary>
    /// Makes what continues many texts together. Nothing else may use the model until it is disposed of, which is before the
    /// model.
    /// </summary>
    /// <param name="places">Texts that run together.</param>
    /// <param name="queue">Texts that may wait for a place.</param>
    /// <param name="cacheBytes">Memory for keys and values of all texts; by default 1 GiB, or less where all places need less.</param>
    /// <param name="lookup">Most tokens that a text tries at a time where its last ones stood before; 0 for none.</param>
    /// <exception cref="UserErrorException">The tokenizer is not of the model, or one context does not fit the cache.</exception>
    /// <exception cref="DeviceException">The machine has too little memory for it.</exception>
    public BatchGenerator CreateBatch(int places = 16, int queue = 256, long? cacheBytes = null, int lookup = 0) =>
        new(Model, Backend, Tokenizer, AddsBos, ContextLength, places, queue, cacheBytes, CacheType, lookup);

    /// <summary>How conversations become prompts of this model.</summary>
    /// <param name="template">A built-in template or a file with one; null for the model's own, else <c>plain</c>.</param>
    /// <param name="warn">Is told, in one line, that the model has none of its own.</param>
    /// <exception cref="UserErrorException">There is no such template, or it uses what is not supported.</exception>
    public ChatFormat CreateChat(string? template = null, Action<string>? warn = null)
    {
        ChatTemplate? chosen = template is null ? ChatTemplate : Chat.ChatTemplate.Load(template);
        if (chosen is null)
        {
            chosen = Chat.ChatTemplate.Plain;
            warn?.Invoke("the model has no chat template: it continues messages as text; --chat-template names the form that it was taught");
        }

        return new ChatFormat(chosen, Tokenizer, AddsBos);
    }

    /// <summary>Makes a client of Microsoft.Extensions.AI, which is to be disposed of before the model.</summary>
    /// <param name="template">As of <see cref="CreateChat"/>.</param>
    /// <exception cref="UserErrorException">As of <see cref="CreateBatch"/> and <see cref="CreateChat"/>.</exception>
    public IChatClient AsChatClient(string? template = null) => new ModelChatClient(CreateChat(template), CreateBatch(), ownsGenerator: true);

    /// <inheritdoc/>
    public void Dispose()
    {
        _generator?.Dispose();
        Model.Dispose();
        Backend.Dispose();
        _source.Dispose();
    }
}
