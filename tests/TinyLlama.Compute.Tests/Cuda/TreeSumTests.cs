using TinyLlama.Compute.Cuda;

namespace TinyLlama.Compute.Tests.Cuda;

public sealed unsafe class TreeSumTests : CudaTests
{
    [Theory]
    [InlineData(1, 7, DType.F32)]
    [InlineData(2, 300, DType.F32)]
    [InlineData(8, 1, DType.BF16)]
    [InlineData(16, 515, DType.F32)]
    [InlineData(64, 33, DType.BF16)]
    public void Gives_the_bits_of_the_cpu(int number, int count, DType type)
    {
        // Of magnitudes so far apart that another order has other bits.
        float[] values = [.. Normal(number * count).Select(static (value, i) => value * MathF.Pow(2, i * 7 % 19))];
        Tensor parts = Put(number, count, values, type), sum = Take(1, count, DType.F32);
        TreeSum.Run(Cuda.Device, Cuda.Device.Stream, sum, parts, number);

        float[] expected = new float[count];
        fixed (float* destination = expected, first = values)
        {
            // The values are bfloat16s: the same in both types.
            Compute.Cpu.TreeSum.Run(destination, (byte*)first, DType.F32, number, count);
        }

        Assert.Equal(expected, Get(sum));
    }
}
