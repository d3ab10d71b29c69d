namespace TinyLlama.Compute.Tests.Cuda;

public sealed class CrossEntropyTests : CudaTests
{
    [Theory]
    [InlineData(1, 1, DType.F32)]
    [InlineData(4, 37, DType.F32)]
    [InlineData(3, 512, DType.F32)]
    [InlineData(5, 37, DType.BF16)]
    [InlineData(3, 512, DType.BF16)]
    [InlineData(2, 32000, DType.BF16)]
    [InlineData(2, 32001, DType.BF16)]
    public void Losses_and_gradients_equal_the_cpu(int tokens, int vocabulary, DType type)
    {
        float[] x = Normal(tokens * vocabulary, 4);
        int[] targets = Whole(tokens, vocabulary);
        targets[^1] = tokens > 1 ? -1 : targets[^1];
        Tensor logits = Put(tokens, vocabulary, x, type), losses = Take(tokens, 1, DType.F32), scale = Put(1, 1, [0.25f], DType.F32);
        Tensor expected = OnCpu(tokens, vocabulary, x), expectedLosses = ZeroOnCpu(tokens, 1);
        Cpu.CrossEntropy(expectedLosses, expected, OnCpu(targets), OnCpu(1, 1, [0.25f]));

        Cuda.CrossEntropy(losses, logits, Put(targets));
        Close(OfCpu(expectedLosses), Get(losses), F32, "losses without gradient");
        Assert.Equal(x, Get(logits));
        Cuda.CrossEntropy(losses, logits, Put(targets), scale);
        Close(OfCpu(expectedLosses), Get(losses), F32, "losses");
        Close(OfCpu(expected), Get(logits), type == DType.F32 ? F32 : Bf16, "dLogits");
    }

    [Fact]
    public void Ignored_rows_have_no_loss_and_no_gradient()
    {
        Tensor logits = Put(2, 40, Normal(80)), losses = Put(2, 1, [7, 7], DType.F32);
        Cuda.CrossEntropy(losses, logits, Put([-1, -100]), Put(1, 1, [1], DType.F32));
        Assert.Equal([0, 0], Get(losses));
        Assert.All(Get(logits), gradient => Assert.Equal(0, gradient));
    }

    [Fact]
    public void Logits_that_are_no_numbers_make_a_loss_that_is_none()
    {
        float[] x = Normal(64);
        x[50] = float.NaN;
        Tensor losses = Take(1, 1, DType.F32);
        Cuda.CrossEntropy(losses, Put(1, 64, x), Put([3]));
        Assert.True(float.IsNaN(Get(losses)[0]));
    }

    [Fact]
    public void Columns_of_a_wider_tensor_alone_change()
    {
        float[] x = Normal(3 * 64);
        Tensor wide = Put(3, 64, x), losses = Take(3, 1, DType.F32);
        Cuda.CrossEntropy(losses, wide.ColumnRange(16, 24), Put([1, 2, 3]), Put(1, 1, [1], DType.F32));
        float[] after = Get(wide);
        for (int i = 0; i < x.Length; i++)
        {
            Assert.Equal(i % 64 is < 16 or >= 40, x[i] == after[i]);
        }
    }
}
