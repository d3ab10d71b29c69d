using System.Text.Json.Nodes;
using TinyLlama.Compute;
using TinyLlama.Compute.Cpu;
using TinyLlama.Compute.Cuda;
using TinyLlama.Model;
using TinyLlama.Tests.Common;

namespace TinyLlama.Tests.Model;

/// <summary>The whole model against float64 values of another implementation (goldens/llama-tiny).</summary>
public sealed class LlamaTinyTests
{
    private const int Sequences = 2;
    private const int Length = 16;

    private static readonly ModelConfig s_config = new()
    {
        VocabularySize = 96,
        ContextLength = 64,
        Layers = 2,
        Heads = 4,
        KeyValueHeads = 2,
        Channels = 64,
        Hidden = 176,
    };

    public static TheoryData<CpuPath> Paths => [CpuPath.Vector512, CpuPath.Vector256, CpuPath.Vector128, CpuPath.Scalar];

    [Theory]
    [MemberData(nameof(Paths))]
    public void Logits_and_loss_equal_the_golden_ones(CpuPath path)
    {
        GoldenFile golden = Golden("forward.safetensors");
        using ModelRun run = Load(path, Keep.Nothing);
        (int[][] sequences, int[] targets) = Batch(golden);
        run.Forward(sequences);
        AssertNear("logits", golden.Read("logits").Values, run.Logits(), 1e-5);
        Assert.Equal(golden.Read("loss").Values[0], run.Loss(targets), 1e-6);
    }

    [Theory]
    [MemberData(nameof(Paths))]
    public void Every_activation_equals_the_golden_one(CpuPath path)
    {
        GoldenFile golden = Golden("forward.safetensors");
        using ModelRun run = Load(path, Keep.Everything);
        run.Forward(Batch(golden).Sequences);
        const int N = Sequences * Length;
        int c = s_config.Channels;
        var checkedNames = new HashSet<string>(StringComparer.Ordinal);
        for (int l = 0; l < s_config.Layers; l++)
        {
            BlockActivations a = run.Workspace.Block(l, N);
            string name = $"act.model.layers.{l}.";
            float[] middle = run.Read(a.Middle);
            float[] next = run.Read(l + 1 < s_config.Layers ? run.Workspace.Block(l + 1, N).Input : run.Workspace.Final(N));
            Check(l == 0 ? "act.embed" : $"act.model.layers.{l - 1}.out", run.Read(a.Input));
            Check(name + "norm1", run.Read(a.Norm1));
            CheckHeads(name + "q_rope", run.Read(a.Qkv.ColumnRange(0, c)), s_config.Heads);
            CheckHeads(name + "k_rope", run.Read(a.Qkv.ColumnRange(c, s_config.KeyValueChannels)), s_config.KeyValueHeads);
            CheckHeads(name + "v", run.Read(a.Qkv.ColumnRange(c + s_config.KeyValueChannels, s_config.KeyValueChannels)), s_config.KeyValueHeads);
            Check(name + "attn_out", run.Read(a.Context));
            Check(name + "resid_mid", middle);
            Check(name + "mlp_out", [.. next.Zip(middle, (after, before) => after - before)]);
            Check(name + "out", next);
        }

        Check("act.final_norm", run.Read(run.Workspace.Output(N)));
        Assert.Equal(golden.Names.Where(n => n.StartsWith("act.", StringComparison.Ordinal)).Order(), checkedNames.Order());

        void Check(string name, float[] actual)
        {
            checkedNames.Add(name);
            AssertNear(name, golden.Read(name).Values, actual, 1e-5);
        }

        // The golden's order is (sequence, head, position, dim), ours (sequence, position, head, dim).
        void CheckHeads(string name, float[] rows, int heads)
        {
            float[] byHead = new float[rows.Length];
            for (int i = 0; i < rows.Length; i++)
            {
                int d = i % s_config.HeadDim;
                int h = i / s_config.HeadDim % heads;
                int t = i / (s_config.HeadDim * heads) % Length;
                int s = i / (s_config.HeadDim * heads * Length);
                byHead[((((s * heads) + h) * Length) + t) * s_config.HeadDim + d] = rows[i];
            }

            Check(name, byHead);
        }
    }

    [Theory]
    [MemberData(nameof(Paths))]
    public void Every_gradient_equals_the_golden_one(CpuPath path)
    {
        GoldenFile golden = Golden("grads.safetensors");
        GoldenFile forward = Golden("forward.safetensors");
        using ModelRun run = Load(path, Keep.Everything);
        (int[][] sequences, int[] targets) = Batch(forward);
        run.Forward(sequences);
        Assert.Equal(forward.Read("loss").Values[0], run.Backward(targets), 1e-6);
        Assert.Equal(golden.Names.Order(), run.Model.Parameters.Select(p => p.Name).Order());
        double squares = 0;
        foreach (Parameter parameter in run.Model.Parameters)
        {
            double[] expected = golden.Read(parameter.Name).Values;
            float[] actual = run.Read(parameter.Gradient);
            double error = Norm(expected.Select((e, i) => e - actual[i])) / Norm(expected);
            Assert.True(error <= 1e-5, $"{parameter.Name}: relative L2 error {error:E2}");
            squares += actual.Sum(g => (double)g * g);
        }

        Assert.Equal(forward.Read("grad_norm").Values[0], Math.Sqrt(squares), 1e-5);
    }

    // Those with code for bf16 where they are; elsewhere the widest again.
    [Theory]
    [MemberData(nameof(Paths))]
    [InlineData(CpuPath.Vector512Amx)]
    [InlineData(CpuPath.Vector512Bf16)]
    public void In_bf16_all_is_within_4_times_the_deviation_of_PyTorch_autocast(CpuPath path)
    {
        using ModelRun run = Load(path, Keep.Everything, DType.BF16);
        AssertNearAutocast(run);
    }

    // Autocast rounds operands of products; a GPU's activations are bfloat16 too, the residual stream among them.
    [Theory]
    [InlineData(true)]
    [InlineData(false)]
    public void On_a_GPU_all_is_within_4_times_the_deviation_of_PyTorch_autocast(bool deterministic)
    {
        CudaEmulator.Require();
        using ModelRun run = Load(CudaBackend.Create(deterministic: deterministic), Keep.Everything);
        AssertNearAutocast(run);
    }

    private static void AssertNearAutocast(ModelRun run)
    {
        GoldenFile golden = Golden("grads.safetensors");
        GoldenFile forward = Golden("forward.safetensors");
        JsonNode deviation = JsonNode.Parse(File.ReadAllText(SharedFiles.Require("goldens/llama-tiny/tolerance_reference.json")))!["bf16_autocast"]!;
        double Tolerance(string name) => 4 * deviation[name]!.GetValue<double>();
        (int[][] sequences, int[] targets) = Batch(forward);
        run.Forward(sequences);
        float[] logits = run.Logits();
        AssertNear("logits", forward.Read("logits").Values, logits, Tolerance("logits_max_abs"));
        Assert.Equal(forward.Read("loss").Values[0], run.Backward(targets), Tolerance("loss_abs"));
        foreach (Parameter parameter in run.Model.Parameters)
        {
            double[] expected = golden.Read(parameter.Name).Values;
            float[] actual = run.Read(parameter.Gradient);
            AssertNear(parameter.Name, expected, actual, Tolerance("grad_max_abs"));
            double error = Norm(expected.Select((e, i) => e - actual[i])) / Norm(expected);
            Assert.True(error <= Tolerance("grad_rel_l2_worst_tensor"), $"{parameter.Name}: relative L2 error {error:E2}");
        }

        // Some rounding has happened.
        Assert.Throws<Xunit.Sdk.TrueException>(() => AssertNear("logits", forward.Read("logits").Values, logits, 1e-4));
    }

    private static double Norm(IEnumerable<double> values) => Math.Sqrt(values.Sum(v => v * v));

    private static GoldenFile Golden(string name) => GoldenFile.Open(SharedFiles.Require("goldens/llama-tiny/" + name));

    private static ModelRun Load(CpuPath path, Keep keep, DType products = DType.F32)
    {
        Assert.SkipWhen(path < CpuPaths.Best, $"this machine has no {path}");
        return Load(CpuBackend.Create(threads: 2, path, products), keep);
    }

    private static ModelRun Load(Backend backend, Keep keep)
    {
        GoldenFile weights = Golden("model.safetensors");
        var run = new ModelRun(backend, s_config, Sequences * Length, keep);
        foreach (Parameter parameter in run.Model.Parameters)
        {
            run.Backend.Write<float>(parameter.Values, weights.ReadSingles(parameter.Name));
        }

        run.Model.Pack();
        return run;
    }

    private static (int[][] Sequences, int[] Targets) Batch(GoldenFile golden)
    {
        int[] tokens = Array.ConvertAll(golden.Read("input_ids").Values, v => (int)v);
        return ([.. tokens.Chunk(Length)], Array.ConvertAll(golden.Read("targets").Values, v => (int)v));
    }

    private static void AssertNear(string name, double[] expected, float[] actual, double tolerance)
    {
        Assert.Equal(expected.Length, actual.Length);
        (int worst, double error) = (0, -1);
        for (int i = 0; i < expected.Length; i++)
        {
            double difference = Math.Abs(expected[i] - actual[i]);
            if (!(difference <= error))
            {
                (worst, error) = (i, difference);
            }
        }

        Assert.True(error <= tolerance, $"{name}[{worst}]: expected {expected[worst]:R}, got {actual[worst]:R}, off by {error:E2}");
    }
}
