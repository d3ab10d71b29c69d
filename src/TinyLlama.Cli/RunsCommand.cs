using System.CommandLine;
using System.Globalization;
using System.Text.Json.Nodes;
using TinyLlama.Checkpoints;
using TinyLlama.Data;
using TinyLlama.Training;

namespace TinyLlama.Cli;

/// <summary><c>tinyllama runs</c>: what runs there are, how they went, and whether their checkpoints are sound.</summary>
internal static class RunsCommand
{
    private const string DefaultFolder = "runs";

    /// <summary>The verb.</summary>
    public static Command Create() => new("runs", "List runs, show their metrics, verify their checkpoints")
    {
        List(), Show(), Verify(),
    };

    private static Command List()
    {
        var folder = new Argument<string>("DIR")
        {
            Description = "The folder of the runs",
            DefaultValueFactory = _ => DefaultFolder,
        };
        Option<bool> json = CommonOptions.Json();
        var command = new Command("ls", "List the runs in a folder") { folder, json };
        command.SetAction(parse =>
        {
            string path = parse.GetRequiredValue(folder);
            RunSummary[] runs = [.. Runs(path).Select(run => Summarize(run, parse.InvocationConfiguration.Error))];
            TextWriter output = parse.InvocationConfiguration.Output;
            if (parse.GetValue(json))
            {
                output.WriteLine(new JsonArray([.. runs.Select(Describe)]).ToJsonString(JsonOutput.Options));
            }
            else if (runs.Length == 0)
            {
                output.WriteLine($"{path}: no runs");
            }
            else
            {
                WriteTable(output, runs);
            }

            return ExitCode.Success;
        });
        return command;
    }

    private static Command Show()
    {
        Argument<string> run = Run();
        var csv = new Option<bool>("--csv") { Description = "Write every step and validation as comma-separated values" };
        Option<bool> json = CommonOptions.Json();
        var command = new Command("show", "Show how a run went") { run, csv, json };
        command.SetAction(parse =>
        {
            string path = parse.GetRequiredValue(run);
            RequireRun(path);
            TextWriter output = parse.InvocationConfiguration.Output;
            if (parse.GetValue(csv))
            {
                WriteCsv(output, MetricsLog.Read(Path.Combine(path, MetricsLog.FileName)));
                return ExitCode.Success;
            }

            RunSummary summary = Summarize(path, parse.InvocationConfiguration.Error);
            if (parse.GetValue(json))
            {
                output.WriteLine(Describe(summary).ToJsonString(JsonOutput.Options));
            }
            else
            {
                WriteSummary(output, summary);
            }

            return ExitCode.Success;
        });
        return command;
    }

    private static Command Verify()
    {
        Argument<string> run = Run();
        Option<bool> json = CommonOptions.Json();
        var command = new Command("verify", "Compare every checkpoint of a run with its hashes; 1 is the exit code if one is damaged") { run, json };
        command.SetAction(parse =>
        {
            string path = parse.GetRequiredValue(run);
            RequireRun(path);
            TextWriter output = parse.InvocationConfiguration.Output;
            var results = new JsonArray();
            bool sound = true;
            foreach ((long step, string checkpoint) in TrainingCheckpoint.List(path))
            {
                IReadOnlyList<string> faults = TrainingCheckpoint.Verify(checkpoint);
                sound &= faults.Count == 0;
                results.Add((JsonNode)new JsonObject
                {
                    ["step"] = step,
                    ["path"] = checkpoint,
                    ["faults"] = new JsonArray([.. faults.Select(static fault => (JsonNode)fault)]),
                });
                if (!parse.GetValue(json))
                {
                    output.WriteLine(faults.Count == 0 ? $"step {step:N0}: sound" : string.Join('\n', faults.Select(fault => $"step {step:N0}: {fault}")));
                }
            }

            if (parse.GetValue(json))
            {
                output.WriteLine(results.ToJsonString(JsonOutput.Options));
            }
            else if (results.Count == 0)
            {
                output.WriteLine($"{path}: no checkpoints");
            }

            return sound ? ExitCode.Success : ExitCode.Failure;
        });
        return command;
    }

    private static Argument<string> Run() => new("RUN") { Description = "The run's folder" };

    private static bool IsRun(string path) =>
        Directory.Exists(Path.Combine(path, TrainingCheckpoint.FolderName)) || File.Exists(Path.Combine(path, MetricsLog.FileName));

    private static void RequireRun(string path)
    {
        if (!IsRun(path))
        {
            throw new UserErrorException(
                $"{path}: not a run, it has neither {TrainingCheckpoint.FolderName} nor {MetricsLog.FileName}; 'tinyllama runs ls' lists runs");
        }
    }

    private static IEnumerable<string> Runs(string folder)
    {
        if (!Directory.Exists(folder))
        {
            return folder == DefaultFolder ? [] : throw new UserErrorException($"{folder}: not found; name the folder that holds the runs");
        }

        return IsRun(folder) ? [folder] : Directory.EnumerateDirectories(folder).Where(IsRun).Order(StringComparer.Ordinal);
    }

    private static RunSummary Summarize(string path, TextWriter error)
    {
        IReadOnlyList<Metrics> metrics = [];
        string log = Path.Combine(path, MetricsLog.FileName);
        try
        {
            metrics = File.Exists(log) ? MetricsLog.Read(log) : [];
        }
        catch (UserErrorException e)
        {
            error.WriteLine($"warning: {e.Message}");
        }

        string checkpoints = Path.Combine(path, TrainingCheckpoint.FolderName);
        var files = new List<FileInfo>();
        if (Directory.Exists(checkpoints))
        {
            files.AddRange(new DirectoryInfo(checkpoints).EnumerateFiles("*", SearchOption.AllDirectories));
        }

        IReadOnlyList<(long Step, string Path)> saved = TrainingCheckpoint.List(path);
        DateTime changed = files.Select(static file => file.LastWriteTimeUtc)
            .Append(File.Exists(log) ? File.GetLastWriteTimeUtc(log) : default)
            .Max();
        return new RunSummary(path, metrics, [.. saved.Select(static checkpoint => checkpoint.Step)], files.Sum(static file => file.Length), changed);
    }

    private static JsonObject Describe(RunSummary run) => new()
    {
        ["name"] = run.Name,
        ["path"] = run.Path,
        ["step"] = run.Step,
        ["tokens"] = run.LastStep?.Tokens,
        ["loss"] = Finite(run.LastStep?.Loss),
        ["validation_loss"] = Finite(run.LastValidation?.Loss),
        ["best_validation_loss"] = Finite(run.BestValidation?.Loss),
        ["best_validation_step"] = run.BestValidation?.Step,
        ["checkpoints"] = new JsonArray([.. run.Checkpoints.Select(static step => (JsonNode)step)]),
        ["checkpoint_bytes"] = run.CheckpointBytes,
        ["changed"] = run.Changed.ToString("yyyy-MM-ddTHH:mm:ssZ", CultureInfo.InvariantCulture),
    };

    // JSON has no NaN.
    private static double? Finite(double? value) => value is { } number && double.IsFinite(number) ? number : null;

    private static void WriteTable(TextWriter output, RunSummary[] runs)
    {
        int width = Math.Max(4, runs.Max(static run => run.Name.Length));
        output.WriteLine($"{"name".PadRight(width)} {"step",9} {"tokens",15} {"loss",8} {"val loss",8} {"size",10}  changed (UTC)");
        foreach (RunSummary run in runs)
        {
            output.WriteLine(string.Create(
                CultureInfo.InvariantCulture,
                $"{run.Name.PadRight(width)} {run.Step,9:N0} {run.LastStep?.Tokens,15:N0} {run.LastStep?.Loss,8:0.0000} {run.LastValidation?.Loss,8:0.0000} {Size(run.CheckpointBytes),10}  {run.Changed:yyyy-MM-dd HH:mm}"));
        }
    }

    private static void WriteSummary(TextWriter output, RunSummary run)
    {
        var rows = new List<(string Name, string Value)> { ("run", run.Path), ("step", $"{run.Step:N0}") };
        if (run.LastStep is { } step)
        {
            rows.Add(("tokens", $"{step.Tokens:N0}"));
            rows.Add(("loss", $"{step.Loss:0.0000}"));
            rows.Add(("learning rate", $"{step.LearningRate:0.###e+00}"));
            rows.Add(("tokens/s", $"{step.TokensPerSecond:N0}"));
        }

        if (run.LastValidation is { } last && run.BestValidation is { } best)
        {
            string bits = last.BitsPerByte is { } value ? $", {value:0.0000} bits per byte" : "";
            rows.Add(("validation loss", $"{last.Loss:0.0000}, perplexity {last.Perplexity:0.00}{bits} (step {last.Step:N0})"));
            rows.Add(("best validation", $"{best.Loss:0.0000} (step {best.Step:N0})"));
        }

        rows.Add(("checkpoints", run.Checkpoints.Count == 0 ? "none" : string.Join(", ", run.Checkpoints.Select(static s => $"{s:N0}"))));
        rows.Add(("size", Size(run.CheckpointBytes)));
        rows.Add(("changed (UTC)", run.Changed.ToString("yyyy-MM-dd HH:mm", CultureInfo.InvariantCulture)));
        int width = rows.Max(static row => row.Name.Length);
        foreach ((string name, string value) in rows)
        {
            output.WriteLine($"{name.PadRight(width)}  {value}");
        }
    }

    private static void WriteCsv(TextWriter output, IReadOnlyList<Metrics> metrics)
    {
        output.WriteLine(
            "step,tokens,loss,gradient_norm,learning_rate,tokens_per_second,mfu,validation_loss,validation_perplexity,validation_bits_per_byte");
        foreach (Metrics record in metrics)
        {
            switch (record)
            {
                case StepMetrics s:
                    output.WriteLine(string.Create(
                        CultureInfo.InvariantCulture,
                        $"{s.Step},{s.Tokens},{s.Loss:R},{s.GradientNorm:R},{s.LearningRate:R},{s.TokensPerSecond:R},{s.Mfu:R},,,"));
                    break;
                case ValidationMetrics v:
                    output.WriteLine(string.Create(
                        CultureInfo.InvariantCulture, $"{v.Step},{v.Tokens},,,,,,{v.Loss:R},{v.Perplexity:R},{v.BitsPerByte:R}"));
                    break;
                default:
                    break;
            }
        }
    }

    private static string Size(long bytes) => bytes switch
    {
        >= 1_000_000_000 => $"{bytes / 1e9:0.00} GB",
        >= 1_000_000 => $"{bytes / 1e6:0.0} MB",
        _ => $"{bytes / 1e3:0.0} KB",
    };

    /// <summary>What the table and the summary tell of a run.</summary>
    private sealed record RunSummary(
        string Path, IReadOnlyList<Metrics> Metrics, IReadOnlyList<long> Checkpoints, long CheckpointBytes, DateTime Changed)
    {
        public string Name { get; } = System.IO.Path.GetFileName(System.IO.Path.TrimEndingDirectorySeparator(System.IO.Path.GetFullPath(Path)));

        public StepMetrics? LastStep { get; } = Metrics.OfType<StepMetrics>().LastOrDefault();

        public ValidationMetrics? LastValidation { get; } = Metrics.OfType<ValidationMetrics>().LastOrDefault();

        public ValidationMetrics? BestValidation { get; } =
            Metrics.OfType<ValidationMetrics>().Where(static record => double.IsFinite(record.Loss)).MinBy(static record => record.Loss);

        /// <summary>Gets the steps done: those of the log, which begins to count at 0, or of the newest checkpoint.</summary>
        public long Step => Math.Max(LastStep is null ? 0 : LastStep.Step + 1, Checkpoints.Count == 0 ? 0 : Checkpoints[^1]);
    }
}
