using System.Text;

namespace TinyLlama.Compute.Collectives;

/// <summary>What an MPI launcher tells its processes.</summary>
/// <param name="Libraries">The libraries that fit it, the best first.</param>
/// <param name="Size">The number of processes it has started, if it says so.</param>
internal sealed record MpiWorld(IReadOnlyList<string> Libraries, int? Size);

/// <summary>Ranks that are processes of an MPI launcher. The library's calls are all made by one thread, from the first to the last.</summary>
internal static class MpiCollective
{
    // Counts of MPI are ints.
    private const int MostBytes = 1 << 30;
    private const int HostBytes = 256;

    /// <summary>Joins the launcher's world.</summary>
    /// <param name="world">What the launcher said.</param>
    /// <param name="timeout">For how long an operation may run.</param>
    /// <param name="mostBytes">The longest piece in which bytes are given to the library.</param>
    /// <exception cref="DeviceException">There is no library, or it is another than the launcher's.</exception>
    public static Collective Join(MpiWorld world, TimeSpan timeout, int mostBytes = MostBytes)
    {
        Mpi mpi = Mpi.Load(world.Libraries);
        var lane = new CollectiveLane("MPI", timeout);
        MpiGroup? group = null;
        byte[] hosts = [];
        lane.Call(() =>
        {
            group = MpiGroup.Begin(mpi, mostBytes);
            hosts = Hosts(group);
        });
        if (world.Size is int size && size != group!.Size)
        {
            throw new DeviceException(
                $"the launcher has started {size} processes and {group.Description} sees a world of {group.Size}: the library is not the launcher's; set TINYLLAMA_MPI to the path of the library that belongs to it");
        }

        return new LaneCollective(lane, group!, [.. hosts.Chunk(HostBytes).Select(static host => Encoding.UTF8.GetString(host).TrimEnd('\0'))]);
    }

    private static unsafe byte[] Hosts(MpiGroup group)
    {
        byte[] own = new byte[HostBytes];
        byte[] name = Encoding.UTF8.GetBytes(Environment.MachineName);
        name.AsSpan(0, Math.Min(name.Length, HostBytes)).CopyTo(own);
        byte[] all = new byte[HostBytes * group.Size];
        fixed (byte* source = own, destination = all)
        {
            group.AllGather(destination, source, HostBytes);
        }

        return all;
    }
}

/// <summary>An MPI communicator.</summary>
internal sealed unsafe class MpiGroup : RankGroup
{
    private readonly Mpi _mpi;
    private readonly nint _communicator;
    private readonly int _mostBytes;
    private readonly int _thread = Environment.CurrentManagedThreadId;
    private readonly string _version;

    private MpiGroup(Mpi mpi, nint communicator, int mostBytes)
    {
        (_mpi, _communicator, _mostBytes, _version) = (mpi, communicator, mostBytes, mpi.Version());
        int number;
        Check(mpi.Rank(communicator, &number), "rank");
        Rank = number;
        Check(mpi.Size(communicator, &number), "size");
        Size = number;
    }

    /// <inheritdoc/>
    public override int Rank { get; }

    /// <inheritdoc/>
    public override int Size { get; }

    /// <inheritdoc/>
    public override string Description => _version;

    /// <summary>Starts MPI. This thread makes all calls from now on.</summary>
    public static MpiGroup Begin(Mpi mpi, int mostBytes)
    {
        int provided;
        mpi.Check(mpi.InitThread(null, null, mpi.ThreadFunneled, &provided), "MPI_Init_thread");
        mpi.Check(mpi.SetErrorHandler(mpi.World, mpi.ErrorsReturn), "MPI_Comm_set_errhandler");
        if (provided < mpi.ThreadFunneled)
        {
            throw new CollectiveException($"{mpi.Version()} does not allow other threads beside its own");
        }

        return new MpiGroup(mpi, mpi.World, mostBytes);
    }

    /// <inheritdoc/>
    public override void AllGather(byte* destination, byte* source, long bytes)
    {
        bool inPlace = source == destination + (Rank * bytes);
        for (long done = 0; done < bytes; done += _mostBytes)
        {
            Parts parts = TakeParts(done, bytes);
            Check(
                _mpi.AllGather(
                    inPlace ? (void*)_mpi.InPlace : source + done, inPlace ? 0 : parts.Bytes, _mpi.Byte,
                    destination + done, parts.Count, parts.Type, _communicator),
                "all-gather");
            Release(parts);
        }
    }

    /// <inheritdoc/>
    public override void AllToAll(byte* destination, byte* source, long bytes)
    {
        for (long done = 0; done < bytes; done += _mostBytes)
        {
            Parts parts = TakeParts(done, bytes);
            Check(
                _mpi.AllToAll(source + done, parts.Count, parts.Type, destination + done, parts.Count, parts.Type, _communicator),
                "all-to-all");
            Release(parts);
        }
    }

    /// <inheritdoc/>
    public override void Broadcast(byte* values, long bytes, int root)
    {
        for (long done = 0; done < bytes; done += _mostBytes)
        {
            Check(_mpi.Broadcast(values + done, Piece(done, bytes), _mpi.Byte, root, _communicator), "broadcast");
        }
    }

    /// <inheritdoc/>
    public override void Send(byte* values, long bytes, int to)
    {
        for (long done = 0; done < bytes; done += _mostBytes)
        {
            Check(_mpi.Send(values + done, Piece(done, bytes), _mpi.Byte, to, 0, _communicator), "send");
        }
    }

    /// <inheritdoc/>
    public override void Receive(byte* values, long bytes, int from)
    {
        for (long done = 0; done < bytes; done += _mostBytes)
        {
            Check(_mpi.Receive(values + done, Piece(done, bytes), _mpi.Byte, from, 0, _communicator, _mpi.StatusIgnore), "receive");
        }
    }

    /// <inheritdoc/>
    public override RankGroup Split(int color, int key)
    {
        nint part = 0;
        Check(_mpi.Split(_communicator, color, key, &part), "split");
        return new MpiGroup(_mpi, part, _mostBytes);
    }

    /// <summary>Ends all processes of the launcher. The one call that may come from another thread: this one waits for others.</summary>
    public override void Abort(string reason, int exitCode) => _ = _mpi.Abort(_mpi.World, exitCode);

    /// <summary>Ends MPI, once all ranks have come here. After a failure, when the lane's thread is gone, the launcher ends the rest.</summary>
    public override void Dispose()
    {
        if (Environment.CurrentManagedThreadId == _thread)
        {
            Check(_mpi.Leave(), "MPI_Finalize");
        }

        base.Dispose();
    }

    private int Piece(long done, long bytes) => (int)Math.Min(_mostBytes, bytes - done);

    // A piece of every rank's part. Where it is not all of it, the pieces lie as far apart as the parts do.
    private Parts TakeParts(long done, long bytes)
    {
        int piece = Piece(done, bytes);
        if (piece == bytes)
        {
            return new Parts(piece, piece, _mpi.Byte);
        }

        nint dense = 0;
        nint spaced = 0;
        Check(_mpi.Contiguous(piece, _mpi.Byte, &dense), "datatype");
        Check(_mpi.Resized(dense, 0, (nint)bytes, &spaced), "datatype");
        Check(_mpi.Commit(&spaced), "datatype");
        Check(_mpi.Free(&dense), "datatype");
        return new Parts(piece, 1, spaced);
    }

    private void Release(Parts parts)
    {
        if (parts.Type != _mpi.Byte)
        {
            nint type = parts.Type;
            Check(_mpi.Free(&type), "datatype");
        }
    }

    private void Check(int status, string operation) => _mpi.Check(status, operation);

    // Of one rank: its bytes, and how many of which datatype they are.
    private readonly record struct Parts(int Bytes, int Count, nint Type);
}
