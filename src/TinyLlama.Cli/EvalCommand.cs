using System.CommandLine;
using System.Globalization;
using System.Text;
using System.Text.Json.Nodes;
using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Data.Shards;
using TinyLlama.Evaluation;
using TinyLlama.Inference;
using TinyLlama.Model;
using TinyLlama.Training;

namespace TinyLlama.Cli;

/// <summary><c>tinyllama eval RUN --tasks perplexity</c>: how well a model predicts a text.</summary>
internal sealed class EvalCommand
{
    private const int TokensPerForward = 2048;

    private readonly Argument<string> _run = CommonOptions.Model();

    private readonly Option<string[]> _tasks = new Option<string[]>("--tasks")
    {
        Description = "What to measure",
        HelpName = "perplexity",
        DefaultValueFactory = _ => ["perplexity"],
    }.AcceptOnlyFromAmong("perplexity");

    private readonly Option<string?> _data = new("--data")
    {
        Description = "A folder of token shards, whose validation split is scored [default: the run's own]",
        HelpName = "DIR",
    };

    private readonly Option<string?> _text = new("--text")
    {
        Description = "A text file, which is scored as one document",
        HelpName = "FILE",
    };

    private readonly Option<int?> _maxTokens = CommonOptions.MaxTokens("Score the first N tokens only");
    private readonly Option<int?> _context = CommonOptions.Context();
    private readonly Option<Device?> _device = CommonOptions.Device();
    private readonly Option<int?> _threads = CommonOptions.Threads();
    private readonly Option<bool> _json = CommonOptions.Json();

    /// <summary>The verb.</summary>
    public static Command Create() => new EvalCommand().Build();

    private Command Build()
    {
        var command = new Command("eval", "Measure a trained model: loss, perplexity and bits per byte of a text")
        {
            _run, _tasks, _data, _text, _maxTokens, _context, _device, _threads, _json,
        };
        command.SetAction((parse, stop) => Task.FromResult(Run(parse, stop)));
        return command;
    }

    private int Run(ParseResult parse, CancellationToken stop)
    {
        (TextWriter output, TextWriter error) = (parse.InvocationConfiguration.Output, parse.InvocationConfiguration.Error);
        string run = parse.GetRequiredValue(_run);
        Recipe? recipe = RecipeOf(run);
        string? data = parse.GetValue(_text) is null ? parse.GetValue(_data) ?? recipe?.Data.Path : parse.GetValue(_data);
        if ((data is null) == (parse.GetValue(_text) is null))
        {
            throw new UserErrorException("name one thing to score: --data DIR (the validation split of token shards) or --text FILE");
        }

        using LanguageModel model = LanguageModel.Load(
            run, parse.GetValue(_threads) ?? 0, warn: line => error.WriteLine("warning: " + line), device: parse.GetValue(_device) ?? default);
        EvaluationTokens tokens = ReadTokens(parse, data, model);
        int context = parse.GetValue(_context) ?? model.Model.Config.ContextLength;
        Score score = Measure(run, model, tokens, recipe?.Data.MaskedDocuments ?? false, context, stop);
        if (parse.GetValue(_json))
        {
            var report = new JsonObject
            {
                ["task"] = "perplexity",
                ["source"] = tokens.Source,
                ["context"] = context,
                ["tokens"] = score.TargetCount,
                ["bytes"] = score.ByteCount,
                ["loss"] = score.Loss,
                ["perplexity"] = score.Perplexity,
                ["bits_per_byte"] = score.BitsPerByte,
            };
            output.WriteLine(report.ToJsonString(JsonOutput.Options));
            return ExitCode.Success;
        }

        output.WriteLine(string.Create(
            CultureInfo.InvariantCulture,
            $"""
            {tokens.Source}: {score.TargetCount:N0} tokens, {score.ByteCount:N0} bytes, context {context}
            loss           {score.Loss:0.0000} nats per token
            perplexity     {score.Perplexity:0.00}
            bits per byte  {score.BitsPerByte:0.0000}
            """));
        return ExitCode.Success;
    }

    /// <summary>Scores tokens.</summary>
    /// <param name="name">What the model is called, for error messages.</param>
    /// <param name="model">The model.</param>
    /// <param name="tokens">What is scored.</param>
    /// <param name="maskedDocuments">Whether attention stops at document boundaries.</param>
    /// <param name="context">T, the tokens of a window.</param>
    /// <param name="stop">Ends it between two forwards.</param>
    /// <exception cref="UserErrorException">The loss is no finite number.</exception>
    internal static Score Measure(
        string name, LanguageModel model, EvaluationTokens tokens, bool maskedDocuments, int context, CancellationToken stop)
    {
        int perForward = Math.Max(1, TokensPerForward / context) * context;
        using Workspace workspace = Workspace.Allocate(
            model.Model, model.Backend, Math.Max(context, Math.Min(perForward, tokens.TargetCount)), Keep.Nothing, context);
        using ProgressDisplay progress = ProgressDisplay.Start("perplexity", tokens.TargetCount, "tokens");
        Score score = Perplexity.Measure(
            model.Model, model.Backend, workspace, tokens, maskedDocuments, context, done => progress.Report(done), stop: stop);
        return double.IsFinite(score.TotalNats)
            ? score
            : throw new UserErrorException($"{name}: the loss is {score.TotalNats}: the model's weights are damaged, or its training diverged");
    }

    /// <summary>Reads a UTF-8 text.</summary>
    /// <exception cref="UserErrorException">It is not there, or not UTF-8.</exception>
    internal static string ReadText(string path)
    {
        try
        {
            return File.ReadAllText(path, new UTF8Encoding(false, throwOnInvalidBytes: true));
        }
        catch (DecoderFallbackException e)
        {
            throw new UserErrorException($"{path}: not UTF-8 text at byte {e.Index}; convert it first", e);
        }
        catch (Exception e) when (e is FileNotFoundException or DirectoryNotFoundException)
        {
            throw new UserErrorException($"{path}: not found", e);
        }
        catch (UnauthorizedAccessException e) when (Directory.Exists(path))
        {
            throw new UserErrorException($"{path}: is a folder; name a text file", e);
        }
    }

    // What a run was trained on, and how, where the model is a run's.
    private static Recipe? RecipeOf(string run)
    {
        string path = Path.Combine(run, TrainingRun.RecipeName);
        return File.Exists(path) ? RecipeFile.Read(path) : null;
    }

    private EvaluationTokens ReadTokens(ParseResult parse, string? data, LanguageModel model)
    {
        long most = parse.GetValue(_maxTokens) ?? long.MaxValue;
        if (data is not null)
        {
            if (parse.GetValue(_data) is null && !Directory.Exists(data))
            {
                throw new UserErrorException($"{data}: not found, seen from this folder; the run was trained on it: name where it is with --data DIR");
            }

            using TokenShards shards = TokenShards.Open(data);
            return EvaluationTokens.FromShards(shards, Split.Validation, model.Tokenizer, most);
        }

        string path = parse.GetValue(_text)!;
        return EvaluationTokens.FromText(ReadText(path), model.Tokenizer, path, model.AddsBos, most);
    }
}
