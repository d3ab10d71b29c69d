using TinyLlama.Compute.Collectives;

namespace TinyLlama.Training;

/// <summary>
/// The ranks of a run in up to four directions. Neighbours split blocks (tensor parallelism), then come the stages of a pipeline,
/// then ranks that keep the same part of the model: of these some keep its state once between them, the groups of them keep it again.
/// </summary>
public sealed class Mesh : IDisposable
{
    /// <summary>Parts the world.</summary>
    /// <param name="world">All ranks; the caller disposes of it, after this.</param>
    /// <param name="sharding">How many there are in each direction.</param>
    public Mesh(Collective world, Sharding sharding)
    {
        ArgumentNullException.ThrowIfNull(world);
        ArgumentNullException.ThrowIfNull(sharding);
        World = world;
        (int data, int part) = Math.DivRem(world.Rank, sharding.ModelRanks);
        (int group, int shard) = Math.DivRem(data, sharding.Shards);
        Shard = world.Split((group * sharding.ModelRanks) + part, world.Rank);
        Replica = world.Split((shard * sharding.ModelRanks) + part, world.Rank);
        Tensor = sharding.Tensor > 1 ? world.Split(world.Rank / sharding.Tensor, world.Rank) : null;
        Pipeline = sharding.Pipeline > 1 ? world.Split((data * sharding.Tensor) + sharding.TensorRankOf(world.Rank), world.Rank) : null;
    }

    /// <summary>Gets all ranks.</summary>
    public Collective World { get; }

    /// <summary>Gets the ranks that keep the state once between them, in one node as a rule.</summary>
    public Collective Shard { get; }

    /// <summary>Gets the ranks that keep the same part of it.</summary>
    public Collective Replica { get; }

    /// <summary>Gets the ranks that split blocks between them; null where blocks are whole.</summary>
    public Collective? Tensor { get; }

    /// <summary>Gets the stages of the pipeline, the first one's rank first; null where there is none.</summary>
    public Collective? Pipeline { get; }

    /// <inheritdoc/>
    public void Dispose()
    {
        Shard.Dispose();
        Replica.Dispose();
        Tensor?.Dispose();
        Pipeline?.Dispose();
    }
}
