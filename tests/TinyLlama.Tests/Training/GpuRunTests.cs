using System.Runtime.InteropServices;
using TinyLlama.Checkpoints;
using TinyLlama.Compute.Collectives;
using TinyLlama.Compute.Cuda;
using TinyLlama.Data;
using TinyLlama.Tests.Checkpoints;
using TinyLlama.Tests.Common;
using TinyLlama.Training;

namespace TinyLlama.Tests.Training;

/// <summary>Whole runs of ranks with a GPU each, which the emulator stands for.</summary>
public sealed class GpuRunTests
{
    [Fact]
    public void Two_GPUs_train_what_one_does()
    {
        CudaEmulator.RequireEmulated();
        using var folder = new TemporaryFolder();
        Recipe recipe = Prepare(folder, "cuda");
        float[][] one = Assert.Single(OnThreads.Run(1, world => Train(recipe, folder["one"], world)));
        Assert.All(OnThreads.Run(2, world => Train(recipe, folder["two"], world)), two => Assert.Equal(one, two));
        Assert.Equal(2, EndRecord.Find(folder["two"])?.Step);
    }

    [Fact]
    public void Two_GPUs_with_a_model_between_them_write_the_checkpoint_of_one()
    {
        CudaEmulator.RequireEmulated();
        using var folder = new TemporaryFolder();
        Recipe recipe = Prepare(folder, "cuda");
        Run("one", 1, tensor: 1, pipeline: 1);
        Run("stages", 2, tensor: 1, pipeline: 2);
        Run("split", 2, tensor: 2, pipeline: 1);
        Assert.Equal(Weights("one"), Weights("stages"));
        float[] expected = MemoryMarshal.Cast<byte, float>(Weights("one")).ToArray(), split = MemoryMarshal.Cast<byte, float>(Weights("split")).ToArray();
        // Two steps move weights by a hundredth of their length, and bf16 has 8 bits.
        double difference = Math.Sqrt(expected.Zip(split, static (e, s) => Math.Pow(e - s, 2)).Sum() / expected.Sum(static e => Math.Pow(e, 2)));
        Assert.InRange(difference, 0, 1e-3);

        void Run(string run, int ranks, int tensor, int pipeline)
        {
            Recipe own = recipe with { Distribution = recipe.Distribution with { Tensor = tensor, Pipeline = pipeline } };
            OnThreads.Run(ranks, world => Train(own, folder[run], world));
        }

        // The tensors of the file, whose header is as long in both.
        byte[] Weights(string run)
        {
            byte[] file = File.ReadAllBytes(Path.Combine(TrainingCheckpoint.PathOf(folder[run], 2), TrainingCheckpoint.ModelName));
            return file[(8 + (int)BitConverter.ToInt64(file))..];
        }
    }

    [Fact]
    public void A_run_that_goes_on_with_atomics_says_so()
    {
        CudaEmulator.Require();
        using var folder = new TemporaryFolder();
        Recipe recipe = Prepare(folder, "cuda");
        var observer = new Listener();
        Run(recipe, lastStep: 1);
        Assert.Empty(observer.Warnings);
        Run(recipe with { Deterministic = false }, lastStep: 2);
        Assert.Contains(observer.Warnings, warning => warning.Contains(", atomics'", StringComparison.Ordinal) && warning.Contains("last bits may differ", StringComparison.Ordinal));
        Assert.Contains(observer.Notes, note => note.Text == "changed deterministic true → false");

        void Run(Recipe recipe, long lastStep)
        {
            using TrainingRun run = TrainingRun.Open(recipe, folder["run"], observer);
            run.Trainer.Run(CancellationToken.None, lastStep);
        }
    }

    [Fact]
    public void The_plan_counts_the_sums_that_atomics_add_up()
    {
        TrainingPlan plan = TrainingPlan.Create(RecipeFile.Parse(
            "model: tinyllama-1.1b\nbatch: { global_tokens: 16384, micro_sequences: 8 }\nbudget: { steps: 1 }", "recipe"));
        using CudaBackend without = CudaBackend.Plan(80L << 30), with = CudaBackend.Plan(80L << 30, deterministic: false);
        Assert.Equal(16384L * plan.Model.Channels * sizeof(float), new MemoryPlan(plan, with).Bytes - new MemoryPlan(plan, without).Bytes);
    }

    [Fact]
    public void On_a_CPU_a_recipe_that_allows_atomics_says_that_it_has_none()
    {
        List<string> warnings = [];
        TrainingRun.OpenDevice(new Recipe { Deterministic = false, Threads = 1 }, warnings.Add).Dispose();
        Assert.EndsWith("is false, which has no effect: a CPU gives the same bits every time", Assert.Single(warnings), StringComparison.Ordinal);
    }

    [Fact]
    public void Ranks_cannot_share_the_GPU_that_a_device_names()
    {
        CudaEmulator.RequireEmulated();
        using var folder = new TemporaryFolder();
        Recipe recipe = Prepare(folder, "cuda:1");
        Assert.All(
            OnThreads.Run(2, world => Record.Exception(() => Train(recipe, folder["run"], world))),
            static failure => Assert.Equal(
                "device is cuda:1, one GPU, and 2 ranks train: --device cuda gives each one of its own", Assert.IsType<UserErrorException>(failure).Message));
    }

    private static Recipe Prepare(TemporaryFolder folder, string device) => RecipeFile.Read(
        TinyRun.Prepare(folder, steps: 2), $"device={device}", "distribution.reduction_lanes=2", "schedule.warmup=1", "validation.every_steps=0", "checkpoints.every_steps=0");

    private static float[][] Train(Recipe recipe, string folder, Collective world)
    {
        using TrainingRun run = TrainingRun.Open(recipe, folder, new Listener(), world);
        run.Trainer.Run(CancellationToken.None);
        return
        [
            .. run.Trainer.Model.Parameters.Select(parameter =>
            {
                float[] values = new float[parameter.Values.Count];
                run.Backend.Read(values, parameter.Values);
                return values;
            }),
        ];
    }

    private sealed class Listener : ITrainingObserver
    {
        public List<string> Warnings { get; } = [];

        public List<NoteMetrics> Notes { get; } = [];

        public void Measured(Metrics metrics)
        {
            if (metrics is NoteMetrics note)
            {
                Notes.Add(note);
            }
        }

        public void Warn(string message) => Warnings.Add(message);
    }
}
