using TinyLlama.Compute.Cpu;
using TinyLlama.Tests.Common;

namespace TinyLlama.Compute.Tests.Cpu;

public abstract class CrossEntropyTests(CpuPath path) : OperationTests(path)
{
    [Theory]
    [InlineData("cross_entropy")]
    [InlineData("cross_entropy_large")]
    public void Equals_the_golden_values(string name)
    {
        GoldenFile golden = GoldenFile.Open(SharedFiles.Require("goldens/llama-tiny/ops.safetensors"));
        (double[] x, int[] shape) = golden.Read($"{name}.logits");
        int[] targets = Array.ConvertAll(golden.Read($"{name}.targets").Values, t => (int)t);
        float[] counted = [targets.Count(t => t >= 0)];
        Tensor logits = Device.Put(shape[0], shape[1], x), losses = Device.Take(shape[0], 1);
        Tensor total = Device.Take(1, 1, DType.F64);

        Device.Backend.CrossEntropy(losses, logits, Device.Put(targets));
        SameBits(Array.ConvertAll(x, v => (float)v), Device.Get(logits), "logits without a scale");
        Device.Backend.CrossEntropy(losses, logits, Device.Put(targets), Device.Put(1, 1, (ReadOnlySpan<float>)[1 / counted[0]]));
        Device.Backend.Sum(total, losses);

        Close(golden.Read($"{name}.loss_none").Values, Device.Get(losses), 1e-6, "losses");
        Close(golden.Read($"{name}.dlogits_mean").Values, Device.Get(logits), 1e-6, "dlogits");
        Assert.Equal(golden.Read($"{name}.loss_sum").Values[0], Device.GetDouble(total), 1e-6 * Device.GetDouble(total));
    }

    [Theory]
    [InlineData(1, 1)]
    [InlineData(3, 5)]
    [InlineData(4, 1000)]
    [InlineData(2, 32_003)]
    public void Equals_the_definition(int tokens, int vocabulary)
    {
        float[] x = Normal(tokens * vocabulary, 3);
        int[] targets = Whole(tokens, vocabulary);
        targets[^1] = tokens > 1 ? -1 : 0;
        Tensor logits = Device.PutStrided(tokens, vocabulary, x), losses = Device.Take(tokens, 1);

        Device.Backend.CrossEntropy(losses, logits, Device.Put(targets), Device.Put(1, 1, (ReadOnlySpan<float>)[0.5f]));

        double[] expected = new double[tokens], dLogits = new double[vocabulary];
        float[] actual = Device.Get(logits);
        for (int n = 0; n < tokens; n++)
        {
            double[] row = Doubles(x[(n * vocabulary)..((n + 1) * vocabulary)]);
            expected[n] = CrossEntropy.Scalar.Loss(row, targets[n]);
            CrossEntropy.Scalar.Backward(dLogits, row, targets[n]);
            Close(Array.ConvertAll(dLogits, d => d / 2), actual.AsSpan(n * vocabulary, vocabulary), 2e-6, $"dlogits of row {n}");
        }

        Close(expected, Device.Get(losses), 1e-6, "losses");
    }

    [Fact]
    public void A_row_of_infinite_logits_gives_a_loss_that_is_not_finite()
    {
        float[] x = new float[40];
        x[7] = float.NaN;
        x[25] = float.PositiveInfinity;
        Tensor losses = Device.Take(2, 1);
        Device.Backend.CrossEntropy(losses, Device.Put(2, 20, x), Device.Put([1, 1]));
        Assert.All(Device.Get(losses), loss => Assert.False(float.IsFinite(loss)));
    }

    [Fact]
    public void A_logit_of_minus_infinity_weighs_nothing()
    {
        float[] x = new float[40];
        x.AsSpan(1, 38).Fill(float.NegativeInfinity);
        Tensor losses = Device.Take(1, 1), logits = Device.Put(1, 40, x);
        Device.Backend.CrossEntropy(losses, logits, Device.Put([39]), Device.Put(1, 1, (ReadOnlySpan<float>)[1f]));
        Close([Math.Log(2)], Device.Get(losses), 1e-6, "loss");
        double[] expected = new double[40];
        (expected[0], expected[39]) = (0.5, -0.5);
        Close(expected, Device.Get(logits), 1e-6, "dlogits");
    }

    [Fact]
    public void A_target_outside_the_vocabulary_is_refused()
    {
        Tensor losses = Device.Take(1, 1), logits = Device.Take(1, 3);
        Assert.Throws<ArgumentException>(() => Device.Backend.CrossEntropy(losses, logits, Device.Put([3])));
    }

    [Fact]
    public void A_row_has_the_same_bits_in_any_batch_and_for_any_number_of_threads()
    {
        const int Tokens = 50, Vocabulary = 1100;
        float[] x = Normal(Tokens * Vocabulary, 3);
        int[] targets = Whole(Tokens, Vocabulary);
        float[] Run(int threads, int first, int count)
        {
            Device device = On(threads);
            Tensor logits = device.Put(count, Vocabulary, x.AsSpan(first * Vocabulary, count * Vocabulary));
            Tensor losses = device.Take(count, 1);
            device.Backend.CrossEntropy(losses, logits, device.Put(targets.AsSpan(first, count)), device.Put(1, 1, (ReadOnlySpan<float>)[1f]));
            return [.. device.Get(losses), .. device.Get(logits)];
        }

        float[] all = Run(1, 0, Tokens);
        SameBits(all, Run(2, 0, Tokens), "2 threads");
        SameBits(all, Run(3, 0, Tokens), "3 threads");
        float[] alone = Run(1, 31, 1);
        SameBits(all.AsSpan(31, 1), alone.AsSpan(0, 1), "the loss of a row alone");
        SameBits(all.AsSpan(Tokens + (31 * Vocabulary), Vocabulary), alone.AsSpan(1), "the gradient of a row alone");
    }

    [Fact]
    public void Allocates_nothing()
    {
        Tensor losses = Device.Take(2, 1), logits = Device.Take(2, 9), scale = Device.Take(1, 1), targets = Device.Put([1, -1]);
        AllocatesNothing(() =>
        {
            Device.Backend.CrossEntropy(losses, logits, targets);
            Device.Backend.CrossEntropy(losses, logits, targets, scale);
        });
    }
}

public sealed class CrossEntropyOn512() : CrossEntropyTests(CpuPath.Vector512);

public sealed class CrossEntropyOn256() : CrossEntropyTests(CpuPath.Vector256);

public sealed class CrossEntropyOn128() : CrossEntropyTests(CpuPath.Vector128);

public sealed class CrossEntropyOnScalar() : CrossEntropyTests(CpuPath.Scalar);
