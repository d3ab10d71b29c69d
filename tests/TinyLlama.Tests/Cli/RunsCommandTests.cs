using System.CommandLine;
using System.Text.Json.Nodes;
using TinyLlama.Checkpoints;
using TinyLlama.Cli;
using TinyLlama.Data;
using TinyLlama.Tests.Checkpoints;
using TinyLlama.Training;

namespace TinyLlama.Tests.Cli;

public sealed class RunsCommandTests : IDisposable
{
    private readonly TemporaryFolder _folder = new();

    public RunsCommandTests()
    {
        string run = Directory.CreateDirectory(_folder["first"]).FullName;
        using (MetricsLog log = MetricsLog.Open(Path.Combine(run, MetricsLog.FileName), 0))
        {
            log.Append(new ValidationMetrics(0, 0, 9.5, 13359.7, 2.5));
            log.Append(new StepMetrics(0, 1000, 9.25, 1.5, 1e-4, 500, 0.25));
            log.Append(new ValidationMetrics(1, 1000, 8.5, 4914.8, null));
            log.Append(new StepMetrics(1, 2000, 8.75, 1.25, 2e-4, 510, null));
            log.Append(new ValidationMetrics(2, 2000, 8.625, 5569, null));
        }

        foreach (long step in new[] { 1, 2 })
        {
            TrainingCheckpoint.Save(run, step, static writer => writer.WriteText("state.json", "{}"));
        }

        TrainingCheckpoint.Save(_folder["second"], 7, static writer => writer.WriteText("state.json", "{}"));
        Directory.CreateDirectory(_folder["no-run"]);
    }

    public void Dispose() => _folder.Dispose();

    [Fact]
    public void Runs_are_listed_with_their_last_numbers()
    {
        (int code, string text) = Run("ls", _folder.Path);
        Assert.Equal(0, code);
        string[] lines = text.Split('\n', StringSplitOptions.RemoveEmptyEntries);
        Assert.Equal(3, lines.Length);
        Assert.Matches(@"^first\s+2\s+2,000\s+8\.7500\s+8\.6250\s+\d", lines[1]);
        Assert.Matches(@"^second\s+7\s", lines[2]);
    }

    [Fact]
    public void The_list_as_JSON_has_the_same_numbers()
    {
        JsonArray runs = JsonNode.Parse(Run("ls", _folder.Path, "--json").Text)!.AsArray();
        Assert.Equal(2, runs.Count);
        Assert.Equal("first", runs[0]!["name"]!.GetValue<string>());
        Assert.Equal(8.5, runs[0]!["best_validation_loss"]!.GetValue<double>());
        Assert.Equal([1, 2], runs[0]!["checkpoints"]!.AsArray().Select(static step => step!.GetValue<int>()));
        Assert.Null(runs[1]!["loss"]);
    }

    [Fact]
    public void A_folder_without_runs_says_so_and_a_missing_one_is_an_error()
    {
        Assert.Contains("no runs", Run("ls", _folder["no-run"]).Text, StringComparison.Ordinal);
        Assert.Throws<UserErrorException>(() => Run("ls", _folder["missing"]));
        Assert.Throws<UserErrorException>(() => Run("show", _folder["no-run"]));
        Assert.Throws<UserErrorException>(() => Run("verify", _folder["no-run"]));
    }

    [Fact]
    public void A_run_is_shown_and_its_metrics_are_written_as_values()
    {
        Assert.Contains("8.5000 (step 1)", Run("show", _folder["first"]).Text, StringComparison.Ordinal);
        string[] lines = Run("show", _folder["first"], "--csv").Text.Split('\n', StringSplitOptions.RemoveEmptyEntries);
        Assert.Equal(6, lines.Length);
        Assert.All(lines, static line => Assert.Equal(9, line.Count(static c => c == ',')));
        Assert.Equal("0,1000,9.25,1.5,0.0001,500,0.25,,,", lines[2]);
        Assert.Equal("1,1000,,,,,,8.5,4914.8,", lines[3]);
    }

    [Fact]
    public void Sound_checkpoints_verify_and_a_damaged_one_gives_the_exit_code_1()
    {
        Assert.Equal((0, "step 1: sound\nstep 2: sound\n"), Run("verify", _folder["first"]));
        File.WriteAllText(Path.Combine(_folder["first"], "checkpoints", "step-00000002", "state.json"), "[]");
        (int code, string text) = Run("verify", _folder["first"]);
        Assert.Equal(1, code);
        Assert.Contains("step 2: ", text, StringComparison.Ordinal);
        Assert.Contains("damaged", text, StringComparison.Ordinal);
        JsonArray results = JsonNode.Parse(Run("verify", _folder["first"], "--json").Text)!.AsArray();
        Assert.Empty(results[0]!["faults"]!.AsArray());
        Assert.Single(results[1]!["faults"]!.AsArray());
    }

    private static (int Code, string Text) Run(params string[] arguments)
    {
        var output = new StringWriter { NewLine = "\n" };
        var configuration = new InvocationConfiguration { EnableDefaultExceptionHandler = false, Output = output, Error = TextWriter.Null };
        return (RunsCommand.Create().Parse(arguments).Invoke(configuration), output.ToString());
    }
}
