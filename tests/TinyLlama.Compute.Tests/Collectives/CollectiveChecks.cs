using System.Runtime.InteropServices;
using TinyLlama.Compute.Collectives;
using TinyLlama.Compute.Cpu;

namespace TinyLlama.Compute.Tests.Collectives;

/// <summary>What every transport must do, as each rank runs it. A check throws where something is wrong.</summary>
internal static class CollectiveChecks
{
    // Parts of no element, one, an odd number, more than a packet has, more than a socket takes at once.
    private static readonly (int Rows, int Columns)[] s_shapes = [(0, 4), (1, 1), (1, 7), (37, 31), (257, 1031)];

    /// <summary>All, by name.</summary>
    public static IReadOnlyDictionary<string, Action<Collective>> All { get; } = new Dictionary<string, Action<Collective>>
    {
        ["all-gather"] = AllGather,
        ["all-gather in place"] = AllGatherInPlace,
        ["all-to-all"] = AllToAll,
        ["more than the system's buffers hold, both ways"] = Large,
        ["reduce-scatter of F32"] = static world => ReduceScatter(world, DType.F32),
        ["reduce-scatter of BF16"] = static world => ReduceScatter(world, DType.BF16),
        ["reduce-scatter in place"] = ReduceScatterInPlace,
        ["broadcast"] = Broadcast,
        ["send and receive around a ring"] = Ring,
        ["parts of the world"] = Split,
        ["a few values"] = FewValues,
        ["many operations in the queue"] = ManyQueued,
    };

    private static void AllGather(Collective world)
    {
        foreach ((int rows, int columns) in s_shapes)
        {
            using var memory = new HostMemory();
            Tensor own = Fill(memory.Take(rows, columns), world.Rank), all = memory.Take(rows * world.Size, columns);
            world.AllGather(all, own).Wait();
            for (int i = 0; i < world.Size; i++)
            {
                RequireFilled(all.RowRange(i * rows, rows), i);
            }
        }
    }

    private static void AllGatherInPlace(Collective world)
    {
        using var memory = new HostMemory();
        const int Rows = 515;
        Tensor all = memory.Take(Rows * world.Size, 513);
        world.AllGather(all, Fill(all.RowRange(world.Rank * Rows, Rows), world.Rank)).Wait();
        for (int i = 0; i < world.Size; i++)
        {
            RequireFilled(all.RowRange(i * Rows, Rows), i);
        }
    }

    private static void AllToAll(Collective world)
    {
        foreach ((int rows, int columns) in s_shapes)
        {
            using var memory = new HostMemory();
            Tensor source = memory.Take(rows * world.Size, columns), destination = memory.Take(rows * world.Size, columns);
            for (int i = 0; i < world.Size; i++)
            {
                Fill(source.RowRange(i * rows, rows), Letter(world.Rank, i));
            }

            world.AllToAll(destination, source).Wait();
            for (int i = 0; i < world.Size; i++)
            {
                RequireFilled(destination.RowRange(i * rows, rows), Letter(i, world.Rank));
            }
        }

        static int Letter(int from, int to) => (from * 64) + to;
    }

    private static void Large(Collective world)
    {
        using var memory = new HostMemory();
        const int Rows = 6;
        Tensor source = memory.Take(Rows * world.Size, 1 << 18), destination = memory.Take(Rows * world.Size, 1 << 18);
        source.HostSpan<float>().Fill(world.Rank + 1);
        world.AllToAll(destination, source).Wait();
        for (int i = 0; i < world.Size; i++)
        {
            Require(!destination.RowRange(i * Rows, Rows).HostSpan<float>().ContainsAnyExcept(i + 1f), $"the part of rank {i}");
        }
    }

    // Values whose sum depends on the order, so that nothing but the pairwise tree over the ranks gives these bits.
    private static void ReduceScatter(Collective world, DType type)
    {
        if (!int.IsPow2(world.Size))
        {
            return;
        }

        foreach ((int rows, int columns) in s_shapes)
        {
            using var memory = new HostMemory();
            Tensor source = memory.Take(rows * world.Size, columns, type), scratch = memory.Take(rows * world.Size, columns, type);
            Tensor sum = memory.Take(rows, columns);
            for (long i = 0; i < source.Count; i++)
            {
                if (type == DType.F32)
                {
                    source.HostSpan<float>()[(int)i] = Addend(world.Rank, i);
                }
                else
                {
                    source.HostSpan<ushort>()[(int)i] = Copy.ToBFloat16(Addend(world.Rank, i));
                }
            }

            world.ReduceScatter(sum, source, scratch).Wait();
            RequireSum(sum, world, type);
        }
    }

    private static void ReduceScatterInPlace(Collective world)
    {
        if (!int.IsPow2(world.Size))
        {
            return;
        }

        using var memory = new HostMemory();
        const int Rows = 33;
        Tensor source = memory.Take(Rows * world.Size, 65), scratch = memory.Take(Rows * world.Size, 65);
        for (int i = 0; i < source.Count; i++)
        {
            source.HostSpan<float>()[i] = Addend(world.Rank, i);
        }

        Tensor part = source.RowRange(world.Rank * Rows, Rows);
        world.ReduceScatter(part, source, scratch).Wait();
        RequireSum(part, world, DType.F32);
    }

    private static void Broadcast(Collective world)
    {
        foreach ((int rows, int columns) in s_shapes)
        {
            for (int root = 0; root < world.Size; root++)
            {
                using var memory = new HostMemory();
                Tensor values = Fill(memory.Take(rows, columns), world.Rank);
                world.Broadcast(values, root).Wait();
                RequireFilled(values, root);
            }
        }
    }

    // Even ranks send first, odd ones receive first, the last one of an odd number after them.
    private static void Ring(Collective world)
    {
        foreach ((int rows, int columns) in s_shapes)
        {
            using var memory = new HostMemory();
            Tensor own = Fill(memory.Take(rows, columns), world.Rank), other = memory.Take(rows, columns);
            int next = (world.Rank + 1) % world.Size, previous = (world.Rank + world.Size - 1) % world.Size;
            Ticket last;
            if (world.Rank % 2 == 0)
            {
                world.Send(own, next);
                last = world.Receive(other, previous);
            }
            else
            {
                world.Receive(other, previous);
                last = world.Send(own, next);
            }

            last.Wait();
            RequireFilled(other, previous);
        }
    }

    private static void Split(Collective world)
    {
        // Odd and even ranks, in descending order; then the halves of a part.
        using Collective part = world.Split(world.Rank % 2, -world.Rank);
        int[] members = [.. Enumerable.Range(0, world.Size).Where(i => i % 2 == world.Rank % 2).OrderDescending()];
        Require(part.Size == members.Length && members[part.Rank] == world.Rank, $"rank {world.Rank} is {part.Rank} of {part.Size}");
        Require(part.Hosts.Count == part.Size, "a host for each rank of a part");
        int[] gathered = new int[part.Size];
        part.AllGather(gathered, [world.Rank]);
        Require(gathered.SequenceEqual(members), "the members of a part, in the order of their keys");

        using Collective half = part.Split(part.Rank / 2, 0);
        int[] inHalf = new int[half.Size];
        half.AllGather(inHalf, [world.Rank]);
        Require(inHalf.SequenceEqual(members.Chunk(2).ElementAt(part.Rank / 2)), "a part of a part, in the order of its ranks");
        world.Barrier();
    }

    private static void FewValues(Collective world)
    {
        var all = new (double Norm, long Count)[world.Size];
        world.AllGather(all, [(world.Rank + 0.5, world.Rank)]);
        Require(all.SequenceEqual(Enumerable.Range(0, world.Size).Select(i => (i + 0.5, (long)i))), "all ranks' values");
        Require(world.Hosts.Count == world.Size && world.LocalRank == world.Rank, "all ranks on this host");
    }

    // More than the queue holds at first, none waited for but the last.
    private static void ManyQueued(Collective world)
    {
        using var memory = new HostMemory();
        const int Operations = 300;
        Tensor[] values = [.. Enumerable.Range(0, Operations).Select(i => Fill(memory.Take(3, 5), (i * world.Size) + world.Rank))];
        Ticket last = default;
        for (int i = 0; i < Operations; i++)
        {
            last = world.Broadcast(values[i], i % world.Size);
        }

        last.Wait();
        for (int i = 0; i < Operations; i++)
        {
            RequireFilled(values[i], (i * world.Size) + (i % world.Size));
        }
    }

    private static float Addend(int rank, long i) => (((rank * 7919) + (i * 104729)) % 2003 - 1001) * MathF.Pow(2, ((rank * 5) + i) % 23);

    private static void RequireSum(Tensor sum, Collective world, DType type)
    {
        ReadOnlySpan<float> actual = sum.HostSpan<float>();
        for (int i = 0; i < actual.Length; i++)
        {
            long index = (world.Rank * sum.Count) + i;
            float expected = Tree(0, world.Size);
            if (BitConverter.SingleToInt32Bits(expected) != BitConverter.SingleToInt32Bits(actual[i]))
            {
                throw new InvalidOperationException($"sum {i} of {actual.Length}: {actual[i]:R} for {expected:R}");
            }

            float Tree(int first, int count)
            {
                float addend = Addend(first, index);
                return count > 1 ? Tree(first, count / 2) + Tree(first + (count / 2), count / 2)
                    : type == DType.BF16 ? Copy.FromBFloat16(Copy.ToBFloat16(addend)) : addend;
            }
        }
    }

    private static Tensor Fill(Tensor tensor, int seed)
    {
        Span<float> values = tensor.HostSpan<float>();
        for (int i = 0; i < values.Length; i++)
        {
            values[i] = Value(seed, i);
        }

        return tensor;
    }

    private static void RequireFilled(Tensor tensor, int seed)
    {
        ReadOnlySpan<float> values = tensor.HostSpan<float>();
        for (int i = 0; i < values.Length; i++)
        {
            if (values[i] != Value(seed, i))
            {
                throw new InvalidOperationException($"({tensor.Rows}, {tensor.Columns}) of {seed}: element {i} is {values[i]}");
            }
        }
    }

    private static float Value(int seed, int i) => (seed * 1000) + (i % 977);

    private static void Require(bool condition, string what)
    {
        if (!condition)
        {
            throw new InvalidOperationException(what);
        }
    }
}

/// <summary>Memory for the tensors of a check.</summary>
internal sealed unsafe class HostMemory : IDisposable
{
    private readonly List<nint> _owned = [];

    public Tensor Take(int rows, int columns, DType type = DType.F32)
    {
        nuint bytes = (nuint)(rows * type.RowBytes(columns));
        void* address = NativeMemory.AlignedAlloc(Math.Max(bytes, 1), 64);
        NativeMemory.Clear(address, bytes);
        _owned.Add((nint)address);
        return new Tensor((nint)address, rows, columns, columns, type);
    }

    public void Dispose() => _owned.ForEach(static address => NativeMemory.AlignedFree((void*)address));
}
