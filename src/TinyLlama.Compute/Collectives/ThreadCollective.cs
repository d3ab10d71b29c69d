namespace TinyLlama.Compute.Collectives;

/// <summary>Ranks that are threads of one process and copy from each other's memory.</summary>
public static class ThreadCollective
{
    /// <summary>Makes the ranks of a world; each belongs to a thread of its own.</summary>
    /// <param name="size">Their number.</param>
    /// <param name="timeout">For how long an operation may run; 10 minutes unless told.</param>
    public static Collective[] Create(int size, TimeSpan? timeout = null)
    {
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(size);
        var meeting = new Meeting(size, new World());
        string[] hosts = [.. Enumerable.Repeat(Environment.MachineName, size)];
        return
        [
            .. Enumerable.Range(0, size).Select(rank => new LaneCollective(
                new CollectiveLane($"rank {rank}", timeout ?? TimeSpan.FromMinutes(10)), new Group(meeting, rank), hosts)),
        ];
    }

    // What all groups wait on, until something changes or the world ends.
    private sealed class World
    {
        private string? _end;

        public void Wait()
        {
            if (_end is null)
            {
                Monitor.Wait(this);
            }

            if (_end is not null)
            {
                throw new CollectiveException(_end);
            }
        }

        public void End(string reason)
        {
            lock (this)
            {
                _end ??= reason;
                Monitor.PulseAll(this);
            }
        }
    }

    // Where the ranks of a group meet: each shows two pointers and two numbers, and all read each other's between two barriers.
    private sealed class Meeting(int size, World world)
    {
        private int _here;
        private long _meetings;

        public nint[] Addresses { get; } = new nint[size];

        public (int Color, int Key)[] Choices { get; } = new (int, int)[size];

        public Meeting[] Parts { get; } = new Meeting[size];

        public Queue<nint>[,] Letters { get; } = Boxes(size);

        public int Size => size;

        public World World => world;

        // Waits until all ranks are here.
        public void Meet()
        {
            lock (world)
            {
                long meeting = _meetings;
                if (++_here == size)
                {
                    (_here, _meetings) = (0, meeting + 1);
                    Monitor.PulseAll(world);
                }

                while (_meetings == meeting)
                {
                    world.Wait();
                }
            }
        }

        private static Queue<nint>[,] Boxes(int size)
        {
            var boxes = new Queue<nint>[size, size];
            for (int i = 0; i < size * size; i++)
            {
                boxes[i / size, i % size] = new Queue<nint>();
            }

            return boxes;
        }
    }

    private sealed unsafe class Group(Meeting meeting, int rank) : RankGroup
    {
        public override int Rank => rank;

        public override int Size => meeting.Size;

        public override string Description => "threads";

        public override void AllGather(byte* destination, byte* source, long bytes)
        {
            Show(source);
            for (int i = 0; i < Size; i++)
            {
                Copy(destination + (i * bytes), (byte*)meeting.Addresses[i], bytes);
            }

            meeting.Meet();
        }

        public override void AllToAll(byte* destination, byte* source, long bytes)
        {
            Show(source);
            for (int i = 0; i < Size; i++)
            {
                Copy(destination + (i * bytes), (byte*)meeting.Addresses[i] + (rank * bytes), bytes);
            }

            meeting.Meet();
        }

        public override void Broadcast(byte* values, long bytes, int root)
        {
            Show(values);
            Copy(values, (byte*)meeting.Addresses[root], bytes);
            meeting.Meet();
        }

        // The sender leaves when its bytes were copied: then its letter is gone from the box.
        public override void Send(byte* values, long bytes, int to)
        {
            Queue<nint> box = meeting.Letters[rank, to];
            lock (meeting.World)
            {
                box.Enqueue((nint)values);
                Monitor.PulseAll(meeting.World);
                while (box.Count > 0)
                {
                    meeting.World.Wait();
                }
            }
        }

        public override void Receive(byte* values, long bytes, int from)
        {
            Queue<nint> box = meeting.Letters[from, rank];
            lock (meeting.World)
            {
                while (box.Count == 0)
                {
                    meeting.World.Wait();
                }

                Copy(values, (byte*)box.Dequeue(), bytes);
                Monitor.PulseAll(meeting.World);
            }
        }

        public override RankGroup Split(int color, int key)
        {
            meeting.Choices[rank] = (color, key);
            meeting.Meet();
            int[] members =
            [
                .. Enumerable.Range(0, Size).Where(i => meeting.Choices[i].Color == color).OrderBy(i => meeting.Choices[i].Key).ThenBy(static i => i),
            ];
            if (members[0] == rank)
            {
                var part = new Meeting(members.Length, meeting.World);
                Array.ForEach(members, i => meeting.Parts[i] = part);
            }

            meeting.Meet();
            var group = new Group(meeting.Parts[rank], Array.IndexOf(members, rank));
            meeting.Meet();
            return group;
        }

        public override void Abort(string reason, int exitCode) => meeting.World.End($"rank {rank}: {reason}");

        private void Show(byte* address)
        {
            meeting.Addresses[rank] = (nint)address;
            meeting.Meet();
        }

        private static void Copy(byte* to, byte* from, long bytes)
        {
            if (to != from)
            {
                Buffer.MemoryCopy(from, to, bytes, bytes);
            }
        }
    }
}
