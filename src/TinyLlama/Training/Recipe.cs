using TinyLlama.Compute;
using TinyLlama.Compute.Cpu;
using TinyLlama.Model;

namespace TinyLlama.Training;

/// <summary>One training run as its user describes it: everything that decides the result, and nothing derived.</summary>
/// <remarks><see cref="RecipeFile"/> reads and writes it; <see cref="TrainingPlan"/> derives the rest.</remarks>
public sealed record Recipe
{
    /// <summary>What <see cref="Init"/> says of a run that begins with random weights.</summary>
    public const string Scratch = "scratch";

    /// <summary>Gets what <c>recompute</c> may be, and the activations that each of them keeps for backward; the least recomputation first.</summary>
    public static IReadOnlyList<(string Name, Keep Keep)> Recomputations { get; } =
        [("none", Keep.Everything), ("elementwise", Keep.Products), ("blocks", Keep.BlockInputs)];

    /// <summary>Gets the name of the preset that the model started from, or null.</summary>
    public string? Preset { get; init; }

    /// <summary>Gets the model's shape; null where <see cref="Init"/> names what has one.</summary>
    public ModelConfig? Model { get; init; }

    /// <summary>Gets <c>scratch</c>, or the path of a run, a checkpoint or a Hugging Face folder whose weights are taken.</summary>
    public string Init { get; init; } = Scratch;

    /// <summary>Gets the distribution of random initial weights.</summary>
    public InitializationScheme Initialization { get; init; } = InitializationScheme.TinyLlama;

    /// <summary>Gets the seed of the initial weights, of the order of the data and of samples.</summary>
    public ulong Seed { get; init; } = 42;

    /// <summary>Gets what is trained on.</summary>
    public DataSettings Data { get; init; } = new();

    /// <summary>Gets the tokens of a step and of a micro-batch.</summary>
    public BatchSettings Batch { get; init; } = new();

    /// <summary>Gets when the run ends.</summary>
    public BudgetSettings Budget { get; init; } = new();

    /// <summary>Gets the constants of AdamW.</summary>
    public OptimizerSettings Optimizer { get; init; } = new();

    /// <summary>Gets how the learning rate changes.</summary>
    public ScheduleSettings Schedule { get; init; } = new();

    /// <summary>Gets when the validation loss is measured.</summary>
    public ValidationSettings Validation { get; init; } = new();

    /// <summary>Gets when text is sampled.</summary>
    public SampleSettings Samples { get; init; } = new();

    /// <summary>Gets when checkpoints are written and which stay.</summary>
    public CheckpointSettings Checkpoints { get; init; } = new();

    /// <summary>Gets how ranks share the state and the work, where there are several.</summary>
    public DistributionSettings Distribution { get; init; } = new();

    /// <summary>
    /// Gets the type that operands of matrix products are rounded to, F32 or BF16; null for the one in which the device
    /// multiplies fastest. On a CPU weights, activations, gradients, the optimizer's state and all sums are fp32 either way.
    /// </summary>
    public DType? Precision { get; init; }

    /// <summary>Gets <see cref="Precision"/> as it is on this machine's CPU.</summary>
    public DType Products => Precision ?? CpuPaths.FastestProducts;

    /// <summary>Gets which activations stay for backward; it computes the others again, to the same bits.</summary>
    public Keep Keep { get; init; } = Keep.Everything;

    /// <summary>Gets which packed forms of the weights are kept. Changes no bit of the result.</summary>
    public PackedForms PackedWeights { get; init; } = PackedForms.Both;

    /// <summary>Gets what the run computes on.</summary>
    public Device Device { get; init; }

    /// <summary>Gets a value indicating whether a GPU gives the same bits every time; otherwise attention's backward adds up by atomics.</summary>
    public bool Deterministic { get; init; } = true;

    /// <summary>Gets the number of threads of the CPU; 0 for one a core. Changes no bit of the result.</summary>
    public int Threads { get; init; }

    /// <summary>Gets where each key was set, for messages; not part of what makes two recipes equal.</summary>
    public RecipeOrigins Origins { get; init; } = RecipeOrigins.None;
}

/// <summary>What is trained on.</summary>
public sealed record DataSettings
{
    /// <summary>Gets the folder of token shards; null where a verb supplies it.</summary>
    public string? Path { get; init; }

    /// <summary>Gets a value indicating whether attention stays inside documents; otherwise it runs across, as TinyLlama's.</summary>
    public bool MaskedDocuments { get; init; }
}

/// <summary>The tokens of a step and of a micro-batch.</summary>
public sealed record BatchSettings
{
    /// <summary>Gets the global batch: tokens of one optimizer step. 0 where the recipe does not say.</summary>
    public long GlobalTokens { get; init; }

    /// <summary>Gets the sequences of a micro-batch: what one forward and backward sees.</summary>
    public int MicroSequences { get; init; } = 8;

    /// <summary>Gets the tokens of a sequence; null for the model's context length.</summary>
    public int? Context { get; init; }
}

/// <summary>When the run ends: one of the three.</summary>
public sealed record BudgetSettings
{
    /// <summary>Gets the tokens to train on, rounded up to whole steps.</summary>
    public long? Tokens { get; init; }

    /// <summary>Gets the number of steps.</summary>
    public long? Steps { get; init; }

    /// <summary>Gets the number of passes over the data, rounded up to whole steps.</summary>
    public double? Epochs { get; init; }
}

/// <summary>The constants of AdamW; the defaults are TinyLlama's.</summary>
public sealed record OptimizerSettings
{
    /// <summary>Gets the peak of the learning rate.</summary>
    public double LearningRate { get; init; } = 4e-4;

    /// <summary>Gets the learning rate at the end; null for a tenth of the peak.</summary>
    public double? MinLearningRate { get; init; }

    /// <summary>Gets the embedding's learning rate as a multiple of <see cref="LearningRate"/>, at any step.</summary>
    public double EmbeddingFactor { get; init; } = 1;

    /// <summary>Gets the same of a head that is not the embedding.</summary>
    public double HeadFactor { get; init; } = 1;

    /// <summary>Gets the decay of the first moment.</summary>
    public double Beta1 { get; init; } = 0.9;

    /// <summary>Gets the decay of the second moment.</summary>
    public double Beta2 { get; init; } = 0.95;

    /// <summary>Gets what is added to the root of the second moment.</summary>
    public double Epsilon { get; init; } = 1e-8;

    /// <summary>Gets the decoupled weight decay, a share of the learning rate.</summary>
    public double WeightDecay { get; init; } = 0.1;

    /// <summary>Gets which parameters decay.</summary>
    public DecayGroup Decay { get; init; } = DecayGroup.All;

    /// <summary>Gets the global norm that gradients are scaled down to.</summary>
    public double Clip { get; init; } = 1;
}

/// <summary>How the learning rate changes.</summary>
public sealed record ScheduleSettings
{
    /// <summary>Gets the shape after the warm-up.</summary>
    public ScheduleKind Kind { get; init; } = ScheduleKind.Cosine;

    /// <summary>Gets what <see cref="Warmup"/> and the curve count.</summary>
    public ScheduleUnit By { get; init; } = ScheduleUnit.Steps;

    /// <summary>Gets the length of the warm-up, in steps or tokens.</summary>
    public long Warmup { get; init; }

    /// <summary>Gets the share of the run in which a wsd schedule decays.</summary>
    public double DecayShare { get; init; } = 0.2;

    /// <summary>
    /// Gets the point inside a step whose rate the step uses, from 0 (its beginning: the very first rate of a warm-up is
    /// 0) to 1 (its end). TinyLlama set the rate anew before each of 8 micro-batches and updated after the last: 0.875.
    /// </summary>
    public double Offset { get; init; }
}

/// <summary>When the validation loss is measured.</summary>
public sealed record ValidationSettings
{
    /// <summary>Gets the number of steps between two validations; 0 for the end only.</summary>
    public long EverySteps { get; init; } = 500;

    /// <summary>Gets the validation tokens, the same each time.</summary>
    public long Tokens { get; init; } = 65_536;
}

/// <summary>When text is sampled.</summary>
public sealed record SampleSettings
{
    /// <summary>Gets the number of steps between two samplings; 0 for never.</summary>
    public long EverySteps { get; init; }

    /// <summary>Gets what the samples begin with.</summary>
    public IReadOnlyList<string> Prompts { get; init; } = [""];

    /// <summary>Gets the most tokens of a sample.</summary>
    public int MaxTokens { get; init; } = 64;

    /// <summary>Gets what divides the logits; 0 takes the likeliest token.</summary>
    public double Temperature { get; init; } = 0.8;

    /// <inheritdoc/>
    public bool Equals(SampleSettings? other) =>
        other is not null && EverySteps == other.EverySteps && MaxTokens == other.MaxTokens
        && Temperature.Equals(other.Temperature) && Prompts.SequenceEqual(other.Prompts);

    /// <inheritdoc/>
    public override int GetHashCode() => HashCode.Combine(EverySteps, MaxTokens, Temperature, Prompts.Count);
}

/// <summary>When checkpoints are written and which stay.</summary>
public sealed record CheckpointSettings
{
    /// <summary>Gets the number of steps between two checkpoints; 0 for the end only.</summary>
    public long EverySteps { get; init; } = 500;

    /// <summary>Gets how many of the newest stay.</summary>
    public int KeepLast { get; init; } = 2;

    /// <summary>Gets the multiple of steps whose checkpoints stay for good; 0 for none.</summary>
    public long KeepEvery { get; init; }

    /// <summary>Gets a value indicating whether the one with the least validation loss stays.</summary>
    public bool KeepBest { get; init; } = true;

    /// <summary>Gets whether training goes on while one is written, from a copy in memory; null for a run of many ranks alone.</summary>
    public bool? Asynchronous { get; init; }
}

/// <summary>How ranks share the state and the work.</summary>
public sealed record DistributionSettings
{
    /// <summary>Gets the stage of ZeRO: 1 shards the optimizer's state, 2 gradients too, 3 weights too.</summary>
    public int Zero { get; init; } = 1;

    /// <summary>Gets the ranks that keep the state once between them; 0 for all.</summary>
    public int Shard { get; init; }

    /// <summary>
    /// Gets the sums that the micro-batches of a step add up in before these add up in a tree: the same number gives the same
    /// bits for any number of ranks up to it. 0 where the first start of the run chooses: one a rank, or one a micro-batch
    /// where gradients are sharded.
    /// </summary>
    public int ReductionLanes { get; init; }

    /// <summary>Gets what gradients are rounded to between ranks.</summary>
    public DType Wire { get; init; } = DType.F32;

    /// <summary>Gets the neighbours that have the heads and the hidden channels of each block between them.</summary>
    public int Tensor { get; init; } = 1;

    /// <summary>Gets the stages that have the blocks between them, each of as many neighbours.</summary>
    public int Pipeline { get; init; } = 1;

    /// <summary>Gets the seconds that a rank waits for the others before it gives them up.</summary>
    public int TimeoutSeconds { get; init; } = 300;
}

/// <summary>Where the keys of a recipe were set: <c>file:line:column</c>, a flag or a variable. All are equal.</summary>
public sealed class RecipeOrigins
{
    private readonly IReadOnlyDictionary<string, string> _places;

    internal RecipeOrigins(IReadOnlyDictionary<string, string> places) => _places = places;

    /// <summary>Gets the origins of a recipe that was made in code.</summary>
    public static RecipeOrigins None { get; } = new(new Dictionary<string, string>(StringComparer.Ordinal));

    /// <summary>Whether the user set the key.</summary>
    public bool Sets(string key) => _places.ContainsKey(key);

    /// <summary>How a message begins that is about a key: where it was set, then its name.</summary>
    public string Describe(string key) => _places.TryGetValue(key, out string? place) ? $"{place}: {key}" : key;

    /// <inheritdoc/>
    public override bool Equals(object? obj) => obj is RecipeOrigins;

    /// <inheritdoc/>
    public override int GetHashCode() => 0;
}
