using System.CommandLine;
using System.Globalization;
using System.Text;
using System.Text.Json.Nodes;
using TinyLlama.Compute.Native;
using TinyLlama.Data;
using TinyLlama.Data.Documents;
using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Cli;

/// <summary><c>tinyllama tokenizer</c>: makes vocabularies and tries them out.</summary>
internal static class TokenizerCommand
{
    private const int LongestShown = 10;

    /// <summary>The verb.</summary>
    public static Command Create() =>
        new("tokenizer", "Train a tokenizer, or try one out") { Train(), Encode(), Decode(), Inspect() };

    private static Command Train()
    {
        Option<string[]> text = new("--text")
        {
            Description = "Files and folders of .txt and .jsonl, also as .gz and .zst",
            HelpName = "PATH",
            AllowMultipleArgumentsPerToken = true,
        };
        Option<bool> sdk = new("--sdk-documentation") { Description = "Take the prose of this SDK's documentation instead of --text" };
        Option<int> size = new("--vocab-size")
        {
            Description = "Number of token ids: 3 special ones, 256 bytes, merged pieces, characters",
            DefaultValueFactory = _ => 32000,
            HelpName = "N",
        };
        Option<double> coverage = new("--character-coverage")
        {
            Description = "Share of all characters that get a token of their own; the rarest become bytes",
            DefaultValueFactory = _ => 0.99995,
            HelpName = "X",
        };
        Option<string> field = new("--field") { Description = "Field of a JSON line that holds the text", DefaultValueFactory = _ => "text", HelpName = "NAME" };
        Option<string?> output = CommonOptions.Out("Folder for tokenizer.model, tokenizer.json and their settings");
        output.Required = true;
        Option<int?> threads = CommonOptions.Threads();
        Option<bool> json = CommonOptions.Json();
        Command command = new("train", "Train a byte-pair encoding that SentencePiece and Hugging Face load")
        {
            text, sdk, size, coverage, field, output, threads, json,
        };
        command.SetAction((parse, stop) =>
        {
            var options = new BpeTrainingOptions
            {
                VocabularySize = parse.GetValue(size),
                CharacterCoverage = parse.GetValue(coverage),
                Threads = parse.GetValue(threads) ?? Environment.ProcessorCount,
            };
            string[] paths = parse.GetValue(text) ?? [];
            if (paths.Length > 0 == parse.GetValue(sdk))
            {
                throw new UserErrorException("name the text: either --text with files or folders, or --sdk-documentation");
            }

            IDocumentSource source = parse.GetValue(sdk)
                ? SdkDocumentation.Find(options.Threads)
                    ?? throw new UserErrorException("no SDK with XML documentation was found here; name other text with --text")
                : Find(paths, parse.GetRequiredValue(field));
            string folder = parse.GetRequiredValue(output)!;
            var documents = new GoodDocuments(source);
            var tokenizer = new BpeTokenizer(Train(documents, source, options, stop));
            tokenizer.Save(folder);
            TextWriter writer = parse.InvocationConfiguration.Output;
            if (parse.GetValue(json))
            {
                writer.WriteLine(new JsonObject
                {
                    ["folder"] = folder,
                    ["sha256"] = tokenizer.Hash,
                    ["vocabulary_size"] = tokenizer.VocabularySize,
                    ["documents"] = documents.Good,
                    ["bad"] = documents.Bad,
                }.ToJsonString(JsonOutput.Options));
            }
            else
            {
                writer.WriteLine(Invariant($"{folder}: vocabulary {tokenizer.VocabularySize:N0}, from {documents.Good:N0} documents ({documents.Bad:N0} bad), SHA-256 {tokenizer.Hash[..12]}…"));
            }

            return Task.FromResult(ExitCode.Success);
        });
        return command;
    }

    private static Command Encode()
    {
        Argument<string> path = Path();
        Argument<string?> text = new("text")
        {
            Description = "The text; without it, standard input to its end",
            Arity = ArgumentArity.ZeroOrOne,
        };
        Option<bool> lines = new("--lines") { Description = "Take each line as a text of its own" };
        Option<bool> bos = new("--bos") { Description = "Put BOS before each text" };
        Option<bool> eos = new("--eos") { Description = "Put EOS after each text" };
        Option<bool> pieces = new("--pieces") { Description = "Write pieces, not ids" };
        Command command = new("encode", "Write the token ids of a text") { path, text, lines, bos, eos, pieces };
        command.SetAction(parse =>
        {
            BpeTokenizer tokenizer = Tokenizer.Load(parse.GetRequiredValue(path));
            int? first = parse.GetValue(bos) ? tokenizer.Bos ?? throw Lacks("BOS") : null;
            int? last = parse.GetValue(eos) ? tokenizer.Eos ?? throw Lacks("EOS") : null;
            using TextReader input = Input(parse.GetValue(text));
            List<int> ids = [];
            foreach (string item in Texts(input, parse.GetValue(lines)))
            {
                ids.Clear();
                ids.AddRange(first is { } begin ? [begin] : []);
                tokenizer.Encode(item, ids);
                ids.AddRange(last is { } end ? [end] : []);
                parse.InvocationConfiguration.Output.WriteLine(string.Join(
                    ' ', parse.GetValue(pieces) ? ids.Select(id => tokenizer.Model.Pieces[id].Text) : ids.Select(Number)));
            }

            return ExitCode.Success;
        });
        return command;
    }

    private static Command Decode()
    {
        Argument<string> path = Path();
        Argument<string?> ids = new("ids")
        {
            Description = "The ids, with spaces between; without them, standard input, a text each line",
            Arity = ArgumentArity.ZeroOrOne,
        };
        Command command = new("decode", "Write the text of token ids") { path, ids };
        command.SetAction(parse =>
        {
            BpeTokenizer tokenizer = Tokenizer.Load(parse.GetRequiredValue(path));
            using TextReader input = Input(parse.GetValue(ids));
            int number = 0;
            foreach (string line in Texts(input, lines: true))
            {
                number++;
                int[] tokens = [.. line.Split((char[]?)null, StringSplitOptions.RemoveEmptyEntries)
                    .Select(word => Id(word, number, tokenizer.VocabularySize))];
                parse.InvocationConfiguration.Output.WriteLine(tokenizer.Decode(tokens));
            }

            return ExitCode.Success;
        });
        return command;
    }

    private static Command Inspect()
    {
        Argument<string> path = Path();
        Option<string[]> text = new("--text")
        {
            Description = "Files and folders whose compression is measured",
            HelpName = "PATH",
            AllowMultipleArgumentsPerToken = true,
        };
        Option<bool> json = CommonOptions.Json();
        Command command = new("inspect", "Show what a tokenizer consists of, and how well it compresses a text") { path, text, json };
        command.SetAction((parse, stop) =>
        {
            BpeTokenizer tokenizer = Tokenizer.Load(parse.GetRequiredValue(path));
            string[] paths = parse.GetValue(text) ?? [];
            (long Bytes, long Tokens, long Fallbacks)? measured = paths.Length == 0 ? null : Measure(tokenizer, Find(paths, "text"), stop);
            TextWriter writer = parse.InvocationConfiguration.Output;
            if (parse.GetValue(json))
            {
                writer.WriteLine(ToJson(tokenizer, measured).ToJsonString(JsonOutput.Options));
            }
            else
            {
                Write(writer, tokenizer, measured);
            }

            return Task.FromResult(ExitCode.Success);
        });
        return command;
    }

    private static Argument<string> Path() =>
        new("tokenizer") { Description = "tokenizer.model, tokenizer.json or a folder with one" };

    private static TextFiles Find(string[] paths, string field) => TextFiles.Find(
        paths, new TextFileOptions { Field = field, OpenZstandard = compressed => new ZstdStream(compressed) });

    private static BpeModel Train(GoodDocuments documents, IDocumentSource source, BpeTrainingOptions options, CancellationToken stop)
    {
        var progress = new Progress(source);
        try
        {
            return BpeTrainer.Train(documents.Read(), options, progress, stop);
        }
        finally
        {
            progress.Display.Dispose();
        }
    }

    private static (long Bytes, long Tokens, long Fallbacks) Measure(BpeTokenizer tokenizer, TextFiles source, CancellationToken stop)
    {
        using var display = ProgressDisplay.Start("encode", source.Files.Sum(file => file.Bytes), "bytes");
        (long Bytes, long Tokens, long Fallbacks) sum = default;
        List<int> ids = [];
        foreach (string document in new GoodDocuments(source).Read())
        {
            stop.ThrowIfCancellationRequested();
            ids.Clear();
            tokenizer.Encode(document, ids);
            sum.Bytes += Encoding.UTF8.GetByteCount(document);
            sum.Tokens += ids.Count;
            sum.Fallbacks += ids.Count(id => tokenizer.Model.Pieces[id].Kind is PieceKind.Byte or PieceKind.Unknown);
            display.Report(source.BytesRead);
        }

        return sum;
    }

    private static void Write(TextWriter writer, BpeTokenizer tokenizer, (long Bytes, long Tokens, long Fallbacks)? measured)
    {
        void Row(string name, FormattableString value) => writer.WriteLine($"{name,-11} {value.ToString(CultureInfo.InvariantCulture)}");
        BpeModel model = tokenizer.Model;
        Row("vocabulary", $"{tokenizer.VocabularySize:N0} ids");
        foreach ((string kind, int count) in Kinds(model))
        {
            Row("", $"{count:N0} {kind}");
        }

        Row("merges", $"{(model.Merges is null ? "any that make a piece, by score" : $"{model.Merges.Count:N0} listed")}");
        Row("text", $"{(model.CharacterMap.IsEmpty ? "as it is" : $"normalized by {model.NormalizerName}")}{(model.RemoveExtraWhitespace ? ", extra spaces removed" : "")}, space before it: {model.DummyPrefix}");
        if (model.WordSplit != WordSplit.None)
        {
            Row("words", $"{WordsOf(model.WordSplit)}, in pieces of bytes");
        }

        Row("BOS, EOS", $"{tokenizer.Bos?.ToString(CultureInfo.InvariantCulture) ?? "none"}, {tokenizer.Eos?.ToString(CultureInfo.InvariantCulture) ?? "none"}");
        Row("SHA-256", $"{tokenizer.Hash}");
        Row("longest", $"{string.Join("  ", Longest(model))}");
        if (measured is { } found)
        {
            Row("the text", $"{found.Bytes / 1e6:0.0##} MB, {found.Tokens:N0} tokens, {PerToken(found):0.000} bytes per token, {100.0 * found.Fallbacks / Math.Max(1, found.Tokens):0.00} % bytes and unknown");
        }
    }

    private static JsonObject ToJson(BpeTokenizer tokenizer, (long Bytes, long Tokens, long Fallbacks)? measured)
    {
        var json = new JsonObject
        {
            ["vocabulary_size"] = tokenizer.VocabularySize,
            ["kinds"] = new JsonObject(Kinds(tokenizer.Model).Select(kind => KeyValuePair.Create(kind.Name.Replace(' ', '_'), (JsonNode?)kind.Count))),
            ["bos"] = tokenizer.Bos,
            ["eos"] = tokenizer.Eos,
            ["sha256"] = tokenizer.Hash,
            ["longest"] = new JsonArray([.. Longest(tokenizer.Model).Select(piece => (JsonNode)piece)]),
        };
        if (measured is { } found)
        {
            json["text_bytes"] = found.Bytes;
            json["text_tokens"] = found.Tokens;
            json["text_fallback_tokens"] = found.Fallbacks;
            json["bytes_per_token"] = PerToken(found);
        }

        return json;
    }

    private static double PerToken((long Bytes, long Tokens, long Fallbacks) measured) => (double)measured.Bytes / Math.Max(1, measured.Tokens);

    private static string WordsOf(WordSplit split) => split switch
    {
        WordSplit.Gpt2 => "as GPT-2",
        WordSplit.SingleDigits => "as SmolLM",
        _ => "as Llama 3",
    };

    private static IEnumerable<(string Name, int Count)> Kinds(BpeModel model) => model.Pieces
        .GroupBy(piece => piece.Kind)
        .OrderBy(group => group.Key)
        .Select(group => (
            group.Key switch
            {
                PieceKind.Normal => "pieces of text",
                PieceKind.Unknown => "unknown",
                PieceKind.Control => "control",
                PieceKind.UserDefined => "user defined",
                _ => "bytes",
            },
            group.Count()));

    /// <summary>The longest pieces that are more than spaces; what a file brings cannot steer the terminal.</summary>
    private static IEnumerable<string> Longest(BpeModel model) => model.Pieces
        .Where(piece => piece.Kind == PieceKind.Normal && piece.Text.Any(character => character != BpeModel.Space))
        .OrderByDescending(piece => piece.Text.Length)
        .ThenBy(piece => piece.Text, StringComparer.Ordinal)
        .Take(LongestShown)
        .Select(piece => string.Concat(piece.Text.Select(character => char.IsControl(character) ? '?' : character)));

    private static TextReader Input(string? text) =>
        text is not null ? new StringReader(text) : CommandLine.OpenInput();

    private static IEnumerable<string> Texts(TextReader input, bool lines)
    {
        if (!lines)
        {
            yield return input.ReadToEnd();
            yield break;
        }

        while (input.ReadLine() is { } line)
        {
            yield return line;
        }
    }

    private static int Id(string word, int line, int vocabularySize) =>
        int.TryParse(word, NumberStyles.None, CultureInfo.InvariantCulture, out int id) && id < vocabularySize
            ? id
            : throw new UserErrorException($"line {line}: \"{word}\" is no id of this vocabulary; ids are 0 to {vocabularySize - 1}");

    private static string Number(int id) => id.ToString(CultureInfo.InvariantCulture);

    private static string Invariant(FormattableString text) => text.ToString(CultureInfo.InvariantCulture);

    private static UserErrorException Lacks(string what) => new($"this vocabulary has no {what}; leave out --{what.ToLowerInvariant()}");

    /// <summary>The texts of a source; bad records are counted and passed over.</summary>
    private sealed class GoodDocuments(IDocumentSource source)
    {
        public long Good { get; private set; }

        public long Bad { get; private set; }

        public IEnumerable<string> Read()
        {
            foreach (Document document in source.Read(0))
            {
                if (document.Fault is null)
                {
                    Good++;
                    yield return document.Text;
                }
                else
                {
                    Bad++;
                }
            }
        }
    }

    /// <summary>Shows the two stages of a training.</summary>
    private sealed class Progress(IDocumentSource source) : IProgress<BpeTrainingProgress>
    {
        private bool _merges;

        public ProgressDisplay Display { get; private set; } =
            ProgressDisplay.Start("count words", source.Files.Sum(file => file.Bytes), "bytes");

        public void Report(BpeTrainingProgress value)
        {
            if (value.TotalPieces > 0 && !_merges)
            {
                _merges = true;
                Display.Dispose();
                Display = ProgressDisplay.Start("merge", value.TotalPieces, "pieces");
            }

            Display.Report(_merges ? value.Pieces : source.BytesRead);
        }
    }
}
