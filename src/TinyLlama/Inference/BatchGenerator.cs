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
    private int _runningCount;
    private Exception? _ended;

    /// <summary>Takes the memory for all places and starts the thread.</summary>
    /// <param name="model">The model; it outlives the generator.</param>
    /// <param name="backend">The device, which nothing else may use until the generator is disposed of.</param>
    /// <param name="tokenizer">The tokenizer that the model was trained with.</param>
    /// <param name="addBos">Whether a prompt begins with BOS, where the vocabulary has one.</param>
    /// <param name="contextLength">Most tokens of prompt and continuation; by default what the model is trained for.</param>
    /// <param name="places">Texts that run together.</param>
    /// <param name="queue">Texts that may wait for a place.</param>
    /// <exception cref="UserErrorException">The tokenizer is not of the model.</exception>
    /// <exception cref="DeviceException">The device has too little memory.</exception>
    public BatchGenerator(
        LlamaModel model, Backend backend, ITokenizer tokenizer, bool addBos = true, int? contextLength = null, int places = 16, int queue = 256)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(queue, 1);
        int context = contextLength ?? model.Config.ContextLength;
        _prompts = new PromptReader(tokenizer, addBos, context, model.Config.VocabularySize);
        _engine = new InferenceEngine(model, backend, context, places);
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
            texts[i] = new BatchGeneration(prompt.Length, new GenerationState(Tokenizer, prompt, own, ContextLength), stop);
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
                while (_running.Count < _places && _waiting.First is { Value: BatchGeneration text })
                {
                    _waiting.RemoveFirst();
                    text.Sequence = _engine.Begin();
                    _running.Add(text);
                }
            }

            Volatile.Write(ref _runningCount, _running.Count);
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

    // Texts with one token to feed come first, so that a long prompt delays nobody by more than one forward.
    private void Step()
    {
        var parts = new List<(BatchGeneration Text, ReadOnlyMemory<int> Tokens)>(_running.Count);
        int room = _engine.Capacity;
        foreach (BatchGeneration text in _running.OrderBy(text => text.Pending.Length > 1))
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
                Accept(text, _logits.AsSpan(i * _engine.VocabularySize, _engine.VocabularySize));
            }
        }
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
            _engine.Clear(text.Sequence!);
        }
    }

    private void Leave(BatchGeneration text, Exception? error = null)
    {
        _engine.End(text.Sequence!);
        _running.Remove(text);
        text.Complete(error);
    }
}
