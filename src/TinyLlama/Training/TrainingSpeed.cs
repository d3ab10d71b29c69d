using System.Diagnostics;
using TinyLlama.Compute;
using TinyLlama.Model;

namespace TinyLlama.Training;

/// <summary>Trains a shape on random tokens, only to see how fast this machine does it.</summary>
public sealed class TrainingSpeed : IDisposable
{
    private static readonly TimeSpan s_warmup = TimeSpan.FromSeconds(8);

    private readonly TrainingMemory _memory;
    private readonly TrainingStep _step;
    private long _steps;

    /// <summary>Allocates and initializes the model and one micro-batch.</summary>
    /// <param name="shape">The shape.</param>
    /// <param name="backend">The device.</param>
    /// <exception cref="DeviceException">The device has not that much memory.</exception>
    public TrainingSpeed(TrainingShape shape, Backend backend)
    {
        ArgumentNullException.ThrowIfNull(shape);
        _memory = TrainingMemory.Allocate(shape, backend);
        _step = new TrainingStep(_memory, backend);
        Initialization.Initialize(_memory.Model, backend, InitializationScheme.TinyLlama, seed: 0);
        var random = new Random(0);
        int[] tokens = new int[shape.Sequences * shape.Context];
        int[] targets = new int[tokens.Length];
        for (int i = 0; i < tokens.Length; i++)
        {
            (tokens[i], targets[i]) = (random.Next(shape.Model.VocabularySize), random.Next(shape.Model.VocabularySize));
        }

        _memory.Batch.Fill(backend, tokens, targets);
    }

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
        using var training = new TrainingSpeed(shape, backend);
        var times = new List<TimeSpan>();
        long begin = Stopwatch.GetTimestamp();
        while (times.Count < Steps)
        {
            stop.ThrowIfCancellationRequested();
            long start = Stopwatch.GetTimestamp();
            training.Step();
            if (Stopwatch.GetElapsedTime(begin) > s_warmup)
            {
                times.Add(Stopwatch.GetElapsedTime(start));
            }
        }

        times.Sort();
        return times[Steps / 4];
    }

    /// <summary>One step of one micro-batch.</summary>
    public StepResult Step()
    {
        _step.Begin(_memory.Batch.Tokens.Rows);
        _step.Accumulate();
        return _step.End(++_steps, learningRate: 1e-4);
    }

    /// <inheritdoc/>
    public void Dispose() => _memory.Dispose();
}
