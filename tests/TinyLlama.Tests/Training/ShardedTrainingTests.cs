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
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(3)]
    public void A_plan_counts_exactly_what_a_rank_takes(int stage)
    {
        var sharding = new Sharding(2, 2, stage, Lanes);
        foreach (IReadOnlyList<(string, long)> taken in OnRanks(2, sharding, (memory, _, _) => memory.Arenas))
        {
            using CpuBackend backend = CpuBackend.Create(1);
            using TrainingMemory plan = TrainingMemory.Plan(Shape(sharding, tied: false), backend);
            Assert.Equal(plan.Arenas, taken);
        }
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

    private static Result[] Train(Sharding sharding, int microBatches, bool tied, bool gpus = false) => OnRanks(sharding.Ranks, sharding, (memory, backend, rank) =>
    {
        memory.Fill(parameters => Initialization.Initialize(parameters, memory.Model.Config, backend, InitializationScheme.TinyLlama, seed: 3));
        var step = new TrainingStep(memory, backend);
        double[] losses = new double[Steps], norms = new double[Steps];
        int perLane = microBatches / sharding.Lanes;
        for (int s = 0; s < Steps; s++)
        {
            step.Begin(microBatches * Context);
            for (int turn = 0; turn < sharding.LanesOfRank; turn++)
            {
                for (int micro = 0; micro < perLane; micro++)
                {
                    int seed = (s * microBatches) + (sharding.LaneOf(rank, turn) * perLane) + micro;
                    var random = new Random(seed);
                    int[] tokens = [.. Enumerable.Range(0, Context).Select(_ => random.Next(96))];
                    memory.Batch.Fill(backend, tokens, tokens);
                    step.Accumulate(turn, micro == perLane - 1);
                }
            }

            StepResult result = step.End(s + 1, 1e-2);
            (losses[s], norms[s]) = (result.Loss, result.GradientNorm);
        }

        var weights = new Dictionary<string, float[]>();
        void Read(IEnumerable<Parameter> parameters)
        {
            foreach (Parameter parameter in parameters)
            {
                float[] values = new float[parameter.Values.Count];
                backend.Read(values, parameter.Values);
                weights[parameter.Name] = values;
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

        return new Result(losses, norms, weights);
    }, tied, gpus);

    // Runs something on every rank, each a thread with a backend of its own.
    private static T[] OnRanks<T>(int ranks, Sharding sharding, Func<TrainingMemory, Backend, int, T> run, bool tied = false, bool gpus = false)
    {
        return OnThreads.Run(ranks, world =>
        {
            using Backend backend = gpus ? CudaBackend.Create() : CpuBackend.Create(1);
            using Collective? ofGpus = gpus && ranks > 1 ? NcclCollective.Create((CudaBackend)backend, world, TimeSpan.FromSeconds(60)) : null;
            using Mesh? mesh = ranks == 1 ? null : new Mesh(ofGpus ?? world, sharding);
            using TrainingMemory memory = TrainingMemory.Allocate(Shape(sharding, tied, gpus), backend, mesh);
            return run(memory, backend, world.Rank);
        });
    }

    // Three blocks, so that neither turn of the blocks is the same at both ends.
    private static TrainingShape Shape(Sharding sharding, bool tied, bool gpus = false) => new(
        new ModelConfig
        {
            VocabularySize = 96,
            ContextLength = 64,
            Layers = 3,
            Heads = gpus ? 2 : 4,
            KeyValueHeads = gpus ? 1 : 2,
            Channels = 32,
            Hidden = 88,
            TiedEmbeddings = tied,
        },
        Sequences: 1, Context, Keep.Everything, new AdamWSettings(0.9f, 0.95f, 1e-8f, 0.1f, 1), DecayGroup.Matrices, RateFactors.Same,
        PackedForms.Both, sharding);

    private sealed record Result(double[] Losses, double[] Norms, Dictionary<string, float[]> Weights);
}
