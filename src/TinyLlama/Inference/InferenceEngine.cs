using TinyLlama.Checkpoints;
using TinyLlama.Compute;
using TinyLlama.Model;

namespace TinyLlama.Inference;

/// <summary>Tokens that follow a sequence in the next forward: its prompt, a part of it, or the one token just sampled.</summary>
/// <param name="Sequence">The sequence; at most once in a forward.</param>
/// <param name="Tokens">At least one token id.</param>
/// <param name="Logits">The number of its last tokens after which logits are wanted, at least one.</param>
public readonly record struct Continuation(CachedSequence Sequence, ReadOnlyMemory<int> Tokens, int Logits = 1);

/// <summary>
/// A model with a key-value cache: takes tokens of one or many sequences in a forward, whether they prefill or decode,
/// and gives the logits after the last token of each, or after some of its last.
/// </summary>
/// <remarks>A sequence gets the same bits alone and together with others, in one forward or in many.</remarks>
public sealed class InferenceEngine : IDisposable
{
    private const int PrefillTokens = 256;

    private readonly LlamaModel _model;
    private readonly Backend _backend;
    private readonly Workspace _workspace;
    private readonly Arena _arena;
    private readonly KeyValueCache _cache;
    private readonly TokenLayout _layout;
    private readonly Tensor _tokens;
    private readonly Tensor _lastRows;
    private readonly Tensor _lastHidden;
    private readonly Tensor _topLogits;
    private readonly Tensor _inverseTemperatures;
    private readonly int[] _hostTokens;
    private readonly int[] _hostRows;
    private readonly int[] _blockTable;
    private readonly Segment[] _segments;
    private int _openSequences;
    private int _logits;
    private bool _hasRun;

    /// <summary>Allocates the cache and the activations of one forward.</summary>
    /// <param name="model">The model; it outlives the engine.</param>
    /// <param name="backend">The device.</param>
    /// <param name="contextLength">Most tokens of a sequence; by default what the model is trained for.</param>
    /// <param name="sequences">Most sequences at a time.</param>
    /// <param name="tokensPerForward">Most packed tokens of a forward.</param>
    /// <param name="cacheBlocks">
    /// Blocks of <see cref="TokenLayout.KeyBlock"/> positions that the sequences share, at least those of one context; by
    /// default so many that each sequence can reach the whole context.
    /// </param>
    /// <param name="cacheType">What keys and values are rounded to; by default what the device likes best (<see cref="Backend.CacheType"/>).</param>
    /// <param name="moreLogits">Most tokens of a forward whose logits are wanted, beside the last of each sequence.</param>
    /// <exception cref="DeviceException">The device has too little memory.</exception>
    public InferenceEngine(
        LlamaModel model, Backend backend, int? contextLength = null, int sequences = 1, int tokensPerForward = PrefillTokens,
        int? cacheBlocks = null, DType? cacheType = null, int moreLogits = 0)
    {
        (_model, _backend) = (model, backend);
        ContextLength = contextLength ?? model.Config.ContextLength;
        ArgumentOutOfRangeException.ThrowIfLessThan(ContextLength, 1);
        ArgumentOutOfRangeException.ThrowIfLessThan(sequences, 1);
        Capacity = Math.Max(sequences, (int)Math.Min(tokensPerForward, (long)sequences * ContextLength));
        int blocksPerSequence = KeyValueCache.BlocksFor(ContextLength);
        int tableEntries = checked(sequences * blocksPerSequence);
        int blocks = cacheBlocks ?? tableEntries;
        ArgumentOutOfRangeException.ThrowIfLessThan(blocks, blocksPerSequence, nameof(cacheBlocks));
        _hostTokens = new int[Capacity];
        int logits = checked(sequences + moreLogits);
        _hostRows = new int[logits];
        _blockTable = new int[tableEntries];
        _segments = new Segment[sequences];

        Arena plan = Arena.Plan("key-value cache");
        _ = Take(plan);
        _arena = backend.AllocateAs(plan);
        (_cache, _layout, _tokens, _lastRows, _lastHidden, _topLogits, _inverseTemperatures) = Take(_arena);
        _workspace = Workspace.Allocate(model, backend, Capacity, Keep.Nothing, ContextLength);
        bool hasTopLogits = VocabularySize > backend.TopLogitsCount && VocabularySize <= TopLogitsRow.MostColumns && logits <= _workspace.LogitsChunk.Rows;
        TopLogitsCount = hasTopLogits ? backend.TopLogitsCount : 0;

        (KeyValueCache, TokenLayout, Tensor, Tensor, Tensor, Tensor, Tensor) Take(Arena arena) => (
            new KeyValueCache(arena, backend, model.Config, blocks, cacheType ?? backend.CacheType),
            new TokenLayout(arena, Capacity, sequences, tableEntries),
            arena.Take(Capacity, 1, DType.I32),
            arena.Take(logits, 1, DType.I32),
            arena.Take(logits, model.Config.Channels, backend.ActivationType),
            backend.TopLogitsCount > 0 ? arena.Take(logits, TopLogitsRow.Width(backend.TopLogitsCount)) : default,
            backend.TopLogitsCount > 0 ? arena.Take(logits, 1) : default);
    }

    /// <summary>Gets the most tokens of a sequence.</summary>
    public int ContextLength { get; }

    /// <summary>Gets the most packed tokens of a forward.</summary>
    public int Capacity { get; }

    /// <summary>Gets the number of logits of a token (V).</summary>
    public int VocabularySize => _model.Config.VocabularySize;

    /// <summary>Gets the width of the final norm's output (C).</summary>
    public int Channels => _model.Config.Channels;

    /// <summary>Gets the cache.</summary>
    public KeyValueCache Cache => _cache;

    /// <summary>Gets how many of the largest logits <see cref="ReadTopLogits"/> reads; 0 where whole rows are at hand.</summary>
    public int TopLogitsCount { get; }

    /// <summary>Begins a sequence without tokens, whose keys and values nobody else gets.</summary>
    /// <exception cref="InvalidOperationException">As many sequences are open as the engine is made for.</exception>
    public CachedSequence Begin() => Open(publishes: false);

    /// <summary>
    /// Begins a sequence with those first tokens of a text whose keys and values are in the cache, and lets others find its
    /// own. The weights must be those of all sequences before that were begun so.
    /// </summary>
    /// <param name="text">The tokens; at least the last one is not fed, so that its logits can be computed.</param>
    /// <exception cref="InvalidOperationException">As many sequences are open as the engine is made for.</exception>
    public CachedSequence Begin(ReadOnlySpan<int> text)
    {
        CachedSequence sequence = Open(publishes: true);
        _cache.Find(sequence, text);
        return sequence;
    }

    /// <summary>Begins a sequence with the tokens of another one, with which it shares their keys and values.</summary>
    /// <exception cref="InvalidOperationException">As many sequences are open as the engine is made for.</exception>
    public CachedSequence Fork(CachedSequence source)
    {
        CachedSequence sequence = Open(source.Publishes);
        _cache.Fork(sequence, source);
        return sequence;
    }

    /// <summary>Ends a sequence that <see cref="Begin()"/> or <see cref="Fork"/> began; its cache blocks are free again.</summary>
    public void End(CachedSequence sequence)
    {
        _cache.Truncate(sequence, 0);
        _openSequences--;
    }

    /// <summary>Forgets a sequence's tokens from a length on: 0 to begin anew.</summary>
    public void Truncate(CachedSequence sequence, int length)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThan((uint)length, (uint)sequence.Length, nameof(length));
        _cache.Truncate(sequence, length);
    }

    /// <summary>Takes the cache blocks that a sequence needs to grow to a length. <see cref="Forward"/> does too, but must not fail.</summary>
    /// <returns>False, and nothing is changed, where too few are free.</returns>
    public bool TryReserve(CachedSequence sequence, int length) => _cache.TryReserve(_backend, sequence, length);

    /// <summary>One forward over some sequences' next tokens: prefill, decode, or both together.</summary>
    /// <param name="parts">At most <see cref="Capacity"/> tokens together; a sequence stays within the context length.</param>
    /// <exception cref="InvalidOperationException">Too few blocks of the cache are free.</exception>
    public void Forward(params ReadOnlySpan<Continuation> parts)
    {
        if (_hasRun)
        {
            _model.PackSome();
        }

        _hasRun = true;
        (int row, int table) = (0, 0);
        _logits = 0;
        for (int p = 0; p < parts.Length; p++)
        {
            (CachedSequence sequence, ReadOnlyMemory<int> tokens, int logits) = parts[p];
            int length = sequence.Length + tokens.Length;
            if (tokens.IsEmpty || row + tokens.Length > Capacity || length > ContextLength)
            {
                throw new ArgumentException(
                    $"part {p} has {tokens.Length} tokens after {sequence.Length} of its sequence and {row} of the forward; a sequence holds {ContextLength}, a forward {Capacity}");
            }

            if (logits < 1 || logits > tokens.Length || _logits + logits > _hostRows.Length)
            {
                throw new ArgumentException($"part {p} wants logits after {logits} of its {tokens.Length} tokens and after {_logits} before; a forward gives {_hostRows.Length}");
            }

            Reserve(sequence, length);
            _segments[p] = new Segment(row, tokens.Length, sequence.Length, table);
            sequence.Blocks.AsSpan(0, sequence.BlockCount).CopyTo(_blockTable.AsSpan(table));
            tokens.Span.CopyTo(_hostTokens.AsSpan(row));
            _cache.Extend(sequence, tokens.Span);
            row += tokens.Length;
            table += sequence.BlockCount;
            for (int i = row - logits; i < row; i++)
            {
                _hostRows[_logits++] = i;
            }
        }

        _layout.Set(_backend, _segments.AsSpan(0, parts.Length), _blockTable.AsSpan(0, table));
        Tensor device = _tokens.RowRange(0, row);
        _backend.Write<int>(device, _hostTokens.AsSpan(0, row));
        _model.Forward(_workspace, device, _layout, _cache);
        foreach (Continuation part in parts)
        {
            _cache.Publish(part.Sequence);
        }

        Tensor rows = _lastRows.RowRange(0, _logits);
        _backend.Write<int>(rows, _hostRows.AsSpan(0, _logits));
        _backend.GatherRows(_lastHidden.RowRange(0, _logits), _workspace.Output(row), rows);
    }

    /// <summary>Feeds any number of tokens of one sequence, in as many forwards as they need.</summary>
    /// <param name="sequence">The sequence.</param>
    /// <param name="tokens">At least one token id; the sequence stays within the context length.</param>
    /// <param name="stop">Ends it between two forwards.</param>
    public void Feed(CachedSequence sequence, ReadOnlyMemory<int> tokens, CancellationToken stop = default)
    {
        for (int done = 0; done < tokens.Length; done += Capacity)
        {
            stop.ThrowIfCancellationRequested();
            Forward(new Continuation(sequence, tokens.Slice(done, Math.Min(Capacity, tokens.Length - done))));
        }
    }

    /// <summary>Reads the logits that the last forward was asked for. Waits for the device.</summary>
    /// <param name="logits">Receives (tokens, V): those after the last token of each part, or after as many of its last as it asked for.</param>
    public void ReadLogits(Span<float> logits) => ReadLogits(logits, _lastHidden.RowRange(0, _logits));

    /// <summary>Reads the logits after every token of a part of the last forward. Waits for the device.</summary>
    /// <param name="logits">Receives (tokens, V), row after row.</param>
    /// <param name="part">Its index.</param>
    public void ReadAllLogits(Span<float> logits, int part) => ReadLogits(logits, Output(part));

    /// <summary>
    /// Reads the largest of the logits that the last forward was asked for, and the weight of the others. Only where there is a
    /// <see cref="TopLogitsCount"/>. Waits for the device.
    /// </summary>
    /// <param name="top">Receives a <see cref="TopLogitsRow"/> for each row of <see cref="ReadLogits(Span{float})"/>.</param>
    /// <param name="inverseTemperatures">One for each: see <see cref="Backend.TopLogits"/>.</param>
    /// <param name="vocabulary">The number of tokens whose logits count: <see cref="TopLogitsCount"/> or more.</param>
    public void ReadTopLogits(Span<float> top, ReadOnlySpan<float> inverseTemperatures, int vocabulary)
    {
        Tensor rows = _topLogits.RowRange(0, _logits), temperatures = _inverseTemperatures.RowRange(0, _logits);
        _backend.Write(temperatures, inverseTemperatures);
        _backend.TopLogits(rows, ComputeLogits().ColumnRange(0, vocabulary), temperatures, TopLogitsCount);
        _backend.Read(top, rows);
    }

    /// <summary>Computes the logits that the last forward was asked for, where there is room for all.</summary>
    internal Tensor ComputeLogits()
    {
        Tensor logits = _workspace.LogitsChunk.RowRange(0, _logits);
        _model.Logits(logits, _lastHidden.RowRange(0, _logits));
        return logits;
    }

    /// <summary>Reads a row of logits as <see cref="ComputeLogits"/> or <see cref="ReadTopLogits"/> left them. Waits for the device.</summary>
    /// <param name="logits">Receives (V).</param>
    /// <param name="row">Its index.</param>
    internal void ReadComputedLogits(Span<float> logits, int row) => _backend.Read(logits, _workspace.LogitsChunk.RowRange(row, 1));

    /// <summary>Reads the output of the final norm for every token of a part of the last forward. Waits for the device.</summary>
    /// <param name="hidden">Receives (tokens, C), row after row.</param>
    /// <param name="part">Its index.</param>
    public void ReadHidden(Span<float> hidden, int part) => DeviceElements.Read(hidden, _backend, Output(part));

    /// <summary>Gets the bytes of a cache block.</summary>
    internal int BlockBytes => _cache.StoredBlockBytes;

    /// <summary>Reads a cache block of a sequence: keys and values of <see cref="TokenLayout.KeyBlock"/> positions, as the device orders them.</summary>
    internal void ReadBlock(Span<byte> block, CachedSequence sequence, int index) => _cache.ReadBlock(block, _backend, sequence, index);

    /// <summary>Lets a sequence, whose blocks are full, grow by tokens whose keys and values were read as a block.</summary>
    /// <exception cref="InvalidOperationException">No block of the cache is free.</exception>
    internal void AppendBlock(CachedSequence sequence, ReadOnlySpan<int> tokens, ReadOnlySpan<byte> block)
    {
        Reserve(sequence, sequence.Length + tokens.Length);
        _cache.WriteBlock(_backend, sequence, sequence.Length / TokenLayout.KeyBlock, block);
        _cache.Extend(sequence, tokens);
    }

    private Tensor Output(int part)
    {
        Segment segment = _segments[part];
        return _workspace.Output(segment.FirstRow + segment.RowCount).RowRange(segment.FirstRow, segment.RowCount);
    }

    private void ReadLogits(Span<float> logits, Tensor hidden)
    {
        int v = VocabularySize;
        for (int row = 0; row < hidden.Rows; row += _workspace.LogitsChunk.Rows)
        {
            int count = Math.Min(_workspace.LogitsChunk.Rows, hidden.Rows - row);
            Tensor chunk = _workspace.LogitsChunk.RowRange(0, count);
            _model.Logits(chunk, hidden.RowRange(row, count));
            _backend.Read(logits.Slice(row * v, count * v), chunk);
        }
    }

    private void Reserve(CachedSequence sequence, int length)
    {
        if (!TryReserve(sequence, length))
        {
            throw new InvalidOperationException("every block of the key-value cache is taken");
        }
    }

    private CachedSequence Open(bool publishes)
    {
        if (_openSequences == _segments.Length)
        {
            throw new InvalidOperationException($"the engine is made for {_segments.Length} sequences at a time, and all are open");
        }

        _openSequences++;
        return new CachedSequence(KeyValueCache.BlocksFor(ContextLength), publishes);
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _workspace.Dispose();
        _arena.Dispose();
    }
}
