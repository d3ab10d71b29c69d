using System.Runtime.InteropServices;

namespace TinyLlama.Compute.Tests.Cuda;

public sealed class AttentionTests : AttentionProblems
{
    [Theory]
    [InlineData(new[] { 1 }, 1, 1, 16)]
    [InlineData(new[] { 3, 1, 17 }, 3, 1, 16)]
    [InlineData(new[] { 64, 65, 63 }, 4, 2, 32)]
    [InlineData(new[] { 5, 130, 1, 99 }, 8, 2, 64)]
    [InlineData(new[] { 200 }, 1, 1, 64)]
    [InlineData(new[] { 129 }, 2, 2, 128)]
    [InlineData(new[] { 70 }, 7, 1, 128)]
    [InlineData(new[] { 67 }, 2, 1, 48)]
    [InlineData(new[] { 66, 3 }, 3, 3, 112)]
    [InlineData(new[] { 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 1, 1, 1, 40, 2, 2, 2 }, 4, 4, 32)]
    public void Equals_the_cpu(int[] lengths, int heads, int keyHeads, int headDim)
    {
        Problem problem = Random(lengths, heads, keyHeads, headDim);
        Near(RunOnCpu(problem), Run(problem));
    }

    [Fact]
    public void A_sequence_has_the_same_bits_alone_and_in_a_batch()
    {
        Problem batch = Random([33, 100, 70, 1], 6, 2, 32);
        Result together = Run(batch);
        int row = 0;
        foreach (int length in batch.Lengths)
        {
            Result alone = Run(batch.Rows(row, length)), part = together.Rows(row, length, batch);
            SameBits(part.Output, alone.Output, "output");
            SameBits(part.LogSumExp, alone.LogSumExp, "logSumExp");
            SameBits(part.DQuery, alone.DQuery, "dQuery");
            SameBits(part.DKeys, alone.DKeys, "dKeys");
            SameBits(part.DValues, alone.DValues, "dValues");
            row += length;
        }
    }

    [Fact]
    public void Rows_that_begin_at_a_later_position_see_the_keys_before_them()
    {
        // The last 5 rows of a sequence of 137, and all of one of 3, whose keys lie between.
        Problem all = Random([137, 3], 4, 2, 64);
        float[] expected = RunOnCpu(all).Output;
        TokenLayout layout = Layout(Cuda, [new Segment(0, 5, 132, 0), new Segment(5, 3, 0, 137)]);
        Tensor output = Take(8, 256), query = Put(8, 256, all.Query.AsSpan(132 * 256));
        Cuda.Attention(output, Take(8, 4, DType.F32), query, Put(140, 128, all.Keys), Put(140, 128, all.Values), layout, 64);
        Near(expected.AsSpan(132 * 256), Get(output), Tolerance, "output");
    }

    [Theory]
    [InlineData(4, 2, 16, DType.BF16)]
    [InlineData(3, 3, 32, DType.BF16)]
    [InlineData(8, 1, 64, DType.BF16)]
    [InlineData(2, 1, 128, DType.BF16)]
    [InlineData(2, 1, 80, DType.BF16)]
    [InlineData(4, 2, 16, DType.Q8_0)]
    [InlineData(3, 3, 32, DType.Q8_0)]
    [InlineData(8, 1, 64, DType.Q8_0)]
    [InlineData(2, 1, 128, DType.Q8_0)]
    [InlineData(4, 2, 48, DType.Q8_0)]
    public void Prefill_in_parts_and_decode_through_a_block_table_have_the_bits_of_one_forward(
        int heads, int keyHeads, int headDim, DType type)
    {
        int[] lengths = [70, 330];
        Problem problem = Random(lengths, heads, keyHeads, headDim);
        Cache whole = new(this, problem, type), parts = new(this, problem, type);
        (float[] output, float[] logSumExp) = whole.Forward([70, 330]);
        Problem rounded = problem with { Keys = Stored(problem.Keys, headDim, type), Values = Stored(problem.Values, headDim, type) };
        Result expected = RunOnCpu(rounded);
        Near(expected.Output, output, Tolerance, "output");
        Close(expected.LogSumExp, logSumExp, 1e-5, "logSumExp");

        // Each step takes this many tokens of each sequence: ragged prefill, then single tokens, then nothing of one.
        (int, int)[] steps = [(30, 230), (1, 1), (33, 28), (1, 1), (1, 1), (4, 5), .. Enumerable.Repeat((0, 1), 3), (0, 61)];
        foreach ((int first, int second) in steps)
        {
            int[] rows = parts.Next([first, second]);
            (float[] y, float[] l) = parts.Forward([first, second]);
            SameBits(Pick(output, rows), y, $"output of rows {rows[0]} …");
            SameBits(Pick(logSumExp, rows), l, $"logSumExp of rows {rows[0]} …");
        }

        float[] Pick(float[] all, int[] rows) => [.. rows.SelectMany(row => Row(all, row, lengths.Sum()))];
    }

    [Fact]
    public void A_row_has_the_same_bits_whether_one_block_sums_its_keys_or_many()
    {
        // The first forward has blocks for the whole device, the second one few.
        Problem problem = Random([600], 32, 32, 16);
        (float[] output, float[] logSumExp) = new Cache(this, problem, DType.BF16).Forward([600]);
        Cache cache = new(this, problem, DType.BF16);
        cache.Forward([599]);
        (float[] y, float[] l) = cache.Forward([1]);
        SameBits(output.AsSpan(599 * 512), y, "output");
        SameBits(logSumExp.AsSpan(599 * 32), l, "logSumExp");
    }

    [Fact]
    public void A_cache_in_Q8_0_holds_bytes_and_scales()
    {
        const int Dim = 64, Position = 3;
        float[] keys = Normal(2 * Dim);
        Tensor cache = Cuda.TakeCache(Plan(), 2, 2, Dim, DType.Q8_0);
        cache = Take(cache.Rows, cache.Columns, DType.Q8_0);
        Tensor other = Take(cache.Rows, cache.Columns, DType.Q8_0);
        Tensor row = PutStrided(1, 2 * Dim, keys);
        Cuda.AppendToCache(cache, other, row, row, Layout(Cuda, [new Segment(0, 1, Position, 0)], 1), Dim);
        byte[] content = new byte[DType.Q8_0.RowBytes(2 * cache.Columns)];
        ReadBytes(content, cache);
        for (int i = 0; i < keys.Length; i++)
        {
            (int head, int channel) = (i / Dim, i % Dim);
            int block = (2 + head) * 64 * Dim / 32 * 34;
            float scale = (float)BitConverter.ToHalf(content, block + (64 * Dim) + (((Position * Dim / 32) + (channel / 32)) * 2));
            float largest = keys.AsSpan(i / 32 * 32, 32).ToArray().Max(Math.Abs);
            Assert.Equal((float)(Half)(largest / 127), scale);
            Assert.Equal(Math.Clamp(MathF.Round(keys[i] * (1 / scale)), -127, 127), (sbyte)content[block + (Position * Dim) + channel]);
        }
    }

    [Fact]
    public void A_layout_without_tokens_does_nothing()
    {
        TokenLayout layout = Layout(Cuda, []);
        Tensor none = Take(0, 32), statistics = Take(0, 2, DType.F32);
        Cuda.Attention(none, statistics, none, none, none, layout, 16);
        Cuda.AttentionBackward(none, none, none, statistics, none, none, statistics, none, none, none, layout, 16);
    }

    [Fact]
    public void Other_head_dims_and_cache_types_are_refused()
    {
        TokenLayout layout = Layout(Cuda, [new Segment(0, 1, 0, 0)]);
        Tensor rows = Take(1, 24), wide = Take(1, 144), statistics = Take(1, 1, DType.F32);
        Assert.Throws<ArgumentException>(() => Cuda.Attention(rows, statistics, rows, rows, rows, layout, 24));
        Assert.Throws<ArgumentException>(() => Cuda.Attention(wide, statistics, wide, wide, wide, layout, 144));
        Assert.Throws<DeviceException>(() => Cuda.TakeCache(Plan(), 1, 1, 64, DType.F16));
    }

    [Fact]
    public void Keys_outside_the_batch_or_the_cache_are_refused()
    {
        Tensor query = Take(3, 16), keys = Take(2, 16), statistics = Take(3, 1, DType.F32);
        TokenLayout layout = Layout(Cuda, [new Segment(0, 3, 0, 0)]);
        Assert.Throws<ArgumentException>(() => Cuda.Attention(query, statistics, query, keys, keys, layout, 16));

        TokenLayout cached = Layout(Cuda, [new Segment(0, 3, 0, 0)], 1);
        Tensor cache = Take(1, 64 * 16);
        Assert.Throws<ArgumentException>(() => Cuda.Attention(query, statistics, query, cache, cache, cached, 16));
        Assert.Throws<ArgumentException>(() => Cuda.AppendToCache(cache, cache, query, query, cached, 16));

        TokenLayout later = Layout(Cuda, [new Segment(0, 3, 1, 0)]);
        Assert.Throws<ArgumentException>(() => Cuda.AttentionBackward(
            query, query, query, statistics, query, query, statistics, query, query, query, later, 16));
    }

    [Fact]
    public void Allocates_nothing()
    {
        Problem problem = Random([5, 3], 2, 1, 16);
        Tensors tensors = new(this, problem);
        tensors.Run();
        long before = GC.GetAllocatedBytesForCurrentThread();
        tensors.Run();
        Assert.Equal(0, GC.GetAllocatedBytesForCurrentThread() - before);
    }

    private static Arena Plan() => Arena.Plan("plan");

    // What a cache holds, as the products read it.
    private static float[] Stored(float[] rows, int headDim, DType type)
    {
        if (type == DType.BF16)
        {
            return rows;
        }

        float[] stored = [.. rows];
        for (int head = 0; head < rows.Length; head += headDim)
        {
            for (int first = 0; first < headDim; first += 32)
            {
                Span<float> group = stored.AsSpan(head + first, Math.Min(32, headDim - first));
                float scale = (float)(Half)(group.ToArray().Max(Math.Abs) / 127);
                foreach (ref float value in group)
                {
                    value = Rounded(Math.Clamp(MathF.Round(value * (1 / scale)), -127, 127) * scale);
                }
            }
        }

        return stored;
    }

    private static float[] Row(float[] all, int row, int rows) => Part(all, row, 1, rows).ToArray();

    private void ReadBytes(byte[] content, Tensor tensor) =>
        Cuda.Read(MemoryMarshal.Cast<byte, ushort>(content.AsSpan()), new Tensor(tensor.Address, 1, content.Length / 2, content.Length / 2, DType.BF16));

    /// <summary>A cache that the sequences of a problem grow in; its blocks are out of order.</summary>
    private sealed class Cache
    {
        private readonly AttentionTests _tests;
        private readonly Problem _problem;
        private readonly Tensor _keys, _values;
        private readonly int[] _done, _table, _firstEntries;

        public Cache(AttentionTests tests, Problem problem, DType type)
        {
            (_tests, _problem, _done) = (tests, problem, new int[problem.Lengths.Length]);
            _firstEntries = new int[problem.Lengths.Length];
            int entries = 0;
            for (int s = 0; s < _firstEntries.Length; s++)
            {
                _firstEntries[s] = entries;
                entries += (problem.Lengths[s] + 63) / 64;
            }

            // 7 has no factor in common with the number of blocks in these tests.
            _table = [.. from entry in Enumerable.Range(0, entries) select ((7 * entry) + 3) % entries];
            Tensor room = tests.Cuda.TakeCache(Plan(), entries, problem.KeyHeads, problem.HeadDim, type);
            (_keys, _values) = (Room(), Room());

            Tensor Room()
            {
                // What was never written is NaN, or scales that are.
                Tensor tensor = tests.Take(room.Rows, room.Columns, type);
                int halves = (int)type.RowBytes(room.Count) / 2;
                ushort[] ones = new ushort[halves];
                Array.Fill(ones, ushort.MaxValue);
                tests.Cuda.Write<ushort>(new Tensor(tensor.Address, 1, halves, halves, DType.BF16), ones);
                return tensor;
            }
        }

        /// <summary>The rows of the problem that are next.</summary>
        public int[] Next(int[] counts) =>
            [.. counts.SelectMany((count, s) => Enumerable.Range(_problem.Lengths.Take(s).Sum() + _done[s], count))];

        /// <summary>Appends so many tokens of each sequence; what they attend to.</summary>
        public (float[] Output, float[] LogSumExp) Forward(int[] counts)
        {
            int[] rows = Next(counts);
            List<Segment> segments = [];
            for (int s = 0, row = 0; s < counts.Length; row += counts[s], s++)
            {
                if (counts[s] > 0)
                {
                    segments.Add(new Segment(row, counts[s], _done[s], _firstEntries[s]));
                }

                _done[s] += counts[s];
            }

            (int heads, int dim) = (_problem.Heads, _problem.HeadDim);
            TokenLayout layout = _tests.Layout(_tests.Cuda, segments.ToArray(), _table);
            Tensor query = Put(_problem.Query), keys = Put(_problem.Keys), values = Put(_problem.Values);
            Tensor output = _tests.Take(rows.Length, heads * dim), logSumExp = _tests.Take(rows.Length, heads, DType.F32);
            _tests.Cuda.AppendToCache(_keys, _values, keys, values, layout, dim);
            _tests.Cuda.Attention(output, logSumExp, query, _keys, _values, layout, dim);
            return (_tests.Get(output), _tests.Get(logSumExp));

            Tensor Put(float[] all) => _tests.PutStrided(
                rows.Length, all.Length / _problem.Tokens, [.. rows.SelectMany(row => Row(all, row, _problem.Tokens))]);
        }
    }
}
