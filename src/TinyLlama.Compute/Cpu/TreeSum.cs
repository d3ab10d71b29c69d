using System.Numerics;

namespace TinyLlama.Compute.Cpu;

/// <summary>Sums of vectors in a pairwise tree: (0 + 1) + (2 + 3) … element by element, so that no width of registers changes a bit.</summary>
/// <remarks>Memory-bound: every part is read once; what is between stays in the first-level cache.</remarks>
internal static unsafe class TreeSum
{
    private const int Block = 1024;
    private const int MostLevels = 16;

    /// <summary>destination = the tree over parts that lie one after the other.</summary>
    /// <param name="destination">Receives count values; it may be one of the parts.</param>
    /// <param name="parts">parts · count values.</param>
    /// <param name="type">Their type, F32 or BF16; sums are F32.</param>
    /// <param name="number">How many; a power of two.</param>
    /// <param name="count">Values of a part.</param>
    public static void Run(float* destination, byte* parts, DType type, int number, long count)
    {
        Shape.Require(BitOperations.IsPow2(number) && number <= 1 << MostLevels, "parts whose number is a power of two");
        float* levels = stackalloc float[Block * (BitOperations.Log2((uint)number) + 1)];
        long partBytes = count * type.ByteCount();
        for (long done = 0; done < count; done += Block)
        {
            int length = (int)Math.Min(Block, count - done);
            Sum(levels, parts + (done * type.ByteCount()), partBytes, type, number, length);
            Buffer.MemoryCopy(levels, destination + done, length * sizeof(float), length * sizeof(float));
        }
    }

    /// <summary>destination += addend, of one shape.</summary>
    public static void Add(ThreadTeam team, Tensor destination, Tensor addend)
    {
        destination.Require(addend.Rows, addend.Columns);
        addend.Require(addend.Rows, addend.Columns);
        Shape.Require(destination.IsContiguous && addend.IsContiguous, "contiguous tensors");
        Rows rows = Rows.Of(addend);
        Work work = new(rows, destination, addend);
        team.Run(ref work, rows.Tasks);
    }

    // The sum of the parts from here on, left in the first of the free levels.
    private static void Sum(float* free, byte* parts, long partBytes, DType type, int number, int length)
    {
        if (number == 1)
        {
            Copy.Widen(free, parts, type, length);
            return;
        }

        Sum(free, parts, partBytes, type, number / 2, length);
        Sum(free + Block, parts + (number / 2 * partBytes), partBytes, type, number / 2, length);
        Add(free, free + Block, length);
    }

    private static void Add(float* sum, float* addend, long count)
    {
        long i = 0;
        for (; i <= count - Vector<float>.Count; i += Vector<float>.Count)
        {
            Vector.Store(Vector.Load(sum + i) + Vector.Load(addend + i), sum + i);
        }

        for (; i < count; i++)
        {
            sum[i] += addend[i];
        }
    }

    private readonly struct Work(Rows rows, Tensor destination, Tensor addend) : IWork
    {
        public void Run(int task, int thread) => Add(
            destination.F32(rows.First(task)), addend.F32(rows.First(task)), (long)(rows.End(task) - rows.First(task)) * addend.Columns);
    }
}
