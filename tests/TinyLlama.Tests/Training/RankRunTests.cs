using System.Collections.Concurrent;
using System.Runtime.InteropServices;
using System.Security.Cryptography;
using TinyLlama.Checkpoints;
using TinyLlama.Compute;
using TinyLlama.Compute.Cpu;
using TinyLlama.Data.Documents;
using TinyLlama.Data.Shards;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Tests.Checkpoints;
using TinyLlama.Training;

namespace TinyLlama.Tests.Training;

/// <summary>Whole runs of several ranks and their checkpoints: saved by some, gone on with by others, to the same bits.</summary>
public sealed class RankRunTests : IDisposable
{
    private const int Steps = 6;

    /// <summary>How far the weights of a run with split blocks may be from those of one rank: as vectors, of their length.</summary>
    private const double SplitTolerance = 2e-4;

    private readonly TemporaryFolder _folder = new();
    private readonly ConcurrentQueue<string> _warnings = [];

    public RankRunTests()
    {
        string text = Directory.CreateDirectory(_folder["text"]).FullName;
        for (int i = 0; i < 20; i++)
        {
            File.WriteAllText(Path.Combine(text, $"{i:00}.txt"), string.Concat(Enumerable.Range(0, 30).Select(n => $"{n * i} times a word is {n + i}. ")));
        }

        DataPreparation.Run(
            _folder["data"], TextFiles.Find([text], new TextFileOptions()), new ByteTokenizer(), new PreparationOptions { ValidationShare = 0.1 });
    }

    public void Dispose() => _folder.Dispose();

    [Theory]
    [InlineData("checkpoints.asynchronous=true")]
    [InlineData("checkpoints.asynchronous=false")]
    [InlineData("checkpoints.asynchronous=true", "precision=bf16")]
    public void A_run_goes_on_with_another_number_of_ranks_and_another_stage_to_the_same_bits(string when, params string[] precision)
    {
        string whole = Train("whole", 1, Steps, precision);
        Train("parts", 4, 1, [when, "distribution.zero=1", .. precision]);
        Train("parts", 1, 2, [when, .. precision]);
        Train("parts", 2, 3, [when, "distribution.zero=3", .. precision]);
        Train("parts", 4, 4, [when, "distribution.zero=2", "distribution.shard=2", .. precision]);
        Train("parts", 2, 5, [when, "distribution.zero=1", .. precision]);
        Assert.Equal(whole, Train("parts", 4, Steps, [when, "distribution.zero=3", .. precision]));
        Assert.Empty(_warnings);
    }

    [Theory]
    [InlineData(2, "distribution.pipeline=2")]
    [InlineData(4, "distribution.pipeline=4")]
    [InlineData(4, "distribution.pipeline=2")]
    [InlineData(2, "distribution.pipeline=2", "distribution.reduction_lanes=1", "recompute=blocks")]
    public void A_run_in_stages_has_the_files_and_the_losses_of_one_rank(int ranks, params string[] settings)
    {
        string[] lanes = [.. settings.Where(static setting => setting.Contains("lanes", StringComparison.Ordinal))];
        Assert.Equal(Train("whole", 1, Steps, lanes), Train("stages", ranks, Steps, settings));
        Assert.Equal(Losses("whole"), Losses("stages"));
        Assert.Equal(
            File.ReadAllBytes(Path.Combine(TrainingCheckpoint.PathOf(_folder["whole"], Steps), TrainingCheckpoint.ModelName)),
            File.ReadAllBytes(Path.Combine(TrainingCheckpoint.PathOf(_folder["stages"], Steps), TrainingCheckpoint.ModelName)));
        Assert.Empty(_warnings);
    }

    [Fact]
    public void A_run_goes_on_with_other_stages_to_the_same_bits()
    {
        string whole = Train("whole", 1);
        Train("parts", 2, 1, "distribution.pipeline=2");
        Train("parts", 1, 2);
        Train("parts", 4, 3, "distribution.pipeline=2");
        Train("parts", 4, 4, "distribution.zero=3");
        Assert.Equal(whole, Train("parts", 3, Steps, "distribution.pipeline=3"));
        Assert.Empty(_warnings);
    }

    [Theory]
    [InlineData(2, "distribution.tensor=2")]
    [InlineData(4, "distribution.tensor=4")]
    [InlineData(4, "distribution.tensor=2", "distribution.pipeline=2")]
    [InlineData(4, "distribution.tensor=2", "samples.every_steps=3", "samples.max_tokens=4")]
    public void A_run_of_split_blocks_has_the_weights_and_the_losses_of_one_rank_but_for_rounding(int ranks, params string[] settings)
    {
        Train("whole", 1);
        Train("split", ranks, Steps, settings);
        RequireClose("whole", "split");
        bool samples = settings.Any(static setting => setting.StartsWith("samples", StringComparison.Ordinal));
        Assert.Equal(samples ? 3 : 0, MetricsLog.Read(Path.Combine(_folder["split"], MetricsLog.FileName)).OfType<SampleMetrics>().Count());
        Assert.Empty(_warnings);
    }

    [Fact]
    public void A_run_goes_on_with_other_parts_of_blocks_but_for_rounding()
    {
        Train("whole", 1);
        Train("parts", 2, 1, "distribution.tensor=2");
        Train("parts", 4, 2, "distribution.tensor=2", "distribution.pipeline=2");
        Train("parts", 2, 3, "distribution.pipeline=2");
        Train("parts", 4, 4, "distribution.tensor=4");
        Train("parts", 4, 5, "distribution.tensor=2");
        Train("parts", 1);
        RequireClose("whole", "parts");
        Assert.Empty(_warnings);
    }

    [Fact]
    public void When_a_rank_s_file_is_damaged_all_ranks_go_on_from_the_checkpoint_before()
    {
        string whole = Train("whole", 1);
        Train("damaged", 2, 4);
        string newest = TrainingCheckpoint.PathOf(_folder["damaged"], 4);
        string path = Path.Combine(newest, "optimizer-00002-of-00002.safetensors");
        byte[] bytes = File.ReadAllBytes(path);
        bytes[^5] ^= 1;
        File.WriteAllBytes(path, bytes);

        Assert.Equal(whole, Train("damaged", 2));
        Assert.Contains("set aside", Assert.Single(_warnings), StringComparison.Ordinal);
        Assert.True(Directory.Exists(newest + ".damaged"));
    }

    [Theory]
    [InlineData("checkpoints.asynchronous=true")]
    [InlineData("checkpoints.asynchronous=false")]
    public void A_full_disk_costs_checkpoints_but_neither_the_run_nor_what_was_saved(string when)
    {
        using SmallDisk disk = SmallDisk.Mount(_folder["small"], 830);
        Train("small/run", 2, Steps, when);
        Assert.Contains(_warnings, static warning => warning.Contains("rank ", StringComparison.Ordinal) && warning.Contains("No space left", StringComparison.Ordinal));
        Assert.InRange(TrainingCheckpoint.FindNewestValid(_folder["small/run"], Assert.Fail)!.Step, 1, Steps - 1);
    }

    [Fact]
    public void The_plan_counts_the_snapshot()
    {
        TrainingPlan with = TrainingPlan.Create(TinyRecipe(["checkpoints.asynchronous=true"]), null, null, 2);
        TrainingPlan without = TrainingPlan.Create(TinyRecipe(["checkpoints.asynchronous=false"]), null, null, 2);
        using CpuBackend backend = CpuBackend.Create(1);
        long bytes = new MemoryPlan(with, backend).Bytes - new MemoryPlan(without, backend).Bytes;
        Assert.Equal(bytes, new MemoryPlan(with, backend).Arenas.Single(static arena => arena.Name == "checkpoint snapshot").Bytes);

        // The first of two ranks: all weights, as they are few, and half of the moments.
        long parameters = ModelTensors.Of(with.Model).Sum(static tensor => tensor.Count);
        Assert.InRange(bytes, 8 * parameters, 9 * parameters);
    }

    // Trains up to a step; returns the hash of the weights and of all moments.
    private string Train(string run, int ranks, int lastStep = Steps, params string[] settings)
    {
        Recipe recipe = TinyRecipe(settings);
        long[] steps = OnThreads.Run(ranks, world =>
        {
            using TrainingRun training = TrainingRun.Open(recipe, _folder[run], new Observer(_warnings), world);
            training.Trainer.Run(CancellationToken.None, lastStep);
            return training.Trainer.State.Step;
        });
        Assert.All(steps, reached => Assert.Equal(lastStep, reached));
        (long step, string path) = TrainingCheckpoint.List(_folder[run])[^1];
        return $"{step} {Hash(TrainingCheckpoint.Open(path))}";
    }

    private double[] Losses(string run) =>
    [
        .. MetricsLog.Read(Path.Combine(_folder[run], MetricsLog.FileName)).Select(static metrics => metrics switch
        {
            StepMetrics step => step.Loss,
            ValidationMetrics validation => validation.Loss,
            _ => 0,
        }).Where(static loss => loss > 0),
    ];

    private void RequireClose(string expected, string actual)
    {
        double[] losses = Losses(expected);
        Assert.Equal(Steps + 3, losses.Length);
        Assert.All(losses.Zip(Losses(actual)), static pair => Assert.Equal(1, pair.Second / pair.First, 1e-5));
        using ModelSource before = ModelSource.Open(_folder[expected], Assert.Fail), after = ModelSource.Open(_folder[actual], Assert.Fail);
        foreach (ModelTensor tensor in before.Tensors)
        {
            float[] wanted = new float[tensor.Count], got = new float[tensor.Count];
            before.Read(wanted, tensor.Name, 0);
            after.Read(got, tensor.Name, 0);
            double difference = Math.Sqrt(wanted.Zip(got, static (w, g) => Math.Pow(w - g, 2)).Sum() / wanted.Sum(static w => Math.Pow(w, 2)));
            Assert.True(difference <= SplitTolerance, $"{tensor.Name}: {difference:e2}");
        }
    }

    private static string Hash(TrainingCheckpoint checkpoint)
    {
        using ModelSource source = ModelSource.Open(checkpoint.Path, Assert.Fail);
        using OptimizerFiles moments = OptimizerFiles.Open(checkpoint, source.Config);
        using CpuBackend backend = CpuBackend.Create(1);
        using IncrementalHash hash = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);
        foreach (ModelTensor tensor in source.Tensors)
        {
            using Arena arena = backend.Allocate("moments", 3 * tensor.Count * sizeof(float));
            var piece = new MomentPiece(tensor.Name, 0, arena.Take(tensor.Rows, tensor.Columns), arena.Take(tensor.Rows, tensor.Columns));
            moments.CopyTo(backend, piece);
            hash.AppendData(MemoryMarshal.AsBytes(piece.First.HostSpan<float>()));
            hash.AppendData(MemoryMarshal.AsBytes(piece.Second.HostSpan<float>()));
        }

        return source.Hash() + Convert.ToHexStringLower(hash.GetHashAndReset());
    }

    private Recipe TinyRecipe(string[] settings) => RecipeFile.Parse(
        $$"""
        model: { vocabulary: 258, context: 32, layers: 4, heads: 8, key_value_heads: 4, channels: 32, hidden: 80 }
        threads: 1
        precision: fp32
        data: { path: '{{_folder["data"]}}' }
        batch: { global_tokens: 128, micro_sequences: 1 }
        budget: { steps: {{Steps}} }
        optimizer: { learning_rate: 3e-3 }
        schedule: { warmup: 2 }
        validation: { every_steps: 4, tokens: 256 }
        checkpoints: { every_steps: 2, keep_last: 2 }
        distribution: { reduction_lanes: 4 }
        """,
        "tiny.yaml",
        null,
        settings);

    private sealed class Observer(ConcurrentQueue<string> warnings) : ITrainingObserver
    {
        public void Measured(Metrics metrics)
        {
            // Not of interest here.
        }

        public void Warn(string message) => warnings.Enqueue(message);
    }
}
