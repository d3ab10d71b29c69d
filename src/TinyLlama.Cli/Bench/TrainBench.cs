using System.Diagnostics;
using TinyLlama.Compute;
using TinyLlama.Compute.Cpu;
using TinyLlama.Compute.Cuda;
using TinyLlama.Model;
using TinyLlama.Training;

namespace TinyLlama.Cli.Bench;

/// <summary>Training steps on random tokens, and where their time goes.</summary>
/// <param name="Model">What was trained.</param>
/// <param name="Step">The time of a step of one micro-batch.</param>
/// <param name="ProcessorSeconds">The processor time of a step, of all threads: what other programs disturb least.</param>
/// <param name="Steps">How many steps were run.</param>
/// <param name="PeakBytes">The most memory that the process held at any time; of a GPU, what the training holds of its memory.</param>
/// <param name="Ceiling">What the machine can do at best: the better of before and after.</param>
/// <param name="Operations">The step by operation, the longest first.</param>
internal sealed record TrainBench(
    BenchModel Model, Duration Step, double ProcessorSeconds, int Steps, long PeakBytes, Ceiling Ceiling,
    IReadOnlyList<Measurement> Operations)
{
    /// <summary>Gets the operations of a step by the formula of PaLM, which counts attention in full; see <see cref="Flops"/>.</summary>
    public double StepFlops => (double)Flops.PerToken(Model.Config, Model.Config.ContextLength) * Model.Tokens;

    /// <summary>Measures.</summary>
    /// <param name="device">The device.</param>
    /// <param name="model">What to train.</param>
    /// <param name="seconds">How long to measure.</param>
    /// <param name="stop">Ends it between two steps.</param>
    /// <exception cref="DeviceException">The device has too little memory.</exception>
    public static TrainBench Run(Backend device, BenchModel model, double seconds, CancellationToken stop)
    {
        var shape = new TrainingShape(
            model.Config, model.Sequences, model.Config.ContextLength, model.Keep,
            new AdamWSettings(Beta1: 0.9f, Beta2: 0.95f, Epsilon: 1e-8f, WeightDecay: 0.1f, MaxNorm: 1), DecayGroup.All, RateFactors.Same,
            model.Packed);
        var ceiling = Ceiling.Measure(device);
        long held = (device as CudaBackend)?.HeldBytes ?? 0;
        bool together = device is CpuBackend;
        using var backend = new TimedBackend(device) { Times = together };
        using var training = new TrainingSpeed(shape, backend);
        Duration step;
        double processorSeconds;
        int steps = 0;
        using (ProgressDisplay progress = ProgressDisplay.Start("bench", 0, "steps"))
        {
            (step, processorSeconds) = Duration.Measure(backend, seconds, Step, stop);
            if (!together)
            {
                backend.Times = true;
                Duration.Measure(backend, 0, Step, stop);
            }

            void Step() => progress.Report(++steps, $"loss {training.Step().Loss:0.000}");
        }

        OperationTimes[] times = backend.TakeTimes();
        using var process = Process.GetCurrentProcess();
        long peakBytes = device is CudaBackend gpu ? gpu.HeldBytes - held : process.PeakWorkingSet64;
        ceiling = ceiling.Better(Ceiling.Measure(device));
        Measurement[] operations =
        [
            .. times
                .Select(operation => new Measurement(model.NameOf(operation.Operation), operation, ceiling))
                .OrderByDescending(operation => operation.Time.Median),
        ];
        return new TrainBench(model, step, processorSeconds, steps, peakBytes, ceiling, operations);
    }
}
