using System.Numerics;
using System.Runtime.InteropServices;

namespace TinyLlama.Compute.Collectives;

/// <summary>
/// Ranks that run the same program on parts of the same work, and the operations in which they meet. Every rank calls the
/// same operations in the same order; each is queued at once and runs while the caller computes.
/// </summary>
/// <remarks>
/// Destinations come before sources. Tensors are contiguous, and belong to the operation until its <see cref="Ticket"/> has
/// been waited for. What moves are bytes, what adds up adds up here, in one order: results do not depend on the transport.
/// </remarks>
public abstract class Collective : IDisposable
{
    private static readonly TimeSpan s_meeting = TimeSpan.FromMilliseconds(100);

    /// <summary>Gets the number of this rank, 0 … <see cref="Size"/>-1.</summary>
    public abstract int Rank { get; }

    /// <summary>Gets the number of ranks.</summary>
    public abstract int Size { get; }

    /// <summary>Gets what carries the bytes, for people: <c>Open MPI 4.1.4</c>.</summary>
    public abstract string Description { get; }

    /// <summary>Gets the name of each rank's host.</summary>
    public abstract IReadOnlyList<string> Hosts { get; }

    /// <summary>Gets the number of this rank among those of its host: which of its devices it takes.</summary>
    public int LocalRank => Hosts.Take(Rank).Count(host => host == Hosts[Rank]);

    /// <summary>Gets what the queue is doing and how long callers waited for it.</summary>
    public abstract CollectiveProgress Progress { get; }

    /// <summary>
    /// Joins the world that the process was started into: by <c>mpirun</c> or <c>srun</c> over MPI, with RANK, WORLD_SIZE,
    /// MASTER_ADDR and MASTER_PORT over TCP, else as the only rank.
    /// </summary>
    /// <param name="timeout">For how long ranks wait for each other, here and in every operation; 10 minutes unless told.</param>
    /// <exception cref="DeviceException">The settings of the ranks disagree, a library is missing, or a port is taken.</exception>
    /// <exception cref="CollectiveException">A rank did not come in time.</exception>
    public static Collective Join(TimeSpan? timeout = null) =>
        RankEnvironment.Join(Environment.GetEnvironmentVariable, timeout ?? TimeSpan.FromMinutes(10));

    /// <summary>Part i of every rank's destination becomes the source of rank i. The source may be this rank's part itself.</summary>
    /// <param name="destination">(Size · rows, C).</param>
    /// <param name="source">(rows, C).</param>
    public Ticket AllGather(Tensor destination, Tensor source)
    {
        RequireParts(destination, source);
        return Queue(new(CollectiveKind.AllGather) { Destination = destination, Source = source });
    }

    /// <summary>Part i of the destination becomes this rank's part of the source of rank i.</summary>
    /// <param name="destination">(Size · rows, C).</param>
    /// <param name="source">The same shape, other memory.</param>
    public Ticket AllToAll(Tensor destination, Tensor source)
    {
        RequireSame(destination, source);
        return Queue(new(CollectiveKind.AllToAll) { Destination = destination, Source = source });
    }

    /// <summary>
    /// The destination becomes the sum of this rank's part over all ranks' sources, added in a pairwise tree over the ranks:
    /// (0 + 1) + (2 + 3) … <see cref="Size"/> is a power of two.
    /// </summary>
    /// <param name="destination">(rows, C) of F32. It may be this rank's part of the source.</param>
    /// <param name="source">(Size · rows, C) of F32 or BF16.</param>
    /// <param name="scratch">As the source, other memory.</param>
    public Ticket ReduceScatter(Tensor destination, Tensor source, Tensor scratch)
    {
        RequireSame(scratch, source);
        RequireParts(source with { Type = destination.Type }, destination);
        Shape.Require(BitOperations.IsPow2(Size), "a number of ranks that is a power of two");
        Shape.Require(destination.Type == DType.F32 && source.Type is DType.F32 or DType.BF16, "sums in F32 of F32 or BF16");
        return Queue(new(CollectiveKind.ReduceScatter) { Destination = destination, Source = source, Scratch = scratch });
    }

    /// <summary>All ranks' values become those of one.</summary>
    /// <param name="values">Any contiguous tensor.</param>
    /// <param name="root">The rank that has them.</param>
    public Ticket Broadcast(Tensor values, int root)
    {
        Shape.Require(values.IsContiguous && root >= 0 && root < Size, "a contiguous tensor and a rank");
        return Queue(new(CollectiveKind.Broadcast) { Destination = values, Peer = root });
    }

    /// <summary>Sends values to a rank that calls <see cref="Receive"/> for them.</summary>
    public Ticket Send(Tensor values, int to)
    {
        RequireOther(values, to);
        return Queue(new(CollectiveKind.Send) { Source = values, Peer = to });
    }

    /// <summary>Receives values that a rank sends.</summary>
    public Ticket Receive(Tensor values, int from)
    {
        RequireOther(values, from);
        return Queue(new(CollectiveKind.Receive) { Destination = values, Peer = from });
    }

    /// <summary>Gathers a few values of every rank, rank after rank, and waits for them.</summary>
    /// <param name="all">Receives Size times as many.</param>
    /// <param name="own">This rank's.</param>
    public void AllGather<T>(Span<T> all, ReadOnlySpan<T> own)
        where T : unmanaged
    {
        Shape.Require(all.Length == own.Length * Size, "as many values as all ranks have");
        GatherBytes(MemoryMarshal.AsBytes(all), MemoryMarshal.AsBytes(own));
    }

    /// <summary>Waits until a task of every rank is done. Ranks meet again and again meanwhile, so that none takes another one's slow disk for its end.</summary>
    /// <param name="own">This rank's.</param>
    /// <returns>What this rank's task returned.</returns>
    public T Await<T>(Task<T> own)
    {
        ArgumentNullException.ThrowIfNull(own);
        Span<bool> all = Size <= 1024 ? stackalloc bool[Size] : new bool[Size];
        do
        {
            bool isDone = Task.WaitAny([own], s_meeting) == 0;
            AllGather(all, [isDone]);
        }
        while (all.Contains(false));

        return own.GetAwaiter().GetResult();
    }

    /// <summary>Waits until every rank is here and everything queued before is done.</summary>
    public void Barrier()
    {
        Span<byte> all = Size <= 1024 ? stackalloc byte[Size] : new byte[Size];
        GatherBytes(all, [0]);
    }

    /// <summary>Parts the ranks by colour; those of one colour are numbered by key, then by rank. All ranks call it.</summary>
    /// <param name="color">Which part this rank joins.</param>
    /// <param name="key">Its place in there.</param>
    /// <returns>The part. It shares the queue; dispose of it before this.</returns>
    public abstract Collective Split(int color, int key);

    /// <summary>
    /// Lets the others know that this rank cannot go on, so that none waits for it. Over MPI this ends all processes, this
    /// one too; else it returns within a second, and nothing more can be called but <see cref="Dispose()"/>.
    /// </summary>
    /// <param name="reason">One line.</param>
    /// <param name="exitCode">Where the transport ends processes: what with. Not 0.</param>
    public abstract void Abort(string reason, int exitCode);

    /// <summary>
    /// Leaves; what is queued is done first, and over MPI all ranks wait for each other. A rank that fails calls
    /// <see cref="Abort"/> before.
    /// </summary>
    public void Dispose()
    {
        Dispose(disposing: true);
        GC.SuppressFinalize(this);
    }

    /// <summary>Gathers bytes of host memory and waits.</summary>
    protected abstract void GatherBytes(Span<byte> all, ReadOnlySpan<byte> own);

    /// <summary>Ends the queue; what is still in it is done first.</summary>
    protected abstract void Dispose(bool disposing);

    /// <summary>Queues an operation.</summary>
    internal abstract Ticket Queue(in CollectiveOperation operation);

    /// <summary>Waits for an operation and everything before it.</summary>
    internal abstract void Wait(long number);

    private void RequireParts(Tensor whole, Tensor part) => Shape.Require(
        whole.IsContiguous && part.IsContiguous && whole.Type == part.Type && whole.Columns == part.Columns && whole.Rows == (long)part.Rows * Size,
        "a contiguous tensor with as many parts as there are ranks");

    private void RequireSame(Tensor destination, Tensor source) => Shape.Require(
        destination.IsContiguous && source.IsContiguous && destination.Type == source.Type && destination.Rows == source.Rows
            && destination.Columns == source.Columns && source.Rows % Size == 0 && destination.Address != source.Address,
        "two contiguous tensors of one shape whose rows the ranks divide");

    private void RequireOther(Tensor values, int rank) =>
        Shape.Require(values.IsContiguous && rank >= 0 && rank < Size && rank != Rank, "a contiguous tensor and another rank");
}

/// <summary>An operation that was queued.</summary>
/// <param name="collective">Where; null for one that is done already.</param>
/// <param name="number">Its number there.</param>
public readonly struct Ticket(Collective? collective, long number)
{
    /// <summary>Waits until the operation is done: on the host, or, for one that a device queues, before what the device is given next.</summary>
    /// <exception cref="CollectiveException">It failed, or one before it did.</exception>
    public void Wait() => collective?.Wait(number);
}

/// <summary>What a queue of operations has done.</summary>
/// <param name="Done">Operations that are done.</param>
/// <param name="Operation">The one that runs, or null.</param>
/// <param name="Age">For how long it has.</param>
/// <param name="Busy">Time of all operations.</param>
/// <param name="Waited">The part of it that callers waited for: what was not hidden behind computing.</param>
public readonly record struct CollectiveProgress(long Done, string? Operation, TimeSpan Age, TimeSpan Busy, TimeSpan Waited);

/// <summary>Ranks lost each other: one died, a network failed, or a time limit passed. The run ends; it goes on from its newest checkpoint.</summary>
/// <param name="message">One line: what, which rank, and where.</param>
/// <param name="inner">The cause, if another exception tells it.</param>
public sealed class CollectiveException(string message, Exception? inner = null) : Exception(message, inner);
