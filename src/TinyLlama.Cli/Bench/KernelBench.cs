using TinyLlama.Compute;
using TinyLlama.Model;

namespace TinyLlama.Cli.Bench;

/// <summary>Every operation of a training step but the matrix products, at the shapes of a model's micro-batch.</summary>
internal static class KernelBench
{
    // Larger than a cache, small enough for any machine.
    private const long MostParameters = 1 << 25;

    private const int MostLossRows = 1024;

    /// <summary>Measures each operation alone.</summary>
    public static void Run(OperationBench bench, BenchModel model)
    {
        Arena plan = Arena.Plan("bench");
        _ = Calls(bench.Timed, plan, model);
        using Arena arena = bench.Timed.AllocateAs(plan);
        foreach ((string name, Action call) in Calls(bench.Timed, arena, model))
        {
            bench.Measure(name, call);
        }
    }

    // Every call can follow itself any number of times: none drives its operands out of the range of normal numbers,
    // outside of which processors are slow.
    private static List<(string Name, Action Call)> Calls(Backend b, Arena arena, BenchModel model)
    {
        ModelConfig config = model.Config;
        (int n, int c, int d, int t) = (model.Tokens, config.Channels, config.HeadDim, config.ContextLength);
        DType type = b.ActivationType;
        List<(string, Action)> calls = [];

        Tensor tokens = arena.Take(n, 1, DType.I32), table = arena.TakeRandom(b, config.VocabularySize, c), dTable = arena.Take(config.VocabularySize, c);
        Tensor x = arena.TakeRandom(b, n, c, type), y = arena.TakeRandom(b, n, c, type), dx = arena.TakeRandom(b, n, c, type), sum = arena.Take(n, c, type);
        Tensor norm = arena.TakeRandom(b, 1, c), dNorm = arena.Take(1, c), r = arena.Take(n, 1);
        calls.Add(("Embedding", () => b.Embedding(y, table, tokens)));
        calls.Add(("EmbeddingBackward", () => b.EmbeddingBackward(dTable, y, tokens)));
        calls.Add(("RmsNorm", () => b.RmsNorm(y, r, x, norm, config.NormEpsilon)));
        calls.Add(("AddRmsNorm", () => b.AddRmsNorm(sum, y, r, x, dx, norm, config.NormEpsilon)));
        calls.Add(("RmsNormBackward", () => b.RmsNormBackward(dx, dNorm, y, x, norm, r)));

        var layout = new TokenLayout(arena, n, model.Sequences);
        Tensor qkv = arena.TakeRandom(b, n, c + (2 * config.KeyValueChannels), type), dQkv = arena.Take(n, qkv.Columns, type), rope = arena.Take(t, d);
        (Tensor query, Tensor keys, Tensor values) = Split(qkv, config);
        (Tensor dQuery, Tensor dKeys, Tensor dValues) = Split(dQkv, config);
        Tensor rotated = qkv.ColumnRange(0, c + config.KeyValueChannels), logSumExp = arena.Take(n, config.Heads), scratch = arena.Take(n, b.AttentionScratchColumns(config.Heads, d));
        calls.Add(("Rope", () => b.Rope(rotated, layout.Positions, rope)));
        calls.Add(("Attention", () => b.Attention(y, logSumExp, query, keys, values, layout, d)));
        calls.Add((
            "AttentionBackward",
            () => b.AttentionBackward(dQuery, dKeys, dValues, scratch, x, y, logSumExp, query, keys, values, layout, d)));

        Tensor gateUp = arena.TakeRandom(b, n, 2 * config.Hidden, type), dGateUp = arena.Take(n, 2 * config.Hidden, type);
        Tensor gated = arena.TakeRandom(b, n, config.Hidden, type);
        calls.Add(("SwiGlu", () => b.SwiGlu(gated, gateUp)));
        calls.Add(("SwiGluBackward", () => b.SwiGluBackward(dGateUp, gated, gateUp)));

        int rows = Math.Min(n, MostLossRows);
        Tensor logits = arena.TakeRandom(b, rows, config.VocabularySize, type), losses = arena.Take(rows, 1), scale = arena.TakeRandom(b, 1, 1);
        calls.Add(("CrossEntropy", () => b.CrossEntropy(losses, logits, tokens.RowRange(0, rows), scale)));

        int count = (int)Math.Min(config.ParameterCount, MostParameters);
        Tensor p = arena.TakeRandom(b, 1, count), first = arena.Take(1, count), second = arena.Take(1, count), gradient = arena.TakeRandom(b, 1, count);
        Tensor[] gradients = [gradient];
        Tensor total = arena.Take(1, 1, DType.F64), partials = arena.Take(1, Backend.SumOfSquaresPartials(gradients), DType.F64), step = arena.TakeRandom(b, 1, 3);
        var settings = new AdamWSettings(Beta1: 1, Beta2: 1, Epsilon: 1e-8f, WeightDecay: 0, MaxNorm: 1);
        calls.Add(("SumOfSquares", () => b.SumOfSquares(total, partials, gradients)));
        calls.Add(("AdamW", () => b.AdamW(p, first, second, gradient, step, total, settings)));
        calls.Add(("Zero", () => b.Zero(gradient)));

        Tensor bf16 = arena.Take(1, count, DType.BF16), f16 = arena.Take(1, count, DType.F16);
        calls.Add(("Copy to BF16", () => b.Copy(bf16, p)));
        calls.Add(("Copy from BF16", () => b.Copy(p, bf16)));
        calls.Add(("Copy to F16", () => b.Copy(f16, p)));

        if (!arena.IsPlan)
        {
            var random = new Random(1);
            b.Write<int>(tokens, [.. Enumerable.Range(0, n).Select(_ => random.Next(config.VocabularySize))]);
            layout.Set(b, [.. Enumerable.Range(0, model.Sequences).Select(s => new Segment(s * t, t, 0, s * t))]);
            b.Write<float>(rope, [.. Enumerable.Range(0, t * d).Select(i => i % d < d / 2 ? 1f : 0f)]);
            b.Attention(y, logSumExp, query, keys, values, layout, d);
        }

        return calls;
    }

    private static (Tensor Query, Tensor Keys, Tensor Values) Split(Tensor qkv, ModelConfig config) => (
        qkv.ColumnRange(0, config.Channels),
        qkv.ColumnRange(config.Channels, config.KeyValueChannels),
        qkv.ColumnRange(config.Channels + config.KeyValueChannels, config.KeyValueChannels));
}
