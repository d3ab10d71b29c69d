using System.CommandLine;
using System.Diagnostics;
using System.Globalization;
using System.Text.Json.Nodes;
using TinyLlama.Checkpoints;
using TinyLlama.Compute;
using TinyLlama.Compute.Collectives;
using TinyLlama.Compute.Cuda;
using TinyLlama.Data;
using TinyLlama.Training;

namespace TinyLlama.Cli;

/// <summary><c>tinyllama pretrain</c>: trains what a recipe says, or goes on with a run.</summary>
internal static class PretrainCommand
{
    /// <summary>The verb.</summary>
    public static Command Create()
    {
        var recipe = new Option<string?>("--recipe") { Description = "The recipe to train", HelpName = "FILE" };
        var resume = new Option<string?>("--resume") { Description = "Go on with this run, by its own recipe", HelpName = "RUN" };
        var plan = new Option<bool>("--plan") { Description = "Print what would be done and how much memory it takes, and do nothing" };
        var output = CommonOptions.Out("The run's folder [default: runs/ and the recipe's name]; a run that is there goes on");
        var set = CommonOptions.Set();
        var threads = CommonOptions.Threads();
        var device = CommonOptions.Device();
        var deviceMemory = DeviceMemory();
        var maxSteps = CommonOptions.MaxSteps();
        var ranks = RankCommand.Ranks("Start this many processes here, which train together");
        var restarts = CommonOptions.AtLeast(
            new Option<int?>("--restarts") { Description = "With --ranks: start them again this often when one is lost [default: 0]", HelpName = "N" }, 0);
        var json = CommonOptions.Json();
        var command = new Command("pretrain", "Train a model by a recipe; the same command again goes on where it was")
        {
            recipe, resume, plan, output, set, threads, device, deviceMemory, maxSteps, ranks, restarts, json,
        };
        command.Validators.Add(result =>
        {
            if ((result.GetResult(recipe) is null) == (result.GetResult(resume) is null))
            {
                result.AddError("give --recipe FILE for a new run, or --resume RUN to go on with one");
            }

            if (result.GetResult(deviceMemory) is not null && result.GetResult(plan) is null)
            {
                result.AddError("--device-memory is for --plan");
            }

            if (result.GetResult(restarts) is not null && result.GetResult(ranks) is null)
            {
                result.AddError("--restarts is for --ranks");
            }

            if (result.GetResult(deviceMemory) is not null && result.GetValue(device) is { Kind: DeviceKind.Cpu })
            {
                result.AddError("--device-memory is of a GPU, and --device is cpu; leave one of them out");
            }
        });
        command.SetAction(async (parse, stop) =>
        {
            string? run = parse.GetValue(resume);
            string folder = run ?? parse.GetValue(output)
                ?? Path.Combine("runs", Path.GetFileNameWithoutExtension(parse.GetValue(recipe)!));
            string file = run is null ? parse.GetValue(recipe)! : Path.Combine(run, TrainingRun.RecipeName);
            if (run is not null && !File.Exists(file))
            {
                throw new UserErrorException($"{run}: not a run, it has no {TrainingRun.RecipeName}");
            }

            List<string> settings = [.. parse.GetValue(set)!];
            if (parse.GetValue(threads) is int count)
            {
                settings.Add($"threads={count}");
            }

            if (parse.GetValue(device) is Device chosen)
            {
                settings.Add($"device={chosen}");
            }

            Recipe resolved = RecipeFile.Read(file, [.. settings]);
            TextWriter writer = parse.InvocationConfiguration.Output;
            long lastStep = parse.GetValue(maxSteps) ?? long.MaxValue;
            if (parse.GetValue(plan))
            {
                WritePlan(resolved, parse.GetValue(ranks) ?? 1, parse.GetValue(deviceMemory), writer, parse.GetValue(json));
                return ExitCode.Success;
            }

            if (parse.GetValue(ranks) is int size)
            {
                string[] arguments = RankCommand.Arguments(parse, size, resolved.Threads > 0, ranks, restarts);
                return await Supervise(resolved, folder, size, parse.GetValue(restarts) ?? 0, arguments, lastStep, stop);
            }

            return Train(resolved, folder, writer, parse.GetValue(json), lastStep, stop) ? ExitCode.Success : ExitCode.Stopped;
        });
        return command;
    }

    private static Option<long?> DeviceMemory() => new("--device-memory")
    {
        Description = "With --plan: plan for a GPU with this much memory, as nvidia-smi tells it (24564MiB, 40GiB), which need not be here",
        HelpName = "SIZE",
        CustomParser = result =>
        {
            string text = result.Tokens[0].Value;
            (string Unit, long Bytes)[] units = [("MiB", 1L << 20), ("GiB", 1L << 30), ("MB", 1_000_000), ("GB", 1_000_000_000)];
            foreach ((string unit, long bytes) in units)
            {
                if (text.EndsWith(unit, StringComparison.Ordinal)
                    && double.TryParse(text[..^unit.Length], NumberStyles.AllowDecimalPoint, CultureInfo.InvariantCulture, out double number) && number is > 0 and < 1e6)
                {
                    return (long)(number * bytes);
                }
            }

            result.AddError($"--device-memory {text} is no size; write one such as 24564MiB, 40GiB or 80GB");
            return null;
        },
    };

    private static void WritePlan(Recipe recipe, int ranks, long? deviceMemory, TextWriter writer, bool json)
    {
        TrainingPlan plan = TrainingRun.PlanOf(recipe, Warn, ranks);
        using Backend backend = deviceMemory is long bytes ? CudaBackend.Plan(bytes, recipe.Deterministic) : TrainingRun.OpenDevice(recipe);
        TrainingRun.RequireSupport(recipe, backend);
        var memory = new MemoryPlan(plan, backend);

        // A guess: half of the measured ceiling, which models of some size exceed.
        double? rate = TrainingRun.PeakFlops(backend) / 2 / plan.FlopsPerToken;
        if (json)
        {
            writer.WriteLine(PlanOutput.ToJson(plan, backend.Description, memory, rate).ToJsonString(JsonOutput.Options));
        }
        else
        {
            PlanOutput.Write(writer, plan, backend.Description, memory, rate);
        }

        memory.RequireFits();
    }

    /// <summary>Starts the same command once a rank and sees it through.</summary>
    private static async Task<int> Supervise(
        Recipe recipe, string folder, int ranks, int restarts, string[] arguments, long lastStep, CancellationToken stop)
    {
        long steps = TrainingRun.PlanOf(recipe, Warn, ranks).Steps;
        return await RankCommand.Supervise(ranks, restarts, folder, EndRecord.FileName, arguments, IsDone, stop);

        bool IsDone() => lastStep < steps
            ? TrainingCheckpoint.FindNewest(folder, static _ => { })?.Step >= lastStep
            : EndRecord.Find(folder)?.Step == steps;
    }

    /// <returns>Whether everything asked for is done, and it was not stopped before.</returns>
    private static bool Train(Recipe recipe, string folder, TextWriter writer, bool json, long lastStep, CancellationToken stop)
    {
        // Twice, so that the watch comes first, who knows which rank is late.
        using var ranks = Collective.Join(TimeSpan.FromSeconds(2.0 * recipe.Distribution.TimeoutSeconds));
        if (ranks.Size == 1)
        {
            using var display = new TrainingDisplay();
            return Train(recipe, folder, ranks, display, display, writer, json, lastStep, stop);
        }

        using TrainingDisplay? terminal = ranks.Rank == 0 ? new TrainingDisplay() : null;
        using var log = new RankLog(folder, ranks.Rank, ranks.Size, terminal);
        try
        {
            return Train(recipe, folder, ranks, terminal, log, writer, json, lastStep, stop);
        }
        catch (Exception e) when (EndRank(e))
        {
            throw;
        }

        // As an exception filter it ends the process before the run is disposed of.
        bool EndRank(Exception reason)
        {
            RankCommand.End(reason, ranks, log.End, stop);
            return false;
        }
    }

    private static bool Train(
        Recipe recipe, string folder, Collective ranks, TrainingDisplay? display, ITrainingObserver observer, TextWriter writer, bool json, long lastStep,
        CancellationToken stop)
    {
        TrainingRun? opened = null;
        using RankWatch? watch = observer is RankLog log
            ? RankWatch.Start(folder, ranks, () => Volatile.Read(ref opened)?.Trainer.State.Step ?? 0, TimeSpan.FromSeconds(recipe.Distribution.TimeoutSeconds), log.End)
            : null;
        using TrainingRun run = TrainingRun.Open(recipe, folder, observer, ranks);
        Volatile.Write(ref opened, run);
        TrainingState before = run.Trainer.State;
        if (ranks.Rank == 0)
        {
            foreach (string warning in run.Plan.Warnings)
            {
                Warn(warning);
            }

            Console.Error.WriteLine(before.Step == 0
                ? $"{folder}: {run.Plan.Model.ParameterCount:N0} parameters, {run.Plan.Steps:N0} steps of {run.Plan.TokensPerStep:N0} tokens, {Describe(run, ranks)}"
                : $"{folder}: goes on from step {before.Step:N0} of {run.Plan.Steps:N0}, {Describe(run, ranks)}");
            display?.Start(run.Plan, before.Tokens);
        }

        long start = Stopwatch.GetTimestamp();
        run.Trainer.Run(stop, lastStep);
        double seconds = Stopwatch.GetElapsedTime(start).TotalSeconds;
        display?.Dispose();
        if (ranks.Rank == 0)
        {
            if (run.Trainer.IsFinished && EndRecord.Find(folder)?.Step != run.Plan.Steps)
            {
                throw new UserErrorException($"{folder}: the last checkpoint is not on the disk; make room, and the same command goes on from the one before");
            }

            WriteResult(run, folder, before, seconds, display?.LastValidation, writer, json);
        }

        return run.Trainer.State.Step >= Math.Min(lastStep, run.Plan.Steps);
    }

    private static string Describe(TrainingRun run, Collective ranks) =>
        ranks.Size == 1 ? run.Backend.Description : $"{ranks.Size} ranks ({ranks.Description}), {run.Backend.Description}";

    private static void WriteResult(
        TrainingRun run, string folder, TrainingState before, double seconds, ValidationMetrics? validation, TextWriter writer, bool json)
    {
        TrainingState after = run.Trainer.State;
        double rate = (after.Tokens - before.Tokens) / Math.Max(seconds, 1e-9);
        if (json)
        {
            writer.WriteLine(new JsonObject
            {
                ["run"] = folder,
                ["finished"] = run.Trainer.IsFinished,
                ["step"] = after.Step,
                ["tokens"] = after.Tokens,
                ["seconds"] = seconds,
                ["tokens_per_second"] = rate,
                ["validation_loss"] = validation?.Loss,
                ["bits_per_byte"] = validation?.BitsPerByte,
            }.ToJsonString(JsonOutput.Options));
        }
        else if (run.Trainer.IsFinished)
        {
            writer.WriteLine(FormattableString.Invariant(
                $"{folder}: {after.Step:N0} steps, {after.Tokens:N0} tokens, {rate:N0} tokens/s; validation loss {validation?.Loss:0.0000}"));
        }
        else
        {
            writer.WriteLine($"{folder}: stopped after step {after.Step:N0} of {run.Plan.Steps:N0}; the same command goes on from there");
        }
    }

    private static void Warn(string message) => Console.Error.WriteLine($"warning: {message}");
}
