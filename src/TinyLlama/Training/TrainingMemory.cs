using TinyLlama.Compute;
using TinyLlama.Model;

namespace TinyLlama.Training;

/// <summary>What decides how much memory a training run takes, and nothing else does.</summary>
/// <param name="Model">The model's shape.</param>
/// <param name="Sequences">Sequences of a micro-batch.</param>
/// <param name="Context">Tokens of a sequence (T).</param>
/// <param name="Keep">Which activations stay for backward.</param>
/// <param name="AdamW">The optimizer's constants.</param>
/// <param name="Decay">Which parameters decay.</param>
/// <param name="Rates">Learning rates of the tables.</param>
/// <param name="Packed">Which packed forms of the weights are kept.</param>
public sealed record TrainingShape(
    ModelConfig Model, int Sequences, int Context, Keep Keep, AdamWSettings AdamW, DecayGroup Decay, RateFactors Rates,
    PackedForms Packed = PackedForms.Both);

/// <summary>
/// Everything that a training step touches, in arenas of declared lifetimes. Built over arenas that only count it is
/// the plan; built over memory of those sizes it is the run.
/// </summary>
public sealed class TrainingMemory : IDisposable
{
    private readonly ModelArenas _modelArenas;
    private readonly Arena _optimizerState;
    private readonly Arena _activations;
    private readonly Arena _activationGradients;
    private readonly Arena _batch;

    private TrainingMemory(
        TrainingShape shape, Backend backend, ModelArenas model, Arena optimizerState, Arena activations, Arena activationGradients, Arena batch)
    {
        (_modelArenas, _optimizerState, _activations, _activationGradients, _batch) =
            (model, optimizerState, activations, activationGradients, batch);
        Model = new LlamaModel(shape.Model, backend, model);
        Optimizer = new AdamWOptimizer(Model, backend, optimizerState, shape.AdamW, shape.Decay, shape.Rates);
        Workspace = new Workspace(activations, activationGradients, backend, shape.Model, shape.Sequences * shape.Context, shape.Keep);
        Batch = new MicroBatch(batch, shape.Sequences, shape.Context);
        LossSum = batch.Take(1, 1, DType.F64);
        Scale = batch.Take(1, 1);
    }

    /// <summary>Gets the model.</summary>
    public LlamaModel Model { get; }

    /// <summary>Gets the optimizer with its moments.</summary>
    public AdamWOptimizer Optimizer { get; }

    /// <summary>Gets the activations and their gradients.</summary>
    public Workspace Workspace { get; }

    /// <summary>Gets the tokens, targets and layout of a micro-batch.</summary>
    public MicroBatch Batch { get; }

    /// <summary>Gets the sum of token losses, (1, 1) of F64.</summary>
    public Tensor LossSum { get; }

    /// <summary>Gets one over the targets of a step, (1, 1) of F32.</summary>
    public Tensor Scale { get; }

    /// <summary>Gets the arenas with the bytes taken from each.</summary>
    public IReadOnlyList<(string Name, long Bytes)> Arenas =>
    [
        .. new[] { _modelArenas.Weights, _modelArenas.Packed, _modelArenas.Gradients, _optimizerState, _activations, _activationGradients, _batch }
            .OfType<Arena>().Select(arena => (arena.Name, arena.UsedBytes)),
    ];

    /// <summary>Counts the bytes of a run without allocating any.</summary>
    public static TrainingMemory Plan(TrainingShape shape, Backend backend) => new(
        shape, backend, ModelArenas.Plan(shape.Packed, trains: true), Arena.Plan("optimizer state"),
        Arena.Plan("activations"), Arena.Plan("activation gradients"), Arena.Plan("batch"));

    /// <summary>Allocates a run. Parameters are zero until initialized or loaded.</summary>
    /// <exception cref="DeviceException">The device has not that much memory.</exception>
    public static TrainingMemory Allocate(TrainingShape shape, Backend backend)
    {
        using TrainingMemory plan = Plan(shape, backend);
        var memory = new TrainingMemory(
            shape, backend, ModelArenas.Allocate(backend, plan._modelArenas), backend.AllocateAs(plan._optimizerState),
            backend.AllocateAs(plan._activations), backend.AllocateAs(plan._activationGradients), backend.AllocateAs(plan._batch));
        memory.Model.Prepare(memory.Workspace);
        return memory;
    }

    /// <summary>Gets what the device keeps of the operations of a micro-batch.</summary>
    public Recording MicroStep { get; } = new();

    /// <inheritdoc/>
    public void Dispose()
    {
        MicroStep.Dispose();
        _modelArenas.Dispose();
        _optimizerState.Dispose();
        _activations.Dispose();
        _activationGradients.Dispose();
        _batch.Dispose();
    }
}
