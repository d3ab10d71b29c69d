using TinyLlama.Data;

namespace TinyLlama.Inference;

/// <summary>
/// The requests that have a place: which tokens go into the next forward, who gets the cache's blocks, and what becomes of
/// the logits. Used by one thread; the counters may be read by any.
/// </summary>
internal sealed class BatchScheduler : IDisposable
{
    // Tokens of prompts that are fed at once while texts grow, which wait for them.
    private const int BesideTexts = 128;

    private readonly InferenceEngine _engine;
    private readonly List<BatchRequest> _running = [];
    private readonly NextTokens _next;
    private readonly float[] _hidden;
    private readonly int _places;
    private long _promptTokens;
    private long _cachedPromptTokens;
    private long _newTokens;
    private long _preemptions;

    /// <summary>Schedules texts of so many different tokens on an engine, which it disposes of.</summary>
    public BatchScheduler(InferenceEngine engine, int places, int vocabulary)
    {
        (_engine, _places) = (engine, places);
        _next = new NextTokens(engine, places, vocabulary);
        _hidden = new float[engine.Capacity * engine.Channels];
    }

    /// <summary>Gets the number of requests that have a place.</summary>
    public int Running => _running.Count;

    /// <summary>Gets a value indicating whether a place is free.</summary>
    public bool HasPlace => _running.Count < _places;

    public long PromptTokens => Interlocked.Read(ref _promptTokens);

    public long CachedPromptTokens => Interlocked.Read(ref _cachedPromptTokens);

    public long NewTokens => Interlocked.Read(ref _newTokens);

    public long Preemptions => Interlocked.Read(ref _preemptions);

    public KeyValueCache Cache => _engine.Cache;

    /// <summary>Gives a request a place where the cache has room for all that it must see so far.</summary>
    /// <remarks>Of completions of one prompt only the first computes it; the others wait in their places.</remarks>
    public bool TryEnter(BatchRequest request)
    {
        if (request.Leader is { } leader && !(_running.Contains(leader) && leader.State.Tokens.IsEmpty))
        {
            request.Leader = null;
        }

        // An embedding needs the output of every token, a text only those that are not in the cache.
        bool finds = request is BatchGeneration && request.Leader is null;
        request.Sequence = _engine.Begin(finds ? request.Input.Span : []);
        if (request.Leader is null && !_engine.TryReserve(request.Sequence, request.Input.Length))
        {
            _engine.End(request.Sequence);
            request.Sequence = null;
            return false;
        }

        if (request is BatchGeneration { State.Tokens.IsEmpty: true } text)
        {
            CountCached(text);
        }

        (request as BatchEmbedding)?.Clear();
        _running.Add(request);
        return true;
    }

    /// <summary>Frees the places of requests that nobody wants any more.</summary>
    public void RemoveStopped()
    {
        foreach (BatchRequest request in _running.Where(request => request.Stop.IsCancellationRequested).ToArray())
        {
            Leave(request, new OperationCanceledException(request.Stop));
        }
    }

    /// <summary>
    /// Gives every request the blocks that it grows into, the oldest first. Where none is free, the youngest gives its own
    /// back, to compute them again later. One alone always has room.
    /// </summary>
    /// <returns>The requests that lost their places, the youngest first.</returns>
    public List<BatchRequest> Grow()
    {
        var preempted = new List<BatchRequest>();
        for (int i = 0; i < _running.Count; i++)
        {
            while (i < _running.Count && _running[i].Leader is null
                && !_engine.TryReserve(_running[i].Sequence!, _running[i].Input.Length))
            {
                preempted.Add(_running[^1]);
                Vacate(_running[^1]);
                Interlocked.Increment(ref _preemptions);
            }
        }

        return preempted;
    }

    /// <summary>One forward. Requests with one token to feed come first, so that a long prompt delays nobody by more than a part of it.</summary>
    public void Step()
    {
        var parts = new List<(BatchRequest Request, ReadOnlyMemory<int> Tokens)>(_running.Count);
        int room = _engine.Capacity;
        foreach (BatchRequest request in _running.Where(request => request.Leader is null).OrderBy(request => request.Pending.Length > 1))
        {
            if (request.Pending.Length > 1 && parts is [{ Tokens.Length: 1 }, ..])
            {
                room = Math.Min(room, BesideTexts);
            }

            int count = Math.Min(request.Pending.Length, room);
            if (count > 0)
            {
                parts.Add((request, request.Pending[..count]));
                room -= count;
            }
        }

        _engine.Forward([.. parts.Select(part => new Continuation(part.Request.Sequence!, part.Tokens))]);
        GenerationState?[] ready = [.. parts.Select(part => part.Request is BatchGeneration { Pending.IsEmpty: true } text ? text.State : null)];
        if (ready.Any(text => text is not null))
        {
            _next.Read(ready);
        }

        for (int i = 0; i < parts.Count; i++)
        {
            (BatchRequest request, ReadOnlyMemory<int> tokens) = parts[i];
            if (request is BatchEmbedding embedding)
            {
                Pool(embedding, i, tokens.Length);
            }
            else if (request is BatchGeneration text)
            {
                Continue(text, tokens.Length, part: i);
            }
        }
    }

    /// <summary>Ends all requests.</summary>
    public void Fail(Exception error) => _running.ForEach(request => request.Complete(error));

    /// <inheritdoc/>
    public void Dispose() => _engine.Dispose();

    private void Pool(BatchEmbedding embedding, int part, int tokens)
    {
        Interlocked.Add(ref _promptTokens, tokens);
        Span<float> hidden = _hidden.AsSpan(0, tokens * _engine.Channels);
        _engine.ReadHidden(hidden, part);
        embedding.Add(hidden);
        if (embedding.Pending.IsEmpty)
        {
            Leave(embedding);
        }
    }

    private void Continue(BatchGeneration text, int tokens, int part)
    {
        if (text.State.Tokens.IsEmpty)
        {
            Interlocked.Add(ref _promptTokens, tokens);
        }

        if (text.Pending.IsEmpty)
        {
            Follow(text, part);
            Accept(text, part);
        }
    }

    // The prompt is computed: those who waited for it go on from it.
    private void Follow(BatchGeneration leader, int part)
    {
        foreach (BatchGeneration text in _running.OfType<BatchGeneration>().Where(text => text.Leader == leader).ToArray())
        {
            _engine.End(text.Sequence!);
            text.Sequence = _engine.Fork(leader.Sequence!);
            text.Leader = null;
            CountCached(text);
            Accept(text, part, again: true);
        }
    }

    private void CountCached(BatchGeneration text)
    {
        text.CachedPromptTokens = text.Sequence!.Length;
        Interlocked.Add(ref _cachedPromptTokens, text.Sequence.Length);
    }

    private void Accept(BatchGeneration text, int part, bool again = false)
    {
        try
        {
            text.Write(_next.Accept(text.State, part, again));
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

    private void Leave(BatchRequest request, Exception? error = null)
    {
        Vacate(request);
        request.Complete(error);
    }

    private void Vacate(BatchRequest request)
    {
        _engine.End(request.Sequence!);
        request.Sequence = null;
        request.Leader = null;
        _running.Remove(request);
        _running.ForEach(other => other.Leader = other.Leader == request ? null : other.Leader);
    }
}
