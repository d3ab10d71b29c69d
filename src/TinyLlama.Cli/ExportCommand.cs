using System.CommandLine;
using System.Globalization;
using System.Text.Json.Nodes;
using TinyLlama.Checkpoints;
using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Cli;

/// <summary><c>tinyllama export</c>: a model as a Hugging Face folder, a GGUF file, or files of llama2.c.</summary>
internal static class ExportCommand
{
    /// <summary>What a model may be named by.</summary>
    public const string ModelHelp = "A run, a checkpoint, a Hugging Face folder, a .gguf file, or a .bin file of llama2.c";

    private const string FolderFormat = "hf";
    private const string FileFormat = "gguf";
    private const string Llama2CFormat = "llama2c";

    private static readonly string[] s_folderTypes = ["f32", "bf16", "f16"];

    /// <summary>The verb.</summary>
    public static Command Create()
    {
        var model = new Argument<string>("MODEL") { Description = ModelHelp };
        var to = new Option<string>("--out") { Description = "The folder, or the .gguf or .bin file, to write", HelpName = "PATH", Required = true };
        Option<string?> format = new Option<string?>("--format")
        {
            Description = "A Hugging Face folder, a GGUF file, or model.bin and tokenizer.bin of llama2.c [default: by the ending of PATH: .gguf, .bin, else hf]",
        }.AcceptOnlyFromAmong(FolderFormat, FileFormat, Llama2CFormat);
        Option<string> type = Type([.. GgufMix.All.Select(static mix => mix.Name)]);
        Option<string?> tokenizer = TokenizerPath();
        var force = new Option<bool>("--force") { Description = "Replace files that are there" };
        Option<bool> json = CommonOptions.Json();
        var command = new Command("export", "Write a model as a Hugging Face folder, a GGUF file, or files of llama2.c")
        {
            model, to, format, type, tokenizer, force, json,
        };
        command.SetAction((parse, stop) =>
        {
            using ModelSource source = ModelSource.Open(parse.GetRequiredValue(model), Warn);
            var request = new Request(
                parse.GetRequiredValue(to), parse.GetValue(type), parse.GetValue(tokenizer), parse.GetValue(force), parse.GetValue(json), stop);
            switch (parse.GetValue(format) ?? FormatOf(request.Path))
            {
                case FileFormat:
                    WriteFile(parse.InvocationConfiguration.Output, source, request);
                    break;
                case Llama2CFormat:
                    WriteLlama2C(parse, source, request);
                    break;
                default:
                    WriteFolder(parse, source, request);
                    break;
            }

            return Task.FromResult(ExitCode.Success);
        });
        return command;
    }

    /// <summary><c>--type</c>, also <c>--dtype</c>.</summary>
    /// <param name="names">The types; by default those that a Hugging Face folder holds.</param>
    public static Option<string> Type(params string[] names)
    {
        var option = new Option<string>("--type", "--dtype") { Description = "What the weights are stored in [default: as in MODEL]" };
        return CommonOptions.OneOf(option, names.Length > 0 ? names : s_folderTypes);
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

    /// <summary>Shows how much of a model is written.</summary>
    public static ProgressDisplay Progress(ModelSource source) =>
        ProgressDisplay.Start("export", source.Tensors.Sum(static tensor => tensor.Count), "elements");

    /// <summary>Tells a display how much is written, until that is to end: what was begun is removed then.</summary>
    public static Action<long> ReportUntil(ProgressDisplay progress, CancellationToken stop) => done =>
    {
        stop.ThrowIfCancellationRequested();
        progress.Report(done);
    };

    private static string FormatOf(string path) => Path.GetExtension(path).ToLowerInvariant() switch
    {
        ".gguf" => FileFormat,
        ".bin" => Llama2CFormat,
        ".safetensors" => throw new UserErrorException($"{path}: safetensors are written into a Hugging Face folder; name a folder"),
        _ => FolderFormat,
    };

    private static void WriteFolder(ParseResult parse, ModelSource source, Request request)
    {
        if (request.Type is { } name && !s_folderTypes.Contains(name, StringComparer.Ordinal))
        {
            throw new UserErrorException($"--type {name}: a Hugging Face folder holds {string.Join(", ", s_folderTypes)}; quantized types need --format gguf");
        }

        DType type = StoredType(request.Type, source);
        ModelExport.RequirePlace(request.Path, request.Force);
        string? tokenizerPath = request.Tokenizer ?? source.TokenizerPath;
        IReadOnlyList<ListedFile> files;
        using (ProgressDisplay progress = Progress(source))
        {
            files = ModelExport.Write(
                request.Path, source, type, LoadTokenizer(tokenizerPath, source), Originals(tokenizerPath), request.Force, ReportUntil(progress, request.Stop));
        }

        Report(parse, request.Json, request.Path, type, files);
    }

    private static void WriteFile(TextWriter output, ModelSource source, Request request)
    {
        GgufMix mix = GgufMix.Find(request.Type ?? source.StoredType.ToString().ToLowerInvariant());
        GgufExport.RequirePlace(request.Path, request.Force);
        BpeTokenizer? tokenizer = LoadTokenizer(request.Tokenizer ?? source.TokenizerPath, source);
        GgufExported exported;
        using (ProgressDisplay progress = Progress(source))
        {
            exported = GgufExport.Write(request.Path, source, mix, tokenizer, request.Force, ReportUntil(progress, request.Stop));
        }

        foreach (string note in exported.Notes)
        {
            Warn(note);
        }

        if (request.Json)
        {
            var result = new JsonObject
            {
                ["path"] = request.Path,
                ["dtype"] = mix.Name,
                ["bytes"] = exported.ByteCount,
                ["bits_per_weight"] = exported.BitsPerWeight,
            };
            output.WriteLine(result.ToJsonString(JsonOutput.Options));
        }
        else
        {
            output.WriteLine(string.Create(
                CultureInfo.InvariantCulture, $"{request.Path}: {exported.ByteCount:N0} bytes, {mix.Name}, {exported.BitsPerWeight:0.00} bits per weight"));
        }
    }

    private static void WriteLlama2C(ParseResult parse, ModelSource source, Request request)
    {
        if (request.Type is not (null or "f32"))
        {
            throw new UserErrorException($"--type {request.Type}: llama2.c's files hold f32; other types need --format gguf");
        }

        string path = FormatOf(request.Path) == Llama2CFormat ? request.Path : Path.Combine(request.Path, Llama2CExport.ModelName);
        Llama2CExport.RequirePlace(path, request.Force);
        BpeTokenizer? tokenizer = LoadTokenizer(request.Tokenizer ?? source.TokenizerPath, source);
        IReadOnlyList<ListedFile> files;
        using (ProgressDisplay progress = Progress(source))
        {
            files = Llama2CExport.Write(path, source, tokenizer, request.Force, ReportUntil(progress, request.Stop));
        }

        Report(parse, request.Json, path, DType.F32, files);
    }

    private sealed record Request(string Path, string? Type, string? Tokenizer, bool Force, bool Json, CancellationToken Stop);
}
