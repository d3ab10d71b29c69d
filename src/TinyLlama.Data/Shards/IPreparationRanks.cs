namespace TinyLlama.Data.Shards;

/// <summary>The ranks that prepare a folder together. All see the same text and the same folder, and call the same stages in the same order.</summary>
public interface IPreparationRanks
{
    /// <summary>Gets the number of this rank, 0 … <see cref="Size"/>-1.</summary>
    int Rank { get; }

    /// <summary>Gets the number of ranks.</summary>
    int Size { get; }

    /// <summary>Does this rank's part of a stage and waits until every rank has done its own.</summary>
    /// <param name="part">
    /// The part; it returns what the other ranks are to know of it. Its token asks it to stop: all ranks as soon as one is asked.
    /// What it throws is thrown at once, and the stage is lost for every rank.
    /// </param>
    /// <param name="stop">Asks this rank, and so all of them, to stop.</param>
    /// <returns>What the part of each rank returned, in the order of ranks.</returns>
    byte[][] Run(Func<CancellationToken, byte[]> part, CancellationToken stop);
}

/// <summary>One process alone.</summary>
internal sealed class SingleRank : IPreparationRanks
{
    public int Rank => 0;

    public int Size => 1;

    public byte[][] Run(Func<CancellationToken, byte[]> part, CancellationToken stop) => [part(stop)];
}
