using System.Globalization;
using TinyLlama.Compute;
using TinyLlama.Model;

namespace TinyLlama.Training;

/// <summary>A key of the recipe format: how it is read into a recipe and written from one.</summary>
/// <param name="Name">Section and key, joined by a dot; a key of the top level has no dot.</param>
/// <param name="Read">The recipe with the key's value.</param>
/// <param name="Write">The value as YAML, or null where the recipe leaves it out.</param>
internal sealed record RecipeKey(
    string Name, Func<Recipe, RecipeValue, Recipe> Read, Func<Recipe, string?> Write);

/// <summary>All keys of the recipe format, in the order in which they are applied and written.</summary>
internal static class RecipeKeys
{
    /// <summary>A shape of which nothing is known yet.</summary>
    internal static readonly ModelConfig Shapeless = new()
    {
        VocabularySize = 0,
        ContextLength = 0,
        Layers = 0,
        Heads = 0,
        KeyValueHeads = 0,
        Channels = 0,
        Hidden = 0,
    };

    private static readonly (string, InitializationScheme)[] s_initializations =
        [("tinyllama", InitializationScheme.TinyLlama), ("tinyllama-v1", InitializationScheme.TinyLlamaV1)];

    private static readonly (string, bool)[] s_documents = [("joined", false), ("masked", true)];
    private static readonly (string, bool?)[] s_asynchronous =
        [("auto", null), ("true", true), ("false", false)];
    private static readonly (string, DType?)[] s_precisions =
        [("auto", null), ("fp32", DType.F32), ("bf16", DType.BF16)];
    private static readonly (string, DType)[] s_wires = [("fp32", DType.F32), ("bf16", DType.BF16)];
    private static readonly (string, Keep)[] s_recompute = [.. Recipe.Recomputations];
    private static readonly (string, PackedForms)[] s_packed =
        [("both", PackedForms.Both), ("forward", PackedForms.Forward), ("none", PackedForms.None)];

    private static readonly (string, DecayGroup)[] s_decay = [("all", DecayGroup.All), ("matrices", DecayGroup.Matrices)];
    private static readonly (string, ScheduleUnit)[] s_units = [("steps", ScheduleUnit.Steps), ("tokens", ScheduleUnit.Tokens)];

    private static readonly (string, ScheduleKind)[] s_kinds =
    [
        ("cosine", ScheduleKind.Cosine), ("linear", ScheduleKind.Linear), ("wsd", ScheduleKind.Wsd),
        ("constant", ScheduleKind.Constant),
    ];

    /// <summary>Gets the keys. The preset comes before what overrides it.</summary>
    public static IReadOnlyList<RecipeKey> All { get; } =
    [
        new("model.preset", ReadPreset, r => r.Preset is null ? null : Quote(r.Preset)),
        Shape("vocabulary", (m, v) => m with { VocabularySize = v.Int32(1) }, m => Text(m.VocabularySize)),
        Shape("context", (m, v) => m with { ContextLength = v.Int32(1) }, m => Text(m.ContextLength)),
        Shape("layers", (m, v) => m with { Layers = v.Int32(1) }, m => Text(m.Layers)),
        Shape("heads", (m, v) => m with { Heads = v.Int32(1) }, m => Text(m.Heads)),
        Shape("key_value_heads", (m, v) => m with { KeyValueHeads = v.Int32(1) }, m => Text(m.KeyValueHeads)),
        Shape("channels", (m, v) => m with { Channels = v.Int32(1) }, m => Text(m.Channels)),
        Shape("hidden", (m, v) => m with { Hidden = v.Int32(1) }, m => Text(m.Hidden)),
        Shape("norm_epsilon", (m, v) => m with { NormEpsilon = v.PositiveSingle() }, m => Text(m.NormEpsilon)),
        Shape("rope_theta", (m, v) => m with { RopeTheta = v.PositiveSingle() }, m => Text(m.RopeTheta)),
        Shape("rope_factor", (m, v) => m with { RopeFactor = v.PositiveSingle() }, m => Text(m.RopeFactor)),
        Shape("tied_embeddings", (m, v) => m with { TiedEmbeddings = v.Boolean() }, m => Text(m.TiedEmbeddings)),

        new("init", (r, v) => r with { Init = v.Text() }, r => Quote(r.Init)),
        new("initialization", (r, v) => r with { Initialization = v.Word<InitializationScheme>(s_initializations) },
            r => Word(s_initializations, r.Initialization)),
        new("seed", (r, v) => r with { Seed = v.Unsigned() }, r => r.Seed.ToString(CultureInfo.InvariantCulture)),

        new("data.path", (r, v) => r with { Data = r.Data with { Path = v.Text() } },
            r => r.Data.Path is null ? null : Quote(r.Data.Path)),
        new("data.documents", (r, v) => r with { Data = r.Data with { MaskedDocuments = v.Word<bool>(s_documents) } },
            r => Word(s_documents, r.Data.MaskedDocuments)),

        new("batch.global_tokens", (r, v) => r with { Batch = r.Batch with { GlobalTokens = v.Integer(1, 1L << 40) } },
            r => r.Batch.GlobalTokens == 0 ? null : Text(r.Batch.GlobalTokens)),
        new("batch.micro_sequences", (r, v) => r with { Batch = r.Batch with { MicroSequences = v.Int32(1) } },
            r => Text(r.Batch.MicroSequences)),
        new("batch.context", (r, v) => r with { Batch = r.Batch with { Context = v.Int32(1) } }, r => Text(r.Batch.Context)),

        new("budget.tokens", (r, v) => r with { Budget = r.Budget with { Tokens = v.Integer(1, 1L << 60) } },
            r => Text(r.Budget.Tokens)),
        new("budget.steps", (r, v) => r with { Budget = r.Budget with { Steps = v.Integer(1, 1L << 40) } },
            r => Text(r.Budget.Steps)),
        new("budget.epochs", (r, v) => r with { Budget = r.Budget with { Epochs = v.Positive() } }, r => Text(r.Budget.Epochs)),

        Optimizer("learning_rate", (o, v) => o with { LearningRate = v.Positive() }, o => Text(o.LearningRate)),
        Optimizer("min_learning_rate", (o, v) => o with { MinLearningRate = v.AtLeastZero() }, o => Text(o.MinLearningRate)),
        Optimizer("embedding_factor", (o, v) => o with { EmbeddingFactor = v.Positive() }, o => Text(o.EmbeddingFactor)),
        Optimizer("head_factor", (o, v) => o with { HeadFactor = v.Positive() }, o => Text(o.HeadFactor)),
        Optimizer("beta1", (o, v) => o with { Beta1 = v.BelowOne() }, o => Text(o.Beta1)),
        Optimizer("beta2", (o, v) => o with { Beta2 = v.BelowOne() }, o => Text(o.Beta2)),
        Optimizer("epsilon", (o, v) => o with { Epsilon = v.Positive() }, o => Text(o.Epsilon)),
        Optimizer("weight_decay", (o, v) => o with { WeightDecay = v.AtLeastZero() }, o => Text(o.WeightDecay)),
        Optimizer("decay", (o, v) => o with { Decay = v.Word<DecayGroup>(s_decay) }, o => Word(s_decay, o.Decay)),
        Optimizer("clip", (o, v) => o with { Clip = v.Positive() }, o => Text(o.Clip)),

        Schedule("kind", (s, v) => s with { Kind = v.Word<ScheduleKind>(s_kinds) }, s => Word(s_kinds, s.Kind)),
        Schedule("by", (s, v) => s with { By = v.Word<ScheduleUnit>(s_units) }, s => Word(s_units, s.By)),
        Schedule("warmup", (s, v) => s with { Warmup = v.Integer(0, 1L << 60) }, s => Text(s.Warmup)),
        Schedule("decay_share", (s, v) => s with { DecayShare = v.Number(x => x is > 0 and <= 1, "a number above 0, up to 1") },
            s => Text(s.DecayShare)),
        Schedule("offset", (s, v) => s with { Offset = v.Number(x => x is >= 0 and <= 1, "a number from 0 to 1") },
            s => Text(s.Offset)),

        new("validation.every_steps", (r, v) => r with { Validation = r.Validation with { EverySteps = v.Integer(0) } },
            r => Text(r.Validation.EverySteps)),
        new("validation.tokens", (r, v) => r with { Validation = r.Validation with { Tokens = v.Integer(1, 1L << 40) } },
            r => Text(r.Validation.Tokens)),

        Samples("every_steps", (s, v) => s with { EverySteps = v.Integer(0) }, s => Text(s.EverySteps)),
        Samples("prompts", (s, v) => s with { Prompts = v.Texts() }, s => $"[{string.Join(", ", s.Prompts.Select(Quote))}]"),
        Samples("max_tokens", (s, v) => s with { MaxTokens = v.Int32(1) }, s => Text(s.MaxTokens)),
        Samples("temperature", (s, v) => s with { Temperature = v.AtLeastZero() }, s => Text(s.Temperature)),

        Checkpoints("every_steps", (c, v) => c with { EverySteps = v.Integer(0) }, c => Text(c.EverySteps)),
        Checkpoints("keep_last", (c, v) => c with { KeepLast = v.Int32(1) }, c => Text(c.KeepLast)),
        Checkpoints("keep_every", (c, v) => c with { KeepEvery = v.Integer(0) }, c => Text(c.KeepEvery)),
        Checkpoints("keep_best", (c, v) => c with { KeepBest = v.Boolean() }, c => Text(c.KeepBest)),
        Checkpoints("asynchronous", (c, v) => c with { Asynchronous = v.Word<bool?>(s_asynchronous) }, c => Word(s_asynchronous, c.Asynchronous)),

        Distribution("zero", (d, v) => d with { Zero = (int)v.Integer(1, 3) }, d => Text(d.Zero)),
        Distribution("shard", (d, v) => d with { Shard = v.Int32(0) }, d => Text(d.Shard)),
        Distribution("reduction_lanes", (d, v) => d with { ReductionLanes = v.Int32(0) }, d => Text(d.ReductionLanes)),
        Distribution("wire", (d, v) => d with { Wire = v.Word<DType>(s_wires) }, d => Word(s_wires, d.Wire)),
        Distribution("tensor", (d, v) => d with { Tensor = v.Int32(1) }, d => Text(d.Tensor)),
        Distribution("pipeline", (d, v) => d with { Pipeline = v.Int32(1) }, d => Text(d.Pipeline)),
        Distribution("timeout_seconds", (d, v) => d with { TimeoutSeconds = v.Int32(1) }, d => Text(d.TimeoutSeconds)),

        new("precision", (r, v) => r with { Precision = v.Word<DType?>(s_precisions) }, r => Word(s_precisions, r.Precision)),
        new("recompute", (r, v) => r with { Keep = v.Word<Keep>(s_recompute) }, r => Word(s_recompute, r.Keep)),
        new("packed_weights", (r, v) => r with { PackedWeights = v.Word<PackedForms>(s_packed) }, r => Word(s_packed, r.PackedWeights)),
        new("device", (r, v) => r with { Device = v.Device() }, r => Quote(r.Device.ToString())),
        new("deterministic", (r, v) => r with { Deterministic = v.Boolean() }, r => Text(r.Deterministic)),
        new("threads", (r, v) => r with { Threads = (int)v.Integer(0, 1024) }, r => Text(r.Threads)),
    ];

    /// <summary>What a recipe calls which activations are recomputed.</summary>
    public static string Name(Keep keep) => Word(s_recompute, keep);

    /// <summary>What a recipe calls which packed forms are kept.</summary>
    public static string Name(PackedForms forms) => Word(s_packed, forms);

    private static Recipe ReadPreset(Recipe recipe, RecipeValue value)
    {
        string name = value.Text();
        ModelPreset preset = Presets.Find(name) ?? throw value.Refuse(
            $"is '{name}', which is no preset; there are {string.Join(", ", Presets.All.Select(p => p.Name))}");
        return recipe with { Preset = name, Model = preset.Config };
    }

    private static RecipeKey Shape(string key, Func<ModelConfig, RecipeValue, ModelConfig> read, Func<ModelConfig, string> write) =>
        new("model." + key, (r, v) => r with { Model = read(r.Model ?? Shapeless, v) }, r => r.Model is null ? null : write(r.Model));

    private static RecipeKey Optimizer(
        string key, Func<OptimizerSettings, RecipeValue, OptimizerSettings> read, Func<OptimizerSettings, string?> write) =>
        new("optimizer." + key, (r, v) => r with { Optimizer = read(r.Optimizer, v) }, r => write(r.Optimizer));

    private static RecipeKey Schedule(
        string key, Func<ScheduleSettings, RecipeValue, ScheduleSettings> read, Func<ScheduleSettings, string> write) =>
        new("schedule." + key, (r, v) => r with { Schedule = read(r.Schedule, v) }, r => write(r.Schedule));

    private static RecipeKey Samples(
        string key, Func<SampleSettings, RecipeValue, SampleSettings> read, Func<SampleSettings, string> write) =>
        new("samples." + key, (r, v) => r with { Samples = read(r.Samples, v) }, r => write(r.Samples));

    private static RecipeKey Checkpoints(
        string key, Func<CheckpointSettings, RecipeValue, CheckpointSettings> read, Func<CheckpointSettings, string> write) =>
        new("checkpoints." + key, (r, v) => r with { Checkpoints = read(r.Checkpoints, v) }, r => write(r.Checkpoints));

    private static RecipeKey Distribution(
        string key, Func<DistributionSettings, RecipeValue, DistributionSettings> read, Func<DistributionSettings, string> write) =>
        new("distribution." + key, (r, v) => r with { Distribution = read(r.Distribution, v) }, r => write(r.Distribution));

    private static string Text(long number) => number.ToString(CultureInfo.InvariantCulture);

    private static string? Text(long? number) => number is long known ? Text(known) : null;

    private static string Text(double number) => number.ToString("R", CultureInfo.InvariantCulture);

    private static string? Text(double? number) => number is double known ? Text(known) : null;

    private static string Text(float number) => number.ToString("R", CultureInfo.InvariantCulture);

    private static string Text(bool value) => value ? "true" : "false";

    private static string Word<T>((string Word, T Value)[] choices, T value) =>
        choices.First(choice => EqualityComparer<T>.Default.Equals(choice.Value, value)).Word;

    /// <summary>A double-quoted YAML scalar on one line.</summary>
    private static string Quote(string text)
    {
        var quoted = new System.Text.StringBuilder("\"");
        foreach (char c in text)
        {
            bool plain = c is >= ' ' and not ('"' or '\\' or '\u007f' or '\u0085' or '\u2028' or '\u2029' or '\ufeff');
            quoted.Append(plain ? c.ToString() : $"\\u{(int)c:x4}");
        }

        return quoted.Append('"').ToString();
    }
}
