using System.Text.Json.Nodes;
using TinyLlama.Compute;
using TinyLlama.Compute.Cpu;
using TinyLlama.Compute.Cuda;
using TinyLlama.Model;
using TinyLlama.Tests.Common;
using TinyLlama.Training;

namespace TinyLlama.Tests.Training;

/// <summary>Three steps of the tiny Llama against PyTorch in float64: forward, backward, clipping and AdamW together.</summary>
public sealed class AdamWGoldenTests
{
    private static readonly AdamWSettings s_settings = new(0.9f, 0.95f, 1e-8f, 0.1f, 1);

    private static readonly double[] s_losses = [4.867182346221068, 4.0693089992063545, 3.452475502953473];

    public static TheoryData<int> Threads => [1, 2, 3];

    [Theory]
    [MemberData(nameof(Threads))]
    public void Weights_and_moments_after_one_and_three_steps_equal_the_goldens(int threads)
    {
        GoldenFile forward = Open("forward.safetensors");
        using CpuBackend backend = CpuBackend.Create(threads);
        using TrainingMemory memory = TrainingMemory.Allocate(TinyShape(Keep.Everything), backend);
        Load(memory, backend, Open("model.safetensors"));
        memory.Batch.Fill(backend, Ints(forward, "input_ids"), Ints(forward, "targets"));

        var step = new TrainingStep(memory, backend);
        double[] norms = [4.507114001331253, 4.072733095906766, 3.3670949567767225];
        for (int s = 1; s <= 3; s++)
        {
            step.Begin(32);
            step.Accumulate();
            StepResult result = step.End(s, 1e-3);
            Assert.Equal(s_losses[s - 1], result.Loss, 1e-6);
            Assert.Equal(norms[s - 1], result.GradientNorm, 1e-4);
            if (s is 1 or 3)
            {
                AssertMeanDifference(memory.Model.Parameters, backend, Open($"weights_step{s}.safetensors"), 5e-8);
            }
        }
    }

    [Theory]
    [InlineData(Keep.Everything)]
    [InlineData(Keep.BlockInputs)]
    public void On_a_GPU_all_is_within_4_times_the_deviation_of_PyTorch_autocast(Keep keep)
    {
        CudaEmulator.Require();
        GoldenFile forward = Open("forward.safetensors");
        JsonNode deviation = JsonNode.Parse(File.ReadAllText(SharedFiles.Require("goldens/llama-tiny/tolerance_reference.json")))!["bf16_autocast"]!;
        using CudaBackend backend = CudaBackend.Create();
        using TrainingMemory memory = TrainingMemory.Allocate(TinyShape(keep), backend);
        Load(memory, backend, Open("model.safetensors"));
        memory.Batch.Fill(backend, Ints(forward, "input_ids"), Ints(forward, "targets"));

        var step = new TrainingStep(memory, backend);
        for (int s = 1; s <= 3; s++)
        {
            step.Begin(32);
            step.Accumulate();
            double autocast = deviation["losses"]![s - 1]!.GetValue<double>();
            Assert.Equal(s_losses[s - 1], step.End(s, 1e-3).Loss, 4 * Math.Abs(autocast - s_losses[s - 1]));
            if (s is 1 or 3)
            {
                AssertMeanDifference(
                    memory.Model.Parameters, backend, Open($"weights_step{s}.safetensors"), 4 * deviation[$"weights_step{s}_mean_abs"]!.GetValue<double>());
            }
        }
    }

    [Fact]
    public void Two_micro_batches_update_as_one_batch_of_both()
    {
        GoldenFile forward = Open("forward.safetensors");
        GoldenFile model = Open("model.safetensors");
        int[] tokens = Ints(forward, "input_ids"), targets = Ints(forward, "targets");

        // The second sequence has fewer targets: it must weigh less, not the same.
        targets.AsSpan(21).Fill(-1);
        using CpuBackend backend = CpuBackend.Create(2);
        using TrainingMemory whole = TrainingMemory.Allocate(TinyShape(Keep.Everything), backend);
        using TrainingMemory halves = TrainingMemory.Allocate(TinyShape(Keep.Everything) with { Sequences = 1 }, backend);
        Load(whole, backend, model);
        Load(halves, backend, model);

        var one = new TrainingStep(whole, backend);
        whole.Batch.Fill(backend, tokens, targets);
        one.Begin(21);
        one.Accumulate();
        StepResult expected = one.End(1, 1e-3);

        var two = new TrainingStep(halves, backend);
        two.Begin(21);
        for (int half = 0; half < 2; half++)
        {
            halves.Batch.Fill(backend, tokens.AsSpan(half * 16, 16), targets.AsSpan(half * 16, 16));
            two.Accumulate();
        }

        StepResult actual = two.End(1, 1e-3);
        Assert.Equal(expected.Loss, actual.Loss, 1e-6);
        Assert.Equal(expected.GradientNorm, actual.GradientNorm, 1e-5);
    }

    [Fact]
    public void A_step_allocates_no_managed_memory()
    {
        using CpuBackend backend = CpuBackend.Create(2);
        AssertStepAllocatesNothing(backend);
    }

    [Fact]
    public void A_step_on_a_GPU_allocates_no_managed_memory()
    {
        CudaEmulator.Require();
        using CudaBackend backend = CudaBackend.Create();
        AssertStepAllocatesNothing(backend);
    }

    private static void AssertStepAllocatesNothing(Backend backend)
    {
        using TrainingMemory memory = TrainingMemory.Allocate(TinyShape(Keep.BlockInputs), backend);
        Initialization.Initialize(memory.Model, backend, InitializationScheme.TinyLlama, seed: 3);
        int[] tokens = [.. Enumerable.Range(0, 32)];
        var step = new TrainingStep(memory, backend);
        long Allocated(int s)
        {
            long before = GC.GetAllocatedBytesForCurrentThread();
            memory.Batch.Fill(backend, tokens, tokens);
            step.Begin(32);
            step.Accumulate();
            step.End(s, 1e-3);
            return GC.GetAllocatedBytesForCurrentThread() - before;
        }

        // The first step takes what is taken at first use, the second may be recorded.
        Allocated(1);
        Allocated(2);
        Assert.Equal(0, Allocated(3));
    }

    [Fact]
    public void Embedding_and_head_alone_learn_at_their_own_rates()
    {
        using CpuBackend backend = CpuBackend.Create(1);
        Dictionary<string, float[]> After(RateFactors rates, double learningRate)
        {
            using TrainingMemory memory = TrainingMemory.Allocate(
                TinyShape(Keep.Everything) with { Rates = rates }, backend);
            Initialization.Initialize(memory.Model, backend, InitializationScheme.TinyLlama, seed: 3);
            int[] tokens = [.. Enumerable.Range(0, 32)];
            memory.Batch.Fill(backend, tokens, tokens);
            var step = new TrainingStep(memory, backend);
            step.Begin(32);
            step.Accumulate();
            step.End(1, learningRate);
            return memory.Model.Parameters.ToDictionary(p => p.Name, p => p.Values.HostSpan<float>().ToArray());
        }

        Dictionary<string, float[]> usual = After(RateFactors.Same, 1e-3);
        Dictionary<string, float[]> twice = After(RateFactors.Same, 2e-3), fourTimes = After(RateFactors.Same, 4e-3);
        foreach ((string name, float[] values) in After(new RateFactors(Embedding: 4, Head: 2), 1e-3))
        {
            Dictionary<string, float[]> expected = name switch
            {
                "model.embed_tokens.weight" => fourTimes,
                "lm_head.weight" => twice,
                _ => usual,
            };
            Assert.Equal(expected[name], values);
            Assert.NotEqual(usual[name], twice[name]);
            Assert.NotEqual(twice[name], fourTimes[name]);
        }
    }

    [Fact]
    public void A_loss_that_is_not_finite_updates_nothing()
    {
        using CpuBackend backend = CpuBackend.Create(2);
        using TrainingMemory memory = TrainingMemory.Allocate(TinyShape(Keep.Everything), backend);
        Initialization.Initialize(memory.Model, backend, InitializationScheme.TinyLlama, seed: 3);
        memory.Model.Parameters[0].Values.HostSpan<float>()[64] = float.NaN;
        float[] before = memory.Model.Parameters[^1].Values.HostSpan<float>().ToArray();
        int[] tokens = [.. Enumerable.Range(0, 32)];
        memory.Batch.Fill(backend, tokens, tokens);
        var step = new TrainingStep(memory, backend);
        step.Begin(32);
        step.Accumulate();
        Assert.False(step.End(1, 1e-3).IsFinite);
        Assert.Equal(before, memory.Model.Parameters[^1].Values.HostSpan<float>().ToArray());
    }

    [Fact]
    public void A_plan_counts_exactly_what_a_run_takes()
    {
        using CpuBackend backend = CpuBackend.Create(1);
        foreach (Keep keep in (Keep[])[Keep.Everything, Keep.Products, Keep.BlockInputs])
        {
            using TrainingMemory plan = TrainingMemory.Plan(TinyShape(keep), backend);
            using TrainingMemory run = TrainingMemory.Allocate(TinyShape(keep), backend);
            Assert.Equal(plan.Arenas, run.Arenas);
            Assert.True(plan.Arenas.Sum(arena => arena.Bytes) > 0);
        }
    }

    private static TrainingShape TinyShape(Keep keep) => new(
        new ModelConfig
        {
            VocabularySize = 96,
            ContextLength = 64,
            Layers = 2,
            Heads = 4,
            KeyValueHeads = 2,
            Channels = 64,
            Hidden = 176,
        },
        Sequences: 2, Context: 16, keep, s_settings, DecayGroup.All, RateFactors.Same);

    private static GoldenFile Open(string name) => GoldenFile.Open(SharedFiles.Require("goldens/llama-tiny/" + name));

    private static int[] Ints(GoldenFile file, string name) => [.. file.Read(name).Values.Select(value => (int)value)];

    private static void Load(TrainingMemory memory, Backend backend, GoldenFile weights)
    {
        foreach (Parameter parameter in memory.Model.Parameters)
        {
            backend.Write<float>(parameter.Values, [.. weights.Read(parameter.Name).Values.Select(value => (float)value)]);
        }

        memory.Model.Pack();
    }

    private static void AssertMeanDifference(IEnumerable<Parameter> actual, Backend backend, GoldenFile expected, double tolerance)
    {
        double sum = 0;
        long count = 0;
        foreach (Parameter parameter in actual)
        {
            float[] values = new float[parameter.Values.Count];
            backend.Read(values, parameter.Values);
            sum += values.Zip(expected.Read(parameter.Name).Values, (a, e) => Math.Abs(a - e)).Sum();
            count += values.Length;
        }

        Assert.True(sum / count <= tolerance, $"mean difference {sum / count:e2} > {tolerance:e2}");
    }
}
