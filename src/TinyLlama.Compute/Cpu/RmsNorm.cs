using System.Runtime.CompilerServices;

namespace TinyLlama.Compute.Cpu;

/// <summary>RMSNorm over packed tokens: output = input · r · weight with r = 1 / sqrt(mean(input²) + ε).</summary>
/// <remarks>
/// Shapes: N = packed tokens, C = channels. input, output, their gradients (N, C); weight, dWeight (1, C); r (N, 1).
/// Backward accumulates into dWeight and into dInput, which is the residual stream.
/// Memory-bound: forward moves 8 · N · C bytes, with the addition 16 · N · C, backward 16 · N · C.
/// </remarks>
internal static unsafe class RmsNorm
{
    /// <summary>Most channels: what the scratch for dWeight is sized for.</summary>
    public const int MaxChannels = 32768;

    /// <summary>Partial sums of dWeight, each over one run of rows: part of the meaning of the result.</summary>
    public const int Partials = 32;

    /// <summary>Writes output and r.</summary>
    public static void Forward<V>(ThreadTeam team, Tensor output, Tensor r, Tensor input, Tensor weight, float epsilon)
        where V : struct, ILanes<V> => AddForward<V>(team, default, output, r, input, default, weight, epsilon);

    /// <summary>Writes sum = input + branch, then output and r of the sum; without a branch, of the input.</summary>
    public static void AddForward<V>(
        ThreadTeam team, Tensor sum, Tensor output, Tensor r, Tensor input, Tensor branch, Tensor weight, float epsilon)
        where V : struct, ILanes<V>
    {
        (int tokens, int channels) = (input.Rows, input.Columns);
        input.Require(tokens, channels);
        output.Require(tokens, channels);
        weight.Require(1, channels);
        r.Require(tokens, 1);
        if (!branch.IsEmpty)
        {
            sum.Require(tokens, channels);
            branch.Require(tokens, channels);
        }

        Rows rows = Rows.Of(input);
        ForwardWork<V> work = new(rows, sum, output, r, input, branch, weight, epsilon);
        team.Run(ref work, rows.Tasks);
    }

    /// <summary>dInput += …; dWeight += …, by <see cref="Partials"/> partial sums that are added in order.</summary>
    /// <param name="team">The threads.</param>
    /// <param name="partials">Scratch of <see cref="Partials"/> · C floats.</param>
    /// <param name="dInput">(N, C).</param>
    /// <param name="dWeight">(1, C).</param>
    /// <param name="dOutput">(N, C).</param>
    /// <param name="input">(N, C).</param>
    /// <param name="weight">(1, C).</param>
    /// <param name="r">What forward wrote.</param>
    public static void Backward<V>(
        ThreadTeam team, float* partials, Tensor dInput, Tensor dWeight, Tensor dOutput, Tensor input, Tensor weight, Tensor r)
        where V : struct, ILanes<V>
    {
        (int tokens, int channels) = (input.Rows, input.Columns);
        Shape.Require(channels <= MaxChannels, "at most 32768 channels");
        input.Require(tokens, channels);
        dInput.Require(tokens, channels);
        dOutput.Require(tokens, channels);
        weight.Require(1, channels);
        dWeight.Require(1, channels);
        r.Require(tokens, 1);

        Rows rows = new(tokens, Math.Max(1, (tokens + Partials - 1) / Partials));
        BackwardWork<V> work = new(rows, partials, dInput, dOutput, input, weight, r);
        team.Run(ref work, rows.Tasks);
        for (int task = 0; task < rows.Tasks; task++)
        {
            Add<V>(dWeight.F32(), partials + ((nint)task * channels), channels);
        }
    }

    private static void Add<V>(float* y, float* x, int count)
        where V : struct, ILanes<V>
    {
        int i = 0;
        for (; i <= count - V.Count; i += V.Count)
        {
            (V.Load(y + i) + V.Load(x + i)).Store(y + i);
        }

        for (; i < count; i++)
        {
            y[i] += x[i];
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Scale<V>(float* y, float* x, float* w, float r, int first, int count)
        where V : struct, ILanes<V>
    {
        for (int i = first; i <= count - V.Count; i += V.Count)
        {
            (V.Load(x + i) * V.Create(r) * V.Load(w + i)).Store(y + i);
        }
    }

    private readonly struct ForwardWork<V>(
        Rows rows, Tensor sum, Tensor output, Tensor r, Tensor input, Tensor branch, Tensor weight, float epsilon) : IWork
        where V : struct, ILanes<V>
    {
        public void Run(int task, int thread)
        {
            int channels = input.Columns;
            for (int n = rows.First(task); n < rows.End(task); n++)
            {
                float* x = input.F32(n);
                float* y = output.F32(n);
                float squares;
                if (branch.IsEmpty)
                {
                    squares = SumSquares(x, channels);
                }
                else
                {
                    float* s = sum.F32(n);
                    squares = AddSumSquares(s, x, branch.F32(n), channels);
                    x = s;
                }

                float scale = 1f / MathF.Sqrt((squares / channels) + epsilon);
                *r.F32(n) = scale;
                float* w = weight.F32();
                Scale<V>(y, x, w, scale, 0, channels);
                Scale<Lanes1>(y, x, w, scale, channels - (channels % V.Count), channels);
            }
        }

        // Four accumulators hide the latency of the multiply-add. Both functions sum in the same order: an addition
        // followed by a norm gives the bits of the fused form.
        private static float SumSquares(float* x, int count)
        {
            V s0 = default, s1 = default, s2 = default, s3 = default;
            int i = 0;
            for (; i <= count - (4 * V.Count); i += 4 * V.Count)
            {
                V x0 = V.Load(x + i), x1 = V.Load(x + i + V.Count);
                V x2 = V.Load(x + i + (2 * V.Count)), x3 = V.Load(x + i + (3 * V.Count));
                s0 = V.Fma(x0, x0, s0);
                s1 = V.Fma(x1, x1, s1);
                s2 = V.Fma(x2, x2, s2);
                s3 = V.Fma(x3, x3, s3);
            }

            float sum = (s0 + s1 + (s2 + s3)).Sum();
            for (; i < count; i++)
            {
                sum += x[i] * x[i];
            }

            return sum;
        }

        private static float AddSumSquares(float* s, float* x, float* b, int count)
        {
            V s0 = default, s1 = default, s2 = default, s3 = default;
            int i = 0;
            for (; i <= count - (4 * V.Count); i += 4 * V.Count)
            {
                V x0 = V.Load(x + i) + V.Load(b + i);
                V x1 = V.Load(x + i + V.Count) + V.Load(b + i + V.Count);
                V x2 = V.Load(x + i + (2 * V.Count)) + V.Load(b + i + (2 * V.Count));
                V x3 = V.Load(x + i + (3 * V.Count)) + V.Load(b + i + (3 * V.Count));
                x0.Store(s + i);
                x1.Store(s + i + V.Count);
                x2.Store(s + i + (2 * V.Count));
                x3.Store(s + i + (3 * V.Count));
                s0 = V.Fma(x0, x0, s0);
                s1 = V.Fma(x1, x1, s1);
                s2 = V.Fma(x2, x2, s2);
                s3 = V.Fma(x3, x3, s3);
            }

            float sum = (s0 + s1 + (s2 + s3)).Sum();
            for (; i < count; i++)
            {
                float x0 = x[i] + b[i];
                s[i] = x0;
                sum += x0 * x0;
            }

            return sum;
        }
    }

    private readonly struct BackwardWork<V>(
        Rows rows, float* partials, Tensor dInput, Tensor dOutput, Tensor input, Tensor weight, Tensor r) : IWork
        where V : struct, ILanes<V>
    {
        public void Run(int task, int thread)
        {
            int channels = input.Columns;
            float* w = weight.F32();
            float* dw = partials + ((nint)task * channels);
            new Span<float>(dw, channels).Clear();
            for (int n = rows.First(task); n < rows.End(task); n++)
            {
                float* x = input.F32(n);
                float* dx = dInput.F32(n);
                float* dy = dOutput.F32(n);
                float scale = *r.F32(n);
                float dot = Dot(dy, w, x, channels);
                float shrink = -(dot / channels) * scale * scale * scale;
                Row<V>(dx, dw, dy, x, w, scale, shrink, 0, channels);
                Row<Lanes1>(dx, dw, dy, x, w, scale, shrink, channels - (channels % V.Count), channels);
            }
        }

        private static float Dot(float* dy, float* w, float* x, int count)
        {
            V s0 = default, s1 = default, s2 = default, s3 = default;
            int i = 0;
            for (; i <= count - (4 * V.Count); i += 4 * V.Count)
            {
                s0 = V.Fma(V.Load(dy + i) * V.Load(w + i), V.Load(x + i), s0);
                int j = i + V.Count;
                s1 = V.Fma(V.Load(dy + j) * V.Load(w + j), V.Load(x + j), s1);
                j += V.Count;
                s2 = V.Fma(V.Load(dy + j) * V.Load(w + j), V.Load(x + j), s2);
                j += V.Count;
                s3 = V.Fma(V.Load(dy + j) * V.Load(w + j), V.Load(x + j), s3);
            }

            float sum = (s0 + s1 + (s2 + s3)).Sum();
            for (; i < count; i++)
            {
                sum += dy[i] * w[i] * x[i];
            }

            return sum;
        }

        // dx += r · dy · w + x · shrink; dw += dy · x · r.
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static void Row<W>(
            float* dx, float* dw, float* dy, float* x, float* w, float scale, float shrink, int first, int count)
            where W : struct, ILanes<W>
        {
            for (int i = first; i <= count - W.Count; i += W.Count)
            {
                W g = W.Load(dy + i) * W.Create(scale);
                W value = W.Load(x + i);
                W d = W.Fma(g, W.Load(w + i), W.Load(dx + i));
                W.Fma(value, W.Create(shrink), d).Store(dx + i);
                W.Fma(g, value, W.Load(dw + i)).Store(dw + i);
            }
        }
    }

    /// <summary>The definition, on one row.</summary>
    internal static class Scalar
    {
        /// <summary>Writes output; returns r.</summary>
        public static double Forward(Span<double> output, ReadOnlySpan<double> input, ReadOnlySpan<double> weight, double epsilon)
        {
            double squares = 0;
            foreach (double x in input)
            {
                squares += x * x;
            }

            double r = 1 / Math.Sqrt((squares / input.Length) + epsilon);
            for (int i = 0; i < input.Length; i++)
            {
                output[i] = input[i] * r * weight[i];
            }

            return r;
        }

        /// <summary>dInput += …, dWeight += ….</summary>
        public static void Backward(
            Span<double> dInput, Span<double> dWeight, ReadOnlySpan<double> dOutput, ReadOnlySpan<double> input,
            ReadOnlySpan<double> weight, double r)
        {
            double dot = 0;
            for (int i = 0; i < input.Length; i++)
            {
                dot += dOutput[i] * weight[i] * input[i] * r;
            }

            for (int i = 0; i < input.Length; i++)
            {
                dInput[i] += r * ((dOutput[i] * weight[i]) - (input[i] * r * dot / input.Length));
                dWeight[i] += dOutput[i] * input[i] * r;
            }
        }
    }
}
