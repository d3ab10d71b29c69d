using System.Globalization;
using System.Text.Json.Nodes;
using TinyLlama.Model;
using TinyLlama.Training;

namespace TinyLlama.Cli;

/// <summary>A training plan as a table for people or as JSON.</summary>
internal static class PlanOutput
{
    /// <summary>Writes a plan.</summary>
    /// <param name="output">Where to.</param>
    /// <param name="plan">The plan.</param>
    /// <param name="device">What the run computes on, and how.</param>
    /// <param name="memory">What it takes of the device's memory.</param>
    /// <param name="tokensPerSecond">The speed to expect, or null where nothing is known of it.</param>
    public static void Write(
        TextWriter output, TrainingPlan plan, string device, MemoryPlan memory, double? tokensPerSecond)
    {
        ModelConfig model = plan.Model;
        string unit = plan.Recipe.Schedule.By == ScheduleUnit.Tokens ? "tokens" : "steps";
        void Row(string name, FormattableString value) =>
            output.WriteLine($"{name,-18} {value.ToString(CultureInfo.InvariantCulture)}");

        Row("model", $"{plan.Recipe.Preset ?? "own"}: {model.Layers} layers, {model.Channels:N0} channels, {model.Heads} heads, {model.KeyValueHeads} key/value heads, {model.Hidden:N0} hidden, vocabulary {model.VocabularySize:N0}");
        Row("parameters", $"{model.ParameterCount:N0}");
        Row("FLOPs per token", $"{plan.FlopsPerToken:N0} (formula of PaLM; {Flops.PerTokenAsTinyLlama(model, plan.ContextLength):N0} by TinyLlama's own)");
        Row("micro-batch", $"{plan.SequencesPerMicroBatch:N0} sequences × {plan.ContextLength:N0} tokens = {plan.TokensPerMicroBatch:N0} tokens");
        Row("step", $"{plan.AccumulationSteps:N0} micro-batches = {plan.TokensPerStep:N0} tokens");
        if (plan.Sharding is { ModelRanks: > 1 } split)
        {
            Row("ranks", $"{split.Ranks:N0} = tensor {split.Tensor:N0} × pipeline {split.Pipeline:N0} × {split.DataRanks:N0} groups, each group {plan.MicroBatchesOfRank:N0} of these; stages wait {plan.PipelineWaiting:P1} of the time; {split.Lanes:N0} reduction lanes; memory below is that of a rank of the fullest stage");
        }
        else if (plan.Sharding is { Ranks: > 1 } sharding)
        {
            Row("ranks", $"{sharding.Ranks:N0}, each {plan.MicroBatchesOfRank:N0} of these; ZeRO-{sharding.Stage} over {sharding.Shards:N0}; {sharding.Lanes:N0} reduction lanes; memory below is one rank's");
        }

        Row("run", $"{plan.Steps:N0} steps = {plan.Tokens:N0} tokens, {plan.Tokens / (double)model.ParameterCount:N1} a parameter");
        if (plan.Epochs is double epochs)
        {
            Row("epochs", $"{epochs:N2}");
        }

        LearningRateSchedule schedule = plan.Schedule;
        Row("learning rate", $"{Kind(schedule)} over {unit}: to {schedule.Peak} in {schedule.Warmup:N0} {unit}{(schedule.Kind == ScheduleKind.Constant ? "" : $", then to {schedule.Minimum} at {schedule.End:N0}")}");
        Row("device", $"{device}");
        foreach ((string name, long bytes) in memory.Arenas)
        {
            Row($"  {name}", $"{Megabytes(bytes),12}");
        }

        Row("memory", $"{Megabytes(memory.Bytes),12} of {Megabytes(memory.AvailableBytes)}");
        foreach (MemoryChoice choice in memory.Choices())
        {
            Row("  would fit", $"{Megabytes(choice.Bytes),12} with recompute {choice.Recompute} and micro-batches of {choice.Sequences:N0} × {plan.ContextLength:N0} tokens");
        }

        if (tokensPerSecond is double rate)
        {
            Row("time", $"{ProgressDisplay.Duration(Time(plan, rate))} at {rate:N0} tokens/s");
        }

        foreach (string warning in plan.Warnings)
        {
            Row("warning", $"{warning}");
        }
    }

    /// <summary>A plan for <c>--json</c>.</summary>
    public static JsonObject ToJson(
        TrainingPlan plan, string device, MemoryPlan memory, double? tokensPerSecond) => new()
        {
            ["preset"] = plan.Recipe.Preset,
            ["parameters"] = plan.Model.ParameterCount,
            ["flops_per_token"] = plan.FlopsPerToken,
            ["flops_per_token_as_tinyllama"] = Flops.PerTokenAsTinyLlama(plan.Model, plan.ContextLength),
            ["context"] = plan.ContextLength,
            ["sequences_per_micro_batch"] = plan.SequencesPerMicroBatch,
            ["micro_batches_per_step"] = plan.AccumulationSteps,
            ["tokens_per_step"] = plan.TokensPerStep,
            ["ranks"] = plan.Sharding.Ranks,
            ["tensor"] = plan.Sharding.Tensor,
            ["pipeline"] = plan.Sharding.Pipeline,
            ["reduction_lanes"] = plan.Sharding.Lanes,
            ["steps"] = plan.Steps,
            ["tokens"] = plan.Tokens,
            ["epochs"] = plan.Epochs,
            ["warmup_steps"] = plan.WarmupSteps,
            ["device"] = device,
            ["arena_bytes"] = new JsonObject(memory.Arenas.Select(arena => KeyValuePair.Create(arena.Name, (JsonNode?)arena.Bytes))),
            ["memory_bytes"] = memory.Bytes,
            ["available_bytes"] = memory.AvailableBytes,
            ["largest_micro_batches"] = new JsonArray([.. memory.Choices().Select(choice => new JsonObject
            {
                ["recompute"] = choice.Recompute,
                ["sequences"] = choice.Sequences,
                ["memory_bytes"] = choice.Bytes,
            })]),
            ["tokens_per_second"] = tokensPerSecond,
            ["seconds"] = tokensPerSecond is double rate ? Time(plan, rate).TotalSeconds : null,
            ["warnings"] = new JsonArray([.. plan.Warnings.Select(warning => (JsonNode?)warning)]),
        };

    private static TimeSpan Time(TrainingPlan plan, double tokensPerSecond) =>
        TimeSpan.FromSeconds(Math.Min(plan.Tokens / tokensPerSecond, 1e11));

    private static string Kind(LearningRateSchedule schedule) => schedule.Kind.ToString().ToLowerInvariant();

    private static string Megabytes(long bytes) =>
        string.Create(CultureInfo.InvariantCulture, $"{bytes / (double)(1 << 20):N1} MiB");
}
