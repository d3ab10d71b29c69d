using System.Runtime.CompilerServices;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// AdamW with clipping by the global norm, as PyTorch: g = gradient · min(1, MaxNorm / (norm + 1e-6)),
/// m = β₁ · m + (1 - β₁) · g, v = β₂ · v + (1 - β₂) · g², and with m̂ = m / (1 - β₁ᵗ), v̂ = v / (1 - β₂ᵗ):
/// value -= lr · (decay · value + m̂ / (√v̂ + ε)). Then gradient = 0.
/// </summary>
/// <remarks>All tensors contiguous. Memory-bound: reads and writes four streams, 32 bytes an element.</remarks>
internal static unsafe class AdamW
{
    private const int ElementsPerTask = 16384;

    /// <summary>One step; nothing where the norm is not finite.</summary>
    public static void Step<V>(
        ThreadTeam team, Tensor values, Tensor first, Tensor second, Tensor gradient, Tensor step, Tensor sumOfSquares,
        AdamWSettings settings)
        where V : struct, ILanes<V>
    {
        foreach (Tensor tensor in (ReadOnlySpan<Tensor>)[values, first, second, gradient])
        {
            tensor.Require(values.Rows, values.Columns);
            Shape.Require(tensor.IsContiguous, "contiguous tensors");
        }

        step.Require(1, 3);
        sumOfSquares.Require(1, 1, DType.F64);
        double norm = Math.Sqrt(*sumOfSquares.F64());
        if (!double.IsFinite(norm))
        {
            return;
        }

        double clip = settings.MaxNorm > 0 ? Math.Min(1, settings.MaxNorm / (norm + 1e-6)) : 1;
        Work<V> work = new(
            values.F32(), first.F32(), second.F32(), gradient.F32(), values.Count, (float)clip, step.F32()[0] * settings.RateFactor,
            step.F32()[1], step.F32()[2], settings);
        team.Run(ref work, checked((int)((values.Count + ElementsPerTask - 1) / ElementsPerTask)));
    }

    private readonly struct Work<V>(
        float* values, float* first, float* second, float* gradient, long count, float clip, float rate,
        float correction1, float correction2, AdamWSettings settings) : IWork
        where V : struct, ILanes<V>
    {
        public void Run(int task, int thread)
        {
            nint start = (nint)task * ElementsPerTask;
            int length = (int)Math.Min(ElementsPerTask, count - start);
            Range<V>(start, 0, length);
            Range<Lanes1>(start, length - (length % V.Count), length);
        }

        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private void Range<W>(nint start, int from, int length)
            where W : struct, ILanes<W>
        {
            float* p = values + start;
            float* m = first + start;
            float* v = second + start;
            float* g = gradient + start;
            W coefficient = W.Create(clip), epsilon = W.Create(settings.Epsilon), decay = W.Create(settings.WeightDecay);
            W beta1 = W.Create(settings.Beta1), rest1 = W.Create((float)(1 - (double)settings.Beta1));
            W beta2 = W.Create(settings.Beta2), rest2 = W.Create((float)(1 - (double)settings.Beta2));
            W scale1 = W.Create(1 / correction1), scale2 = W.Create(1 / correction2), minusRate = W.Create(-rate);
            for (int i = from; i <= length - W.Count; i += W.Count)
            {
                W slope = W.Load(g + i) * coefficient;
                W mean = W.Fma(beta1, W.Load(m + i), rest1 * slope);
                W variance = W.Fma(beta2, W.Load(v + i), rest2 * slope * slope);
                W direction = mean * scale1 / (W.Sqrt(variance * scale2) + epsilon);
                W value = W.Load(p + i);

                // One rounding of the value: the difference of a step from exact arithmetic is half a unit in its last place.
                W.Fma(minusRate, W.Fma(decay, value, direction), value).Store(p + i);
                mean.Store(m + i);
                variance.Store(v + i);
                default(W).Store(g + i);
            }
        }
    }

    /// <summary>The definition, on one element.</summary>
    internal static class Scalar
    {
        /// <summary>The value and the moments after step <paramref name="t"/> (1, 2, …) with a gradient that is clipped already.</summary>
        public static (double Value, double First, double Second) Step(
            double value, double first, double second, double gradient, double rate, int t, double beta1, double beta2,
            double epsilon, double decay)
        {
            first = (beta1 * first) + ((1 - beta1) * gradient);
            second = (beta2 * second) + ((1 - beta2) * gradient * gradient);
            double mean = first / (1 - Math.Pow(beta1, t));
            double root = Math.Sqrt(second / (1 - Math.Pow(beta2, t)));
            return (value - (rate * ((decay * value) + (mean / (root + epsilon)))), first, second);
        }
    }
}
