using System.Runtime.InteropServices;

namespace TinyLlama.Compute.Collectives;

/// <summary>A group of ranks on a <see cref="CollectiveLane"/>: collectives of host memory.</summary>
internal sealed unsafe class LaneCollective : Collective
{
    private readonly CollectiveLane _lane;
    private readonly RankGroup _group;
    private readonly bool _ownsLane;
    private readonly Action _gather;
    private readonly Action _leave;
    private byte* _staging;
    private int _stagingBytes;
    private int _gathered;

    /// <summary>A world over a lane of its own.</summary>
    /// <param name="lane">The lane; this disposes of it.</param>
    /// <param name="group">All ranks.</param>
    /// <param name="hosts">The name of each rank's host.</param>
    public LaneCollective(CollectiveLane lane, RankGroup group, IReadOnlyList<string> hosts)
        : this(lane, group, hosts, ownsLane: true)
    {
    }

    private LaneCollective(CollectiveLane lane, RankGroup group, IReadOnlyList<string> hosts, bool ownsLane)
    {
        (_lane, _group, Hosts, _ownsLane) = (lane, group, hosts, ownsLane);
        _leave = group.Dispose;
        _gather = () => _group.AllGather(_staging + _gathered, _staging, _gathered);
    }

    /// <inheritdoc/>
    public override int Rank => _group.Rank;

    /// <inheritdoc/>
    public override int Size => _group.Size;

    /// <inheritdoc/>
    public override string Description => _group.Description;

    /// <inheritdoc/>
    public override IReadOnlyList<string> Hosts { get; }

    /// <inheritdoc/>
    public override CollectiveProgress Progress => _lane.Progress;

    /// <inheritdoc/>
    public override Collective Split(int color, int key)
    {
        var choices = new (int Color, int Key)[Size];
        AllGather<(int Color, int Key)>(choices, [(color, key)]);
        IEnumerable<string> hosts = Enumerable.Range(0, Size).Where(i => choices[i].Color == color).OrderBy(i => choices[i].Key).Select(i => Hosts[i]);
        RankGroup? part = null;
        _lane.Call(() => part = _group.Split(color, key));
        return new LaneCollective(_lane, part!, [.. hosts], ownsLane: false);
    }

    /// <inheritdoc/>
    public override void Abort(string reason, int exitCode)
    {
        _group.Abort(reason, exitCode);

        // An operation under way fails soon; then, or without one, the others are told.
        _lane.Call(_leave, TimeSpan.FromSeconds(1));
    }

    internal override Ticket Queue(in CollectiveOperation operation) => new(this, _lane.Queue(operation, _group));

    internal override void Wait(long number) => _lane.Wait(number);

    /// <inheritdoc/>
    protected override void GatherBytes(Span<byte> all, ReadOnlySpan<byte> own)
    {
        int needed = checked(own.Length + all.Length);
        if (_stagingBytes < needed)
        {
            _staging = (byte*)NativeMemory.Realloc(_staging, (nuint)needed);
            _stagingBytes = needed;
        }

        own.CopyTo(new Span<byte>(_staging, own.Length));
        _gathered = own.Length;
        _lane.Call(_gather);
        new Span<byte>(_staging + own.Length, all.Length).CopyTo(all);
    }

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        // Parts end with the world.
        if (_ownsLane)
        {
            try
            {
                _lane.Call(_leave);
            }
            catch (CollectiveException)
            {
                // The lane has ended before; whoever waited for it knows.
                _group.Dispose();
            }

            _lane.Dispose();
        }

        NativeMemory.Free(_staging);
        _staging = null;
    }
}
