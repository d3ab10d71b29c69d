using TinyLlama.Compute;
using TinyLlama.Compute.Cuda;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Inference;
using TinyLlama.Model;
using TinyLlama.Tests.Common;
using TinyLlama.Training;

namespace TinyLlama.Tests.Model;

/// <summary>The whole model on a GPU, or on what stands for one: what holds for any weights.</summary>
public sealed class CudaModelTests
{
    // Every head size is a test of attention's own; here the sizes are off the tiles of products.
    private static readonly ModelConfig s_config = new()
    {
        VocabularySize = 99,
        ContextLength = 160,
        Layers = 3,
        Heads = 4,
        KeyValueHeads = 2,
        Channels = 64,
        Hidden = 104,
    };

    public CudaModelTests() => CudaEmulator.Require();

    [Theory]
    [InlineData(Keep.Products)]
    [InlineData(Keep.BlockInputs)]
    public void Recomputed_activations_give_the_same_bits(Keep keep) => Assert.Equal(TrainOnce(Keep.Everything), TrainOnce(keep));

    [Fact]
    public void Gradients_equal_central_differences_along_themselves()
    {
        using var run = new ModelRun(CudaBackend.Create(), s_config with { Layers = 2 }, 128, Keep.Everything);
        Initialization.Initialize(run.Model, run.Backend, InitializationScheme.TinyLlama, seed: 2);
        var random = new Random(4);
        int[][] sequences = [.. Enumerable.Range(0, 2).Select(_ => Enumerable.Range(0, 64).Select(_ => random.Next(s_config.VocabularySize)).ToArray())];
        int[] targets = [.. sequences.SelectMany(s => s).Select(token => (token * 7) % s_config.VocabularySize)];
        run.Forward(sequences);
        run.Backward(targets);
        foreach (Parameter parameter in run.Model.Parameters)
        {
            float[] values = run.Read(parameter.Values), gradient = run.Read(parameter.Gradient);
            double norm = Math.Sqrt(gradient.Sum(g => (double)g * g));

            // So far that the loss changes by a twentieth: more than the rounding of weights and losses, less than curvature shows.
            double distance = 0.025 / norm;
            double difference = (LossAt(distance) - LossAt(-distance)) / (2 * distance);
            MoveTo(0);
            Assert.True(Math.Abs(difference - norm) <= 0.06 * norm, $"{parameter.Name}: gradient {norm:E3}, central difference {difference:E3}");

            double LossAt(double along)
            {
                MoveTo(along);
                run.Forward(sequences);
                return run.Loss(targets);
            }

            void MoveTo(double along)
            {
                run.Backend.Write<float>(parameter.Values, [.. values.Zip(gradient, (value, g) => (float)(value + (along * g / norm)))]);
                run.Model.Pack();
            }
        }
    }

    [Fact]
    public void Weights_that_are_not_packed_give_the_same_bits() => Assert.Equal(Losses(PackedForms.Both), Losses(PackedForms.None));

    // Of three tiles of keys a sequence, so that additions meet; the third step is a record of the second.
    [Fact]
    public void With_atomics_training_goes_as_without()
    {
        double[] expected = Losses(PackedForms.Both, steps: 4, context: 160), actual = Losses(PackedForms.Both, steps: 4, context: 160, deterministic: false);
        Assert.All(expected.Zip(actual), pair => Assert.Equal(pair.First, pair.Second, 2e-3 * pair.First));
    }

    [Fact]
    public void The_same_batch_gives_the_same_bits() => Assert.Equal(TrainOnce(Keep.Everything), TrainOnce(Keep.Everything));

    [Fact]
    public void Prefill_and_decode_equal_one_forward()
    {
        using var run = new ModelRun(CudaBackend.Create(), s_config, 160, Keep.Nothing);
        run.Randomize(3);
        var random = new Random(5);
        int[] tokens = [.. Enumerable.Range(0, 100).Select(_ => random.Next(s_config.VocabularySize))];
        run.Forward(tokens);
        float[] expected = run.Logits();

        using var engine = new InferenceEngine(run.Model, run.Backend, sequences: 2);
        CachedSequence sequence = engine.Begin();
        engine.Forward(new Continuation(sequence, tokens.AsMemory(0, 70)));
        float[] logits = new float[70 * s_config.VocabularySize];
        engine.ReadAllLogits(logits, 0);
        AssertNear(expected.AsSpan(0, logits.Length), logits);
        for (int position = 70; position < tokens.Length; position++)
        {
            engine.Forward(new Continuation(sequence, tokens.AsMemory(position, 1)));
            float[] next = new float[s_config.VocabularySize];
            engine.ReadLogits(next);
            AssertNear(expected.AsSpan(position * next.Length, next.Length), next);
        }
    }

    // Of so few that products' own kernels multiply them: cuBLASLt orders sums by the number of rows.
    [Fact]
    public async Task A_few_texts_together_get_the_tokens_that_each_gets_alone()
    {
        using var run = new ModelRun(CudaBackend.Create(), s_config with { VocabularySize = 258 }, 64, Keep.Nothing);
        run.Randomize(31);
        var tokenizer = new ByteTokenizer();
        string[] prompts = ["a", "bc", "d"];
        var options = new GenerationOptions { MaxTokens = 12, Temperature = 0 };
        string[] alone;
        using (var generator = new TextGenerator(run.Model, run.Backend, tokenizer))
        {
            alone = [.. prompts.Select(prompt => generator.Generate(prompt, options).ToString())];
        }

        // Another thread computes.
        using var batch = new BatchGenerator(run.Model, run.Backend, tokenizer, places: prompts.Length);
        BatchGeneration[] together = [.. prompts.Select(prompt => batch.TrySubmit(prompt, options)!)];
        for (int i = 0; i < prompts.Length; i++)
        {
            string text = "";
            await foreach (GeneratedToken token in together[i].WithCancellation(TestContext.Current.CancellationToken))
            {
                text += token.Text;
            }

            Assert.Equal(alone[i], text);
        }
    }

    private static uint[] TrainOnce(Keep keep)
    {
        using var run = new ModelRun(CudaBackend.Create(), s_config, 256, keep);
        return LlamaModelTests.TrainOnce(run);
    }

    // The cache holds what the batch does, and keys are tiled alike: what differs is the tiles of products.
    private static void AssertNear(ReadOnlySpan<float> expected, ReadOnlySpan<float> actual)
    {
        Assert.Equal(expected.Length, actual.Length);
        for (int i = 0; i < expected.Length; i++)
        {
            Assert.Equal(expected[i], actual[i], 0.02 * (1 + Math.Abs(expected[i])));
        }
    }

    // Losses and norms of some steps.
    private static double[] Losses(PackedForms packed, int steps = 2, int context = 16, bool deterministic = true)
    {
        using CudaBackend backend = CudaBackend.Create(deterministic: deterministic);
        var settings = new AdamWSettings(0.9f, 0.95f, 1e-8f, 0.1f, 1);
        using var training = new TrainingSpeed(
            new TrainingShape(s_config, 2, context, Keep.Everything, settings, DecayGroup.All, RateFactors.Same, packed), backend);
        List<double> losses = [];
        for (int s = 0; s < steps; s++)
        {
            StepResult step = training.Step();
            losses.AddRange([step.Loss, step.GradientNorm]);
        }

        return [.. losses];
    }
}
