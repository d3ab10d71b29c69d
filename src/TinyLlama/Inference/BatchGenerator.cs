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

    private readonly InferenceEngine _engine;
    private readonly PromptReader _prompts;
    private readonly Lock _lock = new();
    private readonly LinkedList<BatchGeneration> _waiting = [];
    private readonly List<BatchGeneration> _running = [];
    private readonly AutoResetEvent _wake = new(initialState: false);
    private readonly Thread _thread;
    private readonly float[] _logits;
    private readonly int _places;
    private readonly int _queue;
    private long _promptTokens;
    private long _newTokens;
    private long _cachedPromptTokens;
    private long _preemptions;
    private int _runningCount;
    private int _usedBlocks;
    private Exception? _ended;

    /// <summary>Takes the memory for all places and starts the thread.</summary>
    /// <param name="model">The model; it outlives the generator.</param>
    /// <param name="backend">The device, which nothing else may use until the generator is disposed of.</param>
    /// <param name="tokenizer">The tokenizer that the model was trained with.</param>
    /// <param name="addBos">Whether a prompt begins with BOS, where the vocabulary has one.</param>
    /// <param name="contextLength">Most tokens of prompt and continuation; by default what the model is trained for.</param>
    /// <param name="places">Texts that run together.</param>
    /// <param name="queue">Texts that may wait for a place.</param>
    /// <param name="cacheBytes">
    /// Memory for keys and values of all texts; by default 1 GiB, or less where all places need less. At least one context.
    /// </param>
    /// <exception cref="UserErrorException">The tokenizer is not of the model, or one context does not fit the cache.</exception>
    /// <exception cref="DeviceException">The device has too little memory.</exception>
    public BatchGenerator(
        LlamaModel model, Backend backend, ITokenizer tokenizer, bool addBos = true, int? contextLength = null, int places = 16, int queue = 256,
        long? cacheBytes = null)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(queue, 1);
        int context = contextLength ?? model.Config.ContextLength;
        _prompts = new PromptReader(tokenizer, addBos, context, model.Config.VocabularySize);
        _engine = new InferenceEngine(model, backend, context, places, cacheBlocks: BlocksFor(model.Config, context, places, cacheBytes));
        (_places, _queue) = (places, queue);
        _logits = new float[places * _engine.VocabularySize];
        _thread = new Thread(Work) { IsBackground = true, Name = "batch generator" };
        _thread.Start();
    }

    /// <summary>Gets the tokenizer.</summary>
    public ITokenizer Tokenizer => _prompts.Tokenizer;

    /// <summary>Gets the most tokens of prompt and continuation.</summary>
    public int ContextLength => _engine.ContextLength;

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
    public int Running => Volatile.Read(ref _runningCount);

    /// <summary>Gets the number of prompt tokens computed so far.</summary>
    public long PromptTokens => Interlocked.Read(ref _promptTokens);

    /// <summary>Gets the number of prompt tokens that were in the cache already, so far.</summary>
    public long CachedPromptTokens => Interlocked.Read(ref _cachedPromptTokens);

    /// <summary>Gets how often a text lost its place because the cache was full, so far.</summary>
    public long Preemptions => Interlocked.Read(ref _preemptions);

    /// <summary>Gets the number of blocks of the cache, of <see cref="TokenLayout.KeyBlock"/> tokens each.</summary>
    public int CacheBlocks => _engine.Cache.BlockCount;

    /// <summary>Gets the number of those that texts have which run.</summary>
    public int UsedCacheBlocks => Volatile.Read(ref _usedBlocks);

    /// <summary>Gets the number of tokens generated so far.</summary>
    public long NewTokens => Interlocked.Read(ref _newTokens);

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

        lock (_lock)
        {
            ObjectDisposedException.ThrowIf(_ended is not null, this);
            RemoveCancelled();
            if (_waiting.Count + completions > _queue)
            {
                return null;
            }

            foreach (BatchGeneration text in texts)
            {
                if (text.State.Finish == FinishReason.None)
                {
                    _waiting.AddLast(text);
                }
                else
                {
                    text.Complete();
                }
            }
        }

        _wake.Set();
        return texts;
    }

    /// <summary>Ends the thread; texts that have not ended fail with <see cref="ObjectDisposedException"/>.</summary>
    public void Dispose()
    {
        End(new ObjectDisposedException(nameof(BatchGenerator)));
        _wake.Set();
        _thread.Join();
        _engine.Dispose();
        _wake.Dispose();
    }

    private void Work()
    {
        try
        {
            while (Admit())
            {
                Step();
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
        _running.ForEach(text => text.Complete(e));
        lock (_lock)
        {
            foreach (BatchGeneration text in _waiting)
            {
                text.Complete(e);
            }

            _waiting.Clear();
        }
    }

    // Texts leave and enter between two forwards. False when the generator is to end.
    private bool Admit()
    {
        while (true)
        {
            for (int i = _running.Count - 1; i >= 0; i--)
            {
                if (_running[i].Stop.IsCancellationRequested)
                {
                    Leave(_running[i], new OperationCanceledException(_running[i].Stop));
                }
            }

            lock (_lock)
            {
                if (_ended is not null)
                {
                    return false;
                }

                RemoveCancelled();
                while (_running.Count < _places && _waiting.First is { Value: BatchGeneration text } && TryEnter(text))
                {
                    _waiting.RemoveFirst();
                    _running.Add(text);
                }
            }

            Grow();
            Volatile.Write(ref _runningCount, _running.Count);
            Volatile.Write(ref _usedBlocks, _engine.Cache.BlockCount - _engine.Cache.FreeBlocks);
            if (_running.Count > 0)
            {
                return true;
            }

            _wake.WaitOne();
        }
    }

    // Under the lock: nobody waits behind a text that nobody wants.
    private void RemoveCancelled()
    {
        for (LinkedListNode<BatchGeneration>? node = _waiting.First, next; node is not null; node = next)
        {
            next = node.Next;
            if (node.Value.Stop.IsCancellationRequested)
            {
                _waiting.Remove(node);
                node.Value.Complete(new OperationCanceledException(node.Value.Stop));
            }
        }
    }

    // A text begins where the cache has room for all that it must see so far. Of completions of one prompt only the first
    // computes it; the others wait in their places.
    private bool TryEnter(BatchGeneration text)
    {
        if (text.Leader is { } leader && !(_running.Contains(leader) && leader.State.Tokens.IsEmpty))
        {
            text.Leader = null;
        }

        text.Sequence = _engine.Begin(text.Leader is null ? text.State.Input.Span : []);
        if (text.Leader is null && !_engine.TryReserve(text.Sequence, text.State.Input.Length))
        {
            _engine.End(text.Sequence);
            return false;
        }

        if (text.State.Tokens.IsEmpty)
        {
            CountCached(text);
        }

        return true;
    }

    // Every text gets the blocks that it grows into, the oldest first; where none is free, the youngest text gives its own
    // back and computes them again later. One text alone always has room.
    private void Grow()
    {
        for (int i = 0; i < _running.Count; i++)
        {
            while (i < _running.Count && _running[i].Leader is null
                && !_engine.TryReserve(_running[i].Sequence!, _running[i].State.Input.Length))
            {
                BatchGeneration youngest = _running[^1];
                Vacate(youngest);
                lock (_lock)
                {
                    _waiting.AddFirst(youngest);
                }

                Interlocked.Increment(ref _preemptions);
            }
        }
    }

    // Texts with one token to feed come first, so that a long prompt delays nobody by more than one forward.
    private void Step()
    {
        var parts = new List<(BatchGeneration Text, ReadOnlyMemory<int> Tokens)>(_running.Count);
        int room = _engine.Capacity;
        foreach (BatchGeneration text in _running.Where(text => text.Leader is null).OrderBy(text => text.Pending.Length > 1))
        {
            int count = Math.Min(text.Pending.Length, room);
            if (count > 0)
            {
                parts.Add((text, text.Pending[..count]));
                room -= count;
            }
        }

        _engine.Forward([.. parts.Select(part => new Continuation(part.Text.Sequence!, part.Tokens))]);
        if (parts.Exists(part => part.Text.Pending.IsEmpty))
        {
            _engine.ReadLogits(_logits.AsSpan(0, parts.Count * _engine.VocabularySize));
        }

        for (int i = 0; i < parts.Count; i++)
        {
            (BatchGeneration text, ReadOnlyMemory<int> tokens) = parts[i];
            if (text.State.Tokens.IsEmpty)
            {
                Interlocked.Add(ref _promptTokens, tokens.Length);
            }

            if (text.Pending.IsEmpty)
            {
                Span<float> logits = _logits.AsSpan(i * _engine.VocabularySize, _engine.VocabularySize);
                Follow(text, logits);
                Accept(text, logits);
            }
        }
    }

    // The prompt is computed: those who waited for it go on from it.
    private void Follow(BatchGeneration leader, ReadOnlySpan<float> logits)
    {
        foreach (BatchGeneration text in _running.Where(text => text.Leader == leader).ToArray())
        {
            _engine.End(text.Sequence!);
            text.Sequence = _engine.Fork(leader.Sequence!);
            text.Leader = null;
            CountCached(text);
            Accept(text, logits.ToArray());
        }
    }

    private void CountCached(BatchGeneration text)
    {
        text.CachedPromptTokens = text.Sequence!.Length;
        Interlocked.Add(ref _cachedPromptTokens, text.Sequence.Length);
    }

    private void Accept(BatchGeneration text, Span<float> logits)
    {
        try
        {
            text.Write(text.State.Accept(logits));
        }
        catch (UserErrorException e)
        {
            Leave(text, e);
            return;
        }

        Interlocked.Increment(ref _newTokens);
        if (text.State.Finish != FinishReason.None)
        {
            Leave(text);
        }
        else if (text.State.Slid)
        {
            _engine.Truncate(text.Sequence!, 0);
        }
    }

    private void Leave(BatchGeneration text, Exception? error = null)
    {
        Vacate(text);
        text.Complete(error);
    }

    private void Vacate(BatchGeneration text)
    {
        _engine.End(text.Sequence!);
        text.Sequence = null;
        text.Leader = null;
        _running.Remove(text);
        _running.ForEach(other => other.Leader = other.Leader == text ? null : other.Leader);
    }

    private static int BlocksFor(ModelConfig config, int contextLength, int places, long? cacheBytes)
    {
        long block = KeyValueCache.BlockBytes(config);
        int context = KeyValueCache.BlocksFor(contextLength);
        if (cacheBytes < context * block)
        {
            throw new UserErrorException(
                $"a cache of {cacheBytes / 1048576.0:N1} MiB is too small for one context of {contextLength} tokens, which needs {context * block / 1048576.0:N1} MiB");
        }

        return (int)Math.Clamp((cacheBytes ?? DefaultCacheBytes) / block, context, (long)places * context);
    }
}
