using TinyLlama.Compute.Collectives;
using TinyLlama.Compute.Cuda;

namespace TinyLlama.Compute.Tests.Collectives;

/// <summary>
/// Lets checks that use memory of the host run over collectives of a GPU: each operation's tensors are written to the GPU before
/// it, and read when its ticket was waited for.
/// </summary>
internal sealed class DeviceCollective(Collective inner, CudaBackend backend, Action dispose) : Collective
{
    private readonly List<Arena> _arenas = [];
    private readonly List<(Ticket Ticket, Tensor Host, Tensor Device)> _operations = [];
    private int _read;

    public override int Rank => inner.Rank;

    public override int Size => inner.Size;

    public override string Description => inner.Description;

    public override IReadOnlyList<string> Hosts => inner.Hosts;

    public override CollectiveProgress Progress => inner.Progress;

    public override Collective Split(int color, int key) => new DeviceCollective(inner.Split(color, key), backend, static () => { });

    public override void Abort(string reason, int exitCode) => inner.Abort(reason, exitCode);

    internal override Ticket Queue(in CollectiveOperation operation)
    {
        (Tensor destination, Tensor source) = (operation.Destination, operation.Source);
        bool isPart = destination.Count < source.Count;
        Tensor whole = Put(isPart ? source : destination);
        Tensor part = isPart ? Put(destination, source, whole) : Put(source, destination, whole);
        CollectiveOperation onDevice = operation with
        {
            Destination = isPart ? part : whole,
            Source = isPart ? whole : part,
            Scratch = Put(operation.Scratch),
        };
        _operations.Add((inner.Queue(onDevice), destination, onDevice.Destination));
        return new Ticket(this, _operations.Count);
    }

    // The last one's ticket speaks for those before it.
    internal override void Wait(long number)
    {
        _operations[(int)number - 1].Ticket.Wait();
        for (; _read < number; _read++)
        {
            (_, Tensor host, Tensor device) = _operations[_read];
            if (!host.IsEmpty)
            {
                backend.Read(host.HostSpan<float>(), device);
            }
        }
    }

    protected override void GatherBytes(Span<byte> all, ReadOnlySpan<byte> own) => inner.AllGather(all, own);

    protected override void Dispose(bool disposing)
    {
        inner.Dispose();
        _arenas.ForEach(arena => arena.Dispose());
        dispose();
    }

    // Where a tensor is part of another one, so it is on the GPU.
    private Tensor Put(Tensor part, Tensor whole, Tensor device)
    {
        long offset = part.Address - whole.Address;
        return offset >= 0 && offset < whole.Rows * whole.Type.RowBytes(whole.Columns)
            ? part with { Address = device.Address + (nint)offset }
            : Put(part);
    }

    private Tensor Put(Tensor host)
    {
        Arena arena = backend.Allocate("check", (host.Rows * host.Type.RowBytes(host.Columns)) + 128);
        _arenas.Add(arena);
        Tensor device = arena.Take(host.Rows, host.Columns, host.Type);
        if (host.IsEmpty)
        {
            return device;
        }

        if (host.Type == DType.F32)
        {
            backend.Write<float>(device, host.HostSpan<float>());
        }
        else
        {
            backend.Write<ushort>(device, host.HostSpan<ushort>());
        }

        return device;
    }
}
