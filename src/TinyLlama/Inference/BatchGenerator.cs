using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Model;

namespace TinyLlama.Inference;

/// <summary>
/// Continues many texts together: in each forward every running text gets its next token, and what room is left prefills
/// new ones. A text begins when a place is free and leaves when it ends (continuous batching, Yu et al. 2022).
/// </summary>
/// <remarks>
/// A text gets the same tokens as from <see cref="TextGenerator"/>, whatever runs beside it. One thread computes; all
/// members may be called from any thread.
/// </remarks>
public sealed class BatchGenerator : IDisposable
{
    private const long DefaultCacheBytes = 1L << 30;

    private readonly PromptReader _prompts;
    private readonly Lock _lock = new();
    private readonly LinkedList<BatchRequest> _waiting = [];
    private readonly BatchScheduler _scheduler;
    private readonly AutoResetEvent _wake = new(initialState: false);
    private readonly Thread _thread;
    private readonly int _places;
    private readonly int _queue;
    private readonly int _channels;
    private int _usedBlocks;
    private Exception? _ended;

    /// <summary>Takes the memory for all places and starts the thread.</summary>
    /// <param name="model">The model; it outlives the generator.</param>
    /// <param name="backend">The device, which nothing else may use until the generator is disposed of.</param>
    /// <param name="tokenizer">The tokenizer that the model was trained with.</param>
    /// <param name="addBos">Whether a prompt begins with BOS, where the vocabulary has one.</param>
    /// <param name="contextLength">Most tokens of prompt and continuation; by default what the model is trained for.</param>
    /// <param name="places">Texts that run together.</param>
    /// <param name="queue">Texts that may wait for a place, besides as many as there are free ones.</param>
    /// <param name="cacheBytes">
    /// Memory for keys and values of all texts; by default 1 GiB, or less where all places need less. At least one context.
    /// </param>
    /// <param name="cacheType">What keys and values are rounded to; by default what the device likes best (<see cref="Backend.CacheType"/>).</param>
    /// <param name="lookup">
    /// Most tokens, up to <see cref="Draft.MostTokens"/>, that a text tries at a time where its last ones stood before (<see cref="PromptLookup"/>), while few texts run; 0 for
    /// none. It gets the same tokens, sooner where it repeats itself or its prompt.
    /// </param>
    /// <exception cref="UserErrorException">The tokenizer is not of the model, or one context does not fit the cache.</exception>
    /// <exception cref="DeviceException">The device has too little memory.</exception>
    public BatchGenerator(
        LlamaModel model, Backend backend, ITokenizer tokenizer, bool addBos = true, int? contextLength = null, int places = 16, int queue = 256,
        long? cacheBytes = null, DType? cacheType = null, int lookup = 0)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(queue, 1);
        ArgumentOutOfRangeException.ThrowIfLessThan(lookup, 0);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(lookup, Draft.MostTokens);
        int context = contextLength ?? model.Config.ContextLength;
        _prompts = new PromptReader(tokenizer, addBos, context, model.Config.VocabularySize);
        int blocks = BlocksFor(KeyValueCache.BlockBytes(backend, model.Config, cacheType ?? backend.CacheType), context, places, cacheBytes);
        var engine = new InferenceEngine(
            model, backend, context, places, cacheBlocks: blocks, cacheType: cacheType, moreLogits: BatchScheduler.MoreLogits(lookup));
        (_places, _queue, _channels) = (places, queue, engine.Channels);
        _scheduler = new BatchScheduler(engine, places, tokenizer.VocabularySize, lookup);
        _thread = new Thread(Work) { IsBackground = true, Name = "batch generator" };
        _thread.Start();
    }

    /// <summary>Gets the tokenizer.</summary>
    public ITokenizer Tokenizer => _prompts.Tokenizer;

    /// <summary>Gets the most tokens of prompt and continuation.</summary>
    public int ContextLength => _prompts.ContextLength;

    /// <summary>Gets the number of texts that wait for a place.</summary>
    public int Waiting
    {
        get
        {
            lock (_lock)
            {
                return _waiting.Count;
            }
        }
    }

    /// <summary>Gets the number of texts that have a place.</summary>
    public int Running => _scheduler.Running;

    /// <summary>Gets the number of prompt tokens computed so far.</summary>
    public long PromptTokens => _scheduler.PromptTokens;

    /// <summary>Gets the number of prompt tokens that were in the cache already, so far.</summary>
    public long CachedPromptTokens => _scheduler.CachedPromptTokens;

    /// <summary>Gets how often a text lost its place because the cache was full, so far.</summary>
    public long Preemptions => _scheduler.Preemptions;

    /// <summary>Gets the number of tokens that were tried because they had followed before, so far.</summary>
    public long ProposedTokens => _scheduler.ProposedTokens;

    /// <summary>Gets the number of those that came.</summary>
    public long AcceptedTokens => _scheduler.AcceptedTokens;

    /// <summary>Gets the number of blocks of the cache, of <see cref="TokenLayout.KeyBlock"/> tokens each.</summary>
    public int CacheBlocks => _scheduler.Cache.BlockCount;

    /// <summary>Gets the number of those that texts have which run.</summary>
    public int UsedCacheBlocks => Volatile.Read(ref _usedBlocks);

    /// <summary>Gets the number of tokens generated so far.</summary>
    public long NewTokens => _scheduler.NewTokens;

    /// <summary>The tokens of a prompt: BOS, where the model wants it and the vocabulary has it, and those of the text.</summary>
    public int[] Encode(string prompt) => _prompts.Encode(prompt);

    /// <summary>Puts a text in line; enumerate what comes back to read it.</summary>
    /// <param name="prompt">The text to continue; may be empty where the vocabulary has BOS.</param>
    /// <param name="options">How to continue.</param>
    /// <param name="stop">Takes it out again; its enumeration ends with <see cref="OperationCanceledException"/>.</param>
    /// <returns>The continuation, or null where the queue is full.</returns>
    /// <exception cref="UserErrorException">An option is out of range, or prompt and new tokens do not fit the context.</exception>
    public BatchGeneration? TrySubmit(string prompt, GenerationOptions options, CancellationToken stop = default) =>
        TrySubmit(Encode(prompt), options, completions: 1, stop)?[0];

    /// <summary>Puts several continuations of one prompt in line, all of them or none.</summary>
    /// <param name="prompt">Token ids, taken as they are: see <see cref="Encode"/>.</param>
    /// <param name="options">How to continue; continuation i has the seed <see cref="GenerationOptions.Seed"/> + i.</param>
    /// <param name="completions">The number of continuations.</param>
    /// <param name="stop">Takes them out again; their enumerations end with <see cref="OperationCanceledException"/>.</param>
    /// <returns>The continuations, or null where the queue has no room for them.</returns>
    /// <exception cref="UserErrorException">An id or option is out of range, or prompt and new tokens do not fit the context.</exception>
    public IReadOnlyList<BatchGeneration>? TrySubmit(
        ReadOnlySpan<int> prompt, GenerationOptions options, int completions = 1, CancellationToken stop = default)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(completions, 1);
        _prompts.Check(prompt, options);
        var texts = new BatchGeneration[completions];
        for (int i = 0; i < completions; i++)
        {
            GenerationOptions own = options with { Seed = options.Seed + (ulong)i };
            texts[i] = new BatchGeneration(prompt.Length, new GenerationState(Tokenizer, prompt, own, ContextLength, _prompts.Constraints.For(own.Json)), stop) { Leader = i == 0 ? null : texts[0] };
        }

        if (texts[0].State.Finish == FinishReason.None)
        {
            return TryEnqueue(texts) ? texts : null;
        }

        Array.ForEach(texts, text => text.Complete());
        return texts;
    }

    /// <summary>Puts a text in line whose embedding is wanted; await <see cref="BatchEmbedding.Vector"/>.</summary>
    /// <param name="prompt">Token ids, taken as they are: see <see cref="Encode"/>.</param>
    /// <param name="stop">Takes it out again.</param>
    /// <returns>The embedding to come, or null where the queue is full.</returns>
    /// <exception cref="UserErrorException">The text is empty or longer than the context, or an id is out of range.</exception>
    public BatchEmbedding? TryEmbed(ReadOnlySpan<int> prompt, CancellationToken stop = default)
    {
        _prompts.Check(prompt);
        var embedding = new BatchEmbedding(prompt.ToArray(), _channels, stop);
        return TryEnqueue([embedding]) ? embedding : null;
    }

    /// <summary>Ends the thread; texts that have not ended fail with <see cref="ObjectDisposedException"/>.</summary>
    public void Dispose()
    {
        End(new ObjectDisposedException(nameof(BatchGenerator)));
        _wake.Set();
        _thread.Join();
        _scheduler.Dispose();
        _wake.Dispose();
    }

    private bool TryEnqueue(BatchRequest[] requests)
    {
        lock (_lock)
        {
            ObjectDisposedException.ThrowIf(_ended is not null, this);
            RemoveCancelled();
            if (_scheduler.Running + _waiting.Count + requests.Length > _places + (long)_queue)
            {
                return false;
            }

            foreach (BatchRequest request in requests)
            {
                _waiting.AddLast(request);
            }
        }

        _wake.Set();
        return true;
    }

    private void Work()
    {
        try
        {
            while (Admit())
            {
                _scheduler.Step();
            }
        }
        catch (Exception e)
        {
            // Nothing here is a text's fault: no further step can be trusted.
            End(e);
            Fail(e);
            throw;
        }

        Fail(_ended!);
    }

    private void End(Exception reason)
    {
        lock (_lock)
        {
            _ended ??= reason;
        }
    }

    private void Fail(Exception e)
    {
        _scheduler.Fail(e);
        lock (_lock)
        {
            foreach (BatchRequest request in _waiting)
            {
                request.Complete(e);
            }

            _waiting.Clear();
        }
    }

    // Texts leave and enter between two forwards. False when the generator is to end.
    private bool Admit()
    {
        while (true)
        {
            _scheduler.RemoveStopped();
            lock (_lock)
            {
                if (_ended is not null)
                {
                    return false;
                }

                RemoveCancelled();
                while (_scheduler.HasPlace && _waiting.First is { Value: BatchRequest request } && _scheduler.TryEnter(request))
                {
                    _waiting.RemoveFirst();
                }

                foreach (BatchRequest request in _scheduler.Grow())
                {
                    _waiting.AddFirst(request);
                }
            }

            Volatile.Write(ref _usedBlocks, _scheduler.Cache.BlockCount - _scheduler.Cache.FreeBlocks);
            if (_scheduler.Running > 0)
            {
                return true;
            }

            _wake.WaitOne();
        }
    }

    // Under the lock: nobody waits behind a text that nobody wants.
    private void RemoveCancelled()
    {
        for (LinkedListNode<BatchRequest>? node = _waiting.First, next; node is not null; node = next)
        {
            next = node.Next;
            if (node.Value.Stop.IsCancellationRequested)
            {
                _waiting.Remove(node);
                node.Value.Complete(new OperationCanceledException(node.Value.Stop));
            }
        }
    }

    private static int BlocksFor(long block, int contextLength, int places, long? cacheBytes)
    {
        int context = KeyValueCache.BlocksFor(contextLength);
        if (cacheBytes < context * block)
        {
            throw new UserErrorException(
                $"a cache of {cacheBytes / 1048576.0:N1} MiB is too small for one context of {contextLength} tokens, which needs {context * block / 1048576.0:N1} MiB");
        }

        return (int)Math.Clamp((cacheBytes ?? DefaultCacheBytes) / block, context, (long)places * context);
    }
}
