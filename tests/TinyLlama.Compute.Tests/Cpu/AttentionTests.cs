using TinyLlama.Compute.Cpu;
using TinyLlama.Tests.Common;

namespace TinyLlama.Compute.Tests.Cpu;

public abstract class AttentionTests(CpuPath path) : OperationTests(path)
{
    [Theory]
    [InlineData(new[] { 1 }, 1, 1, 2)]
    [InlineData(new[] { 3, 1, 17 }, 3, 1, 6)]
    [InlineData(new[] { 64, 65, 63 }, 4, 2, 16)]
    [InlineData(new[] { 5, 130, 1, 99 }, 8, 2, 32)]
    [InlineData(new[] { 129 }, 2, 2, 80)]
    [InlineData(new[] { 70 }, 7, 1, 128)]
    public void Equals_the_definition(int[] lengths, int heads, int keyHeads, int headDim)
    {
        Problem problem = Random(lengths, heads, keyHeads, headDim);
        Result actual = Run(Device, problem);
        (double[] output, double[] logSums, double[] dQuery, double[] dKeys, double[] dValues) = Define(problem);
        Near(output, actual.Output, 5e-6, "output");
        Near(logSums, actual.LogSumExp, 3e-6, "logSumExp");
        Near(dQuery, actual.DQuery, 1e-5, "dQuery");
        Near(dKeys, actual.DKeys, 1e-5, "dKeys");
        Near(dValues, actual.DValues, 1e-5, "dValues");
    }

    [Fact]
    public void A_long_sequence_of_one_key_head_equals_the_definition()
    {
        // More tokens than a task of the forward or a block of the backward has.
        Problem problem = Random([400], 1, 1, 8);
        Result actual = Run(Device, problem);
        (double[] output, _, double[] dQuery, double[] dKeys, double[] dValues) = Define(problem);
        Near(output, actual.Output, 5e-6, "output");
        Near(dQuery, actual.DQuery, 1e-5, "dQuery");
        Near(dKeys, actual.DKeys, 1e-5, "dKeys");
        Near(dValues, actual.DValues, 1e-5, "dValues");
    }

    [Fact]
    public void Has_the_same_bits_for_any_number_of_threads()
    {
        Problem problem = Random([150, 7, 80], 6, 2, 24);
        Result one = Run(Device, problem);
        one.SameBits(Run(On(2), problem), "2 threads");
        one.SameBits(Run(On(3), problem), "3 threads");
    }

    [Fact]
    public void A_sequence_has_the_same_bits_alone_and_in_a_batch()
    {
        Problem batch = Random([33, 100, 70], 4, 2, 16);
        Result together = Run(Device, batch);
        int row = 0;
        foreach (int length in batch.Lengths)
        {
            Result alone = Run(On(1), batch.Rows(row, length));
            together.Rows(row, length, batch).SameBits(alone, $"the sequence at row {row}");
            row += length;
        }
    }

    [Fact]
    public void Keys_outside_the_batch_or_the_cache_are_refused()
    {
        Tensor query = Device.Take(3, 4), keys = Device.Take(2, 4), output = Device.Take(3, 4), logSumExp = Device.Take(3, 1);
        TokenLayout layout = new(Device.Arena, 3, 1);
        layout.Set(Device.Backend, [new Segment(0, 3, 0, 0)]);
        Assert.Throws<ArgumentException>(() => Device.Backend.Attention(output, logSumExp, query, keys, keys, layout, 4));

        TokenLayout cached = new(Device.Arena, 3, 1, 1);
        cached.Set(Device.Backend, [new Segment(0, 3, 0, 0)], [1]);
        Tensor cache = Device.Backend.TakeCache(Device.Arena, 1, 1, 4, DType.F32);
        Assert.Throws<ArgumentException>(() => Device.Backend.Attention(output, logSumExp, query, cache, cache, cached, 4));
        Assert.Throws<ArgumentException>(() => Device.Backend.AppendToCache(cache, cache, query, query, cached, 4));
    }

    [Fact]
    public void Allocates_nothing()
    {
        Problem problem = Random([5, 3], 2, 1, 4);
        Tensors t = new(Device, problem);
        AllocatesNothing(() => t.Run(Device.Backend));
    }

    // With products of fp32 each element is close.
    private protected virtual void Near(double[] expected, float[] actual, double tolerance, string what) => Close(expected, actual, tolerance, what);

    private static (double[] Output, double[] LogSums, double[] DQuery, double[] DKeys, double[] DValues) Define(Problem p)
    {
        (int tokens, int dim, int group) = (p.Lengths.Sum(), p.HeadDim, p.Heads / p.KeyHeads);
        double[] output = new double[p.Query.Length], logSums = new double[tokens * p.Heads], dQuery = new double[p.Query.Length];
        double[] dKeys = new double[p.Keys.Length], dValues = new double[p.Keys.Length];
        int first = 0;
        foreach (int length in p.Lengths)
        {
            for (int head = 0; head < p.Heads; head++)
            {
                double[] k = Column(p.Keys, p.KeyHeads, head / group, first, length, dim);
                double[] v = Column(p.Values, p.KeyHeads, head / group, first, length, dim);
                double[] dk = new double[k.Length], dv = new double[v.Length];
                for (int i = 0; i < length; i++)
                {
                    int at = (((first + i) * p.Heads) + head) * dim;
                    double[] q = Doubles(p.Query[at..(at + dim)]);
                    int seen = (i + 1) * dim;
                    logSums[((first + i) * p.Heads) + head] = Attention.Scalar.Forward(output.AsSpan(at, dim), q, k.AsSpan(0, seen), v.AsSpan(0, seen));
                    Attention.Scalar.Backward(
                        dQuery.AsSpan(at, dim), dk.AsSpan(0, seen), dv.AsSpan(0, seen), Doubles(p.DOutput[at..(at + dim)]), q,
                        k.AsSpan(0, seen), v.AsSpan(0, seen));
                }

                for (int j = 0; j < length * dim; j++)
                {
                    int at = ((((first + (j / dim)) * p.KeyHeads) + (head / group)) * dim) + (j % dim);
                    dKeys[at] += dk[j];
                    dValues[at] += dv[j];
                }
            }

            first += length;
        }

        return (output, logSums, dQuery, dKeys, dValues);
    }

    private static double[] Column(float[] packed, int heads, int head, int first, int length, int dim)
    {
        double[] column = new double[length * dim];
        for (int j = 0; j < column.Length; j++)
        {
            column[j] = packed[((((first + (j / dim)) * heads) + head) * dim) + (j % dim)];
        }

        return column;
    }

    private protected static Result Run(Device device, Problem problem)
    {
        Tensors t = new(device, problem);
        t.Run(device.Backend);
        return new Result(
            device.Get(t.Output), device.Get(t.LogSumExp), device.Get(t.DQuery), device.Get(t.DKeys), device.Get(t.DValues));
    }

    private protected Problem Random(int[] lengths, int heads, int keyHeads, int headDim)
    {
        int tokens = lengths.Sum();
        return new Problem(
            lengths, heads, keyHeads, headDim, Normal(tokens * heads * headDim, 2), Normal(tokens * keyHeads * headDim),
            Normal(tokens * keyHeads * headDim), Normal(tokens * heads * headDim));
    }

    private protected sealed record Problem(
        int[] Lengths, int Heads, int KeyHeads, int HeadDim, float[] Query, float[] Keys, float[] Values, float[] DOutput)
    {
        public Problem Rows(int first, int count)
        {
            Range query = (first * Heads * HeadDim)..((first + count) * Heads * HeadDim);
            Range keys = (first * KeyHeads * HeadDim)..((first + count) * KeyHeads * HeadDim);
            return this with { Lengths = [count], Query = Query[query], Keys = Keys[keys], Values = Values[keys], DOutput = DOutput[query] };
        }
    }

    private protected sealed record Result(float[] Output, float[] LogSumExp, float[] DQuery, float[] DKeys, float[] DValues)
    {
        public void SameBits(Result other, string what)
        {
            OperationTests.SameBits(Output, other.Output, $"output of {what}");
            OperationTests.SameBits(LogSumExp, other.LogSumExp, $"logSumExp of {what}");
            OperationTests.SameBits(DQuery, other.DQuery, $"dQuery of {what}");
            OperationTests.SameBits(DKeys, other.DKeys, $"dKeys of {what}");
            OperationTests.SameBits(DValues, other.DValues, $"dValues of {what}");
        }

        public Result Rows(int first, int count, Problem problem)
        {
            Range query = (first * problem.Heads * problem.HeadDim)..((first + count) * problem.Heads * problem.HeadDim);
            Range keys = (first * problem.KeyHeads * problem.HeadDim)..((first + count) * problem.KeyHeads * problem.HeadDim);
            return new Result(
                Output[query], LogSumExp[(first * problem.Heads)..((first + count) * problem.Heads)], DQuery[query], DKeys[keys], DValues[keys]);
        }
    }

    /// <summary>A problem on a device: query, keys and values as column ranges, as a fused projection leaves them.</summary>
    private sealed class Tensors
    {
        private readonly Tensor _query, _keys, _values, _dOutput, _delta;
        private readonly TokenLayout _layout;
        private readonly int _headDim;

        public Tensors(Device device, Problem p)
        {
            (int tokens, int queryColumns, int keyColumns) = (p.Lengths.Sum(), p.Heads * p.HeadDim, p.KeyHeads * p.HeadDim);
            _headDim = p.HeadDim;
            _query = device.PutStrided(tokens, queryColumns, p.Query);
            _keys = device.PutStrided(tokens, keyColumns, p.Keys);
            _values = device.PutStrided(tokens, keyColumns, p.Values);
            _dOutput = device.PutStrided(tokens, queryColumns, p.DOutput);
            _delta = device.Take(tokens, p.Heads);
            Output = device.Take(tokens, queryColumns);
            LogSumExp = device.Take(tokens, p.Heads);
            DQuery = device.PutStrided(tokens, queryColumns, new float[p.Query.Length]);
            DKeys = device.PutStrided(tokens, keyColumns, new float[p.Keys.Length]);
            DValues = device.PutStrided(tokens, keyColumns, new float[p.Keys.Length]);
            _layout = new TokenLayout(device.Arena, tokens, p.Lengths.Length);
            Segment[] segments = new Segment[p.Lengths.Length];
            for (int s = 0, row = 0; s < segments.Length; row += p.Lengths[s], s++)
            {
                segments[s] = new Segment(row, p.Lengths[s], 0, row);
            }

            _layout.Set(device.Backend, segments);
        }

        public Tensor Output { get; }

        public Tensor LogSumExp { get; }

        public Tensor DQuery { get; }

        public Tensor DKeys { get; }

        public Tensor DValues { get; }

        public void Run(Backend backend)
        {
            backend.Attention(Output, LogSumExp, _query, _keys, _values, _layout, _headDim);
            backend.AttentionBackward(
                DQuery, DKeys, DValues, _delta, _dOutput, Output, LogSumExp, _query, _keys, _values, _layout, _headDim);
        }
    }
}

/// <summary>Attention by fp32 products alone: to the bits of a cache, within the goldens' tolerance.</summary>
public abstract class Fp32AttentionTests(CpuPath path) : AttentionTests(path)
{
    [Theory]
    [InlineData("attn", 1e-6)]
    [InlineData("attn_t37_h8kv2_d64", 1e-6)]
    [InlineData("attn_peaky", 1e-4)] // Scores of ±500 are themselves off by 3e-5 in single precision.
    public void Equals_the_golden_values(string name, double tolerance)
    {
        GoldenFile golden = GoldenFile.Open(SharedFiles.Require("goldens/llama-tiny/ops.safetensors"));
        int[] shape = golden.Read($"{name}.q").Shape;
        int keyHeads = golden.Read($"{name}.k").Shape[1];
        (int batch, int heads, int context, int headDim) = (shape[0], shape[1], shape[2], shape[3]);
        Problem problem = new(
            [.. Enumerable.Repeat(context, batch)], heads, keyHeads, headDim, Load("q"), Load("k"), Load("v"), Load("dy"));

        Result result = Run(Device, problem);

        Close(Heads.Pack(golden.Read($"{name}.y")), result.Output, tolerance, "y");
        Close(Heads.Pack(golden.Read($"{name}.dq")), result.DQuery, 5 * tolerance, "dq");
        Close(Heads.Pack(golden.Read($"{name}.dk")), result.DKeys, 5 * tolerance, "dk");
        Close(Heads.Pack(golden.Read($"{name}.dv")), result.DValues, 5 * tolerance, "dv");

        float[] Load(string tensor) => Array.ConvertAll(Heads.Pack(golden.Read($"{name}.{tensor}")), v => (float)v);
    }

    [Theory]
    [InlineData(4, 2, 32, DType.F32)]
    [InlineData(3, 3, 6, DType.F32)]
    [InlineData(8, 1, 64, DType.F32)]
    [InlineData(4, 2, 40, DType.F16)]
    [InlineData(8, 1, 64, DType.F16)]
    [InlineData(4, 2, 40, DType.Q8_0)]
    [InlineData(8, 1, 64, DType.Q8_0)]
    public void Prefill_in_parts_and_decode_through_a_block_table_have_the_bits_of_the_full_forward(
        int heads, int keyHeads, int headDim, DType type)
    {
        int[] lengths = [70, 200];
        Problem problem = Random(lengths, heads, keyHeads, headDim);
        Problem rounded = problem with { Keys = Rounded(problem.Keys, headDim, type), Values = Rounded(problem.Values, headDim, type) };
        Result full = Run(Device, rounded);

        // Cache blocks out of order, with NaN wherever nothing was appended yet.
        int[] table = [5, 1, 4, 0, 6, 2];
        int[] firstEntry = [0, 2];
        Tensor cacheKeys = Device.Backend.TakeCache(Device.Arena, 7, keyHeads, headDim, type);
        Tensor cacheValues = Device.Backend.TakeCache(Device.Arena, 7, keyHeads, headDim, type);
        if (type == DType.F32)
        {
            cacheKeys.HostSpan<float>().Fill(float.NaN);
            cacheValues.HostSpan<float>().Fill(float.NaN);
        }

        TokenLayout layout = new(Device.Arena, 270, 2, table.Length);

        // Each step takes this many tokens of each sequence: ragged prefill, then single tokens, then nothing of one.
        (int, int)[] steps = [(30, 100), (1, 1), (33, 27), (1, 1), (1, 1), (4, 5), .. Enumerable.Repeat((0, 1), 65)];
        int[] done = [0, 0];
        foreach ((int first, int second) in steps)
        {
            List<Segment> segments = [];
            List<int> rows = [];
            foreach ((int s, int count) in (ReadOnlySpan<(int, int)>)[(0, first), (1, second)])
            {
                if (count > 0)
                {
                    segments.Add(new Segment(rows.Count, count, done[s], firstEntry[s]));
                    rows.AddRange(Enumerable.Range((s * lengths[0]) + done[s], count));
                    done[s] += count;
                }
            }

            layout.Set(Device.Backend, segments.ToArray(), table);
            int n = rows.Count;
            Tensor query = Device.Put(n, heads * headDim, Pick(problem.Query));
            Tensor keys = Device.Put(n, keyHeads * headDim, Pick(problem.Keys));
            Tensor values = Device.Put(n, keyHeads * headDim, Pick(problem.Values));
            Tensor output = Device.Take(n, heads * headDim), logSumExp = Device.Take(n, heads);
            Device.Backend.AppendToCache(cacheKeys, cacheValues, keys, values, layout, headDim);
            Device.Backend.Attention(output, logSumExp, query, cacheKeys, cacheValues, layout, headDim);
            SameBits(Pick(full.Output), Device.Get(output), $"output after {done[0]} and {done[1]} tokens");
            SameBits(Pick(full.LogSumExp), Device.Get(logSumExp), "logSumExp");

            float[] Pick(float[] all)
            {
                int columns = all.Length / lengths.Sum();
                return [.. rows.SelectMany(row => all.AsSpan(row * columns, columns).ToArray())];
            }
        }

        Assert.Equal(lengths, done);
    }

    // Heads one after the other, in each of them groups of 32 channels.
    private static float[] Rounded(float[] rows, int headDim, DType type)
    {
        float[] rounded = [.. rows];
        for (int head = 0; head < rows.Length; head += headDim)
        {
            for (int first = 0; first < headDim; first += 32)
            {
                Span<float> group = rounded.AsSpan(head + first, Math.Min(32, headDim - first));
                float scale = (float)(Half)(group.ToArray().Max(Math.Abs) / 127);
                foreach (ref float value in group)
                {
                    value = type switch
                    {
                        DType.F32 => value,
                        DType.F16 => (float)(Half)value,
                        _ => Math.Clamp(MathF.Round(value * (1 / scale)), -127, 127) * scale,
                    };
                }
            }
        }

        return rounded;
    }
}

public sealed class AttentionOn512() : Fp32AttentionTests(CpuPath.Vector512);

public sealed class AttentionOn256() : Fp32AttentionTests(CpuPath.Vector256);

public sealed class AttentionOn128() : Fp32AttentionTests(CpuPath.Vector128);

public sealed class AttentionOnScalar() : Fp32AttentionTests(CpuPath.Scalar);

/// <summary>By the tiles of AMX, or what stands for them.</summary>
public sealed class AttentionOnAmx() : AttentionTests(CpuPath.Vector512Amx)
{
    private protected override CpuBackend Open(int threads) => AmxTile.Fault is null
        ? CpuBackend.Create(threads, Path, DType.BF16)
        : new CpuBackend<Lanes512, AmxPairTile>(Path, threads);

    // Scores of some units, rounded to 8 bits, move single probabilities by more than a percent: all together they are as far off as the operands.
    private protected override void Near(double[] expected, float[] actual, double tolerance, string what)
    {
        double error = Math.Sqrt(expected.Zip(actual, (e, a) => (e - a) * (e - a)).Average());
        Assert.InRange(error, 0, 1e-3 + (2.0 / 256 * Math.Sqrt(expected.Average(e => e * e))));
    }
}
