using System.Diagnostics;
using TinyLlama.Compute;
using TinyLlama.Compute.Cpu;

namespace TinyLlama.Cli.Bench;

/// <summary>
/// A backend that times what it passes on, and counts the work. The arithmetic is the other backend's, bit for bit; whoever
/// does not measure does not pay. After each operation of a GPU it waits for it: the sum of operations is longer than a step
/// in which they follow each other.
/// </summary>
/// <remarks>
/// Operations are those of products, a multiply-add counted as two; of attention those that a causal mask leaves. Bytes
/// count every tensor once, each time that it is read or written, as if it came from memory.
/// </remarks>
/// <param name="inner">Does the work; stays its owner's to dispose.</param>
internal sealed class TimedBackend(Backend inner) : Backend
{
    private readonly Dictionary<Operation, OperationTimes> _times = [];
    private readonly Arena? _arena = inner is CpuBackend ? null : inner.Allocate("bench", Arena.Alignment);
    private Tensor _single;

    /// <inheritdoc/>
    public override string Description => inner.Description;

    /// <inheritdoc/>
    public override string Arithmetic => inner.Arithmetic;

    /// <inheritdoc/>
    public override DType ActivationType => inner.ActivationType;

    /// <inheritdoc/>
    public override DType CacheType => inner.CacheType;

    /// <inheritdoc/>
    public override bool HasBackwardForm => inner.HasBackwardForm;

    /// <inheritdoc/>
    public override int LogitsBytes => inner.LogitsBytes;

    /// <inheritdoc/>
    public override int TopLogitsCount => inner.TopLogitsCount;

    /// <inheritdoc/>
    public override long AvailableBytes => inner.AvailableBytes;

    /// <summary>Gets or sets a value indicating whether operations are timed, or only passed on.</summary>
    public bool Times { get; set; } = true;

    /// <summary>Waits for all operations of a device, by reading an element.</summary>
    /// <param name="device">The device.</param>
    /// <param name="single">(1, 1) of F32, of the device.</param>
    public static void Wait(Backend device, Tensor single)
    {
        Span<float> element = stackalloc float[1];
        device.Read(element, single);
    }

    /// <summary>What was measured since the last call of this, in the order of the first calls.</summary>
    public OperationTimes[] TakeTimes()
    {
        OperationTimes[] times = [.. _times.Values];
        _times.Clear();
        return times;
    }

    /// <summary>Ends a round, such as a training step: best and median are over rounds.</summary>
    public void EndRound()
    {
        foreach (OperationTimes times in _times.Values)
        {
            times.EndRound();
        }
    }

    /// <summary>Forgets what was measured since the last round ended: what prepared the next one.</summary>
    public void ForgetRound()
    {
        foreach (OperationTimes times in _times.Values)
        {
            times.ForgetRound();
        }
    }

    /// <inheritdoc/>
    public override void RequireModel(int channels, int hidden, int headDim) => inner.RequireModel(channels, hidden, headDim);

    /// <inheritdoc/>
    public override Arena Allocate(string name, long byteCount) => inner.Allocate(name, byteCount);

    /// <inheritdoc/>
    public override Tensor TakePacked(Arena arena, int outputs, int inputs, DType type) => inner.TakePacked(arena, outputs, inputs, type);

    /// <inheritdoc/>
    public override bool ReadsTable(DType type) => inner.ReadsTable(type);

    /// <inheritdoc/>
    public override bool ReadsInPlace(DType type, int inputs, StoredRows rows) => inner.ReadsInPlace(type, inputs, rows);

    /// <inheritdoc/>
    public override void WriteRows(Weight weight, int firstRow, ReadOnlySpan<byte> rows) => inner.WriteRows(weight, firstRow, rows);

    /// <inheritdoc/>
    public override void Pack(Weight weight)
    {
        long start = Stopwatch.GetTimestamp();
        inner.Pack(weight);
        Record(nameof(Pack), start, Bytes(weight.Values, weight.PackedForward, weight.PackedBackward));
    }

    /// <inheritdoc/>
    public override void Write<T>(Tensor destination, ReadOnlySpan<T> source)
    {
        long start = Stopwatch.GetTimestamp();
        inner.Write(destination, source);
        Record(nameof(Write), start, 2 * Bytes(destination));
    }

    /// <inheritdoc/>
    public override void Read<T>(Span<T> destination, Tensor source)
    {
        long start = Stopwatch.GetTimestamp();
        inner.Read(destination, source);
        Record(nameof(Read), start, 2 * Bytes(source));
    }

    /// <inheritdoc/>
    /// <remarks>What is timed runs operation by operation.</remarks>
    public override void Repeat(Recording recording, Action operations)
    {
        if (Times)
        {
            operations();
        }
        else
        {
            inner.Repeat(recording, operations);
        }
    }

    /// <inheritdoc/>
    public override void Zero(Tensor destination)
    {
        long start = Stopwatch.GetTimestamp();
        inner.Zero(destination);
        Record(nameof(Zero), start, Bytes(destination));
    }

    /// <inheritdoc/>
    public override void Add(Tensor destination, Tensor addend)
    {
        long start = Stopwatch.GetTimestamp();
        inner.Add(destination, addend);
        Record(nameof(Add), start, 2 * Bytes(destination) + Bytes(addend));
    }

    /// <inheritdoc/>
    public override void Copy(Tensor destination, Tensor source)
    {
        long start = Stopwatch.GetTimestamp();
        inner.Copy(destination, source);
        Record(nameof(Copy), start, Bytes(destination, source));
    }

    /// <inheritdoc/>
    public override void GatherRows(Tensor destination, Tensor source, Tensor rows)
    {
        long start = Stopwatch.GetTimestamp();
        inner.GatherRows(destination, source, rows);
        Record(nameof(GatherRows), start, (2 * Bytes(destination)) + Bytes(rows));
    }

    /// <inheritdoc/>
    public override void Sum(Tensor total, Tensor values)
    {
        long start = Stopwatch.GetTimestamp();
        inner.Sum(total, values);
        Record(nameof(Sum), start, Bytes(values));
    }

    /// <inheritdoc/>
    public override void Embedding(Tensor output, Tensor table, Tensor tokens)
    {
        long start = Stopwatch.GetTimestamp();
        inner.Embedding(output, table, tokens);
        Record(nameof(Embedding), start, (2 * Bytes(output)) + Bytes(tokens));
    }

    /// <inheritdoc/>
    public override void EmbeddingBackward(Tensor dTable, Tensor dOutput, Tensor tokens)
    {
        long start = Stopwatch.GetTimestamp();
        inner.EmbeddingBackward(dTable, dOutput, tokens);
        Record(nameof(EmbeddingBackward), start, (3 * Bytes(dOutput)) + Bytes(tokens));
    }

    /// <inheritdoc/>
    public override void RmsNorm(Tensor output, Tensor r, Tensor input, Tensor weight, float epsilon)
    {
        long start = Stopwatch.GetTimestamp();
        inner.RmsNorm(output, r, input, weight, epsilon);
        Record(nameof(RmsNorm), start, Bytes(output, r, input, weight));
    }

    /// <inheritdoc/>
    public override void AddRmsNorm(Tensor sum, Tensor output, Tensor r, Tensor input, Tensor branch, Tensor weight, float epsilon)
    {
        long start = Stopwatch.GetTimestamp();
        inner.AddRmsNorm(sum, output, r, input, branch, weight, epsilon);
        Record(nameof(AddRmsNorm), start, Bytes(sum, output, r, input, branch, weight));
    }

    /// <inheritdoc/>
    public override void RmsNormBackward(Tensor dInput, Tensor dWeight, Tensor dOutput, Tensor input, Tensor weight, Tensor r)
    {
        long start = Stopwatch.GetTimestamp();
        inner.RmsNormBackward(dInput, dWeight, dOutput, input, weight, r);
        Record(nameof(RmsNormBackward), start, (2 * Bytes(dInput, dWeight)) + Bytes(dOutput, input, weight, r));
    }

    /// <inheritdoc/>
    public override void MatMul(Tensor output, Tensor input, Weight weight, bool accumulate = false)
    {
        long start = Stopwatch.GetTimestamp();
        inner.MatMul(output, input, weight, accumulate);
        Tensor form = weight.PackedForward.IsEmpty ? weight.Values : weight.PackedForward;
        RecordProduct(
            nameof(MatMul), start, input.Rows, weight.Outputs, weight.Inputs,
            Bytes(input, form) - weight.UnreadBytes + (Bytes(output) * (accumulate ? 2 : 1)));
    }

    /// <inheritdoc/>
    public override void MatMulBackwardInput(Tensor dInput, Tensor dOutput, Weight weight, bool accumulate = false)
    {
        long start = Stopwatch.GetTimestamp();
        inner.MatMulBackwardInput(dInput, dOutput, weight, accumulate);
        Tensor form = weight.PackedBackward.IsEmpty ? weight.Values : weight.PackedBackward;
        RecordProduct(
            nameof(MatMulBackwardInput), start, dOutput.Rows, weight.Outputs, weight.Inputs, Bytes(dOutput, form) + (Bytes(dInput) * (accumulate ? 2 : 1)));
    }

    /// <inheritdoc/>
    public override void MatMulBackwardWeight(Tensor dWeight, Tensor dOutput, Tensor input)
    {
        long start = Stopwatch.GetTimestamp();
        inner.MatMulBackwardWeight(dWeight, dOutput, input);
        RecordProduct(nameof(MatMulBackwardWeight), start, input.Rows, dWeight.Rows, dWeight.Columns, (2 * Bytes(dWeight)) + Bytes(dOutput, input));
    }

    /// <inheritdoc/>
    public override void Rope(Tensor heads, Tensor positions, Tensor table, bool inverse = false)
    {
        long start = Stopwatch.GetTimestamp();
        inner.Rope(heads, positions, table, inverse);
        Record(nameof(Rope), start, (2 * Bytes(heads)) + Bytes(positions, table));
    }

    /// <inheritdoc/>
    public override void Attention(
        Tensor output, Tensor logSumExp, Tensor query, Tensor keys, Tensor values, TokenLayout layout, int headDim)
    {
        (long pairs, long seen) = Pairs(layout);
        long start = Stopwatch.GetTimestamp();
        inner.Attention(output, logSumExp, query, keys, values, layout, headDim);

        // Scores, and their sum of values. Of a cache, the rows that are seen.
        long keyBytes = 2 * seen * (layout.BlockTable.IsEmpty ? Bytes(keys) / keys.Rows : Bytes(keys) / keys.Rows / TokenLayout.KeyBlock);
        Record(nameof(Attention), start, Bytes(output, logSumExp, query) + keyBytes, 4 * query.Columns * pairs);
    }

    /// <inheritdoc/>
    public override void AttentionBackward(
        Tensor dQuery, Tensor dKeys, Tensor dValues, Tensor scratch, Tensor dOutput, Tensor output, Tensor logSumExp,
        Tensor query, Tensor keys, Tensor values, TokenLayout layout, int headDim)
    {
        long pairs = Pairs(layout).Pairs;
        long start = Stopwatch.GetTimestamp();
        inner.AttentionBackward(
            dQuery, dKeys, dValues, scratch, dOutput, output, logSumExp, query, keys, values, layout, headDim);
        long bytes = Bytes(dQuery, dKeys, dValues, dOutput, output, logSumExp, query, keys, values) + (2 * Bytes(scratch));

        // Scores again, the gradients of probabilities, of queries, of keys and of values.
        Record(nameof(AttentionBackward), start, bytes, 10 * query.Columns * pairs);
    }

    /// <inheritdoc/>
    public override int AttentionScratchColumns(int heads, int headDim) => inner.AttentionScratchColumns(heads, headDim);

    /// <inheritdoc/>
    public override Tensor TakeCache(Arena arena, int blocks, int keyHeads, int headDim, DType type) =>
        inner.TakeCache(arena, blocks, keyHeads, headDim, type);

    /// <inheritdoc/>
    public override void AppendToCache(
        Tensor cacheKeys, Tensor cacheValues, Tensor keys, Tensor values, TokenLayout layout, int headDim)
    {
        long start = Stopwatch.GetTimestamp();
        inner.AppendToCache(cacheKeys, cacheValues, keys, values, layout, headDim);
        Record(nameof(AppendToCache), start, 2 * Bytes(keys, values));
    }

    /// <inheritdoc/>
    public override void SwiGlu(Tensor output, Tensor gateUp)
    {
        long start = Stopwatch.GetTimestamp();
        inner.SwiGlu(output, gateUp);
        Record(nameof(SwiGlu), start, Bytes(output, gateUp));
    }

    /// <inheritdoc/>
    public override void SwiGluBackward(Tensor dGateUp, Tensor dOutput, Tensor gateUp)
    {
        long start = Stopwatch.GetTimestamp();
        inner.SwiGluBackward(dGateUp, dOutput, gateUp);
        Record(nameof(SwiGluBackward), start, Bytes(dGateUp, dOutput, gateUp));
    }

    /// <inheritdoc/>
    public override void CrossEntropy(Tensor losses, Tensor logits, Tensor targets, Tensor scale = default)
    {
        long start = Stopwatch.GetTimestamp();
        inner.CrossEntropy(losses, logits, targets, scale);
        Record(nameof(CrossEntropy), start, Bytes(losses, targets) + (Bytes(logits) * (scale.IsEmpty ? 1 : 2)));
    }

    /// <inheritdoc/>
    public override void TopLogits(Tensor top, Tensor logits, Tensor inverseTemperatures, int count)
    {
        long start = Stopwatch.GetTimestamp();
        inner.TopLogits(top, logits, inverseTemperatures, count);
        Record(nameof(TopLogits), start, Bytes(top, logits, inverseTemperatures));
    }

    /// <inheritdoc/>
    public override void SumOfSquares(Tensor total, Tensor partials, ReadOnlySpan<Tensor> values)
    {
        long start = Stopwatch.GetTimestamp();
        inner.SumOfSquares(total, partials, values);
        Record(nameof(SumOfSquares), start, Bytes(values));
    }

    /// <inheritdoc/>
    public override void AdamW(
        Tensor values, Tensor first, Tensor second, Tensor gradient, Tensor step, Tensor sumOfSquares, AdamWSettings settings)
    {
        long start = Stopwatch.GetTimestamp();
        inner.AdamW(values, first, second, gradient, step, sumOfSquares, settings);
        Record(nameof(AdamW), start, 2 * Bytes(values, first, second, gradient));
    }

    /// <inheritdoc/>
    protected override void Dispose(bool disposing) => _arena?.Dispose();

    private void Record(string name, long start, long bytes, long flops = 0) =>
        Record(new Operation(name), start, bytes, flops);

    private void RecordProduct(string name, long start, int tokens, int outputs, int inputs, long bytes) =>
        Record(new Operation(name, tokens, outputs, inputs), start, bytes, 2L * tokens * outputs * inputs);

    private void Record(Operation operation, long start, long bytes, long flops)
    {
        if (!Times)
        {
            return;
        }

        if (_arena is not null)
        {
            _single = _single.IsEmpty ? _arena.Take(1, 1) : _single;
            Wait(inner, _single);
        }

        // A TimeSpan counts in steps of 100 ns, which a small operation does not last.
        double seconds = (Stopwatch.GetTimestamp() - start) / (double)Stopwatch.Frequency;
        if (!_times.TryGetValue(operation, out OperationTimes? times))
        {
            times = new OperationTimes(operation);
            _times.Add(operation, times);
        }

        times.Add(seconds, bytes, flops);
    }

    private static long Bytes(params ReadOnlySpan<Tensor> tensors)
    {
        long bytes = 0;
        foreach (Tensor tensor in tensors)
        {
            bytes += tensor.Rows * tensor.Type.RowBytes(tensor.Columns);
        }

        return bytes;
    }

    // Pairs of a query and a key that it sees, and keys that are seen at all.
    private (long Pairs, long Keys) Pairs(TokenLayout layout)
    {
        if (!Times)
        {
            return default;
        }

        int[] fields = new int[4 * layout.SegmentCount];
        inner.Read<int>(fields, layout.Segments.RowRange(0, layout.SegmentCount));
        (long pairs, long keys) = (0, 0);
        for (int s = 0; s < fields.Length; s += 4)
        {
            (long rows, long before) = (fields[s + 1], fields[s + 2]);
            pairs += (rows * before) + (rows * (rows + 1) / 2);
            keys += before + rows;
        }

        return (pairs, keys);
    }
}
