using TinyLlama.Checkpoints;
using TinyLlama.Compute;
using TinyLlama.Compute.Cpu;
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
/// <param name="Sharding">How ranks share the state; null for one rank.</param>
/// <param name="Snapshot">Whether there is room for a copy of what a checkpoint holds.</param>
public sealed record TrainingShape(
    ModelConfig Model, int Sequences, int Context, Keep Keep, AdamWSettings AdamW, DecayGroup Decay, RateFactors Rates,
    PackedForms Packed = PackedForms.Both, Sharding? Sharding = null, bool Snapshot = false);

/// <summary>
/// Everything that a training step touches, in arenas of declared lifetimes. Built over arenas that only count it is
/// the plan; built over memory of those sizes it is the run.
/// </summary>
public sealed class TrainingMemory : IDisposable
{
    private readonly ModelArenas _modelArenas;
    private readonly RunArenas _arenas;
    private readonly bool _isOnHost;

    private TrainingMemory(TrainingShape shape, Backend backend, Mesh? mesh, int rank, ModelArenas model, RunArenas arenas)
    {
        (_modelArenas, _arenas, _isOnHost) = (model, arenas, backend is CpuBackend);
        Sharding = shape.Sharding ?? Sharding.None;
        Mesh = mesh;
        Model = new LlamaModel(shape.Model, backend, model);
        Parameters = Sharding.Lanes == 1
            ? null
            : new ShardedParameters(Model, backend, Sharding, mesh, arenas.Shards, arenas.Communication);
        Model.Store = Parameters;
        IReadOnlyList<OwnedRows> owned = Parameters?.Owned ?? [.. Model.Units.Select(static unit => new OwnedRows(unit, 0, unit.Values, unit.Gradient))];
        Optimizer = new AdamWOptimizer(
            owned, Sharding.Lanes / Sharding.Shards, backend, arenas.OptimizerState, shape.AdamW, shape.Decay, shape.Rates);
        Workspace = new Workspace(
            arenas.Activations, arenas.ActivationGradients, backend, shape.Model, shape.Sequences * shape.Context, shape.Keep);
        Batch = new MicroBatch(arenas.Batch, shape.Sequences, shape.Context);
        Checkpoint = new CheckpointPart(
            backend, Model.Parameters,
            [.. Optimizer.Owned.Select(static piece => new MomentPiece(piece.Parameter.Name, piece.First, piece.FirstMoment, piece.SecondMoment))],
            rank, Sharding.Ranks, Sharding.Shards);
        Snapshot = shape.Snapshot ? Checkpoint.Snapshot(arenas.Snapshot) : null;
        LossSums = arenas.Batch.Take(1, Sharding.LanesOfRank, DType.F64);
        Scale = arenas.Batch.Take(1, 1);
    }

    /// <summary>Gets how ranks share the state.</summary>
    public Sharding Sharding { get; }

    /// <summary>Gets the ranks; null for one.</summary>
    public Mesh? Mesh { get; }

    /// <summary>Gets the parameters as ranks share them; null where one rank adds all micro-batches up in order.</summary>
    public ShardedParameters? Parameters { get; }

    /// <summary>Gets the model.</summary>
    public LlamaModel Model { get; }

    /// <summary>Gets the optimizer with its moments.</summary>
    public AdamWOptimizer Optimizer { get; }

    /// <summary>Gets what this rank writes of a checkpoint.</summary>
    public CheckpointPart Checkpoint { get; }

    /// <summary>Gets the room for a copy of it, in host memory; null where there is none.</summary>
    public CheckpointPart? Snapshot { get; }

    /// <summary>Gets the activations and their gradients.</summary>
    public Workspace Workspace { get; }

    /// <summary>Gets the tokens, targets and layout of a micro-batch.</summary>
    public MicroBatch Batch { get; }

    /// <summary>Gets the sums of token losses, (1, lanes of a rank) of F64.</summary>
    public Tensor LossSums { get; }

    /// <summary>Gets one over the targets of a step, (1, 1) of F32.</summary>
    public Tensor Scale { get; }

    /// <summary>Gets the device's arenas with the bytes taken from each; units that take turns share one name.</summary>
    public IReadOnlyList<(string Name, long Bytes)> Arenas =>
    [
        .. _modelArenas.All.Concat(_arenas.All).Concat(_isOnHost ? [_arenas.Snapshot] : []).GroupBy(static arena => arena.Name)
            .Select(static group => (group.Key, Bytes: group.Sum(static arena => arena.UsedBytes))).Where(static arena => arena.Bytes > 0),
    ];

    /// <summary>Counts the bytes of a run without allocating any.</summary>
    /// <param name="shape">The shape.</param>
    /// <param name="backend">The device.</param>
    /// <param name="rank">The rank; the first takes as much as any, but for the weights in a snapshot.</param>
    public static TrainingMemory Plan(TrainingShape shape, Backend backend, int rank = 0) =>
        new(shape, backend, mesh: null, rank, PlanModel(shape), RunArenas.Plan());

    /// <summary>Allocates a run. Parameters are zero until initialized or loaded.</summary>
    /// <param name="shape">The shape.</param>
    /// <param name="backend">The device.</param>
    /// <param name="mesh">The ranks that its sharding names; null for one.</param>
    /// <exception cref="DeviceException">The device has not that much memory.</exception>
    public static TrainingMemory Allocate(TrainingShape shape, Backend backend, Mesh? mesh = null)
    {
        int rank = mesh?.World.Rank ?? 0;
        using TrainingMemory plan = Plan(shape, backend, rank);
        var memory = new TrainingMemory(
            shape, backend, mesh, rank, ModelArenas.Allocate(backend, plan._modelArenas), RunArenas.Allocate(backend, plan._arenas));
        memory.Model.Prepare(memory.Workspace);
        return memory;
    }

    /// <summary>Fills all parameters, those that are shared between ranks too, and makes packed forms follow.</summary>
    /// <param name="fill">Fills the values of some parameters; called until all are filled.</param>
    public void Fill(Action<IReadOnlyList<Parameter>> fill)
    {
        ArgumentNullException.ThrowIfNull(fill);
        if (Parameters is null)
        {
            fill(Model.Parameters);
            Model.Pack();
        }
        else
        {
            Parameters.Fill(fill);
        }
    }

    /// <summary>Gets what the device keeps of the operations of a micro-batch.</summary>
    public Recording MicroStep { get; } = new();

    /// <inheritdoc/>
    public void Dispose()
    {
        MicroStep.Dispose();
        _modelArenas.Dispose();
        foreach (Arena arena in _arenas.All)
        {
            arena.Dispose();
        }

        _arenas.Snapshot.Dispose();
    }

    // A single rank is planned as ever: turns and subdivisions are for those that share.
    private static ModelArenas PlanModel(TrainingShape shape) => shape.Sharding is { Lanes: > 1 } sharding
        ? ModelArenas.PlanSharded(
            shape.Packed, sharding.Lanes, gradients: sharding.ReducesEachMicroBatch, weights: sharding.ShardsWeights)
        : ModelArenas.Plan(shape.Packed, trains: true);

    private sealed record RunArenas(
        Arena OptimizerState, Arena Shards, Arena Communication, Arena Activations, Arena ActivationGradients, Arena Batch,
        Arena Snapshot)
    {
        /// <summary>Gets those on the device.</summary>
        public IEnumerable<Arena> All => [OptimizerState, Shards, Communication, Activations, ActivationGradients, Batch];

        public static RunArenas Plan() => new(
            Arena.Plan("optimizer state"), Arena.Plan("shards and lanes"), Arena.Plan("communication"), Arena.Plan("activations"),
            Arena.Plan("activation gradients"), Arena.Plan("batch"), Arena.Plan("checkpoint snapshot"));

        public static RunArenas Allocate(Backend backend, RunArenas plan) => new(
            backend.AllocateAs(plan.OptimizerState), backend.AllocateAs(plan.Shards), backend.AllocateAs(plan.Communication),
            backend.AllocateAs(plan.Activations), backend.AllocateAs(plan.ActivationGradients), backend.AllocateAs(plan.Batch),
            Arena.OnHost(plan.Snapshot.Name, plan.Snapshot.UsedBytes));
    }
}
