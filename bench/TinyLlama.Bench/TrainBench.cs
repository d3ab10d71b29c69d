using System.Diagnostics;
using TinyLlama.Compute;
using TinyLlama.Compute.Cpu;
using TinyLlama.Model;
using TinyLlama.Training;

namespace TinyLlama.Bench;

/// <summary>Tokens per second of training model S on random tokens, and its share of the instruction ceiling.</summary>
internal static class TrainBench
{
    public static int Run(string[] args)
    {
        int seconds = args.Length > 0 ? int.Parse(args[0]) : 20;
        var config = new ModelConfig
        {
            VocabularySize = 4096,
            ContextLength = 256,
            Layers = 6,
            Heads = 8,
            KeyValueHeads = 2,
            Channels = 256,
            Hidden = 704,
        };
        var shape = new TrainingShape(config, 8, 256, Keep.Everything, new AdamWSettings(0.9f, 0.95f, 1e-8f, 0.1f, 1), DecayGroup.All, RateFactors.Same);
        using CpuBackend backend = CpuBackend.Create();
        using TrainingMemory memory = TrainingMemory.Allocate(shape, backend);
        Initialization.Initialize(memory.Model, backend, InitializationScheme.TinyLlama, seed: 1);
        var step = new TrainingStep(memory, backend);

        var random = new Random(1);
        int n = shape.Sequences * shape.Context;
        int[] tokens = [.. Enumerable.Range(0, n).Select(_ => random.Next(config.VocabularySize))];
        int[] targets = [.. Enumerable.Range(0, n).Select(_ => random.Next(config.VocabularySize))];
        memory.Batch.Fill(backend, tokens, targets);

        var times = new List<double>();
        var total = Stopwatch.StartNew();
        for (int s = 1; total.Elapsed.TotalSeconds < seconds || s < 6; s++)
        {
            long start = Stopwatch.GetTimestamp();
            step.Begin(n);
            step.Accumulate();
            StepResult result = step.End(s, 1e-3);
            times.Add(Stopwatch.GetElapsedTime(start).TotalSeconds);
            if (s % 10 == 1)
            {
                Console.WriteLine($"step {s}: {times[^1] * 1000:f0} ms, loss {result.Loss:f4}, norm {result.GradientNorm:f3}");
            }
        }

        times.Sort();
        double median = times[times.Count / 2];
        double flops = (double)Flops.PerToken(config, shape.Context) * n;
        double ceiling = CpuCeiling.Measure(backend).AllThreads * 1e9;
        Console.WriteLine($"{backend.Description}: best {times[0] * 1000:f0} ms, median {median * 1000:f0} ms, {n / median:f0} tokens/s median; "
            + $"{flops / times[0] / 1e9:f0} GFLOP/s best, {flops / median / 1e9:f0} median, of a ceiling of {ceiling / 1e9:f0}: "
            + $"{flops / times[0] / ceiling:p0} best, {flops / median / ceiling:p0} median");
        return 0;
    }
}
