using System.Threading.Channels;
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
    private readonly Channel<BatchGeneration> _waiting;
    private readonly CancellationTokenSource _dispose = new();
    private readonly Thread _thread;
    private readonly List<BatchGeneration> _running = [];
    private readonly float[] _logits;
    private readonly int _places;
    private long _promptTokens;
    private long _newTokens;
    private int _runningCount;

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
        _waiting = Channel.CreateBounded<BatchGeneration>(queue);
        _places = places;
        _logits = new float[places * _engine.VocabularySize];
        _thread = new Thread(Work) { IsBackground = true, Name = "batch generator" };
        _thread.Start();
    }

    /// <summary>Gets the tokenizer.</summary>
    public ITokenizer Tokenizer => _prompts.Tokenizer;

    /// <summary>Gets the most tokens of prompt and continuation.</summary>
    public int ContextLength => _engine.ContextLength;

    /// <summary>Gets the number of texts that wait for a place.</summary>
    public int Waiting => _waiting.Reader.Count;

    /// <summary>Gets the number of texts that have a place.</summary>
    public int Running => Volatile.Read(ref _runningCount);

    /// <summary>Gets the number of prompt tokens computed so far.</summary>
    public long PromptTokens => Interlocked.Read(ref _promptTokens);

    /// <summary>Gets the number of tokens generated so far.</summary>
    public long NewTokens => Interlocked.Read(ref _newTokens);

    /// <summary>Puts a text in line; enumerate what comes back to read it.</summary>
    /// <param name="prompt">The text to continue; may be empty where the vocabulary has BOS.</param>
    /// <param name="options">How to continue.</param>
    /// <param name="stop">Takes it out again; its enumeration ends with <see cref="OperationCanceledException"/>.</param>
    /// <returns>The continuation, or null where the queue is full.</returns>
    /// <exception cref="UserErrorException">An option is out of range, or prompt and new tokens do not fit the context.</exception>
    public BatchGeneration? TrySubmit(string prompt, GenerationOptions options, CancellationToken stop = default)
    {
        ObjectDisposedException.ThrowIf(_dispose.IsCancellationRequested, this);
        int[] tokens = _prompts.Read(prompt, options);
        var text = new BatchGeneration(tokens.Length, new GenerationState(Tokenizer, tokens, options, ContextLength), stop);
        if (text.State.Finish != FinishReason.None)
        {
            text.Complete();
            return text;
        }

        return _waiting.Writer.TryWrite(text) ? text : null;
    }

    /// <summary>Ends the thread; texts that have not ended fail with <see cref="ObjectDisposedException"/>.</summary>
    public void Dispose()
    {
        _waiting.Writer.TryComplete();
        _dispose.Cancel();
        _thread.Join();
        _engine.Dispose();
        _dispose.Dispose();
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
            _waiting.Writer.TryComplete(e);
            Fail(e);
            throw;
        }

        Fail(new ObjectDisposedException(nameof(BatchGenerator)));
    }

    private void Fail(Exception e)
    {
        foreach (BatchGeneration text in _running)
        {
            text.Complete(e);
        }

        while (_waiting.Reader.TryRead(out BatchGeneration? text))
        {
            text.Complete(e);
        }
    }

    // Texts leave and enter between two forwards. False when the generator is to end.
    private bool Admit()
    {
        while (!_dispose.IsCancellationRequested)
        {
            for (int i = _running.Count - 1; i >= 0; i--)
            {
                if (_running[i].Stop.IsCancellationRequested)
                {
                    Leave(_running[i], new OperationCanceledException(_running[i].Stop));
                }
            }

            while (_running.Count < _places && _waiting.Reader.TryRead(out BatchGeneration? text))
            {
                text.Sequence = _engine.Begin();
                text.Pending = text.State.NextInput(0, out _);
                _running.Add(text);
            }

            Volatile.Write(ref _runningCount, _running.Count);
            if (_running.Count > 0)
            {
                return true;
            }

            WaitForText();
        }

        return false;
    }

    private void WaitForText()
    {
        try
        {
            _waiting.Reader.WaitToReadAsync(_dispose.Token).AsTask().GetAwaiter().GetResult();
        }
        catch (OperationCanceledException)
        {
            // Dispose ended the wait.
        }
    }

    // Texts with one token to feed come first, so that a long prompt delays nobody by more than one forward.
    private void Step()
    {
        var parts = new List<(BatchGeneration Text, int Count)>(_running.Count);
        int room = _engine.Capacity;
        foreach (BatchGeneration text in _running.OrderBy(text => text.Pending.Length > 1))
        {
            int count = Math.Min(text.Pending.Length, room);
            if (count > 0)
            {
                parts.Add((text, count));
                room -= count;
            }
        }

        _engine.Forward([.. parts.Select(part => new Continuation(part.Text.Sequence!, part.Text.Pending[..part.Count]))]);
        if (parts.Exists(part => part.Count == part.Text.Pending.Length))
        {
            _engine.ReadLogits(_logits.AsSpan(0, parts.Count * _engine.VocabularySize));
        }

        for (int i = 0; i < parts.Count; i++)
        {
            (BatchGeneration text, int count) = parts[i];
            text.Pending = text.Pending[count..];
            if (text.State.Tokens.IsEmpty)
            {
                Interlocked.Add(ref _promptTokens, count);
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
            return;
        }

        text.Pending = text.State.NextInput(text.Sequence!.Length, out bool anew);
        if (anew)
        {
            _engine.Clear(text.Sequence);
        }
    }

    private void Leave(BatchGeneration text, Exception? error = null)
    {
        _engine.End(text.Sequence!);
        _running.Remove(text);
        text.Complete(error);
    }
}
