namespace TinyLlama.Compute.Tests.Cuda;

public sealed class ReductionsTests : CudaTests
{
    [Theory]
    [InlineData(1, 1)]
    [InlineData(300, 1)]
    [InlineData(37, 9)]
    public void Sum_adds_to_the_total(int rows, int columns)
    {
        float[] values = Normal(rows * columns);
        Tensor total = Take(1, 1, DType.F64);
        Cuda.Write<double>(total, [100]);
        Cuda.Sum(total, PutStrided(rows, columns, values, DType.F32));
        Assert.Equal(100 + values.Sum(value => (double)value), GetDouble(total), 1e-9);
    }

    [Fact]
    public void Sum_of_squares_covers_all_chunks_of_all_tensors()
    {
        int[] counts = [1, 8, Backend.SumChunk - 1, Backend.SumChunk + 3];
        float[][] values = [.. counts.Select(count => Normal(count))];
        Tensor[] tensors = [.. values.Select(v => Put(1, v.Length, v, DType.F32))];
        Tensor total = Take(1, 1, DType.F64), partials = Take(1, Backend.SumOfSquaresPartials(tensors), DType.F64);
        Cuda.SumOfSquares(total, partials, tensors);
        double expected = values.Sum(v => v.Sum(x => (double)x * x));
        Assert.Equal(1, GetDouble(total) / expected, 1e-7);
    }

    [Fact]
    public void No_values_have_the_sum_zero()
    {
        Tensor total = Take(1, 1, DType.F64);
        Cuda.Write<double>(total, [3]);
        Cuda.SumOfSquares(total, Take(1, 1, DType.F64), []);
        Assert.Equal(0, GetDouble(total));
    }
}
