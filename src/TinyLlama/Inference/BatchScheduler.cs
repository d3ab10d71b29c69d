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

    // Tokens of a forward up to which more of them cost less than what they win where half of them come.
    private const int WithProposals = 16;

    private readonly InferenceEngine _engine;
    private readonly List<BatchRequest> _running = [];
    private readonly NextTokens _next;
    private readonly float[] _hidden;
    private readonly int _places;
    private readonly int _lookup;
    private int _runningCount;
    private long _promptTokens;
    private long _cachedPromptTokens;
    private long _newTokens;
    private long _preemptions;
    private long _proposedTokens;
    private long _acceptedTokens;

    /// <summary>Schedules texts on an engine, which it disposes of.</summary>
    /// <param name="engine">The engine, made for so many sequences, and for <see cref="MoreLogits"/>.</param>
    /// <param name="places">Most texts that run together.</param>
    /// <param name="vocabulary">The number of the tokenizer's tokens.</param>
    /// <param name="lookup">Most tokens that are proposed of a text at a time; 0 for none.</param>
    public BatchScheduler(InferenceEngine engine, int places, int vocabulary, int lookup = 0)
    {
        (_engine, _places, _lookup) = (engine, places, lookup);
        _next = new NextTokens(engine, places + MoreLogits(lookup), vocabulary);
        _hidden = new float[engine.Capacity * engine.Channels];
    }

    /// <summary>Gets the number of requests that have a place; one that ends has none when it is told so.</summary>
    public int Running => Volatile.Read(ref _runningCount);

    /// <summary>Gets a value indicating whether a place is free.</summary>
    public bool HasPlace => _running.Count < _places;

    public long PromptTokens => Interlocked.Read(ref _promptTokens);

    public long CachedPromptTokens => Interlocked.Read(ref _cachedPromptTokens);

    public long NewTokens => Interlocked.Read(ref _newTokens);

    public long Preemptions => Interlocked.Read(ref _preemptions);

    public long ProposedTokens => Interlocked.Read(ref _proposedTokens);

    public long AcceptedTokens => Interlocked.Read(ref _acceptedTokens);

    public KeyValueCache Cache => _engine.Cache;

    /// <summary>The logits of a forward that are wanted beside those of each text's next token.</summary>
    public static int MoreLogits(int lookup) => lookup > 0 ? WithProposals : 0;

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
        Volatile.Write(ref _runningCount, _running.Count);
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
        List<Part> parts = NextParts();
        Propose(parts);
        _engine.Forward([.. parts.Select(part => new Continuation(part.Request.Sequence!, part.Tokens, part.Logits))]);

        // The text of each row of logits.
        GenerationState?[] ready = [.. parts.SelectMany(part => Enumerable.Repeat(part.IsLast ? (part.Request as BatchGeneration)?.State : null, part.Logits))];
        if (ready.Any(text => text is not null))
        {
            _next.Read(ready);
        }

        int row = 0;
        for (int i = 0; i < parts.Count; i++)
        {
            Part part = parts[i];
            if (part.Request is BatchEmbedding embedding)
            {
                Pool(embedding, i, part.Tokens.Length);
            }
            else if (part.Request is BatchGeneration text)
            {
                Continue(text, part, row);
            }

            row += part.Logits;
        }
    }

    /// <summary>Ends all requests.</summary>
    public void Fail(Exception error) => _running.ForEach(request => request.Complete(error));

    /// <inheritdoc/>
    public void Dispose() => _engine.Dispose();

    private List<Part> NextParts()
    {
        var parts = new List<Part>(_running.Count);
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
                parts.Add(new Part(request, request.Pending[..count], IsLast: count == request.Pending.Length));
                room -= count;
            }
        }

        return parts;
    }

    // Lets texts that grow try what followed where their last tokens stood before. That changes nothing but the time, so that it may
    // depend on what else there is to do.
    private void Propose(List<Part> parts)
    {
        int room = Math.Min(WithProposals, _engine.Capacity) - parts.Sum(static part => part.Tokens.Length);
        if (_lookup == 0 || room <= 0)
        {
            return;
        }

        int share = Math.Max(1, room / parts.Count);
        for (int i = 0; i < parts.Count && room > 0; i++)
        {
            if (parts[i] is not { Request: BatchGeneration { State: { Tokens.IsEmpty: false } state } text, Tokens.Length: 1, IsLast: true } part)
            {
                continue;
            }

            text.Lookup ??= new PromptLookup(_lookup);
            int most = Math.Min(Math.Min(share, room), Math.Min(state.Left - 1, _engine.ContextLength - state.Input.Length));
            IReadOnlyList<DraftToken> proposed = most > 0 ? text.Lookup.Propose(state.Input.Span, state.Tokens.Length, most) : [];
            if (proposed.Count > 0 && _engine.TryReserve(text.Sequence!, state.Input.Length + proposed.Count))
            {
                parts[i] = part with { Tokens = (int[])[.. part.Tokens.Span, .. proposed.Select(token => token.Token)], Proposed = proposed.Count };
                room -= proposed.Count;
            }
        }
    }

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

    private void Continue(BatchGeneration text, Part part, int row)
    {
        if (text.State.Tokens.IsEmpty)
        {
            Interlocked.Add(ref _promptTokens, part.Tokens.Length);
        }

        if (!part.IsLast)
        {
            return;
        }

        Follow(text, row);
        ReadOnlySpan<int> proposed = part.Tokens.Span[^part.Proposed..];
        Interlocked.Add(ref _proposedTokens, proposed.Length);
        int right = 0;
        while (Accept(text, row + right) && right < proposed.Length && text.State.Tokens[^1] == proposed[right])
        {
            Interlocked.Increment(ref _acceptedTokens);
            right++;
        }

        if (proposed.Length > 0)
        {
            text.Lookup!.Learn(proposed.Length, right);
        }

        Settle(text);
    }

    // The prompt is computed: those who waited for it go on from it.
    private void Follow(BatchGeneration leader, int row)
    {
        foreach (BatchGeneration text in _running.OfType<BatchGeneration>().Where(text => text.Leader == leader).ToArray())
        {
            _engine.End(text.Sequence!);
            text.Sequence = _engine.Fork(leader.Sequence!);
            text.Leader = null;
            CountCached(text);
            _ = Accept(text, row, again: true);
            Settle(text);
        }
    }

    private void CountCached(BatchGeneration text)
    {
        text.CachedPromptTokens = text.Sequence!.Length;
        Interlocked.Add(ref _cachedPromptTokens, text.Sequence.Length);
    }

    // Gives a text its next token. False where it ended.
    private bool Accept(BatchGeneration text, int row, bool again = false)
    {
        try
        {
            text.Write(_next.Accept(text.State, row, again));
        }
        catch (UserErrorException e)
        {
            Leave(text, e);
            return false;
        }

        Interlocked.Increment(ref _newTokens);
        if (text.State.Finish == FinishReason.None)
        {
            return true;
        }

        Leave(text);
        return false;
    }

    // The model forgets what it saw and did not come, or all where the window moved.
    private void Settle(BatchGeneration text)
    {
        if (text.Sequence is { } sequence)
        {
            _engine.Truncate(sequence, text.State.Slid ? 0 : text.State.Input.Length - 1);
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
        Volatile.Write(ref _runningCount, _running.Count);
        _running.ForEach(other => other.Leader = other.Leader == request ? null : other.Leader);
    }

    // What a request feeds in a forward; whether nothing is pending then; how many of the tokens are proposals, the last ones.
    private readonly record struct Part(BatchRequest Request, ReadOnlyMemory<int> Tokens, bool IsLast, int Proposed = 0)
    {
        public int Logits => 1 + Proposed;
    }
}
