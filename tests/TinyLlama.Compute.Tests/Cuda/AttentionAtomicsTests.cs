namespace TinyLlama.Compute.Tests.Cuda;

/// <summary>Attention's backward where gradients of queries are added up by atomics, in whatever order blocks come to them.</summary>
public sealed class AttentionAtomicsTests() : AttentionProblems(deterministic: false)
{
    [Theory]
    [InlineData(new[] { 3, 1, 17 }, 3, 1, 16)]
    [InlineData(new[] { 64, 65, 63 }, 4, 2, 32)]
    [InlineData(new[] { 5, 130, 1, 99 }, 8, 2, 64)]
    [InlineData(new[] { 200 }, 1, 1, 64)]
    [InlineData(new[] { 129 }, 2, 2, 128)]
    [InlineData(new[] { 70, 9 }, 7, 1, 128)]
    [InlineData(new[] { 67 }, 2, 1, 48)]
    [InlineData(new[] { 66, 3 }, 3, 3, 112)]
    public void Gives_the_gradients_of_the_deterministic_kernels(int[] lengths, int heads, int keyHeads, int headDim)
    {
        Problem problem = Random(lengths, heads, keyHeads, headDim);
        Result actual = Run(problem);
        Near(RunOnCpu(problem), actual);

        // The same products; sums of dQuery and delta in another order, rounded then.
        using var deterministic = new AttentionTests();
        Result expected = Run(deterministic, problem);
        Close(expected.DQuery, actual.DQuery, Bf16, "dQuery");
        Close(expected.DKeys, actual.DKeys, Bf16, "dKeys");
        SameBits(expected.DValues, actual.DValues, "dValues");
    }

    [Fact]
    public void What_the_scratch_held_before_does_not_matter()
    {
        Tensors tensors = new(this, Random([70], 2, 1, 16));
        tensors.Run();
        float[] first = Get(tensors.DQuery);
        tensors.Run();
        Close(first, Get(tensors.DQuery), Bf16, "dQuery");
    }

    [Fact]
    public void Scratch_without_room_for_the_sums_is_refused()
    {
        Tensor rows = Take(1, 16), statistics = Take(1, 1, DType.F32);
        TokenLayout layout = Layout(Cuda, [new Segment(0, 1, 0, 0)]);
        Assert.Throws<ArgumentException>(() => Cuda.AttentionBackward(
            rows, rows, rows, statistics, rows, rows, statistics, rows, rows, rows, layout, 16));
    }

    [Fact]
    public void Allocates_nothing()
    {
        Tensors tensors = new(this, Random([5, 3], 2, 1, 16));
        AllocatesNothing(tensors.Run);
    }
}
