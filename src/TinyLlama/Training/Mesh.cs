using TinyLlama.Compute.Collectives;

namespace TinyLlama.Training;

/// <summary>The ranks of a run in two directions: neighbours keep the state once between them, the groups of neighbours keep it again.</summary>
public sealed class Mesh : IDisposable
{
    /// <summary>Parts the world.</summary>
    /// <param name="world">All ranks; the caller disposes of it, after this.</param>
    /// <param name="sharding">How many are neighbours.</param>
    public Mesh(Collective world, Sharding sharding)
    {
        ArgumentNullException.ThrowIfNull(world);
        ArgumentNullException.ThrowIfNull(sharding);
        World = world;
        Shard = world.Split(world.Rank / sharding.Shards, world.Rank);
        Replica = world.Split(world.Rank % sharding.Shards, world.Rank);
    }

    /// <summary>Gets all ranks.</summary>
    public Collective World { get; }

    /// <summary>Gets the ranks that keep the state once between them, in one node as a rule.</summary>
    public Collective Shard { get; }

    /// <summary>Gets the ranks that keep the same part of it.</summary>
    public Collective Replica { get; }

    /// <inheritdoc/>
    public void Dispose()
    {
        Shard.Dispose();
        Replica.Dispose();
    }
}
