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

/// <summary>What a micro-batch needs between its forward and its backward.</summary>
/// <param name="Workspace">Its activations; their gradients are there for one micro-batch at a time.</param>
/// <param name="Batch">Its tokens, targets and layout.</param>
public sealed record MicroStep(Workspace Workspace, MicroBatch Batch);

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
        WholeUnits = shape.Model.Layers + (shape.Model.TiedEmbeddings ? 1 : 2);
        ModelConfig part = Sharding.PartOf(shape.Model, rank);
        Model = new LlamaModel(part, backend, model);
        if (Sharding.Pipeline > 1)
        {
            Model.Stages = new StageGroup(mesh?.Pipeline, arenas.Communication);
        }

        if (Sharding.Tensor > 1)
        {
            Split = new TensorGroup(mesh?.Tensor, backend, arenas.Communication, Model, shape.Sequences * shape.Context);
            Model.Join(Split);
        }

        Parameters = Sharding.Lanes == 1
            ? null
            : new ShardedParameters(Model, backend, Sharding, mesh, rank, arenas.Shards, arenas.Communication);
        Model.Store = Parameters;
        IReadOnlyList<OwnedRows> owned = Parameters?.Owned ?? [.. Model.Units.Select(static unit => new OwnedRows(unit, 0, unit.Values, unit.Gradient))];
        Optimizer = new AdamWOptimizer(
            owned, Sharding.Lanes / Sharding.Shards, Sharding.TensorRankOf(rank) == 0, backend, arenas.OptimizerState, shape.AdamW,
            shape.Decay, shape.Rates);
        UnderWay = [.. Enumerable.Range(0, Sharding.Pipeline - Sharding.PipelineStageOf(rank)).Select(_ => TakeMicroStep(shape, part, backend))];
        Checkpoint = new CheckpointPart(
            backend, WholeParameters(shape.Model, backend), [.. Optimizer.Owned.Select(piece => SavedPiece(piece, rank))],
            rank, Sharding.Ranks, Sharding.Shards * Sharding.ModelRanks);
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

    /// <summary>Gets the number of units of the whole model.</summary>
    public int WholeUnits { get; }

    /// <summary>Gets the place among these of the first one that this rank has.</summary>
    public int FirstUnit => Model.Config.HasEmbedding ? 0 : 1 + Model.Config.FirstLayer;

    /// <summary>Gets the ranks that split blocks; null where blocks are whole.</summary>
    public TensorGroup? Split { get; }

    /// <summary>Gets what is kept of the micro-batches between their forward and their backward: one, or those of a pipeline's stage.</summary>
    public IReadOnlyList<MicroStep> UnderWay { get; }

    /// <summary>Gets the activations and their gradients.</summary>
    public Workspace Workspace => UnderWay[0].Workspace;

    /// <summary>Gets the tokens, targets and layout of a micro-batch.</summary>
    public MicroBatch Batch => UnderWay[0].Batch;

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

    /// <summary>The bytes of each arena of the rank that takes the most: one of the fullest stage, where there are stages.</summary>
    /// <param name="shape">The shape.</param>
    /// <param name="backend">The device.</param>
    public static IReadOnlyList<(string Name, long Bytes)> PlanFullest(TrainingShape shape, Backend backend)
    {
        Sharding sharding = shape.Sharding ?? Sharding.None;
        return Enumerable.Range(0, sharding.Pipeline).Select(stage =>
        {
            using TrainingMemory plan = Plan(shape, backend, stage * sharding.Tensor);
            return plan.Arenas;
        }).MaxBy(static arenas => arenas.Sum(static arena => arena.Bytes))!;
    }

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
        foreach (MicroStep step in memory.UnderWay)
        {
            memory.Model.Prepare(step.Workspace);
        }

        return memory;
    }

    /// <summary>Fills all parameters, those that are shared between ranks too, and makes packed forms follow.</summary>
    /// <param name="fill">Fills the values of some whole parameters; called until all are filled.</param>
    public void Fill(Action<IReadOnlyList<Parameter>> fill)
    {
        ArgumentNullException.ThrowIfNull(fill);
        if (Parameters is null)
        {
            FillParts(Model.Parameters);
            Model.Pack();
        }
        else
        {
            Parameters.Fill(FillParts);
        }

        void FillParts(IReadOnlyList<Parameter> parameters)
        {
            if (Split is null)
            {
                fill(parameters);
                return;
            }

            foreach (Parameter parameter in parameters)
            {
                Split.Fill(parameter, parameter.Values, whole => fill([new Parameter(parameter.Name, whole, default)]));
            }
        }
    }

    /// <summary>Gets what the device keeps of the operations of a micro-batch.</summary>
    public Recording Recording { get; } = new();

    /// <inheritdoc/>
    public void Dispose()
    {
        Recording.Dispose();
        _modelArenas.Dispose();
        foreach (Arena arena in _arenas.All)
        {
            arena.Dispose();
        }

        _arenas.Snapshot.Dispose();
    }

    private MicroStep TakeMicroStep(TrainingShape shape, ModelConfig part, Backend backend)
    {
        _arenas.ActivationGradients.Rewind();
        return new MicroStep(
            new Workspace(_arenas.Activations, _arenas.ActivationGradients, backend, part, shape.Sequences * shape.Context, shape.Keep),
            new MicroBatch(_arenas.Batch, shape.Sequences, shape.Context));
    }

    // Of several ranks that split a model only the shapes of whole parameters count.
    private IReadOnlyList<Parameter> WholeParameters(ModelConfig model, Backend backend) => Sharding.ModelRanks == 1
        ? Model.Parameters
        : new LlamaModel(model, backend, ModelArenas.Plan(PackedForms.None, trains: false)).Parameters;

    // Ranks that split blocks write the moments of each parameter in equal ranges of the whole, also of one that all of them have.
    private MomentPiece SavedPiece(OwnedPiece piece, int rank)
    {
        int count = (int)piece.FirstMoment.Count / (TensorGroup.IsShared(piece.Parameter.Name) ? Sharding.Tensor : 1);
        return new MomentPiece(
            piece.Parameter.Name, piece.First + ((long)Sharding.TensorRankOf(rank) * count), piece.FirstMoment.Elements(0, count),
            piece.SecondMoment.Elements(0, count));
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
