using System.Diagnostics;
using TinyLlama.Compute;
using TinyLlama.Model;

namespace TinyLlama.Training;

/// <summary>How fast this machine trains a shape, measured on random tokens.</summary>
public static class TrainingSpeed
{
    private static readonly TimeSpan s_warmup = TimeSpan.FromSeconds(8);

    /// <summary>
    /// Measures the time of a step of one micro-batch: the lower quartile of some, after seconds in which the JIT compiles what
    /// runs often a second time.
    /// </summary>
    /// <param name="shape">The shape.</param>
    /// <param name="backend">The device.</param>
    /// <param name="stop">Ends it between two steps.</param>
    public static TimeSpan Measure(TrainingShape shape, Backend backend, CancellationToken stop)
    {
        const int Steps = 16;
        using TrainingMemory memory = TrainingMemory.Allocate(shape, backend);
        Initialization.Initialize(memory.Model, backend, InitializationScheme.TinyLlama, seed: 0);
        var random = new Random(0);
        int[] tokens = new int[shape.Sequences * shape.Context];
        for (int i = 0; i < tokens.Length; i++)
        {
            tokens[i] = random.Next(shape.Model.VocabularySize);
        }

        memory.Batch.Fill(backend, tokens, tokens);
        var step = new TrainingStep(memory, backend);
        var times = new List<TimeSpan>();
        long begin = Stopwatch.GetTimestamp();
        for (int i = 1; times.Count < Steps; i++)
        {
            stop.ThrowIfCancellationRequested();
            long start = Stopwatch.GetTimestamp();
            step.Begin(tokens.Length);
            step.Accumulate();
            step.End(i, learningRate: 1e-4);
            if (Stopwatch.GetElapsedTime(begin) > s_warmup)
            {
                times.Add(Stopwatch.GetElapsedTime(start));
            }
        }

        times.Sort();
        return times[Steps / 4];
    }
}
