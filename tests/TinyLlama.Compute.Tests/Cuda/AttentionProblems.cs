namespace TinyLlama.Compute.Tests.Cuda;

/// <summary>Problems of attention, solved by a GPU and by the CPU.</summary>
public abstract class AttentionProblems(bool deterministic = true) : CudaTests(deterministic)
{
    // Rounding to 8 bits has a relative error of 0.0011 in the mean square. Outputs and dValues carry two such errors, a weight's
    // and their own; dQuery and dKeys also those of the gradients of scores, whose terms cancel.
    protected const double Tolerance = 1.0 / 256;
    protected const double GradientTolerance = 1.0 / 128;

    /// <summary>What both gave, within what rounding to bfloat16 explains.</summary>
    protected static void Near(Result expected, Result actual)
    {
        Near(expected.Output, actual.Output, Tolerance, "output");
        Close(expected.LogSumExp, actual.LogSumExp, 1e-5, "logSumExp");
        Near(expected.DQuery, actual.DQuery, GradientTolerance, "dQuery");
        Near(expected.DKeys, actual.DKeys, GradientTolerance, "dKeys");
        Near(expected.DValues, actual.DValues, Tolerance, "dValues");
    }

    // The errors in the mean square are what rounding explains, and no single one stands out.
    protected static void Near(ReadOnlySpan<float> expected, ReadOnlySpan<float> actual, double tolerance, string what)
    {
        const double Nothing = 1e-5; // what should cancel to zero
        (double errors, double squares) = (0, 0);
        for (int i = 0; i < expected.Length; i++)
        {
            errors += Math.Pow((double)expected[i] - actual[i], 2);
            squares += Math.Pow(expected[i], 2);
        }

        (double error, double typical) = (Math.Sqrt(errors / expected.Length), Math.Sqrt(squares / expected.Length));
        Assert.True(error <= (tolerance * typical) + Nothing, $"{what}: an error of {error:E2} in the mean square, of values of {typical:E2}");
        for (int i = 0; i < expected.Length; i++)
        {
            double allowed = (10 * tolerance * (Math.Abs(expected[i]) + typical)) + Nothing;
            Assert.True(Math.Abs(expected[i] - actual[i]) <= allowed, $"{what}[{i}]: expected {expected[i]:R}, got {actual[i]:R}");
        }
    }

    protected static Span<float> Part(float[] all, int row, int count, int rows) => all.AsSpan(all.Length / rows * row, all.Length / rows * count);

    protected Problem Random(int[] lengths, int heads, int keyHeads, int headDim)
    {
        int tokens = lengths.Sum();
        return new Problem(
            lengths, heads, keyHeads, headDim, Normal(tokens * heads * headDim, 2), Normal(tokens * keyHeads * headDim),
            Normal(tokens * keyHeads * headDim), Normal(tokens * heads * headDim));
    }

    protected Result Run(Problem problem) => Run(this, problem);

    /// <summary>On the GPU of a test.</summary>
    protected static Result Run(AttentionProblems test, Problem problem)
    {
        Tensors t = new(test, problem);
        t.Run();
        return new Result(test.Get(t.Output), test.Get(t.LogSumExp), test.Get(t.DQuery), test.Get(t.DKeys), test.Get(t.DValues));
    }

    protected Result RunOnCpu(Problem p)
    {
        int n = p.Tokens, queries = p.Heads * p.HeadDim, columns = p.KeyHeads * p.HeadDim;
        Tensor query = OnCpu(n, queries, p.Query), keys = OnCpu(n, columns, p.Keys), values = OnCpu(n, columns, p.Values);
        Tensor output = OnCpu(n, queries, new float[n * queries]), logSumExp = OnCpu(n, p.Heads, new float[n * p.Heads]);
        Tensor delta = OnCpu(n, p.Heads, new float[n * p.Heads]), dQuery = OnCpu(n, queries, new float[n * queries]);
        Tensor dKeys = OnCpu(n, columns, new float[n * columns]), dValues = OnCpu(n, columns, new float[n * columns]);
        TokenLayout layout = Layout(Cpu, p.Segments());
        Cpu.Attention(output, logSumExp, query, keys, values, layout, p.HeadDim);
        Cpu.AttentionBackward(
            dQuery, dKeys, dValues, delta, OnCpu(n, queries, p.DOutput), output, logSumExp, query, keys, values, layout, p.HeadDim);
        return new Result(OfCpu(output), OfCpu(logSumExp), OfCpu(dQuery), OfCpu(dKeys), OfCpu(dValues));
    }

    protected sealed record Problem(
        int[] Lengths, int Heads, int KeyHeads, int HeadDim, float[] Query, float[] Keys, float[] Values, float[] DOutput)
    {
        public int Tokens => Lengths.Sum();

        public Segment[] Segments()
        {
            Segment[] segments = new Segment[Lengths.Length];
            for (int s = 0, row = 0; s < segments.Length; row += Lengths[s], s++)
            {
                segments[s] = new Segment(row, Lengths[s], 0, row);
            }

            return segments;
        }

        public Problem Rows(int first, int count) => this with
        {
            Lengths = [count],
            Query = [.. Part(Query, first, count, Tokens)],
            Keys = [.. Part(Keys, first, count, Tokens)],
            Values = [.. Part(Values, first, count, Tokens)],
            DOutput = [.. Part(DOutput, first, count, Tokens)],
        };
    }

    protected sealed record Result(float[] Output, float[] LogSumExp, float[] DQuery, float[] DKeys, float[] DValues)
    {
        public Result Rows(int first, int count, Problem p) => new(
            [.. Part(Output, first, count, p.Tokens)], [.. Part(LogSumExp, first, count, p.Tokens)],
            [.. Part(DQuery, first, count, p.Tokens)], [.. Part(DKeys, first, count, p.Tokens)],
            [.. Part(DValues, first, count, p.Tokens)]);
    }

    /// <summary>A problem on the GPU: heads as column ranges, as a fused projection leaves them.</summary>
    protected sealed class Tensors
    {
        private readonly Tensor _query, _keys, _values, _dOutput, _scratch;
        private readonly TokenLayout _layout;
        private readonly AttentionProblems _tests;
        private readonly int _headDim;

        public Tensors(AttentionProblems tests, Problem p)
        {
            (int tokens, int queryColumns, int keyColumns) = (p.Tokens, p.Heads * p.HeadDim, p.KeyHeads * p.HeadDim);
            (_tests, _headDim) = (tests, p.HeadDim);
            _query = tests.PutStrided(tokens, queryColumns, p.Query);
            _keys = tests.PutStrided(tokens, keyColumns, p.Keys);
            _values = tests.PutStrided(tokens, keyColumns, p.Values);
            _dOutput = tests.PutStrided(tokens, queryColumns, p.DOutput);
            _scratch = tests.Take(tokens, tests.Cuda.AttentionScratchColumns(p.Heads, p.HeadDim), DType.F32);
            Output = tests.Take(tokens, queryColumns);
            LogSumExp = tests.Take(tokens, p.Heads, DType.F32);
            DQuery = tests.PutStrided(tokens, queryColumns, new float[p.Query.Length]);
            DKeys = tests.PutStrided(tokens, keyColumns, new float[p.Keys.Length]);
            DValues = tests.PutStrided(tokens, keyColumns, new float[p.Keys.Length]);
            _layout = tests.Layout(tests.Cuda, p.Segments());
        }

        public Tensor Output { get; }

        public Tensor LogSumExp { get; }

        public Tensor DQuery { get; }

        public Tensor DKeys { get; }

        public Tensor DValues { get; }

        public void Run()
        {
            _tests.Cuda.Attention(Output, LogSumExp, _query, _keys, _values, _layout, _headDim);
            _tests.Cuda.AttentionBackward(
                DQuery, DKeys, DValues, _scratch, _dOutput, Output, LogSumExp, _query, _keys, _values, _layout, _headDim);
        }
    }
}
