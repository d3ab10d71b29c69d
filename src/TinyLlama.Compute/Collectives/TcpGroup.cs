namespace TinyLlama.Compute.Collectives;

/// <summary>Ranks that send each other messages over a <see cref="TcpMesh"/>.</summary>
/// <param name="mesh">The sockets; all groups of a process share them.</param>
/// <param name="id">The group's number, the same on all its ranks.</param>
/// <param name="members">The ranks of the mesh that belong to it, in the order of their numbers here.</param>
internal sealed unsafe class TcpGroup(TcpMesh mesh, int id, int[] members) : RankGroup
{
    private readonly int _rank = Array.IndexOf(members, mesh.Rank);
    private long _sequence;

    /// <inheritdoc/>
    public override int Rank => _rank;

    /// <inheritdoc/>
    public override int Size => members.Length;

    /// <inheritdoc/>
    public override string Description => "sockets";

    /// <summary>Around a ring: each part crosses each link between two hosts once, however many ranks a host has.</summary>
    public override void AllGather(byte* destination, byte* source, long bytes)
    {
        Copy(destination + (_rank * bytes), source, bytes);
        TcpHeader header = Next(TcpOperation.AllGather, bytes);
        for (int round = 0; round < Size - 1; round++)
        {
            int known = Place(_rank - round);
            int next = Place(_rank - round - 1);
            mesh.Exchange(
                header, members[Place(_rank + 1)], destination + (known * bytes),
                members[Place(_rank - 1)], destination + (next * bytes), members[next]);
        }
    }

    /// <inheritdoc/>
    public override void AllToAll(byte* destination, byte* source, long bytes)
    {
        Copy(destination + (_rank * bytes), source + (_rank * bytes), bytes);
        TcpHeader header = Next(TcpOperation.AllToAll, bytes);
        for (int round = 1; round < Size; round++)
        {
            int to = Place(_rank + round);
            int from = Place(_rank - round);
            mesh.Exchange(header, members[to], source + (to * bytes), members[from], destination + (from * bytes));
        }
    }

    /// <summary>Down a binomial tree.</summary>
    public override void Broadcast(byte* values, long bytes, int root)
    {
        TcpHeader header = Next(TcpOperation.Broadcast, bytes);
        int place = Place(_rank - root);
        int bit = 1;
        while (bit < Size && (place & bit) == 0)
        {
            bit <<= 1;
        }

        if (place != 0)
        {
            mesh.Exchange(header, -1, null, members[Place(_rank - bit)], values);
        }

        for (bit >>= 1; bit > 0; bit >>= 1)
        {
            if (place + bit < Size)
            {
                mesh.Exchange(header, members[Place(_rank + bit)], values, -1, null);
            }
        }
    }

    // Only two ranks call these: they have no place in the order of the group's operations.

    /// <inheritdoc/>
    public override void Send(byte* values, long bytes, int to) =>
        mesh.Exchange(new TcpHeader(id, TcpOperation.Send, 0, bytes), members[to], values, -1, null);

    /// <inheritdoc/>
    public override void Receive(byte* values, long bytes, int from) =>
        mesh.Exchange(new TcpHeader(id, TcpOperation.Send, 0, bytes), -1, null, members[from], values);

    /// <inheritdoc/>
    public override RankGroup Split(int color, int key)
    {
        const int Fields = 3;
        int* choices = stackalloc int[Size * Fields];
        int* own = choices + (_rank * Fields);
        (own[0], own[1], own[2]) = (color, key, mesh.NextGroup);
        AllGather((byte*)choices, (byte*)own, Fields * sizeof(int));
        int group = 0;
        var chosen = new List<(int Key, int Rank)>();
        for (int i = 0; i < Size; i++)
        {
            int* choice = choices + (i * Fields);
            group = Math.Max(group, choice[2]);
            if (choice[0] == color)
            {
                chosen.Add((choice[1], i));
            }
        }

        chosen.Sort();
        mesh.NextGroup = group + 1;
        return new TcpGroup(mesh, group, [.. chosen.Select(choice => members[choice.Rank])]);
    }

    /// <inheritdoc/>
    public override void Abort(string reason, int exitCode) => mesh.Abort(reason);

    /// <inheritdoc/>
    public override void Dispose()
    {
        mesh.Dispose();
        base.Dispose();
    }

    private TcpHeader Next(TcpOperation operation, long bytes) => new(id, operation, _sequence++, bytes);

    private int Place(int rank) => ((rank % Size) + Size) % Size;

    private static void Copy(byte* to, byte* from, long bytes)
    {
        if (to != from)
        {
            Buffer.MemoryCopy(from, to, bytes, bytes);
        }
    }
}
