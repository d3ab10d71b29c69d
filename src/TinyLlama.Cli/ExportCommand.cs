using System.CommandLine;
using System.Text.Json.Nodes;
using TinyLlama.Checkpoints;
using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Cli;

/// <summary><c>tinyllama export</c>: a model as a Hugging Face folder.</summary>
internal static class ExportCommand
{
    /// <summary>What a model may be named by.</summary>
    public const string ModelHelp = "A run, a checkpoint, a Hugging Face folder, a .gguf file, or a .bin file of llama2.c";

    /// <summary>The verb.</summary>
    public static Command Create()
    {
        var model = new Argument<string>("MODEL") { Description = ModelHelp };
        var to = new Option<string>("--out") { Description = "The folder to write", HelpName = "PATH", Required = true };
        Option<string?> type = Type();
        Option<string?> tokenizer = TokenizerPath();
        var force = new Option<bool>("--force") { Description = "Replace files in a folder that is not empty" };
        Option<bool> json = CommonOptions.Json();
        var command = new Command("export", "Write a model as a Hugging Face folder") { model, to, type, tokenizer, force, json };
        command.SetAction(parse =>
        {
            using ModelSource source = ModelSource.Open(parse.GetRequiredValue(model), Warn);
            DType stored = StoredType(parse.GetValue(type), source);
            string? tokenizerPath = parse.GetValue(tokenizer) ?? source.TokenizerPath;
            string folder = parse.GetRequiredValue(to);
            ModelExport.RequirePlace(folder, parse.GetValue(force));
            IReadOnlyList<ListedFile> files;
            using (ProgressDisplay progress = ProgressDisplay.Start("export", source.Tensors.Sum(static tensor => tensor.Count), "elements"))
            {
                files = ModelExport.Write(
                    folder, source, stored, LoadTokenizer(tokenizerPath, source), Originals(tokenizerPath), parse.GetValue(force),
                    done => progress.Report(done));
            }

            Report(parse, parse.GetValue(json), folder, stored, files);
            return ExitCode.Success;
        });
        return command;
    }

    /// <summary><c>--dtype</c>.</summary>
    public static Option<string?> Type()
    {
        var option = new Option<string?>("--dtype") { Description = "What the weights are stored in [default: as in MODEL]" };
        return option.AcceptOnlyFromAmong("f32", "bf16", "f16");
    }

    /// <summary><c>--tokenizer PATH</c>.</summary>
    public static Option<string?> TokenizerPath() => new("--tokenizer")
    {
        Description = "tokenizer.model, tokenizer.json, a folder with one, or a tokenizer.bin of llama2.c [default: that of MODEL]",
        HelpName = "PATH",
    };

    /// <summary>The type that was asked for.</summary>
    public static DType StoredType(string? name, ModelSource source) => name switch
    {
        "f32" => DType.F32,
        "bf16" => DType.BF16,
        "f16" => DType.F16,
        _ => source.StoredType,
    };

    /// <summary>The tokenizer of a model; it must fit.</summary>
    public static BpeTokenizer? LoadTokenizer(string? path, ModelSource source)
    {
        BpeTokenizer? tokenizer = path is null ? source.LoadTokenizer() : Tokenizer.Load(path);
        if (tokenizer is null)
        {
            Warn($"{source.Path}: no tokenizer came with the model; name one with --tokenizer, or the result is without");
            return null;
        }

        return tokenizer.VocabularySize <= source.Config.VocabularySize
            ? tokenizer
            : throw new UserErrorException(
                $"{path ?? source.Path}: {tokenizer.VocabularySize} ids, the model has {source.Config.VocabularySize}: not its tokenizer");
    }

    /// <summary>The folder whose tokenizer files are copied; those of llama2.c are no others'.</summary>
    public static string? Originals(string? tokenizerPath) => Directory.Exists(tokenizerPath) ? tokenizerPath : null;

    /// <summary>Writes what has been written.</summary>
    public static void Report(ParseResult parse, bool json, string folder, DType type, IReadOnlyList<ListedFile> files)
    {
        TextWriter output = parse.InvocationConfiguration.Output;
        long bytes = files.Sum(static file => file.ByteCount);
        if (json)
        {
            var result = new JsonObject
            {
                ["path"] = folder,
                ["dtype"] = type.ToString(),
                ["bytes"] = bytes,
                ["files"] = new JsonArray([.. files.Select(static file => (JsonNode)file.Name)]),
            };
            output.WriteLine(result.ToJsonString(JsonOutput.Options));
        }
        else
        {
            output.WriteLine($"{folder}: {files.Count} files, {bytes:N0} bytes, weights in {type}");
        }
    }

    /// <summary>Writes a warning.</summary>
    public static void Warn(string message) => Console.Error.WriteLine($"warning: {message}");
}
