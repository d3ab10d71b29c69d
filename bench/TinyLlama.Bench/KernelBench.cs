using System.Globalization;
using TinyLlama.Compute;
using TinyLlama.Compute.Cpu;

namespace TinyLlama.Bench;

/// <summary>
/// Every operation but the matrix products, at the shapes of model S (8 sequences of 256 tokens): time of one call and
/// of all calls in a training step, against its floor, the time that its bytes or its additions and multiplications
/// take at the ceilings measured in the same run. Bytes count each tensor as if it came from memory; what lies in a
/// cache may beat that.
/// </summary>
internal static class KernelBench
{
    private const int Sequences = 8;
    private const int Context = 256;
    private const int N = Sequences * Context;
    private const int C = 256;
    private const int H = 704;
    private const int V = 4096;
    private const int D = 32;
    private const int QueryHeads = 8;
    private const int KeyHeads = 2;
    private const int Layers = 6;
    private const int Parameters = (2 * V * C) + (Layers * ((C * 384) + (C * C) + (3 * C * H) + (2 * C))) + C;

    // Rows of logits that exist at a time.
    private const int LossRows = 256;

    public static int Run(string[] args)
    {
        double seconds = 0.3;
        List<int> threadCounts = [1, Environment.ProcessorCount];
        string filter = "";
        for (int i = 0; i + 1 < args.Length; i += 2)
        {
            switch (args[i])
            {
                case "--seconds":
                    seconds = double.Parse(args[i + 1], CultureInfo.InvariantCulture);
                    break;
                case "--threads":
                    threadCounts = [.. args[i + 1].Split(',').Select(int.Parse)];
                    break;
                case "--kernels":
                    filter = args[i + 1];
                    break;
                default:
                    Console.Error.WriteLine($"no option {args[i]}");
                    return 2;
            }
        }

        foreach (int threads in threadCounts)
        {
            using CpuBackend backend = CpuBackend.Create(threads);
            CpuCeiling ceiling = CpuCeiling.Measure(backend);
            Console.WriteLine(string.Create(
                CultureInfo.InvariantCulture,
                $"\n{backend.Description}: ceiling {ceiling.AllThreads:F1} GFLOP/s, memory read {ceiling.AllThreadsRead:F1} GB/s"));
            Console.WriteLine("                        µs best (median)     GB/s  GFLOP/s   floor µs  share   calls  ms a step");
            using Arena arena = backend.Allocate("bench", 400L << 20);
            double step = 0;
            foreach (Kernel kernel in Kernels(backend, arena))
            {
                if (!kernel.Name.Contains(filter, StringComparison.Ordinal))
                {
                    continue;
                }

                (double best, double median) = Timing.Of(seconds, kernel.Run);
                double floor = Math.Max(kernel.Bytes / (ceiling.AllThreadsRead * 1e9), kernel.Operations / (ceiling.AllThreads * 1e9));
                step += best * kernel.Calls;
                Console.WriteLine(string.Create(
                    CultureInfo.InvariantCulture,
                    $"{kernel.Name,-20} {best * 1e6,10:F0} ({median * 1e6,8:F0}) {kernel.Bytes / best * 1e-9,8:F1} {kernel.Operations / best * 1e-9,8:F1} {floor * 1e6,10:F0} {floor / best,6:P0} {kernel.Calls,7} {best * kernel.Calls * 1e3,10:F2}"));
            }

            Console.WriteLine(string.Create(CultureInfo.InvariantCulture, $"all calls of a step of {N} tokens: {step * 1e3:F1} ms"));
        }

        return 0;
    }

    private static IEnumerable<Kernel> Kernels(Backend backend, Arena arena)
    {
        Random random = new(1);
        Tensor Take(int rows, int columns, double deviation = 1)
        {
            Tensor tensor = arena.Take(rows, columns);
            foreach (ref float element in tensor.HostSpan<float>())
            {
                element = (float)((random.NextDouble() - 0.5) * 3.5 * deviation);
            }

            return tensor;
        }

        Tensor x = Take(N, C), y = Take(N, C), dx = Take(N, C), weight = Take(1, C), dWeight = Take(1, C), r = Take(N, 1);
        yield return new("RmsNorm", 1, 8L * N * C, 0, () => backend.RmsNorm(y, r, x, weight, 1e-5f));
        yield return new("AddRmsNorm", 2 * Layers, 16L * N * C, 0, () => backend.AddRmsNorm(dx, y, r, x, y, weight, 1e-5f));
        yield return new("RmsNormBackward", (2 * Layers) + 1, 16L * N * C, 0, () => backend.RmsNormBackward(dx, dWeight, y, x, weight, r));

        Tensor gateUp = Take(N, 2 * H), dGateUp = Take(N, 2 * H), hidden = Take(N, H);
        yield return new("SwiGlu", Layers, 12L * N * H, 0, () => backend.SwiGlu(hidden, gateUp));
        yield return new("SwiGluBackward", Layers, 20L * N * H, 0, () => backend.SwiGluBackward(dGateUp, hidden, gateUp));

        TokenLayout layout = new(arena, N, Sequences);
        Segment[] segments = [.. Enumerable.Range(0, Sequences).Select(s => new Segment(s * Context, Context, 0, s * Context))];
        layout.Set(backend, segments);
        Tensor qkv = Take(N, (QueryHeads + (2 * KeyHeads)) * D), dQkv = Take(N, (QueryHeads + (2 * KeyHeads)) * D);
        Tensor query = qkv.ColumnRange(0, C), keys = qkv.ColumnRange(C, KeyHeads * D), values = qkv.ColumnRange(C + (KeyHeads * D), KeyHeads * D);
        Tensor dQuery = dQkv.ColumnRange(0, C), dKeys = dQkv.ColumnRange(C, KeyHeads * D), dValues = dQkv.ColumnRange(C + (KeyHeads * D), KeyHeads * D);
        Tensor table = Take(Context, D), logSumExp = Take(N, QueryHeads), delta = Take(N, QueryHeads);
        Tensor rotated = qkv.ColumnRange(0, C + (KeyHeads * D));
        yield return new("Rope", 2 * Layers, 8L * N * rotated.Columns, 0, () => backend.Rope(rotated, layout.Positions, table));
        foreach (ref float element in qkv.HostSpan<float>())
        {
            element = (float)(random.NextDouble() - 0.5);
        }

        long pairs = (long)Sequences * QueryHeads * Context * (Context + 1) / 2;
        yield return new(
            "Attention", Layers, 0, 4 * D * pairs, () => backend.Attention(y, logSumExp, query, keys, values, layout, D));
        yield return new(
            "AttentionBackward", Layers, 0, 10 * D * pairs,
            () => backend.AttentionBackward(dQuery, dKeys, dValues, delta, dx, y, logSumExp, query, keys, values, layout, D));

        Tensor logits = Take(LossRows, V), losses = Take(LossRows, 1), scale = Take(1, 1), total = arena.Take(1, 1, DType.F64);
        Tensor tokens = arena.Take(N, 1, DType.I32);
        foreach (ref int token in tokens.HostSpan<int>())
        {
            token = random.Next(V);
        }

        Tensor targets = tokens.RowRange(0, LossRows);
        yield return new("CrossEntropy", N / LossRows, 8L * LossRows * V, 0, () => backend.CrossEntropy(losses, logits, targets, scale));

        Tensor embedding = Take(V, C), dEmbedding = Take(V, C);
        yield return new("Embedding", 1, 8L * N * C, 0, () => backend.Embedding(y, embedding, tokens));
        yield return new("EmbeddingBackward", 1, 12L * N * C, 0, () => backend.EmbeddingBackward(dEmbedding, y, tokens));

        Tensor p = Take(1, Parameters, 0.1), m = arena.Take(1, Parameters), v2 = arena.Take(1, Parameters), g = Take(1, Parameters, 1e-3);
        Tensor[] gradients = [g];
        Tensor partials = arena.Take(1, Backend.SumOfSquaresPartials(gradients), DType.F64), step = arena.Take(1, 3);
        backend.Write<float>(step, [1e-6f, 0.5f, 0.5f]);
        yield return new("SumOfSquares", 1, 4L * Parameters, 0, () => backend.SumOfSquares(total, partials, gradients));
        AdamWSettings settings = new(0.9f, 0.95f, 1e-8f, 0.1f, 1);
        yield return new("AdamW", 1, 32L * Parameters, 0, () => backend.AdamW(p, m, v2, g, step, total, settings));
        yield return new("Zero", 0, 4L * Parameters, 0, () => backend.Zero(g));

        Tensor half = arena.Take(1, Parameters, DType.BF16), narrow = arena.Take(1, Parameters, DType.F16);
        yield return new("Copy to BF16", 0, 6L * Parameters, 0, () => backend.Copy(half, p));
        yield return new("Copy from BF16", 0, 6L * Parameters, 0, () => backend.Copy(p, half));
        yield return new("Copy to F16", 0, 6L * Parameters, 0, () => backend.Copy(narrow, p));
    }

    private sealed record Kernel(string Name, int Calls, long Bytes, long Operations, Action Run);
}
