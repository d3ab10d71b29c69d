namespace TinyLlama.Compute.Tests.Cuda;

public sealed class AdamWTests : CudaTests
{
    private static readonly AdamWSettings s_settings = new(0.9f, 0.95f, 1e-8f, 0.1f, MaxNorm: 1, RateFactor: 0.5f);

    [Theory]
    [InlineData(1, 100)]
    [InlineData(37, 0.01)]
    [InlineData(5000, 9)]
    public void Equals_the_cpu(int count, double sumOfSquares)
    {
        float[] values = Normal(count), first = Normal(count, 0.1), second = [.. Normal(count, 0.1).Select(MathF.Abs)], gradient = Normal(count);
        float[] step = [1e-3f, 0.19f, 0.0975f];
        Tensor[] cuda = [.. ((float[][])[values, first, second, gradient]).Select(v => Put(1, count, v, DType.F32))];
        Tensor[] cpu = [.. ((float[][])[values, first, second, gradient]).Select(v => OnCpu(1, count, v))];
        Tensor sum = Take(1, 1, DType.F64), sumOfCpu = ZeroOnCpu(1, 1, DType.F64);
        Cuda.Write<double>(sum, [sumOfSquares]);
        Cpu.Write<double>(sumOfCpu, [sumOfSquares]);
        Cuda.AdamW(cuda[0], cuda[1], cuda[2], cuda[3], Put(1, 3, step, DType.F32), sum, s_settings);
        Cpu.AdamW(cpu[0], cpu[1], cpu[2], cpu[3], OnCpu(1, 3, step), sumOfCpu, s_settings);

        string[] names = ["values", "first", "second", "gradient"];
        for (int i = 0; i < names.Length; i++)
        {
            Close(OfCpu(cpu[i]), Get(cuda[i]), 1e-6, names[i]);
        }
    }

    [Theory]
    [InlineData(double.NaN)]
    [InlineData(double.PositiveInfinity)]
    public void Changes_nothing_where_the_norm_is_not_finite(double sumOfSquares)
    {
        Tensor Put4() => Put(1, 4, [1, 2, 3, 4], DType.F32);
        Tensor[] tensors = [Put4(), Put4(), Put4(), Put4()];
        Tensor sum = Take(1, 1, DType.F64);
        Cuda.Write<double>(sum, [sumOfSquares]);
        Cuda.AdamW(tensors[0], tensors[1], tensors[2], tensors[3], Put(1, 3, [1e-3f, 0.1f, 0.05f], DType.F32), sum, s_settings);
        Assert.All(tensors, tensor => Assert.Equal([1, 2, 3, 4], Get(tensor)));
    }
}
