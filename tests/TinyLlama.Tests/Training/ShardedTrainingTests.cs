using System.Numerics;
using TinyLlama.Compute;
using TinyLlama.Compute.Collectives;
using TinyLlama.Compute.Cpu;
using TinyLlama.Compute.Cuda;
using TinyLlama.Model;
using TinyLlama.Tests.Common;
using TinyLlama.Training;

namespace TinyLlama.Tests.Training;

/// <summary>Steps of many ranks against the same steps of one: the bits of weights, losses and norms.</summary>
public sealed class ShardedTrainingTests
{
    private const int Lanes = 4;
    private const int Context = 16;
    private const int Steps = 3;

    /// <summary>How far the losses, norms and weights of split blocks may be from those of whole ones, as vectors, of their length.</summary>
    private const double SplitTolerance = 1e-5;

    /// <summary>(ranks, shards, stage, micro-batches, tied).</summary>
    public static TheoryData<int, int, int, int, bool> Meshes
    {
        get
        {
            var meshes = new TheoryData<int, int, int, int, bool>();
            foreach (int stage in (int[])[1, 2, 3])
            {
                foreach ((int ranks, int shards) in ((int, int)[])[(1, 1), (2, 2), (2, 1), (4, 4), (4, 2), (4, 1)])
                {
                    meshes.Add(ranks, shards, stage, Lanes, false);
                    meshes.Add(ranks, shards, stage, Lanes, true);
                }
            }

            meshes.Add(2, 2, 1, 2 * Lanes, false);
            meshes.Add(4, 4, 1, 2 * Lanes, true);
            return meshes;
        }
    }

    [Theory]
    [MemberData(nameof(Meshes))]
    public void Any_number_of_ranks_and_any_stage_give_the_bits_of_one_rank(int ranks, int shards, int stage, int microBatches, bool tied)
    {
        Result expected = Train(new Sharding(1, 1, 1, Lanes), microBatches, tied)[0];
        foreach (Result actual in Train(new Sharding(ranks, shards, stage, Lanes), microBatches, tied))
        {
            Assert.Equal(expected.Losses, actual.Losses);
            Assert.Equal(expected.Norms, actual.Norms);
            foreach ((string name, float[] values) in expected.Weights)
            {
                Assert.Equal(values, actual.Weights[name]);
            }
        }
    }

    /// <summary>Stages, ranks that keep the same stage, lanes and micro-batches.</summary>
    [Theory]
    [InlineData(2, 1, 1, 1, Keep.Everything)]
    [InlineData(2, 1, 1, 6, Keep.Products)]
    [InlineData(3, 1, 1, 2, Keep.BlockInputs)]
    [InlineData(4, 1, 1, 7, Keep.BlockInputs)]
    [InlineData(5, 1, 1, 16, Keep.Everything)]
    [InlineData(2, 1, 4, 8, Keep.Everything)]
    [InlineData(2, 2, 2, 4, Keep.Everything)]
    [InlineData(2, 2, 4, 8, Keep.BlockInputs)]
    public void A_pipeline_gives_the_bits_of_one_rank(int stages, int replicas, int lanes, int microBatches, Keep keep)
    {
        Result expected = Train(new Sharding(1, 1, 1, lanes), microBatches, tied: false)[0];
        Result[] ranks = Train(new Sharding(stages * replicas, 1, 1, lanes, Pipeline: stages), microBatches, tied: false, keep: keep);
        foreach (Result actual in ranks)
        {
            Assert.Equal(expected.Losses, actual.Losses);
            Assert.Equal(expected.Norms, actual.Norms);
            Assert.All(actual.Weights, weight => Assert.Equal(expected.Weights[weight.Key], weight.Value));
        }

        Assert.Equal(replicas * expected.Weights.Count, ranks.Sum(static rank => rank.Weights.Count));
    }

    /// <summary>Ranks that split blocks, stages, ranks that keep the same again.</summary>
    [Theory]
    [InlineData(2, 1, 1, false)]
    [InlineData(4, 1, 1, true)]
    [InlineData(2, 2, 1, false)]
    [InlineData(2, 1, 2, true)]
    [InlineData(2, 2, 2, false)]
    public void Split_blocks_give_the_losses_and_weights_of_one_rank_but_for_rounding(int split, int stages, int replicas, bool tied)
    {
        Result expected = Train(new Sharding(1, 1, 1, Lanes), Lanes, tied)[0];
        Result[] ranks = Train(new Sharding(split * stages * replicas, 1, 1, Lanes, Tensor: split, Pipeline: stages), Lanes, tied);
        for (int rank = 0; rank < ranks.Length; rank++)
        {
            AssertClose(expected.Losses, ranks[rank].Losses, SplitTolerance, "losses");
            AssertClose(expected.Norms, ranks[rank].Norms, SplitTolerance, "norms");
            foreach ((string name, float[] values) in ranks[rank].Weights)
            {
                (int rows, int columns) = ranks[rank].Shapes[name];
                AssertClose(TensorParallelTests.Slice(expected.Weights[name], name, rows, columns, rank % split, split), values, SplitTolerance, name);
            }
        }

        Assert.All(ranks, rank => Assert.Equal(ranks[0].Losses, rank.Losses));
        Assert.All(ranks, rank => Assert.Equal(ranks[0].Norms, rank.Norms));
    }

    [Theory]
    [InlineData(2, 2, 1)]
    [InlineData(2, 2, 2)]
    [InlineData(2, 2, 3)]
    [InlineData(4, 2, 1)]
    [InlineData(4, 2, 3)]
    public void Any_number_of_GPUs_gives_the_bits_of_one(int ranks, int shards, int stage)
    {
        CudaEmulator.RequireEmulated();
        Result expected = Train(new Sharding(1, 1, 1, Lanes), Lanes, tied: false, gpus: true)[0];
        foreach (Result actual in Train(new Sharding(ranks, shards, stage, Lanes), Lanes, tied: false, gpus: true))
        {
            Assert.Equal(expected.Losses, actual.Losses);
            Assert.Equal(expected.Norms, actual.Norms);
            Assert.All(expected.Weights, weight => Assert.Equal(weight.Value, actual.Weights[weight.Key]));
        }
    }

    [Fact]
    public void A_pipeline_of_GPUs_gives_the_bits_of_one()
    {
        CudaEmulator.RequireEmulated();
        Result expected = Train(new Sharding(1, 1, 1, 1), Lanes, tied: false, gpus: true)[0];
        foreach (Result actual in Train(new Sharding(2, 1, 1, 1, Pipeline: 2), Lanes, tied: false, gpus: true))
        {
            Assert.Equal(expected.Losses, actual.Losses);
            Assert.Equal(expected.Norms, actual.Norms);
            Assert.All(actual.Weights, weight => Assert.Equal(expected.Weights[weight.Key], weight.Value));
        }
    }

    [Fact]
    public void Blocks_split_over_GPUs_give_the_losses_of_one_but_for_rounding()
    {
        CudaEmulator.RequireEmulated();
        Result expected = Train(new Sharding(1, 1, 1, 1), Lanes, tied: false, gpus: true)[0];
        foreach (Result actual in Train(new Sharding(2, 1, 1, 1, Tensor: 2), Lanes, tied: false, gpus: true))
        {
            // Activations are rounded to 8 bits, sums of parts of them too.
            AssertClose(expected.Losses, actual.Losses, 1.0 / 256, "losses");
            AssertClose(expected.Norms, actual.Norms, 1.0 / 64, "norms");
        }
    }

    [Fact]
    public void A_step_of_split_blocks_in_stages_allocates_nothing()
    {
        var sharding = new Sharding(4, 1, 1, 1, Tensor: 2, Pipeline: 2);
        long[] allocated = OnRanks(4, sharding, static (memory, backend, _) =>
        {
            memory.Fill(parameters => Initialization.Initialize(parameters, Shape(Sharding.None, tied: false).Model, backend, InitializationScheme.TinyLlama, seed: 3));
            var step = new TrainingStep(memory, backend);
            int[] tokens = new int[Context];
            Action<MicroBatch, int> fill = (batch, _) => batch.Fill(backend, tokens, tokens);
            long before = 0;
            for (int s = 0; s < Steps; s++)
            {
                before = GC.GetAllocatedBytesForCurrentThread();
                step.Begin(3 * Context);
                step.Accumulate(3, fill);
                step.End(s + 1, 1e-2);
            }

            return GC.GetAllocatedBytesForCurrentThread() - before;
        }, Shape(sharding, tied: false));
        Assert.All(allocated, static bytes => Assert.Equal(0, bytes));
    }

    [Fact]
    public void Lanes_change_last_bits_only()
    {
        Result one = Train(Sharding.None, Lanes, tied: false)[0], four = Train(new Sharding(1, 1, 1, Lanes), Lanes, tied: false)[0];
        foreach ((string name, float[] values) in one.Weights)
        {
            Assert.All(values.Zip(four.Weights[name]), static pair => Assert.Equal(pair.First, pair.Second, 1e-5f));
        }

        Assert.Equal(one.Losses[^1], four.Losses[^1], 1e-5);
    }

    [Theory]
    [InlineData(2)]
    [InlineData(4)]
    public void In_bf16_gradients_on_the_wire_differ_by_their_rounding(int ranks)
    {
        Result expected = Train(new Sharding(1, 1, 1, Lanes), Lanes, tied: false)[0];
        Result actual = Train(new Sharding(ranks, ranks, 1, Lanes, DType.BF16), Lanes, tied: false)[^1];
        Assert.NotEqual(expected.Norms[0], actual.Norms[0]);
        Assert.Equal(1, actual.Norms[0] / expected.Norms[0], 1.0 / 256);
        Assert.Equal(expected.Losses[0], actual.Losses[0]);
        Assert.Equal(expected.Losses[^1], actual.Losses[^1], 0.01);
    }

    [Theory]
    [InlineData(1, 1, 1)]
    [InlineData(2, 1, 1)]
    [InlineData(3, 1, 1)]
    [InlineData(1, 2, 1)]
    [InlineData(1, 1, 2)]
    [InlineData(1, 2, 2)]
    public void A_plan_counts_exactly_what_a_rank_takes(int stage, int split, int stages)
    {
        int ranks = Math.Max(2, split * stages);
        var sharding = new Sharding(ranks, split * stages > 1 ? 1 : 2, stage, Lanes, DType.F32, split, stages);
        TrainingShape shape = Shape(sharding, tied: false) with { Snapshot = true };
        using CpuBackend backend = CpuBackend.Create(1);
        IReadOnlyList<(string Name, long Bytes)>[] taken = OnRanks(ranks, sharding, static (memory, _, _) => memory.Arenas, shape);
        for (int rank = 0; rank < ranks; rank++)
        {
            using TrainingMemory plan = TrainingMemory.Plan(shape, backend, rank);
            Assert.Equal(plan.Arenas, taken[rank]);
        }

        Assert.Equal(taken.Max(static arenas => arenas.Sum(static arena => arena.Bytes)), TrainingMemory.PlanFullest(shape, backend).Sum(static arena => arena.Bytes));
    }

    [Fact]
    public void Of_a_pipeline_the_first_stage_keeps_the_activations_of_most_micro_batches()
    {
        using CpuBackend backend = CpuBackend.Create(1);
        TrainingShape shape = Shape(new Sharding(2, 1, 1, 1, Pipeline: 2), tied: false);
        shape = shape with { Model = shape.Model with { Layers = 16, VocabularySize = 8 } };
        long Bytes(TrainingShape shape, int rank)
        {
            using TrainingMemory plan = TrainingMemory.Plan(shape, backend, rank);
            return plan.Arenas.Single(static arena => arena.Name == "activations").Bytes;
        }

        long whole = Bytes(shape with { Sharding = Sharding.None }, 0);
        Assert.Equal(1, (double)Bytes(shape, 0) / whole, 0.1);
        Assert.Equal(0.5, (double)Bytes(shape, 1) / whole, 0.1);
    }

    [Fact]
    public void Stages_divide_the_model()
    {
        ModelConfig whole = Shape(Sharding.None, tied: false).Model;
        ModelConfig[] stages = [.. Enumerable.Range(0, 3).Select(stage => whole.Stage(stage, 3))];
        Assert.Equal(whole.ParameterCount, stages.Sum(static stage => stage.ParameterCount));
        Assert.Equal([0, 1, 3], stages.Select(static stage => stage.FirstLayer));
        Assert.Equal([1, 2, 2], stages.Select(static stage => stage.Layers));
    }

    [Fact]
    public void Each_stage_takes_less_memory_than_the_one_before()
    {
        using CpuBackend backend = CpuBackend.Create(1);
        long Bytes(Sharding? sharding)
        {
            // Large enough that buffers for a block weigh less than all blocks.
            TrainingShape shape = Shape(sharding ?? Sharding.None, tied: false);
            using TrainingMemory plan = TrainingMemory.Plan(shape with { Model = shape.Model with { Layers = 16 } }, backend);
            return plan.Arenas.Where(static arena => !arena.Name.Contains("activation", StringComparison.Ordinal)).Sum(static arena => arena.Bytes);
        }

        long[] bytes = [Bytes(null), .. Enumerable.Range(1, 3).Select(stage => Bytes(new Sharding(Lanes, Lanes, stage, Lanes)))];
        Assert.Equal(bytes.OrderDescending(), bytes);
        Assert.Equal(4, bytes.Distinct().Count());
    }

    private static void AssertClose<T>(IReadOnlyList<T> expected, IReadOnlyList<T> actual, double tolerance, string what)
        where T : struct, INumber<T>
    {
        Assert.Equal(expected.Count, actual.Count);
        double squares = expected.Sum(static value => Math.Pow(double.CreateChecked(value), 2));
        double difference = expected.Zip(actual, static (e, a) => Math.Pow(double.CreateChecked(e - a), 2)).Sum();
        Assert.True(difference <= tolerance * tolerance * squares, $"{what}: {Math.Sqrt(difference / squares):e2}");
    }

    private static Result[] Train(Sharding sharding, int microBatches, bool tied, bool gpus = false, Keep keep = Keep.Everything) =>
        OnRanks(sharding.Ranks, sharding, (memory, backend, rank) =>
    {
        memory.Fill(parameters => Initialization.Initialize(parameters, Shape(sharding, tied, gpus).Model, backend, InitializationScheme.TinyLlama, seed: 3));
        var step = new TrainingStep(memory, backend);
        double[] losses = new double[Steps], norms = new double[Steps];
        int perLane = microBatches / sharding.Lanes;
        for (int s = 0; s < Steps; s++)
        {
            step.Begin(microBatches * Context);
            step.Accumulate(perLane, (batch, micro) =>
            {
                int seed = (s * microBatches) + (sharding.LaneOf(rank, micro / perLane) * perLane) + (micro % perLane);
                var random = new Random(seed);
                int[] tokens = [.. Enumerable.Range(0, Context).Select(_ => random.Next(96))];
                batch.Fill(backend, tokens, tokens);
            });
            StepResult result = step.End(s + 1, 1e-2);
            (losses[s], norms[s]) = (result.Loss, result.GradientNorm);
        }

        var weights = new Dictionary<string, float[]>();
        var shapes = new Dictionary<string, (int, int)>();
        void Read(IEnumerable<Parameter> parameters)
        {
            foreach (Parameter parameter in parameters)
            {
                float[] values = new float[parameter.Values.Count];
                backend.Read(values, parameter.Values);
                weights[parameter.Name] = values;
                shapes[parameter.Name] = (parameter.Rows, parameter.Columns);
            }
        }

        if (memory.Parameters is { } shared)
        {
            shared.ForEach(unit => Read(unit.Parameters));
        }
        else
        {
            Read(memory.Model.Parameters);
        }

        return new Result(losses, norms, weights, shapes);
    }, Shape(sharding, tied, gpus) with { Keep = keep }, gpus);

    // Runs something on every rank, each a thread with a backend of its own.
    private static T[] OnRanks<T>(int ranks, Sharding sharding, Func<TrainingMemory, Backend, int, T> run, TrainingShape shape, bool gpus = false)
    {
        return OnThreads.Run(ranks, world =>
        {
            using Backend backend = gpus ? CudaBackend.Create() : CpuBackend.Create(1);
            using Collective? ofGpus = gpus && ranks > 1 ? NcclCollective.Create((CudaBackend)backend, world, TimeSpan.FromSeconds(60)) : null;
            using Mesh? mesh = ranks == 1 ? null : new Mesh(ofGpus ?? world, sharding);
            using TrainingMemory memory = TrainingMemory.Allocate(shape, backend, mesh);
            return run(memory, backend, world.Rank);
        });
    }

    // An odd number of blocks, so that neither turn of the blocks is the same at both ends. AdamW's epsilon is above the
    // rounding of gradients: below it, a weight moves as far whichever way a gradient near zero is rounded.
    private static TrainingShape Shape(Sharding sharding, bool tied, bool gpus = false) => new(
        new ModelConfig
        {
            VocabularySize = 96,
            ContextLength = 64,
            Layers = gpus ? 3 : 5,
            Heads = gpus ? 2 : 8,
            KeyValueHeads = gpus ? 2 : 4,
            Channels = 32,
            Hidden = 96,
            TiedEmbeddings = tied,
        },
        Sequences: 1, Context, Keep.Everything, new AdamWSettings(0.9f, 0.95f, 1e-4f, 0.1f, 1), DecayGroup.Matrices, RateFactors.Same,
        PackedForms.Both, sharding);

    private sealed record Result(double[] Losses, double[] Norms, Dictionary<string, float[]> Weights, Dictionary<string, (int Rows, int Columns)> Shapes);
}
