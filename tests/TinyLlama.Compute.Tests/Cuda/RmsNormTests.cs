namespace TinyLlama.Compute.Tests.Cuda;

public sealed class RmsNormTests : CudaTests
{
    private const float Epsilon = 1e-5f;

    public static TheoryData<int, int> Shapes => new()
    {
        { 1, 8 }, { 3, 24 }, { 33, 72 }, { 2, 2048 }, { 3, 2056 }, { 520, 264 },
    };

    [Theory]
    [MemberData(nameof(Shapes))]
    public void Equals_the_cpu(int tokens, int channels)
    {
        float[] x = Normal(tokens * channels), w = Normal(channels, 0.2, 1);
        Tensor output = PutStrided(tokens, channels, new float[x.Length]), r = Take(tokens, 1, DType.F32);
        Cuda.RmsNorm(output, r, PutStrided(tokens, channels, x), Put(1, channels, w, DType.F32), Epsilon);

        Tensor expected = ZeroOnCpu(tokens, channels), expectedR = ZeroOnCpu(tokens, 1);
        Cpu.RmsNorm(expected, expectedR, OnCpu(tokens, channels, x), OnCpu(1, channels, w), Epsilon);
        Close(OfCpu(expectedR), Get(r), F32, "r");
        Close(OfCpu(expected), Get(output), Bf16, "output");
    }

    [Theory]
    [MemberData(nameof(Shapes))]
    public void Fused_addition_has_the_bits_of_an_addition_and_a_norm(int tokens, int channels)
    {
        float[] x = Normal(tokens * channels), b = Normal(tokens * channels), total = new float[x.Length];
        for (int i = 0; i < total.Length; i++)
        {
            total[i] = Rounded(x[i] + b[i]);
        }

        Tensor weight = Put(1, channels, Normal(channels), DType.F32), input = PutStrided(tokens, channels, x);
        Tensor output = Take(tokens, channels), r = Take(tokens, 1, DType.F32);
        Tensor expected = Take(tokens, channels), expectedR = Take(tokens, 1, DType.F32);
        Cuda.AddRmsNorm(input, output, r, input, PutStrided(tokens, channels, b), weight, Epsilon);
        Cuda.RmsNorm(expected, expectedR, Put(tokens, channels, total), weight, Epsilon);

        Assert.Equal(total, Get(input));
        Assert.Equal(Get(expectedR), Get(r));
        Assert.Equal(Get(expected), Get(output));
    }

    [Theory]
    [MemberData(nameof(Shapes))]
    public void Gradients_equal_the_cpu(int tokens, int channels)
    {
        float[] x = Normal(tokens * channels), w = Normal(channels, 0.2, 1), dy = Normal(tokens * channels), dx = Normal(tokens * channels);
        float[] r = Normal(tokens, 0.1, 1), dw = Normal(channels);
        Tensor dInput = PutStrided(tokens, channels, dx), dWeight = Put(1, channels, dw, DType.F32);
        Cuda.RmsNormBackward(
            dInput, dWeight, PutStrided(tokens, channels, dy), PutStrided(tokens, channels, x), Put(1, channels, w, DType.F32),
            Put(tokens, 1, r, DType.F32));

        Tensor expected = OnCpu(tokens, channels, dx), expectedWeight = OnCpu(1, channels, dw);
        Cpu.RmsNormBackward(
            expected, expectedWeight, OnCpu(tokens, channels, dy), OnCpu(tokens, channels, x), OnCpu(1, channels, w), OnCpu(tokens, 1, r));
        Close(OfCpu(expected), Get(dInput), Bf16, "dInput");
        Close(OfCpu(expectedWeight), Get(dWeight), F32, "dWeight");
    }

    [Fact]
    public void A_row_has_the_same_bits_alone_and_in_a_batch()
    {
        const int Tokens = 40, Channels = 136, Row = 23;
        float[] x = Normal(Tokens * Channels), w = Normal(Channels);
        float[] Run(int first, int count)
        {
            Tensor output = Take(count, Channels);
            float[] rows = x[(first * Channels)..((first + count) * Channels)];
            Cuda.RmsNorm(output, Take(count, 1, DType.F32), Put(count, Channels, rows), Put(1, Channels, w, DType.F32), Epsilon);
            return Get(output);
        }

        Assert.Equal(Run(0, Tokens)[(Row * Channels)..((Row + 1) * Channels)], Run(Row, 1));
    }

    [Fact]
    public void No_rows_are_nothing_to_do()
    {
        Tensor weight = Put(1, 8, Normal(8), DType.F32), dWeight = Put(1, 8, [1, 2, 3, 4, 5, 6, 7, 8], DType.F32);
        Tensor none = Take(0, 8), noR = Take(0, 1, DType.F32);
        Cuda.RmsNorm(none, noR, none, weight, Epsilon);
        Cuda.RmsNormBackward(none, dWeight, none, none, weight, noR);
        Assert.Equal([1, 2, 3, 4, 5, 6, 7, 8], Get(dWeight));
    }

    [Fact]
    public void Allocates_nothing()
    {
        Tensor input = Put(3, 8, Normal(24)), weight = Put(1, 8, Normal(8), DType.F32);
        Tensor output = Take(3, 8), r = Take(3, 1, DType.F32), dInput = Take(3, 8), dWeight = Take(1, 8, DType.F32);
        AllocatesNothing(() =>
        {
            Cuda.AddRmsNorm(input, output, r, input, input, weight, Epsilon);
            Cuda.RmsNorm(output, r, input, weight, Epsilon);
            Cuda.RmsNormBackward(dInput, dWeight, output, input, weight, r);
        });
    }
}
