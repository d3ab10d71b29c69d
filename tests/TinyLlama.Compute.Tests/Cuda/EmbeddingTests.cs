namespace TinyLlama.Compute.Tests.Cuda;

public sealed class EmbeddingTests : CudaTests
{
    public static TheoryData<int, int, int> Shapes => new()
    {
        { 1, 1, 8 }, { 5, 3, 24 }, { 300, 40, 16 }, { 40, 11, 2056 },
    };

    [Theory]
    [MemberData(nameof(Shapes))]
    public void Rows_are_those_of_the_tokens(int count, int vocabulary, int channels)
    {
        float[] table = Normal(vocabulary * channels);
        int[] tokens = Whole(count, vocabulary);
        float[] expected = [.. tokens.SelectMany(token => table[(token * channels)..((token + 1) * channels)])];
        foreach (DType type in (DType[])[DType.F32, DType.BF16])
        {
            Tensor output = PutStrided(count, channels, new float[expected.Length]);
            Cuda.Embedding(output, PutStrided(vocabulary, channels, table, type), Put(tokens));
            Assert.Equal(expected, Get(output));
        }
    }

    [Fact]
    public void Rows_of_half_precision_are_widened()
    {
        Half[] table = [.. Normal(3 * 8).Select(value => (Half)value)];
        Tensor halves = Take(3, 8, DType.F16), output = Take(2, 8);
        Cuda.Write<Half>(halves, table);
        Cuda.Embedding(output, halves, Put([2, 0]));
        Assert.Equal([.. table[16..].Concat(table[..8]).Select(value => Rounded((float)value))], Get(output));
    }

    [Theory]
    [MemberData(nameof(Shapes))]
    public void Gradients_add_up_in_the_order_of_the_tokens(int count, int vocabulary, int channels)
    {
        float[] before = Normal(vocabulary * channels), dOutput = Normal(count * channels);
        int[] tokens = Whole(count, vocabulary);
        Tensor dTable = Put(vocabulary, channels, before, DType.F32);
        Cuda.EmbeddingBackward(dTable, PutStrided(count, channels, dOutput), Put(tokens));

        Tensor expected = OnCpu(vocabulary, channels, before);
        Cpu.EmbeddingBackward(expected, OnCpu(count, channels, dOutput), OnCpu(tokens));
        Assert.Equal(OfCpu(expected), Get(dTable));
    }

    [Theory]
    [InlineData(DType.BF16, 3)]
    [InlineData(DType.F32, 37)]
    [InlineData(DType.F32, 600)]
    public void Gathers_rows_of_any_type(DType type, int columns)
    {
        float[] values = Normal(5 * columns);
        int[] rows = [4, 0, 0, 2];
        Tensor destination = PutStrided(rows.Length, columns, new float[rows.Length * columns], type);
        Cuda.GatherRows(destination, PutStrided(5, columns, values, type), Put(rows));
        Assert.Equal([.. rows.SelectMany(row => values[(row * columns)..((row + 1) * columns)])], Get(destination));
    }
}
