using TinyLlama.Compute;
using TinyLlama.Compute.Collectives;
using TinyLlama.Compute.Cpu;
using TinyLlama.Model;
using TinyLlama.Training;

namespace TinyLlama.Tests.Training;

/// <summary>Heads and hidden channels split over ranks, against one rank that has all.</summary>
public sealed class TensorParallelTests
{
    private const int Tokens = 33;

    // Fewer than there are: sums come in parts.
    private const int SummedTokens = 20;

    /// <summary>Sums over ranks round in another order than those of one product: some units in the last place.</summary>
    private const double Tolerance = 2e-5;

    private static readonly ModelConfig s_config = new()
    {
        VocabularySize = 96,
        ContextLength = 64,
        Layers = 3,
        Heads = 8,
        KeyValueHeads = 4,
        Channels = 64,
        Hidden = 176,
    };

    [Theory]
    [InlineData(2, Keep.Everything)]
    [InlineData(4, Keep.Everything)]
    [InlineData(4, Keep.BlockInputs)]
    public void Losses_and_gradients_are_those_of_one_rank(int ranks, Keep keep)
    {
        (float[] losses, Dictionary<string, float[]> values, Dictionary<string, float[]> gradients) = Backward(s_config, null, [], keep);
        foreach ((int rank, (float[] Losses, Dictionary<string, float[]> _, Dictionary<string, float[]> Gradients) part) in
            OnThreads.Run(ranks, world => (world.Rank, Backward(s_config.Part(ranks), world, values, keep))))
        {
            AssertClose(losses, part.Losses, "losses");
            foreach (Parameter parameter in Shapes(s_config.Part(ranks)))
            {
                AssertClose(Slice(gradients[parameter.Name], parameter.Name, parameter.Rows, parameter.Columns, rank, ranks), part.Gradients[parameter.Name], parameter.Name);
            }
        }
    }

    [Fact]
    public void Parts_divide_the_model()
    {
        long shared = Shapes(s_config).Where(static parameter => TensorGroup.IsShared(parameter.Name)).Sum(static parameter => (long)parameter.Rows * parameter.Columns);
        Assert.Equal(s_config.ParameterCount - shared, 4 * (s_config.Part(4).ParameterCount - shared));
        Assert.Equal(s_config.HeadDim, s_config.Part(2).Part(2).HeadDim);
        Assert.Equal(s_config.Part(4), s_config.Part(2).Part(2));
    }

    /// <summary>A rank's part of a whole parameter, found by its indices.</summary>
    internal static float[] Slice(float[] whole, string name, int partRows, int partColumns, int rank, int ranks)
    {
        bool byColumns = name.Contains("o_proj", StringComparison.Ordinal) || name.Contains("down_proj", StringComparison.Ordinal);
        bool byRows = !byColumns && name.Contains("_proj", StringComparison.Ordinal);
        int columns = byColumns ? ranks * partColumns : partColumns;
        (int row, int column) = (byRows ? rank * partRows : 0, byColumns ? rank * partColumns : 0);
        return [.. Enumerable.Range(row, partRows).SelectMany(r => whole.AsSpan((r * columns) + column, partColumns).ToArray())];
    }

    private static (float[] Losses, Dictionary<string, float[]> Values, Dictionary<string, float[]> Gradients) Backward(
        ModelConfig config, Collective? group, Dictionary<string, float[]> whole, Keep keep)
    {
        using CpuBackend backend = CpuBackend.Create(1);
        using LlamaModel model = LlamaModel.Allocate(config, backend, trains: true);
        using Arena arena = backend.Allocate("test", 1 << 20);
        if (group is null)
        {
            Initialization.Initialize(model, backend, InitializationScheme.TinyLlama, seed: 3);
        }
        else
        {
            foreach (Parameter parameter in model.Parameters)
            {
                backend.Write<float>(parameter.Values, Slice(whole[parameter.Name], parameter.Name, parameter.Rows, parameter.Columns, group.Rank, group.Size));
            }

            model.Pack();
            model.Join(new TensorGroup(group, backend, arena, model, SummedTokens));
        }

        using Workspace workspace = Workspace.Allocate(model, backend, Tokens, keep);
        var random = new Random(5);
        var batch = new MicroBatch(arena, 1, Tokens);
        int[] tokens = [.. Enumerable.Range(0, Tokens).Select(_ => random.Next(96))];
        batch.Fill(backend, tokens, tokens);
        Tensor scale = arena.Take(1, 1);
        backend.Write<float>(scale, [1f / Tokens]);
        model.Forward(workspace, batch.Tokens, batch.Layout, KeyValueSource.Batch);
        model.Backward(workspace, batch.Tokens, batch.Targets, scale, batch.Layout);
        return (
            workspace.Losses(Tokens).HostSpan<float>().ToArray(),
            model.Parameters.ToDictionary(static p => p.Name, static p => p.Values.HostSpan<float>().ToArray()),
            model.Parameters.ToDictionary(static p => p.Name, static p => p.Gradient.HostSpan<float>().ToArray()));
    }

    // The parameters of a shape; nothing is allocated.
    private static IReadOnlyList<Parameter> Shapes(ModelConfig config)
    {
        using CpuBackend backend = CpuBackend.Create(1);
        return new LlamaModel(config, backend, ModelArenas.Plan(PackedForms.None, trains: false)).Parameters;
    }

    private static void AssertClose(float[] expected, float[] actual, string what)
    {
        double scale = expected.Max(MathF.Abs);
        double difference = expected.Zip(actual, static (e, a) => Math.Abs(e - (double)a)).Max();
        Assert.True(expected.Length == actual.Length && difference <= Tolerance * scale, $"{what}: {difference / scale:e2} of the largest");
    }
}
