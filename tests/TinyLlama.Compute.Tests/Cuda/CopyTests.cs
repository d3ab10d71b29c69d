namespace TinyLlama.Compute.Tests.Cuda;

public sealed class CopyTests : CudaTests
{
    [Theory]
    [InlineData(1, 1)]
    [InlineData(3, 37)]
    [InlineData(5, 300)]
    [InlineData(3, 4104)]
    public void Rounds_singles_to_the_nearest_bfloat16_and_back(int rows, int columns)
    {
        float[] values = new float[rows * columns];
        for (int i = 0; i < values.Length; i++)
        {
            values[i] = MathF.Sin(i) * MathF.Pow(10, (i % 9) - 4);
        }

        Tensor source = PutStrided(rows, columns, values, DType.F32);
        Tensor rounded = Take(rows, columns), back = Take(rows, columns, DType.F32);
        Cuda.Copy(rounded, source);
        Cuda.Copy(back, rounded);

        Assert.Equal(Array.ConvertAll(values, Rounded), Get(rounded));
        Assert.Equal(Get(rounded), Get(back));
    }

    [Theory]
    [InlineData(1, 1)]
    [InlineData(3, 300)]
    public void Adds_as_the_cpu_does(int rows, int columns)
    {
        float[] sum = Normal(rows * columns), addend = Normal(rows * columns);
        Tensor destination = Put(rows, columns, sum, DType.F32);
        Cuda.Add(destination, Put(rows, columns, addend, DType.F32));
        Assert.Equal(sum.Zip(addend, static (a, b) => a + b), Get(destination));

        Tensor rounded = Put(rows, columns, sum, DType.BF16);
        Cuda.Add(rounded, Put(rows, columns, addend, DType.BF16));
        Assert.Equal(sum.Zip(addend, static (a, b) => Rounded(Rounded(a) + Rounded(b))), Get(rounded));
    }
}
