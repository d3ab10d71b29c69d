namespace TinyLlama.Compute.Cpu;

/// <summary>Cross-entropy of each row in nats, and its gradient in place: dLogits = (softmax - target) · scale.</summary>
/// <remarks>
/// Shapes: logits (N, V), targets and losses (N, 1), scale (1, 1) or empty. A negative target is ignored: loss and
/// gradient are 0. With a gradient each exponential is computed once and stays in place; sums over the vocabulary run in
/// lanes over short blocks, over the blocks in fp64. Bound by the exponentials while a row lies in cache.
/// </remarks>
internal static unsafe class CrossEntropy
{
    /// <summary>Logits whose exponentials are summed in fp32 before the sum goes on in fp64.</summary>
    private const int Block = 512;

    /// <summary>Writes losses, and gradients over the logits where there is a scale.</summary>
    public static void Forward<V>(ThreadTeam team, Tensor losses, Tensor logits, Tensor targets, Tensor scale)
        where V : struct, ILanes<V>
    {
        logits.Require(logits.Rows, logits.Columns);
        losses.Require(logits.Rows, 1);
        targets.RequireIndices(logits.Rows, logits.Columns, allowNegative: true);
        if (!scale.IsEmpty)
        {
            scale.Require(1, 1);
        }

        Rows rows = Rows.Of(logits);
        Work<V> work = new(rows, losses, logits, targets, scale);
        team.Run(ref work, rows.Tasks);
    }

    private readonly struct Work<V>(Rows rows, Tensor losses, Tensor logits, Tensor targets, Tensor scale) : IWork
        where V : struct, ILanes<V>
    {
        public void Run(int task, int thread)
        {
            int vocabulary = logits.Columns;
            for (int n = rows.First(task); n < rows.End(task); n++)
            {
                float* x = logits.F32(n);
                int target = *targets.I32(n);
                if (target < 0)
                {
                    *losses.F32(n) = 0;
                    if (!scale.IsEmpty)
                    {
                        new Span<float>(x, vocabulary).Clear();
                    }

                    continue;
                }

                float max = Max(x, vocabulary);
                float chosen = x[target];
                double sum = scale.IsEmpty ? SumExp<Forget>(x, max, vocabulary) : SumExp<Keep>(x, max, vocabulary);
                *losses.F32(n) = (float)(Math.Log(sum) + ((double)max - chosen));
                if (!scale.IsEmpty)
                {
                    Scale(x, (float)(*scale.F32() / sum), vocabulary);
                    x[target] -= *scale.F32();
                }
            }
        }

        private static float Max(float* x, int count)
        {
            V m0 = V.Create(float.NegativeInfinity), m1 = m0, m2 = m0, m3 = m0;
            int i = 0;
            for (; i <= count - (4 * V.Count); i += 4 * V.Count)
            {
                m0 = V.Max(m0, V.Load(x + i));
                m1 = V.Max(m1, V.Load(x + i + V.Count));
                m2 = V.Max(m2, V.Load(x + i + (2 * V.Count)));
                m3 = V.Max(m3, V.Load(x + i + (3 * V.Count)));
            }

            float max = V.Max(V.Max(m0, m1), V.Max(m2, m3)).Max();
            for (; i < count; i++)
            {
                max = MathF.Max(max, x[i]);
            }

            return max;
        }

        private static double SumExp<TKeep>(float* x, float max, int count)
            where TKeep : struct
        {
            double sum = 0;
            int i = 0;
            for (int end = Block; i <= count - (2 * V.Count); end += Block)
            {
                V s0 = default, s1 = default;
                for (; i < end && i <= count - (2 * V.Count); i += 2 * V.Count)
                {
                    V e0 = Exponential.ExpOfUpToZero(V.Load(x + i) - V.Create(max));
                    V e1 = Exponential.ExpOfUpToZero(V.Load(x + i + V.Count) - V.Create(max));
                    s0 += e0;
                    s1 += e1;
                    if (typeof(TKeep) == typeof(Keep))
                    {
                        e0.Store(x + i);
                        e1.Store(x + i + V.Count);
                    }
                }

                sum += (s0 + s1).Sum();
            }

            for (; i < count; i++)
            {
                float e = Exponential.ExpOfUpToZero(new Lanes1(x[i] - max)).Sum();
                sum += e;
                x[i] = typeof(TKeep) == typeof(Keep) ? e : x[i];
            }

            return sum;
        }

        private static void Scale(float* x, float scale, int count)
        {
            int i = 0;
            for (; i <= count - V.Count; i += V.Count)
            {
                (V.Load(x + i) * V.Create(scale)).Store(x + i);
            }

            for (; i < count; i++)
            {
                x[i] *= scale;
            }
        }
    }

    /// <summary>The exponentials replace the logits.</summary>
    private readonly struct Keep;

    /// <summary>The logits stay.</summary>
    private readonly struct Forget;

    /// <summary>The definition, on one row.</summary>
    internal static class Scalar
    {
        /// <summary>The loss of a row.</summary>
        public static double Loss(ReadOnlySpan<double> logits, int target) => target < 0 ? 0 : LogSumExp(logits) - logits[target];

        /// <summary>Writes the gradient of the loss.</summary>
        public static void Backward(Span<double> dLogits, ReadOnlySpan<double> logits, int target)
        {
            double logSum = LogSumExp(logits);
            for (int i = 0; i < logits.Length; i++)
            {
                dLogits[i] = target < 0 ? 0 : Math.Exp(logits[i] - logSum) - (i == target ? 1 : 0);
            }
        }

        private static double LogSumExp(ReadOnlySpan<double> logits)
        {
            double max = double.NegativeInfinity;
            foreach (double x in logits)
            {
                max = Math.Max(max, x);
            }

            double sum = 0;
            foreach (double x in logits)
            {
                sum += Math.Exp(x - max);
            }

            return Math.Log(sum) + max;
        }
    }
}
