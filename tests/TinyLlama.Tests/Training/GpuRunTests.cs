using TinyLlama.Compute.Collectives;
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
        using TrainingRun run = TrainingRun.Open(recipe, folder, new Silent(), world);
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

    private sealed class Silent : ITrainingObserver
    {
        public void Measured(Metrics metrics)
        {
        }

        public void Warn(string message)
        {
        }
    }
}
