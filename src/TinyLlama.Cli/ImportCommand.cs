using System.CommandLine;
using TinyLlama.Checkpoints;
using TinyLlama.Compute;
using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Cli;

/// <summary><c>tinyllama import</c>: a model of another program as a run with one checkpoint, of step 0 and without optimizer.</summary>
internal static class ImportCommand
{
    /// <summary>The verb.</summary>
    public static Command Create()
    {
        var model = new Argument<string>("MODEL") { Description = ExportCommand.ModelHelp };
        var to = new Option<string>("--out") { Description = "The run to make", HelpName = "PATH", Required = true };
        Option<string> type = ExportCommand.Type();
        Option<string?> tokenizer = ExportCommand.TokenizerPath();
        Option<bool> json = CommonOptions.Json();
        var command = new Command("import", "Take over a model of another program as a run") { model, to, type, tokenizer, json };
        command.SetAction((parse, stop) =>
        {
            using ModelSource source = ModelSource.Open(parse.GetRequiredValue(model), ExportCommand.Warn);
            DType stored = ExportCommand.StoredType(parse.GetValue(type), source);
            string? tokenizerPath = parse.GetValue(tokenizer) ?? source.TokenizerPath;
            string run = parse.GetRequiredValue(to);
            ModelExport.RequirePlace(run, force: null);
            BpeTokenizer? loaded = ExportCommand.LoadTokenizer(tokenizerPath, source);
            TrainingCheckpoint checkpoint;
            using (ProgressDisplay progress = ProgressDisplay.Start("import", source.Tensors.Sum(static tensor => tensor.Count), "elements"))
            {
                checkpoint = TrainingCheckpoint.Save(run, 0, writer => writer.WriteModel(
                    source, stored, loaded, ExportCommand.Originals(tokenizerPath), ExportCommand.ReportUntil(progress, stop)));
            }

            ExportCommand.Report(parse, parse.GetValue(json), checkpoint.Path, stored, checkpoint.Files);
            return Task.FromResult(ExitCode.Success);
        });
        return command;
    }
}
