using TinyLlama.Compute.Cuda;

namespace TinyLlama.Compute.Collectives;

/// <summary>
/// Ranks with a GPU each, which talk through NCCL beside what they compute. Tensors are of the GPU; waiting for a
/// <see cref="Ticket"/> makes the GPU wait, not the host. A few values of the host go through the collective that the ranks met by.
/// </summary>
public sealed unsafe class NcclCollective : Collective
{
    private readonly CudaLane _lane;
    private readonly Collective _bootstrap;
    private readonly nint _communicator;
    private readonly bool _isWorld;

    private NcclCollective(CudaLane lane, Collective bootstrap, nint communicator, bool isWorld) =>
        (_lane, _bootstrap, _communicator, _isWorld) = (lane, bootstrap, communicator, isWorld);

    /// <summary>Makes a world of GPUs of a world of processes. All ranks call it.</summary>
    /// <param name="backend">This rank's GPU; dispose of the collective before it.</param>
    /// <param name="bootstrap">The ranks, of the host; dispose of it after this.</param>
    /// <param name="limit">How long an operation may take before the world ends with an error.</param>
    /// <exception cref="DeviceException">A rank has no NCCL, or another version than the others.</exception>
    /// <exception cref="CollectiveException">The ranks did not find each other.</exception>
    public static NcclCollective Create(CudaBackend backend, Collective bootstrap, TimeSpan limit)
    {
        Invitation invitation = Agree(bootstrap);
        var lane = new CudaLane(backend.Device, limit, $"rank {bootstrap.Rank} ({bootstrap.Hosts[bootstrap.Rank]})");
        try
        {
            (int size, int rank) = (bootstrap.Size, bootstrap.Rank);
            nint communicator = lane.Join(
                $"the meeting of {size} ranks",
                _ =>
                {
                    nint joined = 0;
                    Nccl.Config config = Nccl.Config.NonBlocking;
                    int result = Nccl.ncclCommInitRankConfig(&joined, size, invitation.Id, rank, &config);
                    return (result, joined);
                },
                parent: 0);
            return new NcclCollective(lane, bootstrap, communicator, isWorld: true);
        }
        catch
        {
            lane.Dispose();
            throw;
        }
    }

    /// <inheritdoc/>
    public override int Rank => _bootstrap.Rank;

    /// <inheritdoc/>
    public override int Size => _bootstrap.Size;

    /// <inheritdoc/>
    public override string Description => $"NCCL {NcclLibrary.Text(NcclLibrary.Found.Version)} over {_bootstrap.Description}";

    /// <inheritdoc/>
    public override IReadOnlyList<string> Hosts => _bootstrap.Hosts;

    /// <inheritdoc/>
    public override CollectiveProgress Progress => _lane.Progress;

    /// <inheritdoc/>
    public override Collective Split(int color, int key)
    {
        nint communicator = _lane.Join(
            $"the parting of {Size} ranks",
            parent =>
            {
                nint part = 0;
                Nccl.Config config = Nccl.Config.NonBlocking;
                int result = Nccl.ncclCommSplit(parent, color, key, &part, &config);
                return (result, part);
            },
            _communicator);
        return new NcclCollective(_lane, _bootstrap.Split(color, key), communicator, isWorld: false);
    }

    /// <inheritdoc/>
    public override void Abort(string reason, int exitCode)
    {
        _lane.Abort(reason);
        _bootstrap.Abort(reason, exitCode);
    }

    internal override Ticket Queue(in CollectiveOperation operation) => new(this, _lane.Queue(new NcclOperation(operation, _communicator, Size)));

    internal override void Wait(long number) => _lane.Wait(number);

    /// <inheritdoc/>
    protected override void GatherBytes(Span<byte> all, ReadOnlySpan<byte> own)
    {
        _lane.Finish();
        _bootstrap.AllGather(all, own);
    }

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        _lane.Leave(_communicator);
        if (_isWorld)
        {
            _lane.Dispose();
        }
        else
        {
            _bootstrap.Dispose();
        }
    }

    // Every rank hears what every rank has, so that all refuse alike; rank 0 invites.
    private static Invitation Agree(Collective bootstrap)
    {
        NcclLibrary library = NcclLibrary.Found;
        Invitation own = new() { Version = library.Fault is null ? library.Version : 0 };
        if (own.Version > 0 && bootstrap.Rank == 0 && Nccl.ncclGetUniqueId(&own.Id) != 0)
        {
            own.Version = -1;
        }

        var all = new Invitation[bootstrap.Size];
        bootstrap.AllGather(all, new ReadOnlySpan<Invitation>(in own));
        if (library.Fault is { } fault)
        {
            throw new DeviceException(fault);
        }

        int other = Array.FindIndex(all, invitation => invitation.Version != library.Version);
        return other < 0
            ? all[0]
            : throw new DeviceException(all[other].Version switch
            {
                0 => $"rank {other} has no NCCL that can be used: see tinyllama env on its machine",
                < 0 => $"NCCL of rank {other} finds no network to meet by: see what NCCL_DEBUG=WARN says, or name one in NCCL_SOCKET_IFNAME",
                int version => $"rank {other} has NCCL {NcclLibrary.Text(version)}, rank {bootstrap.Rank} {NcclLibrary.Text(library.Version)}: install one version everywhere",
            });
    }

    private struct Invitation
    {
        public Nccl.UniqueId Id;
        public int Version;
    }
}
