using System.CommandLine;
using System.Globalization;
using System.Text.Json.Nodes;
using TinyLlama.Checkpoints;
using TinyLlama.Compute;
using TinyLlama.Compute.Native;
using TinyLlama.Data;
using TinyLlama.Evaluation;
using TinyLlama.Inference;

namespace TinyLlama.Cli;

/// <summary><c>tinyllama quantize MODEL --type T --out FILE</c>: a smaller model, and what that costs.</summary>
internal sealed class QuantizeCommand
{
    private const int SpeedTokens = 64;

    private readonly Argument<string> _model = new("MODEL") { Description = ExportCommand.ModelHelp };

    private readonly Option<string> _type = CommonOptions.OneOf(
        new Option<string>("--type") { Description = "What the weights are stored in", Required = true }, [.. GgufMix.All.Select(static mix => mix.Name)]);

    private readonly Option<string> _out = new("--out") { Description = "The .gguf file to write", HelpName = "FILE", Required = true };

    private readonly Option<string?> _text = new("--text")
    {
        Description = "A UTF-8 text whose perplexity is compared [default: perplexity is not measured]",
        HelpName = "FILE",
    };

    private readonly Option<double?> _maximumIncrease = CommonOptions.AtLeast(
        new Option<double?>("--max-perplexity-increase")
        {
            Description = "Write nothing if perplexity grows by more than P percent; needs --text",
            HelpName = "P",
        },
        0);

    private readonly Option<bool> _force = new("--force") { Description = "Replace a file that is there" };
    private readonly Option<Device?> _device = CommonOptions.Device();
    private readonly Option<int?> _threads = CommonOptions.Threads();
    private readonly Option<bool> _json = CommonOptions.Json();

    /// <summary>The verb.</summary>
    public static Command Create() => new QuantizeCommand().Build();

    private Command Build()
    {
        var command = new Command("quantize", "Write a model as a smaller GGUF file, and compare size, perplexity and speed")
        {
            _model, _type, _out, _text, _maximumIncrease, _force, _device, _threads, _json,
        };
        command.SetAction((parse, stop) => Task.FromResult(Run(parse, stop)));
        return command;
    }

    private int Run(ParseResult parse, CancellationToken stop)
    {
        string path = parse.GetRequiredValue(_out);
        if (parse.GetValue(_maximumIncrease) is not null && parse.GetValue(_text) is null)
        {
            throw new UserErrorException("--max-perplexity-increase needs a text to measure perplexity of: name one with --text");
        }

        GgufExport.RequirePlace(path, parse.GetValue(_force));
        string? text = parse.GetValue(_text) is { } file ? EvalCommand.ReadText(file) : null;
        Measured before = Measure(parse, parse.GetRequiredValue(_model), text, stop);

        // Its type is told by its ending, also while it is unfinished.
        string unfinished = $"{path}.{Path.GetRandomFileName()}.gguf";
        try
        {
            Write(unfinished, parse, stop);
            Measured after = Measure(parse, unfinished, text, stop);
            RequireQuality(parse, before, after);
            File.Move(unfinished, path, overwrite: parse.GetValue(_force));
            DirectoryFlush.Flush(Path.GetDirectoryName(Path.GetFullPath(path))!);
            Report(parse, path, before, after);
            return ExitCode.Success;
        }
        finally
        {
            File.Delete(unfinished);
        }
    }

    private void Write(string path, ParseResult parse, CancellationToken stop)
    {
        using ModelSource source = ModelSource.Open(parse.GetRequiredValue(_model), ExportCommand.Warn);
        using ProgressDisplay progress = ExportCommand.Progress(source);
        GgufExported exported = GgufExport.Write(
            path, source, GgufMix.Find(parse.GetRequiredValue(_type)), ExportCommand.LoadTokenizer(null, source), force: false, ExportCommand.ReportUntil(progress, stop));
        foreach (string note in exported.Notes)
        {
            ExportCommand.Warn(note);
        }
    }

    private Measured Measure(ParseResult parse, string path, string? text, CancellationToken stop)
    {
        long bytes;
        using (ModelSource source = ModelSource.Open(path, ExportCommand.Warn))
        {
            bytes = source.WeightBytes;
        }

        using LanguageModel model = LanguageModel.Load(path, parse.GetValue(_threads) ?? 0, device: parse.GetValue(_device) ?? default);
        double? perplexity = null;
        if (text is not null)
        {
            EvaluationTokens tokens = EvaluationTokens.FromText(text, model.Tokenizer, parse.GetValue(_text)!, model.AddsBos, long.MaxValue);
            perplexity = EvalCommand.Measure(path, model, tokens, maskedDocuments: false, model.Model.Config.ContextLength, stop).Perplexity;
        }

        return new Measured(bytes, 8.0 * bytes / model.Model.Config.ParameterCount, perplexity, DecodeRate(model, stop));
    }

    // Tokens a second of one text that does not end early.
    private static double DecodeRate(LanguageModel model, CancellationToken stop)
    {
        int?[] ends = [model.Tokenizer.Bos, model.Tokenizer.Eos];
        var options = new GenerationOptions
        {
            Temperature = 0,
            MaxTokens = Math.Min(SpeedTokens, model.Model.Config.ContextLength / 2),
            LogitBias = ends.OfType<int>().Distinct().ToDictionary(static id => id, static _ => double.NegativeInfinity),
        };

        // The first time, weights are turned to what kernels read, and the JIT is waited for.
        _ = model.Generate("The", options, stop).ToString();
        Generation generation = model.Generate("The", options, stop);
        _ = generation.ToString();
        return generation.Decode.Tokens / generation.Decode.Time.TotalSeconds;
    }

    private void RequireQuality(ParseResult parse, Measured before, Measured after)
    {
        if (parse.GetValue(_maximumIncrease) is { } most && Increase(before, after) is { } increase && increase > most)
        {
            throw new UserErrorException(string.Create(
                CultureInfo.InvariantCulture,
                $"{parse.GetRequiredValue(_type)} raises perplexity from {before.Perplexity:0.000} to {after.Perplexity:0.000}, by {increase:0.00} %, "
                + $"more than --max-perplexity-increase {most}; nothing is written: take a larger type"));
        }
    }

    private void Report(ParseResult parse, string path, Measured before, Measured after)
    {
        TextWriter output = parse.InvocationConfiguration.Output;
        double? increase = Increase(before, after);
        if (parse.GetValue(_json))
        {
            var report = new JsonObject
            {
                ["path"] = path,
                ["dtype"] = parse.GetRequiredValue(_type),
                ["bytes"] = new FileInfo(path).Length,
                ["before"] = before.ToJson(),
                ["after"] = after.ToJson(),
                ["perplexity_increase_percent"] = increase,
            };
            output.WriteLine(report.ToJsonString(JsonOutput.Options));
            return;
        }

        string perplexity = increase is null
            ? "perplexity        not measured: name a text with --text"
            : string.Create(CultureInfo.InvariantCulture, $"perplexity        {before.Perplexity,15:0.000} {after.Perplexity,15:0.000}  {increase:+0.00;-0.00} %");
        output.WriteLine(string.Create(
            CultureInfo.InvariantCulture,
            $"""
            {path}: {new FileInfo(path).Length:N0} bytes, {parse.GetRequiredValue(_type)}
                                       before           after
            bytes of weights  {before.WeightBytes,15:N0} {after.WeightBytes,15:N0}
            bits per weight   {before.BitsPerWeight,15:0.00} {after.BitsPerWeight,15:0.00}
            {perplexity}
            decode tokens/s   {before.TokensPerSecond,15:0.0} {after.TokensPerSecond,15:0.0}
            """));
    }

    private static double? Increase(Measured before, Measured after) => 100 * ((after.Perplexity / before.Perplexity) - 1);

    /// <summary>What a model weighs, knows and does.</summary>
    private sealed record Measured(long WeightBytes, double BitsPerWeight, double? Perplexity, double TokensPerSecond)
    {
        public JsonObject ToJson() => new()
        {
            ["weight_bytes"] = WeightBytes,
            ["bits_per_weight"] = BitsPerWeight,
            ["perplexity"] = Perplexity,
            ["decode_tokens_per_second"] = TokensPerSecond,
        };
    }
}
