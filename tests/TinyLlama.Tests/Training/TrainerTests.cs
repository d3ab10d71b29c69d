using System.Security.Cryptography;
using TinyLlama.Checkpoints;
using TinyLlama.Data;
using TinyLlama.Data.Documents;
using TinyLlama.Data.Shards;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Tests.Checkpoints;
using TinyLlama.Training;

namespace TinyLlama.Tests.Training;

/// <summary>Whole runs of a tiny model on a tiny corpus: what is stopped, killed or damaged ends with the same bits.</summary>
public sealed class TrainerTests : IDisposable
{
    private const int Steps = 9;

    private readonly TemporaryFolder _folder = new();

    public TrainerTests()
    {
        string text = Path.Combine(_folder.Path, "text");
        Directory.CreateDirectory(text);
        for (int i = 0; i < 40; i++)
        {
            File.WriteAllText(Path.Combine(text, $"{i:00}.txt"), string.Concat(Enumerable.Range(0, 30).Select(n => $"{n * i} times a word is {n + i}. ")));
        }

        DataPreparation.Run(
            Data, TextFiles.Find([text], new TextFileOptions()), new ByteTokenizer(), new PreparationOptions { ValidationShare = 0.1 });
    }

    private string Data => Path.Combine(_folder.Path, "data");

    public void Dispose() => _folder.Dispose();

    [Fact]
    public void A_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not()
    {
        string whole = Train("whole");
        using (var stop = new CancellationTokenSource())
        {
            Train("parts", stop: stop, stopAfter: 4);
        }

        Assert.NotEqual(whole, Train("parts", lastStep: 7));
        Assert.Equal(whole, Train("parts"));
        Assert.Equal(Losses("whole"), Losses("parts"));
    }

    [Theory]
    [InlineData(1)]
    [InlineData(3)]
    public void The_number_of_threads_changes_no_bit(int threads) =>
        Assert.Equal(Train("two"), Train("other", $"threads={threads}"));

    [Fact]
    public void Other_work_on_the_cores_changes_no_bit()
    {
        string quiet = Train("quiet");
        using var stop = new CancellationTokenSource();
        Thread[] others = [.. Enumerable.Range(0, Environment.ProcessorCount).Select(_ => new Thread(() =>
        {
            while (!stop.IsCancellationRequested)
            {
                Thread.SpinWait(1000);
            }
        }))];
        Array.ForEach(others, other => other.Start());
        string busy = Train("busy");
        stop.Cancel();
        Array.ForEach(others, other => other.Join());
        Assert.Equal(quiet, busy);
    }

    [Fact]
    public void The_number_of_threads_changes_no_bit_in_bf16_which_trains_to_other_weights()
    {
        string one = Train("one", "precision=bf16", "threads=1");
        Assert.Equal(one, Train("two", "precision=bf16"));
        Assert.NotEqual(one, Train("fp32"));
    }

    [Fact]
    public void A_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_used()
    {
        string whole = Train("whole");
        Train("damaged", lastStep: 8);
        string newest = TrainingCheckpoint.List(Run("damaged"))[^1].Path;
        Assert.EndsWith("step-00000008", newest, StringComparison.Ordinal);
        string model = Path.Combine(newest, TrainingCheckpoint.ModelName);
        byte[] bytes = File.ReadAllBytes(model);
        bytes[^5] ^= 1;
        File.WriteAllBytes(model, bytes);

        var observer = new Recorder();
        Assert.Equal(whole, Train("damaged", observer: observer));
        Assert.Contains(observer.Warnings, warning => warning.Contains("set aside", StringComparison.Ordinal));
        Assert.True(Directory.Exists(newest + ".damaged"));
    }

    [Fact]
    public void A_full_disk_costs_checkpoints_but_neither_the_run_nor_what_was_saved()
    {
        using SmallDisk disk = SmallDisk.Mount(_folder["small"], 1400);
        var observer = new Recorder();
        using (TrainingRun run = TrainingRun.Open(TinyRecipe(), Path.Combine(disk.Path, "run"), observer))
        {
            run.Trainer.Run(CancellationToken.None);
            Assert.True(run.Trainer.IsFinished);
        }

        Assert.Contains(observer.Warnings, warning => warning.Contains("could not be written", StringComparison.Ordinal));
        TrainingCheckpoint? saved = TrainingCheckpoint.FindNewestValid(Path.Combine(disk.Path, "run"), observer.Warn);
        Assert.NotNull(saved);
        Assert.InRange(saved.Step, 2, Steps - 1);
    }

    [Fact]
    public void Masked_documents_train_to_other_weights_than_joined_ones() =>
        Assert.NotEqual(Train("joined"), Train("masked", "data.documents=masked"));

    [Fact]
    public void Recomputed_blocks_train_to_the_same_bits() =>
        Assert.Equal(Train("kept"), Train("recomputed", "recompute=blocks"));

    [Theory]
    [InlineData("forward")]
    [InlineData("none")]
    public void Weights_that_are_packed_on_the_fly_train_to_the_same_bits(string forms) =>
        Assert.Equal(Train("kept"), Train("on-the-fly", $"packed_weights={forms}"));

    [Fact]
    public void What_changed_on_resume_is_noted_and_what_makes_another_run_is_refused()
    {
        Train("run", lastStep: 3);
        Train("run", "optimizer.learning_rate=2e-3");
        NoteMetrics note = Assert.Single(MetricsLog.Read(Path.Combine(Run("run"), MetricsLog.FileName)).OfType<NoteMetrics>());
        Assert.Contains("optimizer.learning_rate", note.Text, StringComparison.Ordinal);
        Assert.Equal(3, note.Step);

        UserErrorException refused = Assert.Throws<UserErrorException>(() => Train("run", "seed=8"));
        Assert.Contains("seed 7 → 8", refused.Message, StringComparison.Ordinal);
    }

    [Fact]
    public void A_run_has_one_trainer_at_a_time()
    {
        using TrainingRun open = TrainingRun.Open(TinyRecipe(), Run("run"), new Recorder());
        Assert.Contains("another process", Assert.Throws<UserErrorException>(
            () => TrainingRun.Open(TinyRecipe(), Run("run"), new Recorder())).Message, StringComparison.Ordinal);
    }

    [Fact]
    public void Other_data_is_not_what_a_run_goes_on_with()
    {
        Train("run", lastStep: 3);
        string other = Path.Combine(_folder.Path, "other");
        DataPreparation.Run(
            other, TextFiles.Find([Path.Combine(_folder.Path, "text")], new TextFileOptions()), new ByteTokenizer(),
            new PreparationOptions { ValidationShare = 0.1, Seed = 5 });
        UserErrorException refused = Assert.Throws<UserErrorException>(() => Train("run", $"data.path={other}"));
        Assert.Contains("other data", refused.Message, StringComparison.Ordinal);
    }

    [Fact]
    public void A_loss_that_is_not_finite_stops_the_run_and_names_step_and_documents()
    {
        UserErrorException stopped = Assert.Throws<UserErrorException>(
            () => Train("run", "optimizer.learning_rate=1e30", "optimizer.min_learning_rate=1e29", "schedule.warmup=0"));
        Assert.Contains("step ", stopped.Message, StringComparison.Ordinal);
        Assert.Contains(".txt", stopped.Message, StringComparison.Ordinal);
        Assert.Contains("nothing was updated", stopped.Message, StringComparison.Ordinal);
    }

    [Fact]
    public void A_run_may_begin_with_the_weights_of_another_and_a_schedule_of_its_own()
    {
        Train("base");
        var observer = new Recorder();
        Train("next", observer: observer, settings: [$"init={Run("base")}", "budget.steps=3"]);
        double baseEnd = MetricsLog.Read(Path.Combine(Run("base"), MetricsLog.FileName)).OfType<ValidationMetrics>().Last().Loss;
        double nextStart = observer.Seen.OfType<ValidationMetrics>().First().Loss;
        Assert.Equal(baseEnd, nextStart, 1e-6);
    }

    private string Train(string run, params string[] settings) => Train(run, settings, null);

    private string Train(
        string run, string[]? settings = null, Recorder? observer = null, long lastStep = long.MaxValue,
        CancellationTokenSource? stop = null, int stopAfter = 0)
    {
        observer ??= new Recorder();
        if (stop is not null)
        {
            observer.OnStep = step =>
            {
                if (step + 1 == stopAfter)
                {
                    stop.Cancel();
                }
            };
        }

        using TrainingRun training = TrainingRun.Open(TinyRecipe(settings ?? []), Run(run), observer);
        training.Trainer.Run(stop?.Token ?? CancellationToken.None, lastStep);
        string newest = TrainingCheckpoint.List(Run(run))[^1].Path;
        return string.Join(' ', new[] { TrainingCheckpoint.ModelName, TrainingCheckpoint.OptimizerName }
            .Select(name => Convert.ToHexStringLower(SHA256.HashData(File.ReadAllBytes(Path.Combine(newest, name))))));
    }

    private Recipe TinyRecipe(params string[] settings) => RecipeFile.Parse(
        $$"""
        model: { vocabulary: 258, context: 32, layers: 2, heads: 4, key_value_heads: 2, channels: 32, hidden: 80 }
        seed: 7
        threads: 2
        precision: fp32
        data: { path: '{{Data}}' }
        batch: { global_tokens: 128, micro_sequences: 2 }
        budget: { steps: {{Steps}} }
        optimizer: { learning_rate: 3e-3 }
        schedule: { warmup: 2 }
        validation: { every_steps: 4, tokens: 256 }
        samples: { every_steps: 4, prompts: ["1"], max_tokens: 4 }
        checkpoints: { every_steps: 2, keep_last: 2 }
        """,
        "tiny.yaml",
        null,
        settings);

    private string Run(string name) => Path.Combine(_folder.Path, name);

    private double[] Losses(string run) =>
        [.. MetricsLog.Read(Path.Combine(Run(run), MetricsLog.FileName)).Select(metrics => metrics switch
        {
            StepMetrics step => step.Loss,
            ValidationMetrics validation => validation.Loss,
            _ => 0,
        })];

    private sealed class Recorder : ITrainingObserver
    {
        public List<string> Warnings { get; } = [];

        public List<Metrics> Seen { get; } = [];

        public Action<long>? OnStep { get; set; }

        public void Measured(Metrics metrics)
        {
            Seen.Add(metrics);
            if (metrics is StepMetrics)
            {
                OnStep?.Invoke(metrics.Step);
            }
        }

        public void Warn(string message) => Warnings.Add(message);
    }
}
