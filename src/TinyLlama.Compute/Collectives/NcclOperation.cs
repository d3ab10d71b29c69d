using TinyLlama.Compute.Cuda;

namespace TinyLlama.Compute.Collectives;

/// <summary>An operation of an NCCL communicator. What moves are bytes.</summary>
/// <param name="Kind">Which.</param>
/// <param name="Communicator">The communicator.</param>
/// <param name="Size">The number of its ranks.</param>
internal readonly record struct NcclOperation(CollectiveLane.Kind Kind, nint Communicator, int Size)
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
        CollectiveLane.Kind.AllGather => "all-gather",
        CollectiveLane.Kind.AllToAll => "all-to-all",
        CollectiveLane.Kind.ReduceScatter => "reduce-scatter",
        CollectiveLane.Kind.Broadcast => "broadcast",
        CollectiveLane.Kind.Send => "send",
        _ => "receive",
    };

    /// <summary>Queues what NCCL does.</summary>
    /// <returns>NCCL's result.</returns>
    public int Begin(nint stream) => Kind switch
    {
        CollectiveLane.Kind.AllGather => Nccl.ncclAllGather(Source.Address, Destination.Address, Bytes(Source), Nccl.Byte, Communicator, stream),
        CollectiveLane.Kind.AllToAll => Exchange(Destination, stream),
        CollectiveLane.Kind.ReduceScatter => Exchange(Scratch, stream),
        CollectiveLane.Kind.Broadcast => Nccl.ncclBroadcast(
            Destination.Address, Destination.Address, Bytes(Destination), Nccl.Byte, Peer, Communicator, stream),
        CollectiveLane.Kind.Send => Nccl.ncclSend(Source.Address, Bytes(Source), Nccl.Byte, Peer, Communicator, stream),
        _ => Nccl.ncclRecv(Destination.Address, Bytes(Destination), Nccl.Byte, Peer, Communicator, stream),
    };

    /// <summary>Queues what follows it: the sum of a reduce-scatter.</summary>
    public void End(CudaDevice device, nint stream)
    {
        if (Kind == CollectiveLane.Kind.ReduceScatter)
        {
            TreeSum.Run(device, stream, Destination, Scratch, Size);
        }
    }

    // A group, as no rank could receive before it has sent.
    private int Exchange(Tensor destination, nint stream)
    {
        nuint part = Bytes(Source) / (nuint)Size;
        int result = Nccl.ncclGroupStart();
        for (int peer = 0; peer < Size && result == 0; peer++)
        {
            nint offset = (nint)((nuint)peer * part);
            result = Nccl.ncclSend(Source.Address + offset, part, Nccl.Byte, peer, Communicator, stream);
            result = result == 0 ? Nccl.ncclRecv(destination.Address + offset, part, Nccl.Byte, peer, Communicator, stream) : result;
        }

        int ended = Nccl.ncclGroupEnd();
        return result == 0 ? ended : result;
    }

    private static nuint Bytes(Tensor tensor) => (nuint)(tensor.Rows * tensor.Type.RowBytes(tensor.Columns));
}
