using System.Runtime.CompilerServices;

namespace TinyLlama.Compute.Cpu;

/// <summary>Rotary position embedding (Su et al. 2021) on half-split pairs (i, i + D/2), in place.</summary>
/// <remarks>
/// Shapes: heads (N, any number · D), positions (N, 1), table (positions, D): D/2 cosines, then D/2 sines.
/// The backward is the rotation by the opposite angle. Memory-bound: 8 bytes an element.
/// </remarks>
internal static unsafe class Rope
{
    /// <summary>Rotates; with <paramref name="inverse"/>, back.</summary>
    public static void Rotate<V>(ThreadTeam team, Tensor heads, Tensor positions, Tensor table, bool inverse)
        where V : struct, ILanes<V>
    {
        int headDim = table.Columns;
        Shape.Require(headDim > 0 && headDim % 2 == 0 && heads.Columns % headDim == 0, "whole heads of an even dimension");
        heads.Require(heads.Rows, heads.Columns);
        table.Require(table.Rows, headDim);
        positions.RequireIndices(heads.Rows, table.Rows);
        Rows rows = Rows.Of(heads);
        Work<V> work = new(rows, heads, positions, table, inverse ? -1f : 1f);
        team.Run(ref work, rows.Tasks);
    }

    private readonly struct Work<V>(Rows rows, Tensor heads, Tensor positions, Tensor table, float sign) : IWork
        where V : struct, ILanes<V>
    {
        public void Run(int task, int thread)
        {
            int headDim = table.Columns;
            int half = headDim / 2;
            int tail = half - (half % V.Count);
            for (int n = rows.First(task); n < rows.End(task); n++)
            {
                float* cos = table.F32(*positions.I32(n));
                float* end = heads.F32(n) + heads.Columns;
                for (float* x = heads.F32(n); x < end; x += headDim)
                {
                    Pairs<V>(x, cos, half, sign, 0);
                    Pairs<Lanes1>(x, cos, half, sign, tail);
                }
            }
        }

        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static void Pairs<W>(float* x, float* cos, int half, float sign, int first)
            where W : struct, ILanes<W>
        {
            for (int i = first; i <= half - W.Count; i += W.Count)
            {
                W c = W.Load(cos + i), s = W.Load(cos + half + i) * W.Create(sign);
                W a = W.Load(x + i), b = W.Load(x + half + i);
                ((a * c) - (b * s)).Store(x + i);
                W.Fma(b, c, a * s).Store(x + half + i);
            }
        }
    }

    /// <summary>The definition, on one head.</summary>
    internal static class Scalar
    {
        /// <summary>Rotates pair i by angles[i].</summary>
        public static void Rotate(Span<double> head, ReadOnlySpan<double> angles)
        {
            int half = head.Length / 2;
            for (int i = 0; i < half; i++)
            {
                (double sin, double cos) = Math.SinCos(angles[i]);
                (double a, double b) = (head[i], head[i + half]);
                head[i] = (a * cos) - (b * sin);
                head[i + half] = (b * cos) + (a * sin);
            }
        }
    }
}
