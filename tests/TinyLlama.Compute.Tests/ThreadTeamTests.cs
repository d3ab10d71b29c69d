using TinyLlama.Compute.Cpu;

namespace TinyLlama.Compute.Tests;

public sealed unsafe class ThreadTeamTests
{
    [Theory]
    [InlineData(1, 100)]
    [InlineData(2, 0)]
    [InlineData(2, 1)]
    [InlineData(2, 1000)]
    [InlineData(3, 2)]
    [InlineData(5, 777)]
    public void Each_task_runs_once(int threads, int tasks)
    {
        using ThreadTeam team = new(threads);
        int[] runs = new int[tasks];
        int[] highestThread = new int[1];
        Count work = new() { Runs = runs, HighestThread = highestThread };
        team.Run(ref work, tasks);
        Assert.All(runs, count => Assert.Equal(1, count));
        Assert.InRange(highestThread[0], 0, threads - 1);
    }

    [Fact]
    public void Many_jobs_of_changing_size_follow_each_other()
    {
        using ThreadTeam team = new(3);
        int[] runs = new int[8];
        int[] highestThread = new int[1];
        int[] expected = new int[8];
        Count work = new() { Runs = runs, HighestThread = highestThread };
        for (int job = 0; job < 30_000; job++)
        {
            int tasks = job % 9;
            team.Run(ref work, tasks);
            for (int task = 0; task < tasks; task++)
            {
                expected[task]++;
            }
        }

        Assert.Equal(expected, runs);
    }

    [Fact]
    public void A_job_wakes_threads_that_went_to_sleep()
    {
        using ThreadTeam team = new(2);
        for (int job = 0; job < 20; job++)
        {
            // Long enough for the other thread to stop spinning.
            Thread.Sleep(1);
            using CountdownEvent both = new(2);
            Meet work = new() { Both = both };
            team.Run(ref work, 2);
        }
    }

    [Fact]
    public void The_first_exception_of_a_task_reaches_the_caller_and_the_team_goes_on()
    {
        using ThreadTeam team = new(2);
        for (int round = 0; round < 100; round++)
        {
            InvalidDataException failure = Assert.Throws<InvalidDataException>(() =>
            {
                FailAt work = new() { Task = round };
                team.Run(ref work, 200);
            });
            Assert.Equal("task " + round, failure.Message);
        }

        int[] runs = new int[10];
        Count after = new() { Runs = runs, HighestThread = new int[1] };
        team.Run(ref after, runs.Length);
        Assert.All(runs, count => Assert.Equal(1, count));
    }

    [Fact]
    public void A_job_inside_a_job_is_refused()
    {
        using ThreadTeam team = new(2);
        Assert.Throws<InvalidOperationException>(() =>
        {
            Nest work = new() { Team = team };
            team.Run(ref work, 2);
        });
    }

    [Fact]
    public void A_job_allocates_nothing()
    {
        using ThreadTeam team = new(2);
        Count work = new() { Runs = new int[64], HighestThread = new int[1] };
        team.Run(ref work, 64);
        long before = GC.GetAllocatedBytesForCurrentThread();
        for (int i = 0; i < 100; i++)
        {
            team.Run(ref work, 64);
        }

        Assert.Equal(0, GC.GetAllocatedBytesForCurrentThread() - before);
    }

    private struct Count : IWork
    {
        public int[] Runs;
        public int[] HighestThread;

        public readonly void Run(int task, int thread)
        {
            Interlocked.Increment(ref Runs[task]);
            int highest = Volatile.Read(ref HighestThread[0]);
            while (thread > highest)
            {
                highest = Interlocked.CompareExchange(ref HighestThread[0], thread, highest);
            }
        }
    }

    // Ends only if two threads are inside at once.
    private struct Meet : IWork
    {
        public CountdownEvent Both;

        public readonly void Run(int task, int thread)
        {
            Both.Signal();
            Both.Wait();
        }
    }

    private struct FailAt : IWork
    {
        public int Task;

        public readonly void Run(int task, int thread)
        {
            if (task == Task)
            {
                throw new InvalidDataException("task " + task);
            }
        }
    }

    private struct Nest : IWork
    {
        public ThreadTeam Team;

        public readonly void Run(int task, int thread)
        {
            Nothing work = default;
            Team.Run(ref work, 2);
        }
    }

    private readonly struct Nothing : IWork
    {
        public void Run(int task, int thread)
        {
        }
    }
}
