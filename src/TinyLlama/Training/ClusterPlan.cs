using System.Globalization;
using System.Numerics;
using TinyLlama.Compute;
using TinyLlama.Compute.Cuda;
using TinyLlama.Data;
using TinyLlama.Model;

namespace TinyLlama.Training;

/// <summary>GPUs in nodes, and what is assumed of them.</summary>
/// <param name="Gpu">Their kind.</param>
/// <param name="Ranks">Their number, a power of two.</param>
/// <param name="PerNode">GPUs of a node, a power of two.</param>
/// <param name="Share">The share of the GPU's peak at which one alone trains. 0.56 is TinyLlama's on A100: 24,000 tokens/s.</param>
/// <param name="Wire">What gradients are rounded to between ranks.</param>
public sealed record Cluster(GpuModel Gpu, int Ranks, int PerNode, double Share = 0.56, DType Wire = DType.F32);

/// <summary>Seconds of one step.</summary>
/// <param name="Compute">Forward and backward of a rank's micro-batches, alone on its GPU.</param>
/// <param name="Links">Communication inside nodes.</param>
/// <param name="Network">Communication between nodes.</param>
/// <param name="Exposed">Communication that computing does not hide, and time in which stages of a pipeline wait for each other.</param>
/// <param name="Slowdown">By how much communication that is hidden slows computing.</param>
/// <param name="Optimizer">AdamW, at the rate of the memory.</param>
public readonly record struct ClusterStep(double Compute, double Links, double Network, double Exposed, double Slowdown, double Optimizer)
{
    /// <summary>Gets the whole step.</summary>
    public double Seconds => Compute + Exposed + Slowdown + Optimizer + ClusterPlan.FixedSeconds;

    /// <summary>Gets the share of the speed of as many GPUs that need not talk.</summary>
    public double Efficiency => Compute / Seconds;
}

/// <summary>What a run on many GPUs takes of each one's memory, and how long a step would take. Nothing is allocated or measured: both are arithmetic.</summary>
/// <remarks>
/// An operation among n ranks that moves b bytes takes (n-1)/n·b/rate + α·messages (Thakur et al. 2005). Its messages are n-1 for up
/// to 8 ranks, else 2·√n, for each unit: a block, the embedding, the head. All-gathers enter a node once; a reduce-scatter is an
/// all-to-all, so among all ranks each one's whole gradients cross the network, while one inside a node leaves a shard to do so.
/// No stragglers, no jitter: an upper bound, and real clusters lose 2 to 5 % more.
/// </remarks>
public sealed class ClusterPlan
{
    /// <summary>The share of the links' rate that collectives reach.</summary>
    public const double LinkShare = 2.0 / 3;

    /// <summary>The share of the memory's rate that AdamW reaches.</summary>
    public const double MemoryShare = 5.0 / 6;

    /// <summary>Seconds of a message inside a node (α).</summary>
    public const double LinkLatency = 10e-6;

    /// <summary>Seconds of a message between nodes (α).</summary>
    public const double NetworkLatency = 25e-6;

    /// <summary>The share of a forward or backward under which communication can hide.</summary>
    public const double HidingShare = 0.85;

    /// <summary>Seconds by which a second of hidden communication slows computing.</summary>
    public const double SlowdownShare = 0.06;

    /// <summary>Seconds of a step that are no part of anything else: norm, launches, the host.</summary>
    public const double FixedSeconds = 0.012;

    // AdamW reads and writes masters and moments, reads gradients and writes weights.
    private const int OptimizerBytes = 28;

    private readonly TrainingPlan _plan;

    /// <summary>Divides a run over GPUs.</summary>
    /// <param name="plan">The run.</param>
    /// <param name="cluster">The GPUs.</param>
    /// <exception cref="UserErrorException">They cannot divide a step's sequences.</exception>
    public ClusterPlan(TrainingPlan plan, Cluster cluster)
    {
        Sharding split = plan.Sharding;
        (int groups, int rest) = Math.DivRem(cluster.Ranks, split.ModelRanks);
        if (rest != 0 || !BitOperations.IsPow2(groups) || !BitOperations.IsPow2(cluster.PerNode) || plan.SequencesPerStep % groups != 0)
        {
            string both = split.ModelRanks == 1
                ? "both must be powers of two and divide"
                : Invariant($"tensor {split.Tensor:N0} × pipeline {split.Pipeline:N0} of them have a model between them, and the number of such groups must be a power of two and divide");
            throw new UserErrorException(Invariant(
                $"{cluster.Ranks:N0} GPUs, {cluster.PerNode:N0} a node: {both} the {plan.SequencesPerStep:N0} sequences of a step; change them or {plan.Recipe.Origins.Describe("batch.global_tokens")}"));
        }

        (_plan, Cluster) = (plan, cluster with { PerNode = Math.Min(cluster.PerNode, cluster.Ranks) });
        long sequences = plan.SequencesPerStep / groups;
        Sequences = (int)BigInteger.GreatestCommonDivisor(plan.SequencesPerMicroBatch, sequences);
        MicroBatches = (int)(sequences / Sequences);
        using Backend backend = CudaBackend.Plan(cluster.Gpu.MemoryBytes, plan.Recipe.Deterministic);
        AvailableBytes = backend.AvailableBytes;
    }

    /// <summary>Gets the GPUs.</summary>
    public Cluster Cluster { get; }

    /// <summary>Gets the sequences of a micro-batch: the recipe's, or the most of them that divide a rank's part of a step.</summary>
    public int Sequences { get; }

    /// <summary>Gets the micro-batches of one rank in a step.</summary>
    public int MicroBatches { get; }

    /// <summary>Gets what recipes call the activations that stay.</summary>
    public string Recompute => RecipeKeys.Name(_plan.Recipe.Keep);

    /// <summary>Gets the tokens of one rank in a step: of all that have one model between them the same.</summary>
    public long TokensPerRank => (long)MicroBatches * Sequences * _plan.ContextLength;

    /// <summary>Gets the tokens/s at which one GPU alone trains.</summary>
    public double TokensPerSecond => Cluster.Share * Cluster.Gpu.PeakFlops / _plan.FlopsPerToken;

    /// <summary>Gets the bytes of one GPU that a run may take.</summary>
    public long AvailableBytes { get; }

    /// <summary>Gets the units that are gathered and reduced by themselves: the blocks, the embedding, the head with the last norm.</summary>
    public int Units => _plan.Model.Layers + (_plan.Model.TiedEmbeddings ? 1 : 2);

    /// <summary>Gets the ways to divide: each stage of ZeRO inside nodes and over all GPUs, or the recipe's own where it splits the model.</summary>
    public IReadOnlyList<Sharding> Ways => _plan.Sharding is { ModelRanks: > 1 } split
        ? [split with { Ranks = Cluster.Ranks, Lanes = Cluster.Ranks / split.ModelRanks }]
        : [.. from stage in Enumerable.Range(1, 3)
              from shards in new[] { Cluster.PerNode, Cluster.Ranks }.Distinct()
              select new Sharding(Cluster.Ranks, shards, stage, stage == 1 ? Cluster.Ranks : Cluster.Ranks * MicroBatches, Cluster.Wire)];

    private double LinkRate => LinkShare * Cluster.Gpu.LinkRate;

    /// <summary>The bytes of each arena on one GPU: those that <see cref="TrainingMemory"/> would take there.</summary>
    public IReadOnlyList<(string Name, long Bytes)> Memory(Sharding way)
    {
        using Backend backend = CudaBackend.Plan(Cluster.Gpu.MemoryBytes, _plan.Recipe.Deterministic);
        return TrainingMemory.PlanFullest(_plan.Shape with { Sequences = Sequences, Sharding = way }, backend);
    }

    /// <summary>The time of a step.</summary>
    /// <param name="way">What is divided among how many.</param>
    /// <param name="networkRate">Bytes a second that one GPU's share of its node's network carries in one direction.</param>
    public ClusterStep Step(Sharding way, double networkRate)
    {
        double compute = TokensPerRank / (way.ModelRanks * TokensPerSecond);
        (double Links, double Network) between = BetweenParts(way, networkRate);
        (double Links, double Network) gather = Gather(way, networkRate);
        (double Links, double Network) reduce = Reduce(way, networkRate);
        (double Links, double Network) replicas = SumReplicas(way, networkRate);

        // In each micro-batch, once beside the first forward, and once beside the last backward.
        double forward = way.Stage == 3 ? gather.Links + gather.Network : 0;
        double firstForward = way.Stage == 3 ? 0 : gather.Links + gather.Network;
        double backward = forward + (way.ReducesEachMicroBatch ? reduce.Links + reduce.Network : 0);
        double lastBackward = (way.ReducesEachMicroBatch ? 0 : reduce.Links + reduce.Network) + replicas.Links + replicas.Network;
        double exposed = Exposed(forward, firstForward, compute / 3) + Exposed(backward, lastBackward, compute * 2 / 3);
        double total = (MicroBatches * (forward + backward)) + firstForward + lastBackward;

        int gathers = way.Stage == 3 ? 2 * MicroBatches : 1;
        int reductions = way.ReducesEachMicroBatch ? MicroBatches : 1;
        double parts = between.Links + between.Network;
        double waiting = (compute + parts) * (way.Pipeline - 1) / MicroBatches;
        return new ClusterStep(
            compute, (gathers * gather.Links) + (reductions * reduce.Links) + between.Links + replicas.Links,
            (gathers * gather.Network) + (reductions * reduce.Network) + between.Network + replicas.Network,
            exposed + parts + waiting, SlowdownShare * (total - exposed),
            ParametersOf(way) / way.Shards * OptimizerBytes / (MemoryShare * Cluster.Gpu.MemoryRate));
    }

    // The sums of split blocks and what passes between stages, in all micro-batches: computing waits for both.
    private (double Links, double Network) BetweenParts(Sharding way, double networkRate)
    {
        double bytes = (double)Sequences * _plan.ContextLength * _plan.Model.Channels * DType.BF16.ByteCount();
        int layers = (_plan.Model.Layers + way.Pipeline - 1) / way.Pipeline;

        // A sum is a reduce-scatter and an all-gather, each of so many messages of a part of it.
        int sums = 2 * (way.Tensor - 1) * layers * (_plan.Recipe.Keep == Keep.BlockInputs ? 5 : 4);
        int passes = way.Pipeline > 1 ? 2 : 0;
        double Inside(int messages, double size) => messages * ((size / LinkRate) + LinkLatency);
        double Outside(int messages, double size) => messages * ((size / networkRate) + NetworkLatency);
        bool splitInside = way.Tensor <= Cluster.PerNode, stagesInside = way.ModelRanks <= Cluster.PerNode;
        return (
            MicroBatches * ((splitInside ? Inside(sums, bytes / way.Tensor) : 0) + (stagesInside ? Inside(passes, bytes) : 0)),
            MicroBatches * ((splitInside ? 0 : Outside(sums, bytes / way.Tensor)) + (stagesInside ? 0 : Outside(passes, bytes))));
    }

    // All weights of a copy, first between nodes, then inside each.
    private (double Links, double Network) Gather(Sharding way, double networkRate)
    {
        double bytes = ParametersOf(way) * sizeof(float);
        int inside = Math.Min(way.Shards, Cluster.PerNode);
        int nodes = way.Shards / inside;
        return (Time(inside, bytes * (inside - 1) / inside, LinkRate, LinkLatency),
            Time(nodes, bytes / inside * (nodes - 1) / nodes, networkRate, NetworkLatency));
    }

    // An all-to-all of the gradients: what goes to another node goes through this rank's share of the network.
    private (double Links, double Network) Reduce(Sharding way, double networkRate)
    {
        double bytes = ParametersOf(way) * way.Wire.ByteCount();
        int inside = Math.Min(way.Shards, Cluster.PerNode);
        return (Time(inside, bytes * (inside - 1) / way.Shards, LinkRate, LinkLatency),
            Time(way.Shards / inside, bytes * (way.Shards - inside) / way.Shards, networkRate, NetworkLatency));
    }

    // A shard of the gradients is reduced over the replicas, and gathered again.
    private (double Links, double Network) SumReplicas(Sharding way, double networkRate)
    {
        double bytes = ParametersOf(way) * sizeof(float) / way.Shards * (way.Replicas - 1) / way.Replicas;
        return Cluster.Ranks <= Cluster.PerNode
            ? (2 * Time(way.Replicas, bytes, LinkRate, LinkLatency), 0)
            : (0, 2 * Time(way.Replicas, bytes, networkRate, NetworkLatency));
    }

    // Those of a rank of the first stage, which has the embedding.
    private double ParametersOf(Sharding way) => way.PartOf(_plan.Model, 0).ParameterCount;

    private double Time(int ranks, double bytes, double rate, double latency) =>
        ranks == 1 ? 0 : (bytes / rate) + (latency * Units * (ranks <= 8 ? ranks - 1 : 2 * Math.Sqrt(ranks)));

    private static string Invariant(FormattableString text) => text.ToString(CultureInfo.InvariantCulture);

    // What is left of communication in all forwards, or all backwards, when each hides its own; the one with more hides no more.
    private double Exposed(double each, double once, double compute)
    {
        double hides = HidingShare * compute / MicroBatches;
        return ((MicroBatches - 1) * Math.Max(0, each - hides)) + Math.Max(0, each + once - hides);
    }
}
