namespace TinyLlama.Compute.Cpu;

/// <summary>Sums over many values, in fp64 over fixed chunks: the same bits for any number of threads.</summary>
/// <remarks>Within a chunk, squares add up in lanes of fp32 over short blocks, blocks in fp64. Memory-bound: 4 bytes an element.</remarks>
internal static unsafe class Reductions
{
    /// <summary>Values whose squares are summed in fp32: 32 a lane at most, for an error below fp32's own rounding.</summary>
    private const int Block = 256;

    /// <summary>total += Σ values.</summary>
    public static void Sum(Tensor total, Tensor values)
    {
        total.Require(1, 1, DType.F64);
        values.Require(values.Rows, values.Columns);
        double sum = 0;
        for (int row = 0; row < values.Rows; row++)
        {
            float* x = values.F32(row);
            for (int i = 0; i < values.Columns; i++)
            {
                sum += x[i];
            }
        }

        *total.F64() += sum;
    }

    /// <summary>total = Σ values², one partial sum for each chunk of each tensor, then a pairwise tree over them all.</summary>
    public static void SumOfSquares<V>(ThreadTeam team, Tensor total, Tensor partials, ReadOnlySpan<Tensor> values)
        where V : struct, ILanes<V>
    {
        int count = Backend.SumOfSquaresPartials(values);
        total.Require(1, 1, DType.F64);
        Shape.Require(
            partials.Type == DType.F64 && partials.IsContiguous && partials.Count >= count, "a partial sum for each chunk");
        double* next = partials.F64();
        foreach (Tensor tensor in values)
        {
            tensor.Require(tensor.Rows, tensor.Columns);
            Shape.Require(tensor.IsContiguous, "contiguous tensors");
            SquaresWork<V> work = new(next, tensor.F32(), tensor.Count);
            int chunks = (int)((tensor.Count + Backend.SumChunk - 1) / Backend.SumChunk);
            team.Run(ref work, chunks);
            next += chunks;
        }

        *total.F64() = Tree(partials.F64(), count);
    }

    // The neighbours at distance 1, 2, 4, … add up, so the tree depends on the number of partial sums alone.
    private static double Tree(double* sums, int count)
    {
        for (int distance = 1; distance < count; distance *= 2)
        {
            for (int i = 0; i + distance < count; i += 2 * distance)
            {
                sums[i] += sums[i + distance];
            }
        }

        return count > 0 ? sums[0] : 0;
    }

    private readonly struct SquaresWork<V>(double* partials, float* values, long count) : IWork
        where V : struct, ILanes<V>
    {
        public void Run(int task, int thread)
        {
            float* x = values + ((nint)task * Backend.SumChunk);
            int length = (int)Math.Min(Backend.SumChunk, count - ((long)task * Backend.SumChunk));
            double sum = 0;
            int i = 0;
            for (int end = Block; i <= length - (2 * V.Count); end += Block)
            {
                V s0 = default, s1 = default;
                for (; i < end && i <= length - (2 * V.Count); i += 2 * V.Count)
                {
                    V x0 = V.Load(x + i), x1 = V.Load(x + i + V.Count);
                    s0 = V.Fma(x0, x0, s0);
                    s1 = V.Fma(x1, x1, s1);
                }

                sum += (s0 + s1).Sum();
            }

            for (; i < length; i++)
            {
                sum += (double)x[i] * x[i];
            }

            partials[task] = sum;
        }
    }
}
