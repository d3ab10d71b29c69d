using System.Globalization;
using System.Numerics;
using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Model;

namespace TinyLlama.Training;

/// <summary>Every number of a run that follows from its recipe. Made once, before anything is allocated.</summary>
public sealed record TrainingPlan
{
    /// <summary>Rows of a tensor are counted in 32 bits; this leaves room for the widest.</summary>
    private const long MostTokensOfMicroBatch = 1 << 24;

    /// <summary>More steps or tokens than this are a slip of the pen.</summary>
    private const double MostTokens = 1L << 60;

    private TrainingPlan()
    {
    }

    /// <summary>Gets the recipe.</summary>
    public required Recipe Recipe { get; init; }

    /// <summary>Gets the model's shape, from the recipe or from what <see cref="Recipe.Init"/> names.</summary>
    public required ModelConfig Model { get; init; }

    /// <summary>Gets T of this run: the tokens of a sequence.</summary>
    public required int ContextLength { get; init; }

    /// <summary>Gets the sequences of a micro-batch.</summary>
    public required int SequencesPerMicroBatch { get; init; }

    /// <summary>Gets the tokens of a micro-batch.</summary>
    public long TokensPerMicroBatch => (long)SequencesPerMicroBatch * ContextLength;

    /// <summary>Gets the micro-batches of a step, of all ranks together.</summary>
    public required int AccumulationSteps { get; init; }

    /// <summary>Gets how ranks share the state and these micro-batches.</summary>
    public required Sharding Sharding { get; init; }

    /// <summary>Gets the micro-batches of a rank in a step: those of all ranks that have one model between them are the same.</summary>
    public int MicroBatchesOfRank => AccumulationSteps / Sharding.DataRanks;

    /// <summary>Gets the share of a step's time in which a stage of a pipeline waits for the others, (P - 1) / (M + P - 1).</summary>
    public double PipelineWaiting => (Sharding.Pipeline - 1.0) / (MicroBatchesOfRank + Sharding.Pipeline - 1);

    /// <summary>Gets the sequences of a step.</summary>
    public long SequencesPerStep => (long)SequencesPerMicroBatch * AccumulationSteps;

    /// <summary>Gets the global batch: the tokens of a step.</summary>
    public long TokensPerStep => TokensPerMicroBatch * AccumulationSteps;

    /// <summary>Gets the number of steps.</summary>
    public required long Steps { get; init; }

    /// <summary>Gets the number of tokens trained on.</summary>
    public long Tokens => Steps * TokensPerStep;

    /// <summary>Gets the passes over the data, or null where the data is not known.</summary>
    public required double? Epochs { get; init; }

    /// <summary>Gets the learning rate as a function of steps or tokens.</summary>
    public required LearningRateSchedule Schedule { get; init; }

    /// <summary>Gets the number of steps of the warm-up.</summary>
    public required long WarmupSteps { get; init; }

    /// <summary>Gets the validation sequences, the same each time.</summary>
    public required int ValidationSequences { get; init; }

    /// <summary>Gets the model FLOPs of one token, forward and backward.</summary>
    public long FlopsPerToken => Flops.PerToken(Model, ContextLength);

    /// <summary>Gets a value indicating whether training goes on while a checkpoint is written.</summary>
    public bool SavesAsynchronously => Recipe.Checkpoints.Asynchronous ?? Sharding.Ranks > 1;

    /// <summary>Gets what decides how much memory the run takes.</summary>
    public TrainingShape Shape => new(
        Model, SequencesPerMicroBatch, ContextLength, Recipe.Keep,
        new AdamWSettings(
            (float)Recipe.Optimizer.Beta1, (float)Recipe.Optimizer.Beta2, (float)Recipe.Optimizer.Epsilon,
            (float)Recipe.Optimizer.WeightDecay, (float)Recipe.Optimizer.Clip),
        Recipe.Optimizer.Decay,
        new RateFactors((float)Recipe.Optimizer.EmbeddingFactor, (float)Recipe.Optimizer.HeadFactor), Recipe.PackedWeights, Sharding,
        SavesAsynchronously || Sharding.ShardsWeights || Sharding.ModelRanks > 1);

    /// <summary>Gets what is allowed and most likely a mistake, a sentence each.</summary>
    public required IReadOnlyList<string> Warnings { get; init; }

    /// <summary>The learning rate of a step, counted from 0.</summary>
    public double LearningRateAt(long step)
    {
        double progress = step + Recipe.Schedule.Offset;
        return Schedule.At(Recipe.Schedule.By == ScheduleUnit.Tokens ? progress * TokensPerStep : progress);
    }

    /// <summary>Whether the validation loss is measured before this step; <see cref="Steps"/> asks for the end.</summary>
    public bool ValidatesAt(long step) => Falls(step, Recipe.Validation.EverySteps) || step == Steps;

    /// <summary>Whether text is sampled before this step; <see cref="Steps"/> asks for the end.</summary>
    public bool SamplesAt(long step) => Recipe.Samples.EverySteps > 0 && (Falls(step, Recipe.Samples.EverySteps) || step == Steps);

    /// <summary>Whether a checkpoint is written before this step; <see cref="Steps"/> asks for the end.</summary>
    public bool SavesAt(long step) => (step > 0 && Falls(step, Recipe.Checkpoints.EverySteps)) || step == Steps;

    /// <summary>Derives a plan and checks everything that can be checked before memory is taken and data is read.</summary>
    /// <param name="recipe">The recipe.</param>
    /// <param name="initial">The shape of what <see cref="Recipe.Init"/> names; null from scratch.</param>
    /// <param name="sequencesPerEpoch">
    /// The training sequences of the run's context length that the data holds; null where the data is not known yet, which
    /// a budget in epochs does not allow.
    /// </param>
    /// <param name="ranks">The number of ranks that train.</param>
    /// <param name="neighbours">Ranks of one host, which shard between them unless the recipe says otherwise; 1 where that is not known or would be none.</param>
    /// <exception cref="UserErrorException">A line for each mistake, with the arithmetic and where the key was set.</exception>
    public static TrainingPlan Create(
        Recipe recipe, ModelConfig? initial = null, long? sequencesPerEpoch = null, int ranks = 1, int neighbours = 1)
    {
        List<string> problems = [];
        List<string> warnings = [];
        string Of(string key) => recipe.Origins.Describe(key);

        ModelConfig model = ChooseModel(recipe, initial, problems);
        int context = recipe.Batch.Context ?? model.ContextLength;
        if (context > model.ContextLength)
        {
            problems.Add(Invariant(
                $"{Of("batch.context")} {context:N0} is more than the model's context of {model.ContextLength:N0}; raise model.context too"));
        }

        int accumulation = Accumulation(recipe, context, problems);
        long tokensPerStep = (long)recipe.Batch.MicroSequences * context * accumulation;
        long steps = CountSteps(recipe, context, tokensPerStep, sequencesPerEpoch, problems);
        LearningRateSchedule schedule = Anneal(recipe, steps, tokensPerStep, problems, warnings);
        string[] indivisible = [.. WhyNoSplit(recipe, model, ranks)];
        problems.AddRange(indivisible);
        Sharding sharding = indivisible.Length > 0 ? Sharding.None : Share(recipe, ranks, neighbours, accumulation, problems);
        if (problems.Count > 0)
        {
            throw new UserErrorException(string.Join('\n', problems));
        }

        if (recipe.Validation.EverySteps > steps)
        {
            warnings.Add(Invariant($"{Of("validation.every_steps")} {recipe.Validation.EverySteps:N0} is more than the {steps:N0} steps"));
        }

        long warmup = recipe.Schedule.By == ScheduleUnit.Steps
            ? recipe.Schedule.Warmup
            : DivideUp(recipe.Schedule.Warmup, tokensPerStep);
        return new TrainingPlan
        {
            Recipe = recipe,
            Model = model,
            ContextLength = context,
            SequencesPerMicroBatch = recipe.Batch.MicroSequences,
            AccumulationSteps = accumulation,
            Sharding = sharding,
            Steps = steps,
            Epochs = sequencesPerEpoch is > 0 and long count ? (double)steps * tokensPerStep / context / count : null,
            Schedule = schedule,
            WarmupSteps = warmup,
            ValidationSequences = (int)Math.Min(int.MaxValue, DivideUp(recipe.Validation.Tokens, context)),
            Warnings = warnings,
        };
    }

    private static ModelConfig ChooseModel(Recipe recipe, ModelConfig? initial, List<string> problems)
    {
        if (recipe.Model is not ModelConfig own)
        {
            if (initial is null)
            {
                problems.Add(
                    $"model is missing: name a preset ({string.Join(", ", Presets.All.Select(preset => preset.Name))}) or its numbers");
            }

            return initial ?? Presets.All[0].Config;
        }

        (string Key, int Value)[] needed =
        [
            ("vocabulary", own.VocabularySize), ("context", own.ContextLength), ("layers", own.Layers), ("heads", own.Heads),
            ("key_value_heads", own.KeyValueHeads), ("channels", own.Channels), ("hidden", own.Hidden),
        ];
        string missing = string.Join(", ", needed.Where(dimension => dimension.Value == 0).Select(dimension => dimension.Key));
        if (missing.Length > 0)
        {
            problems.Add($"model lacks {missing}: give every number, or name a preset to start from");
            return own;
        }

        foreach (string problem in own.Problems())
        {
            string key = "model." + problem[..problem.IndexOf(' ', StringComparison.Ordinal)];
            problems.Add($"{recipe.Origins.Describe(key)}{problem[(key.Length - "model.".Length)..]}");
        }

        if (initial is not null)
        {
            (string Key, int Own, int Initial)[] dimensions =
            [
                ("vocabulary", own.VocabularySize, initial.VocabularySize),
                ("layers", own.Layers, initial.Layers),
                ("heads", own.Heads, initial.Heads),
                ("key_value_heads", own.KeyValueHeads, initial.KeyValueHeads),
                ("channels", own.Channels, initial.Channels),
                ("hidden", own.Hidden, initial.Hidden),
            ];
            problems.AddRange(dimensions.Where(d => d.Own != d.Initial).Select(d => Invariant(
                $"{recipe.Origins.Describe("model." + d.Key)} is {d.Own:N0}, but that of init {recipe.Init} is {d.Initial:N0}; leave model out to take its shape")));
            if (own.TiedEmbeddings != initial.TiedEmbeddings)
            {
                problems.Add($"{recipe.Origins.Describe("model.tied_embeddings")} differs from that of init {recipe.Init}; leave model out to take its shape");
            }
        }

        return own;
    }

    private static int Accumulation(Recipe recipe, int context, List<string> problems)
    {
        BatchSettings batch = recipe.Batch;
        if (batch.GlobalTokens == 0)
        {
            problems.Add("batch.global_tokens is missing: how many tokens is one step?");
            return 1;
        }

        if (context < 1)
        {
            return 1;
        }

        long micro = (long)batch.MicroSequences * context;
        if (micro > MostTokensOfMicroBatch)
        {
            problems.Add(Invariant(
                $"{recipe.Origins.Describe("batch.micro_sequences")} {batch.MicroSequences:N0} × context {context:N0} = {micro:N0} tokens in one micro-batch, but {MostTokensOfMicroBatch:N0} are the most; let it accumulate more micro-batches"));
            return 1;
        }

        (long accumulation, long rest) = Math.DivRem(batch.GlobalTokens, micro);
        if (rest == 0 && accumulation <= int.MaxValue)
        {
            return (int)accumulation;
        }

        long below = accumulation * micro;
        string multiple = below == 0 ? $"{micro:N0}" : Invariant($"{below:N0} or {below + micro:N0}");
        (long sequences, long left) = Math.DivRem(batch.GlobalTokens, context);
        string smaller = left == 0 ? Invariant($", or batch.micro_sequences {LargestDivisor(sequences, batch.MicroSequences):N0}") : "";
        problems.Add(Invariant(
            $"{recipe.Origins.Describe("batch.global_tokens")} {batch.GlobalTokens:N0} is not a multiple of micro-batch {batch.MicroSequences:N0} × context {context:N0} = {micro:N0}; use {multiple}{smaller}"));
        return 1;
    }

    private static long CountSteps(
        Recipe recipe, int context, long tokensPerStep, long? sequencesPerEpoch, List<string> problems)
    {
        BudgetSettings budget = recipe.Budget;
        string[] set = [.. new[]
        {
            budget.Tokens is null ? null : "budget.tokens",
            budget.Steps is null ? null : "budget.steps",
            budget.Epochs is null ? null : "budget.epochs",
        }.OfType<string>()];
        if (set.Length != 1)
        {
            problems.Add(set.Length == 0
                ? "budget is missing: give one of budget.tokens, budget.steps and budget.epochs"
                : $"{recipe.Origins.Describe(set[1])} contradicts {set[0]}: a budget is one of tokens, steps and epochs");
            return 1;
        }

        if (set[0] == "budget.epochs" && sequencesPerEpoch is not > 0)
        {
            problems.Add($"{recipe.Origins.Describe("budget.epochs")} needs the data, which is not known here; give budget.tokens or budget.steps");
            return 1;
        }

        long step = Math.Max(1, tokensPerStep);
        double steps = budget.Steps
            ?? (budget.Tokens is long tokens ? DivideUp(tokens, step) : Math.Ceiling(budget.Epochs!.Value * sequencesPerEpoch!.Value * context / step));
        if (steps * step > MostTokens)
        {
            problems.Add(Invariant($"{recipe.Origins.Describe(set[0])}: {steps:N0} steps of {step:N0} tokens are more than anybody trains"));
            return 1;
        }

        return (long)steps;
    }

    private static LearningRateSchedule Anneal(
        Recipe recipe, long steps, long tokensPerStep, List<string> problems, List<string> warnings)
    {
        (OptimizerSettings optimizer, ScheduleSettings schedule) = (recipe.Optimizer, recipe.Schedule);
        string Of(string key) => recipe.Origins.Describe(key);
        double peak = optimizer.LearningRate;
        double minimum = optimizer.MinLearningRate ?? peak / 10;
        if (schedule.Kind == ScheduleKind.Constant)
        {
            if (optimizer.MinLearningRate is not null)
            {
                warnings.Add($"{Of("optimizer.min_learning_rate")} has no effect: schedule.kind is constant");
            }
        }
        else if (minimum >= peak)
        {
            problems.Add(Invariant(
                $"{Of("optimizer.min_learning_rate")} {minimum} is not below optimizer.learning_rate {peak}: the rate would not fall; for that say schedule.kind: constant"));
        }

        if (schedule.Kind != ScheduleKind.Wsd && schedule.DecayShare != new ScheduleSettings().DecayShare)
        {
            warnings.Add($"{Of("schedule.decay_share")} has no effect: only schedule.kind wsd decays in a share of the run");
        }

        bool byTokens = schedule.By == ScheduleUnit.Tokens;
        string unit = byTokens ? "tokens" : "steps";
        double end = byTokens ? (double)steps * tokensPerStep : steps;
        if (schedule.Warmup > 0 && schedule.Warmup >= end)
        {
            problems.Add(Invariant(
                $"{Of("schedule.warmup")} of {schedule.Warmup:N0} {unit} is not less than the run of {end:N0} {unit}; use about {Math.Max(1, Math.Floor(end / 20)):N0}"));
        }
        else if (schedule.Kind == ScheduleKind.Wsd && schedule.Warmup > end * (1 - schedule.DecayShare))
        {
            problems.Add(Invariant(
                $"{Of("schedule.warmup")} of {schedule.Warmup:N0} {unit} reaches into the decay, the last {schedule.DecayShare:0.##} of {end:N0} {unit}; shorten one of them"));
        }
        else if (schedule.Warmup > end / 4)
        {
            warnings.Add(Invariant($"{Of("schedule.warmup")} of {schedule.Warmup:N0} {unit} is more than a quarter of the run"));
        }
        else if (schedule.Warmup == 0 && recipe.Init == Recipe.Scratch)
        {
            warnings.Add("schedule.warmup is 0: random weights begin at the full learning rate");
        }

        return new LearningRateSchedule(schedule.Kind, peak, minimum, schedule.Warmup, end, schedule.DecayShare);
    }

    // What keeps ranks from having one model between them.
    private static IEnumerable<string> WhyNoSplit(Recipe recipe, ModelConfig model, int ranks)
    {
        DistributionSettings distribution = recipe.Distribution;
        (int tensor, int pipeline) = (distribution.Tensor, distribution.Pipeline);
        string Of(string key) => recipe.Origins.Describe("distribution." + key);
        if (tensor == 1 && pipeline == 1)
        {
            yield break;
        }

        string both = Invariant($"distribution.tensor {tensor:N0} × distribution.pipeline {pipeline:N0}");
        if (ranks % ((long)tensor * pipeline) != 0)
        {
            yield return Invariant($"{both} = {(long)tensor * pipeline:N0} ranks have a model between them: start that many, or a multiple, not {ranks:N0}");
        }

        if (!BitOperations.IsPow2(tensor))
        {
            yield return Invariant($"{Of("tensor")} {tensor:N0} is not a power of two");
        }

        foreach ((string key, int value) in new[] { ("heads", model.Heads), ("key_value_heads", model.KeyValueHeads), ("hidden", model.Hidden) })
        {
            if (value % tensor != 0)
            {
                yield return Invariant($"{Of("tensor")} {tensor:N0} does not divide model.{key} {value:N0}");
            }
        }

        if (pipeline > model.Layers)
        {
            yield return Invariant($"{Of("pipeline")} {pipeline:N0} is more than model.layers {model.Layers:N0}: every stage has a layer or more");
        }

        if (pipeline > 1 && model.TiedEmbeddings)
        {
            yield return $"{Of("pipeline")} parts the embedding from the head, and model.tied_embeddings makes them one; use distribution.tensor";
        }

        if (pipeline > 1 && recipe.Samples.EverySteps > 0)
        {
            yield return $"{recipe.Origins.Describe("samples.every_steps")} wants text of a model that no stage of distribution.pipeline has whole; set it to 0";
        }

        if (distribution.Zero > 1 || distribution.Shard > 1 || distribution.Wire != DType.F32)
        {
            string key = distribution.Zero > 1 ? "zero" : distribution.Shard > 1 ? "shard" : "wire";
            yield return $"{Of(key)} is for ranks that shard a state, which {both} divides already; leave it out";
        }
    }

    private static Sharding Share(Recipe recipe, int ranks, int neighbours, int microBatches, List<string> problems)
    {
        DistributionSettings distribution = recipe.Distribution;
        string Of(string key) => recipe.Origins.Describe("distribution." + key);
        (int tensor, int pipeline) = (distribution.Tensor, distribution.Pipeline);
        int world = ranks;
        ranks /= tensor * pipeline;
        bool eachMicroBatch = distribution.Zero > 1;
        int lanes = distribution.ReductionLanes > 0 ? distribution.ReductionLanes : eachMicroBatch && ranks > 1 ? microBatches : ranks;
        int shards = tensor * pipeline > 1 ? 1 : distribution.Shard > 0 ? Math.Min(distribution.Shard, ranks) : neighbours > 1 ? neighbours : ranks;
        if (!BitOperations.IsPow2(ranks))
        {
            problems.Add(Invariant($"{ranks:N0} {(world > ranks ? "groups of " : "")}ranks cannot share a step in equal parts of one tree; use {1 << BitOperations.Log2((uint)ranks):N0}"));
        }
        else if (!BitOperations.IsPow2(lanes) || microBatches % lanes != 0)
        {
            string from = distribution.ReductionLanes > 0 ? Of("reduction_lanes") : eachMicroBatch ? "distribution.zero above 1: reduction_lanes" : "ranks: reduction_lanes";
            problems.Add(Invariant(
                $"{from} {lanes:N0} is not a power of two that divides the {microBatches:N0} micro-batches of a step; change batch.micro_sequences or batch.global_tokens, or use {1 << BitOperations.TrailingZeroCount(microBatches):N0} or less"));
        }
        else if (ranks > lanes)
        {
            problems.Add(Invariant(
                $"{Of("reduction_lanes")} {lanes:N0} is less than the {ranks:N0} ranks, which need one each; use fewer ranks, or set it to {ranks:N0}, which changes last bits"));
        }
        else if (eachMicroBatch && lanes > 1 && lanes != microBatches)
        {
            problems.Add(Invariant(
                $"{Of("zero")} {distribution.Zero} sums gradients over ranks in each of the {microBatches:N0} micro-batches, so each is a lane of its own; set distribution.reduction_lanes to {microBatches:N0}, or use zero: 1"));
        }
        else if (!BitOperations.IsPow2(shards))
        {
            problems.Add(Invariant($"{Of("shard")} {shards:N0} is not a power of two"));
        }
        else
        {
            return new Sharding(world, shards, distribution.Zero, lanes, distribution.Wire, tensor, pipeline);
        }

        return Sharding.None;
    }

    private static bool Falls(long step, long every) => every > 0 && step % every == 0;

    private static long DivideUp(long value, long by) => (value / by) + (value % by > 0 ? 1 : 0);

    private static long LargestDivisor(long number, long most)
    {
        long divisor = Math.Min(number, most);
        while (number % divisor != 0)
        {
            divisor--;
        }

        return divisor;
    }

    private static string Invariant(FormattableString text) => text.ToString(CultureInfo.InvariantCulture);
}
