using System.CommandLine;
using System.Text.Json.Nodes;
using TinyLlama.Cli;
using TinyLlama.Cli.Bench;
using TinyLlama.Compute;
using TinyLlama.Compute.Cpu;
using TinyLlama.Compute.Cuda;
using TinyLlama.Data;
using TinyLlama.Inference;
using TinyLlama.Model;
using TinyLlama.Tests.Common;
using TinyLlama.Training;

namespace TinyLlama.Tests.Cli;

public sealed class BenchCommandTests
{
    private static readonly ModelConfig s_smoke = Presets.Find("smoke")!.Config;

    [Fact]
    public void Train_prints_the_step_and_its_operations()
    {
        string text = Run("train", "--model", "smoke", "--sequences", "2", "--ctx", "16", "--seconds", "0");
        foreach (string expected in (string[])["2 × 16 tokens a step", "tokens/s", "of ceiling", "peak memory", "AdamW", "32 × 352 × 64", "matrix products"])
        {
            Assert.Contains(expected, text, StringComparison.Ordinal);
        }
    }

    [Fact]
    public void The_products_of_a_step_are_the_operations_of_the_formula_and_every_operation_is_measured()
    {
        JsonNode bench = JsonNode.Parse(Run("train", "--model", "smoke", "--sequences", "2", "--ctx", "16", "--seconds", "0", "--json"))!;
        JsonNode[] operations = [.. bench["operations"]!.AsArray().Select(operation => operation!)];
        double products = operations.Where(o => (int)o["tokens"]! > 0).Sum(o => (double)o["flops"]!);
        long multiplied = s_smoke.ParameterCount - ((long)s_smoke.VocabularySize * s_smoke.Channels) - (((2 * s_smoke.Layers) + 1) * s_smoke.Channels);
        Assert.Equal(6.0 * multiplied * 32, products);

        // Two sequences of 16 · 17 / 2 pairs, two products of 2 · 64 in each layer.
        Assert.Equal(s_smoke.Layers * 2 * 136 * 4 * 64.0, (double)operations.Single(o => (string)o["name"]! == "Attention")["flops"]!);
        Assert.All(operations, o =>
        {
            Assert.True((double)o["best_seconds"]! > 0 && (double)o["median_seconds"]! >= (double)o["best_seconds"]!, (string)o["name"]!);
            Assert.True((int)o["calls"]! > 0 && (double)o["bytes"]! > 0, (string)o["name"]!);
        });
    }

    [Fact]
    public void A_step_on_a_GPU_is_measured_whole_and_operation_by_operation()
    {
        CudaEmulator.Require();
        JsonNode bench = JsonNode.Parse(Run("train", "--model", "smoke", "--sequences", "1", "--ctx", "16", "--seconds", "0", "--device", "cuda", "--json"))!;
        JsonNode[] operations = [.. bench["operations"]!.AsArray().Select(operation => operation!)];
        Assert.Equal(s_smoke.Layers, (int)operations.Single(o => (string)o["name"]! == "Attention")["calls"]!);
        Assert.Equal(s_smoke.Layers * 136 * 4 * 64.0, (double)operations.Single(o => (string)o["name"]! == "Attention")["flops"]!);
        Assert.InRange((double)bench["median_tokens_per_second"]!, 0.01, 1e9);
        Assert.InRange((long)bench["peak_bytes"]!, s_smoke.ParameterCount * 16, long.MaxValue);
    }

    [Fact]
    public void Whole_steps_on_a_GPU_are_recorded_as_a_run_records_them_and_timed_operations_are_not()
    {
        CudaEmulator.Require();
        using CudaBackend device = CudaBackend.Create();
        using var timed = new TimedBackend(device) { Times = false };
        using var recording = new Recording();
        int calls = 0;
        for (int step = 0; step < 3; step++)
        {
            timed.Repeat(recording, () => calls++);
        }

        Assert.Equal(2, calls);
        timed.Times = true;
        timed.Repeat(recording, () => calls++);
        Assert.Equal(3, calls);
    }

    [Theory]
    [InlineData("matmul", "of 8", 4, "cpu")]
    [InlineData("kernels", "norm", 3, "cpu")]
    [InlineData("matmul", "of 8", 4, "cuda")]
    [InlineData("kernels", "norm", 3, "cuda")]
    public void Operations_are_measured_alone(string verb, string only, int count, string device)
    {
        if (device == "cuda")
        {
            CudaEmulator.Require();
        }

        string[] options = [verb, "--model", "smoke", "--sequences", "1", "--ctx", "16", "--only", only, "--seconds", "0", "--threads", "1", "--device", device];
        Assert.Contains("floor ms", Run(options), StringComparison.Ordinal);
        JsonNode?[] rows = [.. JsonNode.Parse(Run([.. options, "--json"]))!.AsArray()];
        Assert.Equal(count, rows.Length);
        Assert.All(rows, row => Assert.Equal(1, (int)row!["calls"]!));
    }

    [Theory]
    [InlineData("--model nix", "--model nix")]
    [InlineData("--sequences 100000 --ctx 100000", "--sequences 100000 of --ctx 100000")]
    public void An_unknown_shape_and_a_huge_micro_batch_are_refused(string options, string message)
    {
        var error = Assert.Throws<UserErrorException>(() => Run(["train", .. options.Split(' ')]));
        Assert.Contains(message, error.Message, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("none", 1)]
    [InlineData("elementwise", 2)]
    [InlineData("blocks", 2)]
    public void Backward_computes_again_what_is_asked_for(string recompute, int timesALayer)
    {
        JsonNode bench = JsonNode.Parse(Run("train", "--model", "smoke", "--sequences", "1", "--ctx", "16", "--seconds", "0", "--recompute", recompute, "--json"))!;
        Assert.Equal(recompute, (string)bench["recompute"]!);
        Assert.Equal(timesALayer * s_smoke.Layers, (int)bench["operations"]!.AsArray().Single(o => (string)o!["name"]! == "SwiGlu")!["calls"]!);
    }

    [Fact]
    public void The_shapes_S_M_and_L_have_the_size_that_comparisons_quote() => Assert.Equal(
        [6_327_552, 66_597_376, 1_100_048_384],
        ((string[])["S", "M", "L"]).Select(name => BenchModel.Find(name, null, null).Config.ParameterCount));

    [Fact]
    public void Timing_changes_no_bit()
    {
        using CpuBackend device = CpuBackend.Create(2);
        using var timed = new TimedBackend(device);
        Assert.Equal(TrainThenInfer(device), TrainThenInfer(timed));
        Assert.Contains(timed.TakeTimes(), times => times.Operation.Name == nameof(Backend.AppendToCache));
    }

    // Losses and norms of some steps, then the logits after a prefill.
    private static double[] TrainThenInfer(Backend backend)
    {
        var settings = new AdamWSettings(0.9f, 0.95f, 1e-8f, 0.1f, 1);
        using var training = new TrainingSpeed(new TrainingShape(s_smoke, 2, 16, Keep.BlockInputs, settings, DecayGroup.All, RateFactors.Same), backend);
        StepResult[] steps = [training.Step(), training.Step(), training.Step()];

        using LlamaModel model = LlamaModel.Allocate(s_smoke, backend, trains: false);
        Initialization.Initialize(model, backend, InitializationScheme.TinyLlama, seed: 3);
        using var engine = new InferenceEngine(model, backend, tokensPerForward: 8);
        engine.Feed(engine.Begin(), Enumerable.Range(1, 5).ToArray());
        float[] logits = new float[s_smoke.VocabularySize];
        engine.ReadLogits(logits);
        return [.. steps.SelectMany(step => new[] { step.Loss, step.GradientNorm }), .. logits];
    }

    private static string Run(params string[] arguments)
    {
        var output = new StringWriter { NewLine = "\n" };
        var configuration = new InvocationConfiguration { EnableDefaultExceptionHandler = false, Output = output, Error = TextWriter.Null };
        Assert.Equal(ExitCode.Success, BenchCommand.Create().Parse(arguments).Invoke(configuration));
        return output.ToString();
    }
}
