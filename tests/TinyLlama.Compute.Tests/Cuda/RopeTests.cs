namespace TinyLlama.Compute.Tests.Cuda;

public sealed class RopeTests : CudaTests
{
    [Theory]
    [InlineData(1, 1, 16)]
    [InlineData(5, 3, 32)]
    [InlineData(37, 9, 64)]
    [InlineData(3, 2, 128)]
    public void Equals_the_cpu_and_turns_back(int tokens, int heads, int headDim)
    {
        const int Positions = 50;
        float[] x = Normal(tokens * heads * headDim), table = new float[Positions * headDim];
        for (int i = 0; i < table.Length; i++)
        {
            int position = i / headDim, pair = i % (headDim / 2);
            double angle = position * Math.Pow(10000, -2.0 * pair / headDim);
            table[i] = (float)(i % headDim < headDim / 2 ? Math.Cos(angle) : Math.Sin(angle));
        }

        int[] positions = Whole(tokens, Positions);
        Tensor actual = PutStrided(tokens, heads * headDim, x), turns = Put(Positions, headDim, table, DType.F32);
        Tensor expected = OnCpu(tokens, heads * headDim, x), expectedTurns = OnCpu(Positions, headDim, table);
        foreach (bool inverse in (bool[])[false, true])
        {
            Cuda.Rope(actual, Put(positions), turns, inverse);
            Cpu.Rope(expected, OnCpu(positions), expectedTurns, inverse);
            Close(OfCpu(expected), Get(actual), inverse ? 2 * Bf16 : Bf16, $"inverse {inverse}");
        }
    }
}
