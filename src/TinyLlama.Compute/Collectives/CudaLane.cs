using System.Diagnostics;
using System.Runtime.InteropServices;
using TinyLlama.Compute.Cuda;

namespace TinyLlama.Compute.Collectives;

/// <summary>
/// A stream beside the one that a GPU computes on, for the communicators of one world. What is queued here waits for what was
/// queued there; there, only what asks waits. The host waits for neither. A thread watches: it ends the communicators at their
/// first error, or when an operation takes longer than it may, since NCCL alone would wait for ever for a rank that died.
/// </summary>
internal sealed unsafe class CudaLane : IDisposable
{
    // Operations that may be under way; the host waits where there would be more.
    private const int Most = 1024;

    private readonly CudaDevice _device;
    private readonly TimeSpan _limit;
    private readonly string _rank;
    private readonly nint _ready;
    private readonly nint[] _ends = new nint[Most];
    private readonly Operation[] _operations = new Operation[Most];
    private readonly List<nint> _communicators = [];
    private readonly Thread _watch;
    private long _queued;
    private long _done;
    private long _progressed;
    private bool _disposed;
    private CollectiveException? _failure;

    /// <summary>Takes a stream and begins to watch.</summary>
    /// <param name="device">The GPU.</param>
    /// <param name="limit">How long an operation may take.</param>
    /// <param name="rank">Whose it is, for errors.</param>
    public CudaLane(CudaDevice device, TimeSpan limit, string rank)
    {
        (_device, _limit, _rank) = (device, limit, rank);
        device.MakeCurrent();
        nint stream;
        device.Check(CudaDriver.cuStreamCreate(&stream, CudaDriver.NonBlocking), What);
        Stream = stream;
        _ready = CreateEvent();
        for (int i = 0; i < Most; i++)
        {
            _ends[i] = CreateEvent();
        }

        _watch = new Thread(Watch) { IsBackground = true, Name = "NCCL" };
        _watch.Start();
    }

    /// <summary>Gets the GPU.</summary>
    public CudaDevice Device => _device;

    /// <summary>Gets the stream.</summary>
    public nint Stream { get; }

    /// <summary>Gets what is under way. How long operations took, and which part of it was hidden, the host does not see.</summary>
    public CollectiveProgress Progress
    {
        get
        {
            lock (_operations)
            {
                Advance();
                bool runs = _done < _queued && _failure is null;
                return new CollectiveProgress(_done, runs ? Oldest.What : null, runs ? Age : default, default, default);
            }
        }
    }

    private const string What = "NCCL's stream";

    private ref Operation Oldest => ref _operations[_done % Most];

    // Since the oldest operation was queued, or the one before it ended.
    private TimeSpan Age => Stopwatch.GetElapsedTime(Math.Max(_progressed, Oldest.Queued));

    /// <summary>Joins a communicator, or parts one, with calls that go on by themselves; waits until it is there.</summary>
    /// <param name="what">For the error.</param>
    /// <param name="begin">Begins it and gives NCCL's result.</param>
    /// <param name="parent">The communicator that is parted; 0 for none.</param>
    /// <exception cref="CollectiveException">It failed, or took too long.</exception>
    public nint Join(string what, Func<nint, (int Result, nint Communicator)> begin, nint parent)
    {
        lock (_operations)
        {
            ThrowIfFailed();
            _device.MakeCurrent();
            (int result, nint communicator) = begin(parent);
            long start = Stopwatch.GetTimestamp();
            if (parent != 0)
            {
                Settle(what, result, parent, start);
            }

            Settle(what, result, communicator, start);
            _communicators.Add(communicator);
            return communicator;
        }
    }

    /// <summary>Queues an operation after all that the GPU was given to compute.</summary>
    /// <param name="operation">The operation.</param>
    /// <returns>Its number.</returns>
    /// <exception cref="CollectiveException">It failed, or something before it did.</exception>
    public long Queue(in NcclOperation operation)
    {
        lock (_operations)
        {
            ThrowIfFailed();
            _device.MakeCurrent();
            if (_queued - _done == Most)
            {
                // The wait is ended by the thread that watches, which needs the lock.
                nint end = _ends[_done % Most];
                Monitor.Exit(_operations);
                _ = CudaDriver.cuEventSynchronize(end);
                Monitor.Enter(_operations);
                Advance();
                ThrowIfFailed();
            }

            _device.Check(CudaDriver.cuEventRecord(_ready, _device.Stream), What);
            _device.Check(CudaDriver.cuStreamWaitEvent(Stream, _ready, 0), What);
            int result = operation.Begin(Stream);
            Settle(operation.Operation.Name, result, operation.Communicator, Stopwatch.GetTimestamp());
            operation.End(_device, Stream);
            int slot = (int)(_queued % Most);
            _device.Check(CudaDriver.cuEventRecord(_ends[slot], Stream), What);
            _operations[slot] = new Operation(operation.Operation.Name, Stopwatch.GetTimestamp());
            return ++_queued;
        }
    }

    /// <summary>What the GPU computes from here on waits for an operation.</summary>
    /// <exception cref="CollectiveException">Something failed, so far as is known.</exception>
    public void Wait(long number)
    {
        ThrowIfFailed();
        if (number > _queued - Most)
        {
            _device.MakeCurrent();
            _device.Check(CudaDriver.cuStreamWaitEvent(_device.Stream, _ends[(number - 1) % Most], 0), What);
            ThrowIfFailed();
        }
    }

    /// <summary>Waits on the host until all that was queued is done.</summary>
    /// <exception cref="CollectiveException">Something failed.</exception>
    public void Finish()
    {
        ThrowIfFailed();
        _device.MakeCurrent();
        int result = CudaDriver.cuStreamSynchronize(Stream);
        lock (_operations)
        {
            Look();
        }

        ThrowIfFailed();
        _device.Check(result, What);
    }

    /// <summary>Ends all communicators, with what other ranks may be waiting for in them; they see it when their time is up.</summary>
    public void Abort(string reason)
    {
        lock (_operations)
        {
            if (_failure is null)
            {
                Fail(new CollectiveException($"{_rank}: {reason}"));
            }
        }
    }

    /// <summary>Ends a communicator; one that failed has ended already.</summary>
    public void Leave(nint communicator)
    {
        lock (_operations)
        {
            if (_communicators.Remove(communicator))
            {
                _device.MakeCurrent();
                _ = Nccl.ncclCommFinalize(communicator);
                _ = State(communicator, Stopwatch.GetTimestamp());
                _ = Nccl.ncclCommDestroy(communicator);
            }
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        lock (_operations)
        {
            _disposed = true;
            Monitor.PulseAll(_operations);
        }

        _watch.Join();
        _device.MakeCurrent();
        _ = CudaDriver.cuStreamSynchronize(Stream);
        Array.ForEach(_ends, end => _ = CudaDriver.cuEventDestroy_v2(end));
        _ = CudaDriver.cuEventDestroy_v2(_ready);
        _ = CudaDriver.cuStreamDestroy_v2(Stream);
    }

    private nint CreateEvent()
    {
        nint created;
        _device.Check(CudaDriver.cuEventCreate(&created, CudaDriver.EventWithoutTime), What);
        return created;
    }

    private void Watch()
    {
        TimeSpan interval = TimeSpan.FromMilliseconds(Math.Clamp(_limit.TotalMilliseconds / 8, 1, 1000));
        lock (_operations)
        {
            while (!_disposed && _failure is null)
            {
                Monitor.Wait(_operations, interval);
                _device.MakeCurrent();
                Look();
            }
        }
    }

    // Under the lock: an error, or a wait that is too long, is the end.
    private void Look()
    {
        Advance();
        for (int i = 0; i < _communicators.Count && _failure is null; i++)
        {
            int state = Error(_communicators[i]);
            if (state is not 0 and not Nccl.InProgress)
            {
                Fail(_done < _queued ? Oldest.What : "between operations", state, _communicators[i]);
            }
        }

        if (_failure is null && _done < _queued && Age > _limit)
        {
            Fail(TooLong(Oldest.What));
        }
    }

    private CollectiveException TooLong(string what) =>
        new($"{_rank}: NCCL: {what} has taken more than {_limit.TotalSeconds:0.#} s: another rank is gone, or far behind");

    // Under the lock: what ended since.
    private void Advance()
    {
        while (_done < _queued && CudaDriver.cuEventQuery(_ends[_done % Most]) == 0)
        {
            _done++;
            _progressed = Stopwatch.GetTimestamp();
        }
    }

    private void Settle(string what, int result, nint communicator, long start)
    {
        int state = result is 0 or Nccl.InProgress ? State(communicator, start) : result;
        ThrowIfFailed();
        if (state == Nccl.InProgress)
        {
            Fail(TooLong(what), communicator);
        }
        else if (state != 0)
        {
            Fail(what, state, communicator);
        }

        ThrowIfFailed();
    }

    // What has become of a call that goes on by itself; the thread that watches may have the lock in between.
    private int State(nint communicator, long start)
    {
        int state = Error(communicator);
        for (int looks = 0; state == Nccl.InProgress && _failure is null && Stopwatch.GetElapsedTime(start) < _limit; looks++)
        {
            if (looks > 100)
            {
                Monitor.Wait(_operations, 1);
            }

            if (_failure is null)
            {
                state = Error(communicator);
            }
        }

        return state;
    }

    private static int Error(nint communicator)
    {
        int error;
        int result = Nccl.ncclCommGetAsyncError(communicator, &error);
        return result == 0 ? error : result;
    }

    private void Fail(string what, int result, nint communicator)
    {
        string detail = communicator == 0 ? "" : Marshal.PtrToStringUTF8((nint)Nccl.ncclGetLastError(communicator)) ?? "";
        string name = Marshal.PtrToStringUTF8((nint)Nccl.ncclGetErrorString(result)) ?? "";
        Fail(new CollectiveException($"{_rank}: NCCL: {what}: {name} ({result}){(detail.Length > 0 ? ": " : "")}{detail.ReplaceLineEndings(" ").Trim()}"), communicator);
    }

    // Ends every communicator, so that what hangs in them ends too.
    private void Fail(CollectiveException failure, nint joining = 0)
    {
        _failure = failure;
        if (joining != 0 && !_communicators.Contains(joining))
        {
            _communicators.Add(joining);
        }

        _communicators.ForEach(communicator => _ = Nccl.ncclCommAbort(communicator));
        _communicators.Clear();
    }

    private void ThrowIfFailed()
    {
        if (_failure is { } failure)
        {
            throw new CollectiveException(failure.Message, failure);
        }
    }

    private readonly record struct Operation(string What, long Queued);
}
