using System.CommandLine;
using System.Globalization;
using System.Security.Cryptography;
using System.Text.Json.Nodes;
using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Inference;

namespace TinyLlama.Cli;

/// <summary><c>tinyllama generate RUN -p TEXT</c>: continues a text, as it is computed.</summary>
internal sealed class GenerateCommand
{
    private readonly Argument<string> _run = CommonOptions.Model();

    private readonly Option<string?> _prompt = new("-p", "--prompt")
    {
        Description = "The text to continue; - reads it from standard input [default: nothing, the beginning of a text]",
        HelpName = "TEXT",
    };

    private readonly Option<int?> _maxTokens = CommonOptions.MaxTokens("Most new tokens [default: as many as the context holds]");
    private readonly Option<double?> _temperature = CommonOptions.Temperature();
    private readonly Option<int?> _topK = new("--top-k") { Description = "Draw from the K likeliest tokens only", HelpName = "K" };

    private readonly Option<double?> _topP = new("--top-p")
    {
        Description = "Draw from the likeliest tokens that reach this probability together [default: 0.95]",
        HelpName = "P",
    };

    private readonly Option<double?> _minP = new("--min-p")
    {
        Description = "Draw only tokens of at least this share of the likeliest one's probability",
        HelpName = "P",
    };

    private readonly Option<double?> _penalty = new("--repetition-penalty")
    {
        Description = "Makes tokens that are in the context already less likely; 1 for not",
        HelpName = "X",
    };

    private readonly Option<double?> _presence = new("--presence-penalty")
    {
        Description = "Subtracted from the logits of tokens that were generated already",
        HelpName = "X",
    };

    private readonly Option<double?> _frequency = new("--frequency-penalty")
    {
        Description = "Subtracted from the logit of a token each time that it was generated already",
        HelpName = "X",
    };

    private readonly Option<ulong?> _seed = CommonOptions.Seed();

    private readonly Option<string[]> _stops = new("--stop")
    {
        Description = "End before this text; may be repeated",
        HelpName = "TEXT",
        DefaultValueFactory = _ => [],
    };

    private readonly Option<string?> _schema = new("--json-schema")
    {
        Description = "The new text is JSON of the schema in this file",
        HelpName = "FILE",
    };

    private readonly Option<string> _overflow = new Option<string>("--overflow")
    {
        Description = "Where the context is too small: an error, or a window that slides over the text",
        DefaultValueFactory = _ => "error",
    }.AcceptOnlyFromAmong("error", "sliding");

    private readonly Option<string?> _lora = CommonOptions.Lora();

    private readonly Option<string?> _draft = new("--draft")
    {
        Description = "A small model with the same tokenizer that proposes tokens, which are verified together",
        HelpName = "MODEL",
    };

    private readonly Option<int?> _draftTokens = new("--draft-tokens")
    {
        Description = "Tokens that the draft model proposes at a time [default: 4]",
        HelpName = "N",
    };

    private readonly Option<int?> _lookup = new("--lookup")
    {
        Description = "Propose up to N tokens that followed where the text's last ones stood before",
        HelpName = "N",
    };

    private readonly Option<int?> _beams = new("--beams")
    {
        Description = "Search for the likeliest text, following N at a time, instead of drawing one",
        HelpName = "N",
    };

    private readonly Option<double?> _lengthPenalty = new("--length-penalty")
    {
        Description = "Beams that ended are compared by ln p / length^A [default: 1]",
        HelpName = "A",
    };

    private readonly Option<string?> _promptCache = new("--prompt-cache")
    {
        Description = "Keep the prompt's keys and values in this file: one that begins alike is not computed again",
        HelpName = "FILE",
    };

    private readonly Option<int?> _context = CommonOptions.Context();
    private readonly Option<DType?> _cacheType = CommonOptions.CacheType();
    private readonly Option<Device?> _device = CommonOptions.Device();
    private readonly Option<int?> _threads = CommonOptions.Threads();
    private readonly Option<bool> _json = CommonOptions.Json();

    /// <summary>The verb.</summary>
    public static Command Create() => new GenerateCommand().Build();

    private Command Build()
    {
        var command = new Command("generate", "Continue a text with a trained model")
        {
            _run, _prompt, _maxTokens, _temperature, _topK, _topP, _minP, _penalty, _presence, _frequency, _seed, _stops, _schema, _overflow,
            _lora, _draft, _draftTokens, _lookup, _beams, _lengthPenalty, _promptCache, _context, _cacheType, _device, _threads, _json,
        };
        command.SetAction((parse, stop) => Task.FromResult(Run(parse, stop)));
        return command;
    }

    private int Run(ParseResult parse, CancellationToken stop)
    {
        TextWriter error = parse.InvocationConfiguration.Error;
        GenerationOptions options = Options(parse);
        options.Validate();
        string prompt = parse.GetValue(_prompt) ?? "";
        if (prompt == "-")
        {
            // The line's end belongs to the shell that wrote it.
            using TextReader input = CommandLine.OpenInput();
            prompt = input.ReadToEnd();
            prompt = prompt.EndsWith("\r\n", StringComparison.Ordinal) ? prompt[..^2] : prompt.EndsWith('\n') ? prompt[..^1] : prompt;
        }

        RequireOneDraft(parse);
        RequireOneWay(parse);
        using LanguageModel model = Load(parse, parse.GetRequiredValue(_run), error, parse.GetValue(_lora), parse.GetValue(_promptCache));
        return parse.GetValue(_beams) is int beams
            ? Search(parse, model, prompt, beams, stop)
            : Continue(parse, model, prompt, options, stop);
    }

    private int Continue(ParseResult parse, LanguageModel model, string prompt, GenerationOptions options, CancellationToken stop)
    {
        (TextWriter output, TextWriter error) = (parse.InvocationConfiguration.Output, parse.InvocationConfiguration.Error);
        using LanguageModel? small = parse.GetValue(_draft) is string path ? Load(parse, path, error) : null;
        using DraftModel? draft = small is null ? null : new DraftModel(small, model, parse.GetValue(_draftTokens) ?? 4);
        model.Draft = parse.GetValue(_lookup) is int tokens ? new PromptLookup(tokens) : draft;
        Generation generation = model.Generate(prompt, options, stop);
        if (parse.GetValue(_json))
        {
            string text = generation.ToString();
            output.WriteLine(Report(generation, prompt, text, options.Seed).ToJsonString(JsonOutput.Options));
            return ExitCode.Success;
        }

        output.Write(prompt);
        try
        {
            foreach (string piece in generation)
            {
                output.Write(piece);
                output.Flush();
            }
        }
        finally
        {
            output.WriteLine();
        }

        error.WriteLine(Summary(generation, options));
        return ExitCode.Success;
    }

    private int Search(ParseResult parse, LanguageModel model, string prompt, int beams, CancellationToken stop)
    {
        var options = new BeamSearchOptions
        {
            Beams = beams,
            LengthPenalty = parse.GetValue(_lengthPenalty) ?? 1,
            MaxTokens = parse.GetValue(_maxTokens),
        };
        IReadOnlyList<BeamText> texts;
        using (ProgressDisplay progress = ProgressDisplay.Start("search", options.MaxTokens ?? 0, "tokens"))
        {
            texts = model.Search(prompt, options, length => progress.Report(length), stop);
        }

        if (parse.GetValue(_json))
        {
            var report = new JsonObject { ["prompt"] = prompt, ["beams"] = new JsonArray([.. texts.Select(Report)]) };
            parse.InvocationConfiguration.Output.WriteLine(report.ToJsonString(JsonOutput.Options));
            return ExitCode.Success;
        }

        BeamText best = texts[0];
        parse.InvocationConfiguration.Output.WriteLine(prompt + best.Text);
        parse.InvocationConfiguration.Error.WriteLine(string.Create(
            CultureInfo.InvariantCulture,
            $"the best of {texts.Count} texts: ln p {best.LogProbability:N2}, {best.Tokens.Count} new tokens, {Ending(best.Finish)}"));
        return ExitCode.Success;
    }

    private LanguageModel Load(ParseResult parse, string path, TextWriter error, string? adapter = null, string? promptCache = null) => LanguageModel.Load(
        path, parse.GetValue(_threads) ?? 0, parse.GetValue(_context), line => error.WriteLine("warning: " + line), adapter, promptCache, parse.GetValue(_cacheType),
        parse.GetValue(_device) ?? default);

    private void RequireOneDraft(ParseResult parse)
    {
        if (parse.GetValue(_draft) is not null && parse.GetValue(_lookup) is not null)
        {
            throw new UserErrorException("--draft and --lookup both propose tokens; choose one of them");
        }

        if (parse.GetValue(_draft) is null && parse.GetValue(_draftTokens) is not null)
        {
            throw new UserErrorException("--draft-tokens is for a draft model; name one with --draft, or use --lookup N");
        }
    }

    // A search draws nothing.
    private void RequireOneWay(ParseResult parse)
    {
        if (parse.GetValue(_beams) is null)
        {
            if (parse.GetValue(_lengthPenalty) is not null)
            {
                throw new UserErrorException("--length-penalty compares beams; say how many with --beams N");
            }

            return;
        }

        Option[] drawing =
        [
            _temperature, _topK, _topP, _minP, _penalty, _presence, _frequency, _seed, _stops, _schema, _overflow, _draft, _draftTokens, _lookup,
            _promptCache,
        ];
        if (Array.Find(drawing, option => parse.GetResult(option) is { Implicit: false }) is { } given)
        {
            throw new UserErrorException($"--beams searches for the likeliest text, {given.Name} is of one that is drawn; leave one of them out");
        }
    }

    private GenerationOptions Options(ParseResult parse)
    {
        double temperature = parse.GetValue(_temperature) ?? 0.8;

        // A new text each time, unless asked otherwise; the seed is shown, so that any can be had again.
        ulong seed = parse.GetValue(_seed) ?? (ulong)RandomNumberGenerator.GetInt32(int.MaxValue);
        return new GenerationOptions
        {
            MaxTokens = parse.GetValue(_maxTokens),
            Temperature = temperature,
            TopK = parse.GetValue(_topK) ?? 0,
            TopP = parse.GetValue(_topP) ?? 0.95,
            MinP = parse.GetValue(_minP) ?? 0,
            RepetitionPenalty = parse.GetValue(_penalty) ?? 1,
            PresencePenalty = parse.GetValue(_presence) ?? 0,
            FrequencyPenalty = parse.GetValue(_frequency) ?? 0,
            Seed = seed,
            StopStrings = parse.GetValue(_stops) ?? [],
            Json = parse.GetValue(_schema) is string schema ? ReadSchema(schema) : null,
            Overflow = parse.GetValue(_overflow) == "sliding" ? ContextOverflow.Sliding : ContextOverflow.Error,
        };
    }

    private static JsonConstraint ReadSchema(string path)
    {
        try
        {
            return JsonConstraint.FromSchema(File.ReadAllText(path));
        }
        catch (Exception e) when (e is UserErrorException or IOException or UnauthorizedAccessException)
        {
            throw new UserErrorException($"--json-schema {path}: {e.Message}", e);
        }
    }

    private static string Summary(Generation generation, GenerationOptions options)
    {
        (int tokens, TimeSpan time) = generation.Decode;
        string seed = options.Temperature == 0 ? "" : $" · seed {options.Seed}";
        string decode = tokens == 0 ? "" : $" · decode {Rate(tokens, time)}";
        (int proposed, int accepted) = generation.Drafted;
        string drafted = proposed == 0 ? "" : string.Create(CultureInfo.InvariantCulture, $", {accepted} of {proposed} drafted tokens accepted ({100.0 * accepted / proposed:N0} %)");
        int prefilled = generation.PromptTokens.Count - generation.CachedPromptTokens;
        string cached = generation.CachedPromptTokens == 0 ? "" : $" after {generation.CachedPromptTokens} cached ones";
        string prefill = generation.PrefillTime == TimeSpan.Zero ? "nothing computed" : $"prefill {prefilled} tokens{cached}, {Rate(prefilled, generation.PrefillTime)}";
        return $"{prefill}{decode}{drafted} · {generation.Tokens.Count} new tokens, {Ending(generation.Finish)}{seed}";
    }

    private static string Rate(int tokens, TimeSpan time) =>
        string.Create(CultureInfo.InvariantCulture, $"{tokens / time.TotalSeconds:N1} tokens/s");

    private static string Ending(FinishReason reason) => reason switch
    {
        FinishReason.EndOfText => "the text ended",
        FinishReason.StopToken => "a stop token came",
        FinishReason.StopString => "a stop string came",
        FinishReason.MaxTokens => "as many as asked for",
        FinishReason.ContextFull => "the context is full",
        _ => "not finished",
    };

    private static string Name(FinishReason reason) => reason switch
    {
        FinishReason.EndOfText => "end_of_text",
        FinishReason.StopToken => "stop_token",
        FinishReason.StopString => "stop_string",
        FinishReason.MaxTokens => "max_tokens",
        FinishReason.ContextFull => "context_full",
        _ => "none",
    };

    private static JsonObject Report(BeamText text) => new()
    {
        ["text"] = text.Text,
        ["log_probability"] = text.LogProbability,
        ["score"] = text.Score,
        ["new_tokens"] = text.Tokens.Count,
        ["finish_reason"] = Name(text.Finish),
    };

    private static JsonObject Report(Generation generation, string prompt, string text, ulong seed) => new()
    {
        ["prompt"] = prompt,
        ["text"] = text,
        ["finish_reason"] = Name(generation.Finish),
        ["seed"] = seed,
        ["prompt_tokens"] = generation.PromptTokens.Count,
        ["cached_prompt_tokens"] = generation.CachedPromptTokens,
        ["new_tokens"] = generation.Tokens.Count,
        ["prefill_seconds"] = generation.PrefillTime.TotalSeconds,
        ["decode_tokens"] = generation.Decode.Tokens,
        ["decode_seconds"] = generation.Decode.Time.TotalSeconds,
        ["drafted_tokens"] = generation.Drafted.Proposed,
        ["accepted_tokens"] = generation.Drafted.Accepted,
    };
}
