namespace TinyLlama.Compute.Tests.Cuda;

public sealed class SwiGluTests : CudaTests
{
    [Theory]
    [InlineData(1, 8)]
    [InlineData(3, 40)]
    [InlineData(7, 5632)]
    public void Equals_the_cpu(int tokens, int hidden)
    {
        float[] gateUp = Normal(tokens * 2 * hidden, 3), dOutput = Normal(tokens * hidden);
        Tensor input = PutStrided(tokens, 2 * hidden, gateUp);
        Tensor output = PutStrided(tokens, hidden, new float[dOutput.Length]), dGateUp = PutStrided(tokens, 2 * hidden, new float[gateUp.Length]);
        Cuda.SwiGlu(output, input);
        Cuda.SwiGluBackward(dGateUp, PutStrided(tokens, hidden, dOutput), input);

        Tensor expected = ZeroOnCpu(tokens, hidden), expectedGradient = ZeroOnCpu(tokens, 2 * hidden), inputOfCpu = OnCpu(tokens, 2 * hidden, gateUp);
        Cpu.SwiGlu(expected, inputOfCpu);
        Cpu.SwiGluBackward(expectedGradient, OnCpu(tokens, hidden, dOutput), inputOfCpu);
        Close(OfCpu(expected), Get(output), Bf16, "output");
        Close(OfCpu(expectedGradient), Get(dGateUp), Bf16, "dGateUp");
    }

    [Fact]
    public void Gates_far_from_zero_give_no_NaN()
    {
        Tensor gateUp = Put(1, 16, [-3e38f, -200, -90, -20, 20, 90, 200, 3e38f, 1, 1, 1, 1, 1, 1, 1, 1]), output = Take(1, 8);
        Cuda.SwiGlu(output, gateUp);
        Close([0, 0, 0, -4e-8f, 20, 90, 200, Rounded(3e38f)], Get(output), 1e-3, "output");
    }
}
