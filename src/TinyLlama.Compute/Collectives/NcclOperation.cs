using TinyLlama.Compute.Cuda;

namespace TinyLlama.Compute.Collectives;

/// <summary>An operation of an NCCL communicator. What moves are bytes.</summary>
/// <param name="Operation">What is asked for.</param>
/// <param name="Communicator">The communicator.</param>
/// <param name="Size">The number of its ranks.</param>
internal readonly record struct NcclOperation(CollectiveOperation Operation, nint Communicator, int Size)
{
    private Tensor Destination => Operation.Destination;

    private Tensor Source => Operation.Source;

    /// <summary>Queues what NCCL does.</summary>
    /// <returns>NCCL's result.</returns>
    public int Begin(nint stream) => Operation.Kind switch
    {
        CollectiveKind.AllGather => Nccl.ncclAllGather(Source.Address, Destination.Address, Bytes(Source), Nccl.Byte, Communicator, stream),
        CollectiveKind.AllToAll => Exchange(Destination, stream),
        CollectiveKind.ReduceScatter => Exchange(Operation.Scratch, stream),
        CollectiveKind.Broadcast => Nccl.ncclBroadcast(
            Destination.Address, Destination.Address, Bytes(Destination), Nccl.Byte, Operation.Peer, Communicator, stream),
        CollectiveKind.Send => Nccl.ncclSend(Source.Address, Bytes(Source), Nccl.Byte, Operation.Peer, Communicator, stream),
        _ => Nccl.ncclRecv(Destination.Address, Bytes(Destination), Nccl.Byte, Operation.Peer, Communicator, stream),
    };

    /// <summary>Queues what follows it: the sum of a reduce-scatter.</summary>
    public void End(CudaDevice device, nint stream)
    {
        if (Operation.Kind == CollectiveKind.ReduceScatter)
        {
            TreeSum.Run(device, stream, Destination, Operation.Scratch, Size);
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

    private static nuint Bytes(Tensor tensor) => (nuint)CollectiveOperation.Bytes(tensor);
}
