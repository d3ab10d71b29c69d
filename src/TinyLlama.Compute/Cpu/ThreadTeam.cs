using System.Diagnostics;
using System.Runtime.CompilerServices;
using System.Runtime.ExceptionServices;
using System.Runtime.InteropServices;

namespace TinyLlama.Compute.Cpu;

/// <summary>A job that a <see cref="ThreadTeam"/> splits: tasks fixed by shape, claimed by threads as they come.</summary>
internal interface IWork
{
    /// <summary>Does one task. What it writes must depend on <paramref name="task"/> alone.</summary>
    /// <param name="task">0 … tasks-1.</param>
    /// <param name="thread">0 … threads-1: whose scratch to use.</param>
    void Run(int task, int thread);
}

/// <summary>
/// Persistent threads that claim the tasks of one job after another. The caller is thread 0 and takes part; the others
/// spin for a moment after a job, because the next one usually follows within microseconds, then sleep.
/// </summary>
/// <remarks>
/// The caller waits only for threads that have entered the job: one that another program keeps from its core enters
/// late, finds the job closed and costs nothing. One job at a time: a task must not run a job of the same team.
/// </remarks>
internal sealed unsafe class ThreadTeam : IDisposable
{
    // The state word: threads inside the job in the low bits, then the flags, then the number of the job.
    private const long InsideMask = 0xFFFF;
    private const long Open = 1L << 16;
    private const long CallerSleeps = 1L << 17;
    private const long FirstJob = 1L << 20;

    private static readonly long s_spinTicks = Stopwatch.Frequency * 40 / 1_000_000;

    private readonly Member[] _members;
    private readonly SemaphoreSlim _allLeft = new(0);
    private Shared _shared;

    // Of the open job; written only while no thread is inside.
    private delegate*<ThreadTeam, void*, int, void> _claim;
    private void* _work;
    private int _tasks;

    private int _running;
    private volatile bool _stopping;
    private Exception? _failure;

    /// <summary>Starts the threads.</summary>
    /// <param name="threads">Their number, the caller's included.</param>
    public ThreadTeam(int threads)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(threads, 1);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(threads, (int)InsideMask);
        Threads = threads;
        _members = new Member[threads - 1];
        for (int i = 0; i < _members.Length; i++)
        {
            _members[i] = new Member(this, i + 1);
        }
    }

    /// <summary>Gets the number of threads, the caller's included.</summary>
    public int Threads { get; }

    /// <summary>
    /// Runs all tasks; returns when the last has ended. If one throws, tasks that nobody has claimed are left out and
    /// the exception is thrown here.
    /// </summary>
    /// <param name="work">The job. It is copied to the stack; what tasks write goes through pointers in it.</param>
    /// <param name="tasks">The number of tasks.</param>
    /// <exception cref="InvalidOperationException">A job of this team is running.</exception>
    public void Run<TWork>(ref TWork work, int tasks)
        where TWork : struct, IWork
    {
        TWork job = work;
        if (_members.Length == 0 || tasks <= 1)
        {
            for (int task = 0; task < tasks; task++)
            {
                job.Run(task, 0);
            }

            return;
        }

        if (Interlocked.Exchange(ref _running, 1) != 0)
        {
            throw new InvalidOperationException("a thread team runs one job at a time");
        }

        _claim = &Claim<TWork>;
        _work = Unsafe.AsPointer(ref job);
        _tasks = tasks;
        _shared.Next = 0;
        OpenJob(Math.Min(tasks - 1, _members.Length));
        _claim(this, _work, 0);
        CloseJob();

        Exception? failure = _failure;
        _work = null;
        _failure = null;
        Volatile.Write(ref _running, 0);
        if (failure is not null)
        {
            ExceptionDispatchInfo.Throw(failure);
        }
    }

    /// <summary>Ends the threads and waits for them.</summary>
    public void Dispose()
    {
        _stopping = true;
        Interlocked.Add(ref _shared.State, FirstJob);
        foreach (Member member in _members)
        {
            member.Wake();
            member.Dispose();
        }

        _allLeft.Dispose();
    }

    private static void Claim<TWork>(ThreadTeam team, void* work, int thread)
        where TWork : struct, IWork
    {
        ref TWork job = ref Unsafe.AsRef<TWork>(work);
        int tasks = team._tasks;
        try
        {
            for (int task; (task = Interlocked.Increment(ref team._shared.Next) - 1) < tasks;)
            {
                job.Run(task, thread);
            }
        }
        catch (Exception failure)
        {
            Interlocked.CompareExchange(ref team._failure, failure, null);
            Interlocked.Exchange(ref team._shared.Next, tasks);
        }
    }

    private void OpenJob(int helpers)
    {
        // A full fence: what describes the job is visible before the job is, and the job before Wake looks who sleeps.
        Interlocked.Add(ref _shared.State, FirstJob + Open);
        for (int i = 0; i < helpers; i++)
        {
            _members[i].Wake();
        }
    }

    private void CloseJob()
    {
        long state = Interlocked.And(ref _shared.State, ~Open) & InsideMask;
        long start = 0;
        for (int spins = 1; state != 0; spins++)
        {
            if (SpinFor(ref start, spins))
            {
                // Asleep, this thread leaves its core to the one it waits for, should that one have none.
                state = Interlocked.Or(ref _shared.State, CallerSleeps) & InsideMask;
                if (state != 0)
                {
                    _allLeft.Wait();
                }

                Interlocked.And(ref _shared.State, ~CallerSleeps);
                return;
            }

            state = Volatile.Read(ref _shared.State) & InsideMask;
        }
    }

    private void Leave()
    {
        if ((Interlocked.Decrement(ref _shared.State) & (InsideMask | CallerSleeps)) == CallerSleeps)
        {
            _allLeft.Release();
        }
    }

    // Pauses; true when the time for spinning is over. The clock costs more than a pause, so it is read now and then.
    private static bool SpinFor(ref long start, int spins)
    {
        Thread.SpinWait(1);
        if (spins % 16 != 0)
        {
            return false;
        }

        long now = Stopwatch.GetTimestamp();
        start = start == 0 ? now : start;
        return now - start > s_spinTicks;
    }

    // Each on a pair of cache lines of its own: threads that wait read the state while others count tasks.
    [StructLayout(LayoutKind.Explicit, Size = 384)]
    private struct Shared
    {
        [FieldOffset(128)]
        public long State;

        [FieldOffset(256)]
        public int Next;
    }

    private sealed class Member : IDisposable
    {
        private readonly ThreadTeam _team;
        private readonly int _index;
        private readonly Thread _thread;
        private readonly SemaphoreSlim _wake = new(0);
        private int _asleep;

        public Member(ThreadTeam team, int index)
        {
            (_team, _index) = (team, index);
            _thread = new Thread(Work) { IsBackground = true, Name = $"kernels {index}" };
            _thread.Start();
        }

        public void Wake()
        {
            if (Volatile.Read(ref _asleep) != 0 && Interlocked.Exchange(ref _asleep, 0) != 0)
            {
                _wake.Release();
            }
        }

        public void Dispose()
        {
            _thread.Join();
            _wake.Dispose();
        }

        private void Work()
        {
            long seen = 0;
            while (!_team._stopping)
            {
                seen = WaitAfter(seen);
                if (TryEnter(seen))
                {
                    _team._claim(_team, _team._work, _index);
                    _team.Leave();
                }
            }
        }

        // Waits until a job has opened after the one seen; returns its number.
        private long WaitAfter(long seen)
        {
            long start = 0;
            for (int spins = 1; ; spins++)
            {
                long job = Volatile.Read(ref _team._shared.State) & -FirstJob;
                if (job != seen)
                {
                    return job;
                }

                if (SpinFor(ref start, spins))
                {
                    Interlocked.Exchange(ref _asleep, 1);
                    job = Volatile.Read(ref _team._shared.State) & -FirstJob;

                    // If somebody cleared the flag meanwhile, a permit is on its way and must be taken.
                    if (job == seen || Interlocked.Exchange(ref _asleep, 0) == 0)
                    {
                        _wake.Wait();
                    }

                    (start, spins) = (0, 0);
                }
            }
        }

        private bool TryEnter(long job)
        {
            long state = Volatile.Read(ref _team._shared.State);
            while ((state & -FirstJob) == job && (state & Open) != 0)
            {
                long found = Interlocked.CompareExchange(ref _team._shared.State, state + 1, state);
                if (found == state)
                {
                    return true;
                }

                state = found;
            }

            return false;
        }
    }
}
