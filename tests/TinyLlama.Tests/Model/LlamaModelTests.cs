using TinyLlama.Compute;
using TinyLlama.Compute.Cpu;
using TinyLlama.Model;

namespace TinyLlama.Tests.Model;

/// <summary>What holds for a Llama of any weights.</summary>
public sealed class LlamaModelTests
{
    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void Gradients_equal_central_differences(bool tied)
    {
        using var run = new ModelRun(ModelRun.TinyConfig(tied), 32, Keep.Everything);
        run.Randomize(7);
        var random = new Random(11);
        int[][] sequences = Sequences(random, 9, 5, 13);
        int[] targets = Targets(random, sequences, ignoreEvery: 6);
        run.Forward(sequences);
        run.Backward(targets);
        foreach (Parameter parameter in run.Model.Parameters)
        {
            float[] gradient = run.Read(parameter.Gradient);
            double scale = Math.Sqrt(gradient.Average(g => (double)g * g));
            Assert.True(scale > 1e-5, $"{parameter.Name} has no gradient to check");
            int largest = Array.IndexOf(gradient, gradient.MaxBy(Math.Abs));
            foreach (int i in (int[])[largest, .. Enumerable.Range(0, 4).Select(_ => random.Next(gradient.Length))])
            {
                double difference = CentralDifference(run, parameter, i, sequences, targets);
                Assert.True(
                    Math.Abs(difference - gradient[i]) <= (1e-2 * (Math.Abs(gradient[i]) + scale)) + 2e-5,
                    $"{parameter.Name}[{i}]: gradient {gradient[i]:R}, central difference {difference:R}");
            }
        }
    }

    [Theory]
    [InlineData(false, Keep.BlockInputs)]
    [InlineData(true, Keep.BlockInputs)]
    [InlineData(false, Keep.Products)]
    [InlineData(true, Keep.Products)]
    public void Recomputed_activations_give_the_same_bits(bool tied, Keep keep)
    {
        Assert.Equal(TrainOnce(tied, Keep.Everything, threads: 1), TrainOnce(tied, keep, threads: 1));
    }

    [Fact]
    public void What_is_recomputed_takes_no_memory()
    {
        using CpuBackend backend = CpuBackend.Create(1);
        ModelConfig config = ModelRun.TinyConfig();
        const int Tokens = 64;
        long Bytes(Keep keep)
        {
            Arena activations = Arena.Plan("activations");
            _ = new Workspace(activations, null, backend, config, Tokens, keep);
            return activations.UsedBytes;
        }

        // Two norms and SwiGLU of every block but the one that all share.
        long elementwise = (config.Layers - 1L) * Tokens * sizeof(float) * ((2 * config.Channels) + config.Hidden);
        Assert.Equal(Bytes(Keep.Everything) - elementwise, Bytes(Keep.Products));
        Assert.True(Bytes(Keep.BlockInputs) < Bytes(Keep.Products));
    }

    [Fact]
    public void Any_number_of_threads_gives_the_same_bits()
    {
        uint[] one = TrainOnce(tied: false, Keep.Everything, threads: 1);
        Assert.Equal(one, TrainOnce(tied: false, Keep.Everything, threads: 2));
        Assert.Equal(one, TrainOnce(tied: false, Keep.Everything, threads: 3));
    }

    [Fact]
    public void A_sequence_has_the_same_bits_alone_and_in_a_batch()
    {
        using var run = new ModelRun(ModelRun.TinyConfig(), 256, Keep.Nothing);
        run.Randomize(5);
        int[][] sequences = Sequences(new Random(3), 70, 1, 96, 17, 64);
        run.Forward(sequences);
        float[] together = run.Logits();
        int row = 0;
        foreach (int[] sequence in sequences)
        {
            run.Forward(sequence);
            int v = run.Model.Config.VocabularySize;
            Assert.Equal(Bits(together.AsSpan(row * v, sequence.Length * v)), Bits(run.Logits()));
            row += sequence.Length;
        }
    }

    [Fact]
    public void Gradients_of_two_backwards_add_up()
    {
        using var run = new ModelRun(ModelRun.TinyConfig(), 16, Keep.Everything);
        run.Randomize(2);
        int[][] sequences = Sequences(new Random(4), 12);
        int[] targets = Targets(new Random(6), sequences, ignoreEvery: 100);
        run.Forward(sequences);
        run.Backward(targets);
        float[][] once = [.. run.Model.Parameters.Select(p => run.Read(p.Gradient))];
        run.Forward(sequences);
        run.Backward(targets);
        foreach ((Parameter parameter, float[] first) in run.Model.Parameters.Zip(once))
        {
            float[] both = run.Read(parameter.Gradient);
            float largest = first.Max(Math.Abs);
            Assert.All(both.Zip(first), pair => Assert.Equal(2 * pair.Second, pair.First, 1e-5f * largest));
        }
    }

    private static double CentralDifference(ModelRun run, Parameter parameter, int i, int[][] sequences, int[] targets)
    {
        const float Step = 1e-2f;
        float[] values = run.Read(parameter.Values);
        float value = values[i];
        values[i] = value + Step;
        double above = LossWith(values);
        values[i] = value - Step;
        double below = LossWith(values);
        values[i] = value;
        LossWith(values);
        return (above - below) / ((double)(value + Step) - (value - Step));

        double LossWith(float[] changed)
        {
            run.Backend.Write<float>(parameter.Values, changed);
            run.Model.Pack();
            run.Forward(sequences);
            return run.Loss(targets);
        }
    }

    // The bits of the losses' mean and of every gradient of one forward and backward.
    private static uint[] TrainOnce(bool tied, Keep keep, int threads)
    {
        using var run = new ModelRun(ModelRun.TinyConfig(tied), 256, keep, threads: threads);
        return TrainOnce(run);
    }

    /// <summary>The same of any model of room for 256 tokens and a vocabulary of at least 41.</summary>
    internal static uint[] TrainOnce(ModelRun run)
    {
        run.Randomize(9);
        var random = new Random(13);
        int[][] sequences = Sequences(random, 90, 30, 1, 64);
        int[] targets = Targets(random, sequences, ignoreEvery: 10);
        run.Forward(sequences);
        float loss = (float)run.Backward(targets);
        return Bits([loss, .. run.Model.Parameters.SelectMany(p => run.Read(p.Gradient))]);
    }

    private static uint[] Bits(ReadOnlySpan<float> values) =>
        Array.ConvertAll(values.ToArray(), BitConverter.SingleToUInt32Bits);

    private static int[][] Sequences(Random random, params int[] lengths) =>
        [.. lengths.Select(length => Enumerable.Range(0, length).Select(_ => random.Next(41)).ToArray())];

    private static int[] Targets(Random random, int[][] sequences, int ignoreEvery) =>
        [.. sequences.SelectMany(s => s).Select((_, i) => i % ignoreEvery == ignoreEvery - 1 ? -1 : random.Next(41))];
}
