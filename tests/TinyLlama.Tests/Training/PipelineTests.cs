using TinyLlama.Compute;
using TinyLlama.Compute.Collectives;
using TinyLlama.Compute.Cpu;
using TinyLlama.Model;
using TinyLlama.Training;

namespace TinyLlama.Tests.Training;

/// <summary>Blocks in stages on several ranks, against one rank that has all: the same bits.</summary>
public sealed class PipelineTests
{
    private const int Context = 16;

    private static readonly ModelConfig s_config = new()
    {
        VocabularySize = 96,
        ContextLength = 64,
        Layers = 5,
        Heads = 4,
        KeyValueHeads = 2,
        Channels = 32,
        Hidden = 88,
    };

    [Theory]
    [InlineData(1, 3, Keep.Everything)]
    [InlineData(2, 1, Keep.Everything)]
    [InlineData(2, 6, Keep.Everything)]
    [InlineData(3, 2, Keep.BlockInputs)]
    [InlineData(4, 7, Keep.BlockInputs)]
    [InlineData(5, 16, Keep.Everything)]
    public void Gradients_and_losses_are_those_of_one_rank_to_the_bit(int stages, int microBatches, Keep keep)
    {
        using CpuBackend backend = CpuBackend.Create(1);
        using LlamaModel whole = LlamaModel.Allocate(s_config, backend, trains: true);
        Initialization.Initialize(whole, backend, InitializationScheme.TinyLlama, seed: 3);
        using Workspace workspace = Workspace.Allocate(whole, backend, Context, keep);
        using Arena arena = backend.Allocate("test", 1 << 16);
        var batch = new MicroBatch(arena, 1, Context);
        Tensor scale = arena.Take(1, 1), loss = arena.Take(1, 1, DType.F64);
        backend.Write<float>(scale, [1f / (microBatches * Context)]);
        for (int micro = 0; micro < microBatches; micro++)
        {
            Fill(backend, batch, micro);
            whole.Forward(workspace, batch.Tokens, batch.Layout, KeyValueSource.Batch);
            whole.Backward(workspace, batch.Tokens, batch.Targets, scale, batch.Layout);
            backend.Sum(loss, workspace.Losses(Context));
        }

        Dictionary<string, float[]> gradients = whole.Parameters.ToDictionary(static p => p.Name, static p => p.Gradient.HostSpan<float>().ToArray());
        int found = 0;
        foreach ((double stageLoss, Dictionary<string, float[]> stageGradients) in OnThreads.Run(stages, world => Run(world, microBatches, keep)))
        {
            Assert.Equal(loss.HostSpan<double>()[0], stageLoss);
            Assert.All(stageGradients, pair => Assert.Equal(gradients[pair.Key], pair.Value));
            found += stageGradients.Count;
        }

        Assert.Equal(gradients.Count, found);
    }

    [Fact]
    public void Stages_divide_the_model()
    {
        ModelConfig[] stages = [.. Enumerable.Range(0, 3).Select(stage => s_config.Stage(stage, 3))];
        Assert.Equal(s_config.ParameterCount, stages.Sum(static stage => stage.ParameterCount));
        Assert.Equal([0, 1, 3], stages.Select(static stage => stage.FirstLayer));
        Assert.Equal([1, 2, 2], stages.Select(static stage => stage.Layers));
    }

    private static (double Loss, Dictionary<string, float[]> Gradients) Run(Collective world, int microBatches, Keep keep)
    {
        ModelConfig config = s_config.Stage(world.Rank, world.Size);
        using CpuBackend backend = CpuBackend.Create(1);
        using LlamaModel model = LlamaModel.Allocate(config, backend, trains: true);
        Initialization.Initialize(model.Parameters, s_config, backend, InitializationScheme.TinyLlama, seed: 3);
        model.Pack();
        Arena plan = Arena.Plan("pipeline");
        _ = new PipelineStep(world, backend, model, plan, 1, Context, keep);
        using Arena arena = backend.AllocateAs(plan);
        using Arena small = backend.Allocate("test", 64);
        Tensor scale = small.Take(1, 1);
        backend.Write<float>(scale, [1f / (microBatches * Context)]);
        var step = new PipelineStep(world, backend, model, arena, 1, Context, keep);
        step.Prepare();
        double loss = step.Run(microBatches, (batch, micro) => Fill(backend, batch, micro), scale);
        return (loss, model.Parameters.ToDictionary(static p => p.Name, static p => p.Gradient.HostSpan<float>().ToArray()));
    }

    private static void Fill(Backend backend, MicroBatch batch, int micro)
    {
        var random = new Random(micro);
        int[] tokens = [.. Enumerable.Range(0, Context).Select(_ => random.Next(96))];
        batch.Fill(backend, tokens, tokens);
    }
}
