using System.Diagnostics;
using TinyLlama.Compute;
using TinyLlama.Model;

namespace TinyLlama.Training;

/// <summary>How fast this machine trains a shape, measured on random tokens.</summary>
public static class TrainingSpeed
{
    /// <summary>Measures the time of a step of one micro-batch: the median of a few, after one that warms up.</summary>
    /// <param name="shape">The shape.</param>
    /// <param name="backend">The device.</param>
    /// <param name="stop">Ends it between two steps.</param>
    public static TimeSpan Measure(TrainingShape shape, Backend backend, CancellationToken stop)
    {
        const int Steps = 5;
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
        for (int i = 0; i <= Steps; i++)
        {
            stop.ThrowIfCancellationRequested();
            long start = Stopwatch.GetTimestamp();
            step.Begin(tokens.Length);
            step.Accumulate();
            step.End(i + 1, learningRate: 1e-4);
            times.Add(Stopwatch.GetElapsedTime(start));
        }

        times.RemoveAt(0);
        times.Sort();
        return times[Steps / 2];
    }
}
