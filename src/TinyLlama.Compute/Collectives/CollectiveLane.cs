using System.Diagnostics;

namespace TinyLlama.Compute.Collectives;

/// <summary>A way to carry bytes between ranks. Calls come one at a time, all from the thread of a <see cref="CollectiveLane"/>, and return when their work is done.</summary>
internal abstract unsafe class RankGroup : IDisposable
{
    /// <summary>Gets the number of this rank.</summary>
    public abstract int Rank { get; }

    /// <summary>Gets the number of ranks.</summary>
    public abstract int Size { get; }

    /// <summary>Gets what carries the bytes, for people.</summary>
    public abstract string Description { get; }

    /// <summary>Part i of the destination = the source of rank i. The source may be this rank's part of the destination.</summary>
    /// <param name="destination">Size · bytes.</param>
    /// <param name="source">The rank's own.</param>
    /// <param name="bytes">Of one rank.</param>
    public abstract void AllGather(byte* destination, byte* source, long bytes);

    /// <summary>Part i of the destination = this rank's part of the source of rank i.</summary>
    /// <param name="destination">Size · bytes.</param>
    /// <param name="source">Size · bytes, elsewhere.</param>
    /// <param name="bytes">Of one part.</param>
    public abstract void AllToAll(byte* destination, byte* source, long bytes);

    /// <summary>Everyone's bytes = the root's.</summary>
    public abstract void Broadcast(byte* values, long bytes, int root);

    /// <summary>Sends bytes to a rank that receives as many.</summary>
    public abstract void Send(byte* values, long bytes, int to);

    /// <summary>Receives bytes of a rank that sends as many.</summary>
    public abstract void Receive(byte* values, long bytes, int from);

    /// <summary>The part of the ranks with this rank's colour, in the order of key, then rank.</summary>
    public abstract RankGroup Split(int color, int key);

    /// <summary>Lets what runs and what follows fail on all ranks, as far as the transport can. Any thread may call it.</summary>
    /// <param name="reason">One line, for the other ranks.</param>
    /// <param name="exitCode">Where the launcher ends the processes: what with.</param>
    public virtual void Abort(string reason, int exitCode)
    {
    }

    /// <summary>Leaves: the last call, of the group of all ranks alone.</summary>
    public virtual void Dispose() => GC.SuppressFinalize(this);
}

/// <summary>
/// A thread that runs operations in the order in which they were queued. It makes every call of the transport, so that one
/// that knows a single thread will do, and progress needs no polling while the caller computes.
/// </summary>
internal sealed unsafe class CollectiveLane : IDisposable
{
    private readonly Thread _thread;
    private readonly TimeSpan _timeout;
    private readonly object _gate = new();
    private Entry[] _queue = new Entry[64];
    private long _queued;
    private long _done;
    private long _started;
    private long _busy;
    private long _waited;
    private bool _ends;
    private CollectiveException? _failure;

    /// <summary>Starts the thread.</summary>
    /// <param name="name">Its name, for debuggers.</param>
    /// <param name="timeout">For how long an operation may run.</param>
    public CollectiveLane(string name, TimeSpan timeout)
    {
        // A transport that can name who does not come does so before.
        _timeout = timeout * 1.1;
        _thread = new Thread(Run) { IsBackground = true, Name = name };
        _thread.Start();
    }

    /// <summary>Gets what was done so far.</summary>
    public CollectiveProgress Progress
    {
        get
        {
            lock (_gate)
            {
                bool runs = _done < _queued && _failure is null;
                Entry current = runs ? _queue[_done % _queue.Length] : default;
                return new CollectiveProgress(
                    _done, runs ? current.Name : null, runs ? Stopwatch.GetElapsedTime(Math.Max(_started, current.Queued)) : default,
                    Stopwatch.GetElapsedTime(0, _busy), Stopwatch.GetElapsedTime(0, _waited));
            }
        }
    }

    /// <summary>Queues an operation of a group.</summary>
    /// <returns>Its number.</returns>
    public long Queue(in CollectiveOperation operation, RankGroup group) => Queue(new Entry { Operation = operation, Group = group });

    /// <summary>Waits until so many operations are done.</summary>
    /// <exception cref="CollectiveException">One of them failed.</exception>
    public void Wait(long number)
    {
        lock (_gate)
        {
            long start = Stopwatch.GetTimestamp();
            while (_done < number && _failure is null)
            {
                if (!Monitor.Wait(_gate, _timeout / 16) && Progress is { Operation: string name } progress && progress.Age > _timeout)
                {
                    _failure = new CollectiveException($"{name} has not ended within {_timeout.TotalSeconds:0} s: a rank hangs or is gone");
                }
            }

            _waited += Stopwatch.GetTimestamp() - start;
            if (_done < number)
            {
                throw new CollectiveException(_failure!.Message, _failure);
            }
        }
    }

    /// <summary>Runs something on the lane's thread, after what is queued, and waits for it.</summary>
    public void Call(Action action) => Wait(Queue(new Entry { Action = action }));

    /// <summary>The same, for a rank that is about to end: it waits for no longer than this, and a failure is as good an end.</summary>
    public void Call(Action action, TimeSpan most)
    {
        long number = Queue(new Entry { Action = action });
        long start = Stopwatch.GetTimestamp();
        lock (_gate)
        {
            while (_done < number && _failure is null && Stopwatch.GetElapsedTime(start) < most)
            {
                Monitor.Wait(_gate, most);
            }
        }
    }

    /// <summary>Does what is queued, then ends the thread. One that failed or hangs is left to the end of the process.</summary>
    public void Dispose()
    {
        lock (_gate)
        {
            _ends = true;
            Monitor.PulseAll(_gate);
        }

        _thread.Join(TimeSpan.FromSeconds(5));
    }

    private long Queue(Entry entry)
    {
        lock (_gate)
        {
            if (_queued - _done == _queue.Length)
            {
                var longer = new Entry[_queue.Length * 2];
                for (long i = _done; i < _queued; i++)
                {
                    longer[i % longer.Length] = _queue[i % _queue.Length];
                }

                _queue = longer;
            }

            _queue[_queued % _queue.Length] = entry with { Queued = Stopwatch.GetTimestamp() };
            _queued++;
            Monitor.PulseAll(_gate);
            return _queued;
        }
    }

    private void Run()
    {
        while (true)
        {
            Entry entry;
            lock (_gate)
            {
                while (_done == _queued && !_ends)
                {
                    Monitor.Wait(_gate);
                }

                if (_done == _queued)
                {
                    return;
                }

                entry = _queue[_done % _queue.Length];
                _started = Stopwatch.GetTimestamp();
            }

            CollectiveException? failure = null;
            try
            {
                if (entry.Group is { } group)
                {
                    Run(entry.Operation, group);
                }
                else
                {
                    entry.Action!();
                }
            }
            catch (Exception e)
            {
                // The thread that waits is told, whatever it was.
                failure = e as CollectiveException ?? new CollectiveException($"{entry.Name}: {e.Message}", e);
            }

            lock (_gate)
            {
                _busy += Stopwatch.GetTimestamp() - _started;
                _failure ??= failure;
                _queue[_done % _queue.Length] = default;
                if (_failure is null)
                {
                    _done++;
                }

                Monitor.PulseAll(_gate);
                if (_failure is not null)
                {
                    return;
                }
            }
        }
    }

    private static void Run(in CollectiveOperation o, RankGroup group)
    {
        byte* destination = (byte*)o.Destination.Address;
        byte* source = (byte*)o.Source.Address;
        long sent = CollectiveOperation.Bytes(o.Source);
        long received = CollectiveOperation.Bytes(o.Destination);
        switch (o.Kind)
        {
            case CollectiveKind.AllGather:
                group.AllGather(destination, source, sent);
                break;
            case CollectiveKind.AllToAll:
                group.AllToAll(destination, source, sent / group.Size);
                break;
            case CollectiveKind.ReduceScatter:
                group.AllToAll((byte*)o.Scratch.Address, source, sent / group.Size);
                Cpu.TreeSum.Run((float*)destination, (byte*)o.Scratch.Address, o.Scratch.Type, group.Size, o.Destination.Count);
                break;
            case CollectiveKind.Broadcast:
                group.Broadcast(destination, received, o.Peer);
                break;
            case CollectiveKind.Send:
                group.Send(source, sent, o.Peer);
                break;
            case CollectiveKind.Receive:
                group.Receive(destination, received, o.Peer);
                break;
            default:
                throw new InvalidOperationException($"{o.Kind} is no operation of a lane");
        }
    }

    /// <summary>One entry of the queue: an operation of a group, or something else to be done on the thread.</summary>
    private readonly record struct Entry
    {
        public CollectiveOperation Operation { get; init; }

        public RankGroup? Group { get; init; }

        public Action? Action { get; init; }

        public long Queued { get; init; }

        public string Name => Group is null ? "gather of a few values" : Operation.Name;
    }
}
