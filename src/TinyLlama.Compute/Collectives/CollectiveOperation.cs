namespace TinyLlama.Compute.Collectives;

/// <summary>The operations of a <see cref="Collective"/> that move tensors.</summary>
internal enum CollectiveKind
{
    AllGather,
    AllToAll,
    ReduceScatter,
    Broadcast,
    Send,
    Receive,
}

/// <summary>One operation on tensors, its shapes checked.</summary>
/// <param name="Kind">Which.</param>
internal readonly record struct CollectiveOperation(CollectiveKind Kind)
{
    /// <summary>Gets where values arrive.</summary>
    public Tensor Destination { get; init; }

    /// <summary>Gets where they come from.</summary>
    public Tensor Source { get; init; }

    /// <summary>Gets where a reduce-scatter receives.</summary>
    public Tensor Scratch { get; init; }

    /// <summary>Gets the other rank, or the root.</summary>
    public int Peer { get; init; }

    /// <summary>Gets its name, for errors.</summary>
    public string Name => Kind switch
    {
        CollectiveKind.AllGather => "all-gather",
        CollectiveKind.AllToAll => "all-to-all",
        CollectiveKind.ReduceScatter => "reduce-scatter",
        CollectiveKind.Broadcast => "broadcast",
        CollectiveKind.Send => $"send to rank {Peer}",
        _ => $"receive from rank {Peer}",
    };

    /// <summary>The bytes of a contiguous tensor.</summary>
    public static long Bytes(Tensor tensor) => tensor.Rows * tensor.Type.RowBytes(tensor.Columns);
}
