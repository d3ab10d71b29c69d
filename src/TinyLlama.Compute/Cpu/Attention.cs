namespace TinyLlama.Compute.Cpu;

/// <summary>Causal grouped-query attention.</summary>
internal static unsafe class Attention
{
    /// <summary>Writes output and logSumExp.</summary>
    public static void Forward(
        Tensor output, Tensor logSumExp, Tensor query, Tensor keys, Tensor values, TokenLayout layout, int headDim)
    {
        int heads = query.Columns / headDim;
        int group = heads / (keys.Columns / headDim);
        float scale = 1f / MathF.Sqrt(headDim);
        for (int s = 0; s < layout.SegmentCount; s++)
        {
            Segment segment = layout.SegmentAt(s);
            for (int i = 0; i < segment.RowCount; i++)
            {
                for (int head = 0; head < heads; head++)
                {
                    int column = head / group * headDim;
                    float* q = query.F32(segment.FirstRow + i) + (head * headDim);
                    float* o = output.F32(segment.FirstRow + i) + (head * headDim);
                    float max = float.NegativeInfinity;
                    double sum = 0;
                    new Span<float>(o, headDim).Clear();
                    for (int position = 0; position <= segment.FirstPosition + i; position++)
                    {
                        int row = layout.KeyRow(segment, position);
                        float score = Dot(q, keys.F32(row) + column, headDim) * scale;
                        float newMax = MathF.Max(max, score);
                        float keep = MathF.Exp(max - newMax);
                        float weight = MathF.Exp(score - newMax);
                        sum = (sum * keep) + weight;
                        float* v = values.F32(row) + column;
                        for (int d = 0; d < headDim; d++)
                        {
                            o[d] = (o[d] * keep) + (weight * v[d]);
                        }

                        max = newMax;
                    }

                    for (int d = 0; d < headDim; d++)
                    {
                        o[d] = (float)(o[d] / sum);
                    }

                    logSumExp.F32(segment.FirstRow + i)[head] = (float)(max + Math.Log(sum));
                }
            }
        }
    }

    /// <summary>Writes dQuery, dKeys and dValues.</summary>
    public static void Backward(
        Tensor dQuery, Tensor dKeys, Tensor dValues, Tensor delta, Tensor dOutput, Tensor output, Tensor logSumExp,
        Tensor query, Tensor keys, Tensor values, TokenLayout layout, int headDim)
    {
        int heads = query.Columns / headDim;
        int group = heads / (keys.Columns / headDim);
        float scale = 1f / MathF.Sqrt(headDim);
        for (int n = 0; n < query.Rows; n++)
        {
            new Span<float>(dQuery.F32(n), dQuery.Columns).Clear();
            new Span<float>(dKeys.F32(n), dKeys.Columns).Clear();
            new Span<float>(dValues.F32(n), dValues.Columns).Clear();
            for (int head = 0; head < heads; head++)
            {
                delta.F32(n)[head] = Dot(dOutput.F32(n) + (head * headDim), output.F32(n) + (head * headDim), headDim);
            }
        }

        for (int s = 0; s < layout.SegmentCount; s++)
        {
            Segment segment = layout.SegmentAt(s);
            for (int i = 0; i < segment.RowCount; i++)
            {
                int n = segment.FirstRow + i;
                for (int head = 0; head < heads; head++)
                {
                    int column = head / group * headDim;
                    float* q = query.F32(n) + (head * headDim);
                    float* dq = dQuery.F32(n) + (head * headDim);
                    float* dy = dOutput.F32(n) + (head * headDim);
                    for (int position = 0; position <= segment.FirstPosition + i; position++)
                    {
                        int row = segment.FirstKey + position;
                        float* k = keys.F32(row) + column;
                        float* dk = dKeys.F32(row) + column;
                        float* dv = dValues.F32(row) + column;
                        float p = MathF.Exp((Dot(q, k, headDim) * scale) - logSumExp.F32(n)[head]);
                        float ds = p * (Dot(dy, values.F32(row) + column, headDim) - delta.F32(n)[head]) * scale;
                        for (int d = 0; d < headDim; d++)
                        {
                            dv[d] += p * dy[d];
                            dk[d] += ds * q[d];
                            dq[d] += ds * k[d];
                        }
                    }
                }
            }
        }
    }

    private static float Dot(float* a, float* b, int count)
    {
        float sum = 0;
        for (int i = 0; i < count; i++)
        {
            sum += a[i] * b[i];
        }

        return sum;
    }
}
