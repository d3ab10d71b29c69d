using System.CommandLine;
using System.Globalization;
using System.Text.Json.Nodes;
using TinyLlama.Compute.Collectives;
using TinyLlama.Compute.Native;
using TinyLlama.Data;
using TinyLlama.Data.Documents;
using TinyLlama.Data.Shards;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Training;

namespace TinyLlama.Cli;

/// <summary><c>tinyllama data</c>: from text to token shards.</summary>
internal static class DataCommand
{
    /// <summary>What <c>--tokenizer</c> says for <see cref="ByteTokenizer"/>.</summary>
    private const string ByteTokenizerName = "bytes";

    /// <summary>The verb.</summary>
    public static Command Create() => new("data", "Prepare text for training") { Prepare(), Verify() };

    private static Command Prepare()
    {
        PreparationOptions defaults = new();
        Option<string[]> text = new("--text")
        {
            Description = "Files and folders of .txt and .jsonl, also as .gz and .zst",
            HelpName = "PATH",
            AllowMultipleArgumentsPerToken = true,
        };
        Option<bool> sdk = new("--sdk-documentation") { Description = "Take the prose of this SDK's documentation instead of --text" };
        Option<string> tokenizer = new("--tokenizer")
        {
            Description = $"tokenizer.model, tokenizer.json or a folder with one; or '{ByteTokenizerName}'",
            HelpName = "PATH",
            Required = true,
        };
        Option<string?> output = CommonOptions.Out("Folder for the token shards");
        output.Required = true;
        Option<string> field = new("--field") { Description = "Field of a JSON line that holds the text", DefaultValueFactory = _ => "text", HelpName = "NAME" };
        Option<bool> lines = new("--lines") { Description = "Take each line of a .txt file as a document, not the whole file" };
        Option<string?> separator = new("--separator")
        {
            Description = "Line between the documents of a .txt file, such as '<|endoftext|>', or '' for paragraphs",
            HelpName = "LINE",
        };
        Option<double> share = new("--validation-share")
        {
            Description = "Share of the documents to validate on, chosen by a hash of their text",
            DefaultValueFactory = _ => defaults.ValidationShare,
            HelpName = "X",
        };
        Option<double> maximumBad = new("--max-bad")
        {
            Description = "Share of bad lines or files above which it is an error",
            DefaultValueFactory = _ => defaults.MaximumBadShare,
            HelpName = "X",
        };
        Option<bool> deduplicate = new("--deduplicate") { Description = "Of documents with the same text keep one" };
        Option<bool> noBos = new("--no-bos") { Description = "Put no BOS before a document" };
        Option<bool> noEos = new("--no-eos") { Description = "Put no EOS after a document" };
        Option<ulong?> seed = CommonOptions.Seed();
        Option<int?> threads = CommonOptions.Threads();
        Option<int?> ranks = RankCommand.Ranks("Start this many processes here, which divide files and shards between them");
        Option<bool> json = CommonOptions.Json();
        Command command = new("prepare", "Encode text into shuffled token shards; run again, it continues where it was")
        {
            text, sdk, tokenizer, output, field, lines, separator, share, seed, deduplicate, noBos, noEos, maximumBad, threads, ranks, json,
        };
        command.SetAction(async (parse, stop) =>
        {
            string folder = parse.GetRequiredValue(output)!;
            string[] paths = parse.GetValue(text) ?? [];
            if (paths.Length > 0 == parse.GetValue(sdk))
            {
                throw new UserErrorException("name the text: either --text with files or folders, or --sdk-documentation");
            }

            if (parse.GetValue(ranks) is int size)
            {
                return await Supervise(folder, size, RankCommand.Arguments(parse, size, parse.GetValue(threads) is not null, ranks), stop);
            }

            string tokenizerPath = parse.GetRequiredValue(tokenizer);
            PreparationOptions options = new()
            {
                Seed = parse.GetValue(seed) ?? 0,
                ValidationShare = parse.GetValue(share),
                AddBos = !parse.GetValue(noBos),
                AddEos = !parse.GetValue(noEos),
                Deduplicate = parse.GetValue(deduplicate),
                MaximumBadShare = parse.GetValue(maximumBad),
                Threads = parse.GetValue(threads) ?? Environment.ProcessorCount,
                TokenizerFiles = TokenizerFiles(tokenizerPath),
            };
            using Collective world = Collective.Join();
            return world.Size == 1 ? Prepare() : OnRank(world, Prepare, stop);

            int Prepare()
            {
                IDocumentSource source = parse.GetValue(sdk)
                    ? SdkDocumentation.Find(options.Threads) ?? throw new UserErrorException("no SDK with XML documentation was found here (looked beside the running runtime, in DOTNET_ROOT and at dotnet on PATH); name other text with --text")
                    : TextFiles.Find(paths, new TextFileOptions
                    {
                        Field = parse.GetRequiredValue(field),
                        Lines = parse.GetValue(lines),
                        Separator = parse.GetValue(separator),
                        OpenZstandard = compressed => new ZstdStream(compressed),
                    });
                ITokenizer opened = tokenizerPath == ByteTokenizerName ? new ByteTokenizer() : Tokenizer.Load(tokenizerPath);
                Manifest manifest = Run(folder, source, opened, options, world.Size == 1 ? null : new PreparationRanks(world), stop);
                if (world.Rank == 0)
                {
                    Report(parse.InvocationConfiguration.Output, folder, manifest, source, parse.GetValue(json));
                }

                return ExitCode.Success;
            }
        });
        return command;
    }

    private static Command Verify()
    {
        Argument<string> folder = new("folder") { Description = "A folder of token shards" };
        Command command = new("verify", "Compare every file of a folder of token shards with its manifest") { folder };
        command.SetAction(parse =>
        {
            IReadOnlyList<string> faults = TokenShards.Verify(parse.GetRequiredValue(folder));
            foreach (string fault in faults)
            {
                parse.InvocationConfiguration.Output.WriteLine(fault);
            }

            parse.InvocationConfiguration.Output.WriteLine(faults.Count == 0 ? "all files are as they were written" : $"{faults.Count} files differ; prepare the data again");
            return faults.Count == 0 ? ExitCode.Success : ExitCode.Failure;
        });
        return command;
    }

    private static async Task<int> Supervise(string folder, int ranks, string[] arguments, CancellationToken stop)
    {
        int code = await RankCommand.Supervise(
            ranks, restarts: 0, folder, Manifest.FileName, arguments, () => File.Exists(Path.Combine(folder, Manifest.FileName)), stop);
        string logs = Path.Combine(folder, Heartbeat.FolderName);
        if (code == ExitCode.Success && Directory.Exists(logs))
        {
            Directory.Delete(logs, recursive: true);
        }

        return code;
    }

    /// <summary>Does the work of one rank; where that fails, all ranks end.</summary>
    private static int OnRank(Collective world, Func<int> prepare, CancellationToken stop)
    {
        try
        {
            return prepare();
        }
        catch (OperationCanceledException)
        {
            // The stop may have been another rank's.
            Console.Error.WriteLine("stopped");
            return ExitCode.Stopped;
        }
        catch (Exception e)
        {
            RankCommand.End(e, world, reason => Console.Error.WriteLine(RankProcess.IsSupervised ? reason : $"{reason} (rank {world.Rank})"), stop);
            throw;
        }
    }

    /// <summary>Prepares a folder and shows how far it is, or, with several ranks, how far the first one is.</summary>
    internal static Manifest Run(
        string folder, IDocumentSource source, ITokenizer tokenizer, PreparationOptions options, IPreparationRanks? ranks, CancellationToken stop)
    {
        ProgressDisplay? display = null;
        string? stage = null;
        try
        {
            return DataPreparation.Run(
                folder,
                source,
                tokenizer,
                options,
                ranks is { Rank: > 0 } ? null : progress =>
                {
                    if (progress.Stage != stage)
                    {
                        display?.Dispose();
                        display = ProgressDisplay.Start(stage = progress.Stage, progress.Total, "bytes");
                    }

                    display!.Report(progress.Done, string.Create(CultureInfo.InvariantCulture, $"{progress.Documents:N0} documents"));
                },
                ranks,
                stop);
        }
        finally
        {
            display?.Dispose();
        }
    }

    /// <summary>What goes beside the shards, so that who reads them has the tokenizer.</summary>
    private static string[] TokenizerFiles(string path) =>
        path == ByteTokenizerName ? []
        : Directory.Exists(path) ? [.. Tokenizer.FileNames.Select(f => Path.Combine(path, f)).Where(File.Exists)]
        : [path];

    private static void Report(TextWriter output, string folder, Manifest manifest, IDocumentSource source, bool asJson)
    {
        if (asJson)
        {
            output.WriteLine(new JsonObject
            {
                ["folder"] = folder,
                ["tokenizer_sha256"] = manifest.TokenizerSha256,
                ["vocabulary_size"] = manifest.VocabularySize,
                ["train"] = Counts(manifest.Train),
                ["validation"] = Counts(manifest.Validation),
                ["bad"] = manifest.LeftOut.Bad,
                ["empty"] = manifest.LeftOut.Empty,
                ["duplicates"] = manifest.LeftOut.Duplicates,
                ["files"] = source.Files.Count,
                ["files_passed_over"] = PassedOver(source).Count,
            }.ToJsonString(JsonOutput.Options));
            return;
        }

        void Row(string name, FormattableString value) => output.WriteLine($"{name,-11} {value.ToString(CultureInfo.InvariantCulture)}");
        void Split(string name, SplitEntry split) =>
            Row(name, $"{split.Documents:N0} documents, {split.Tokens:N0} tokens, {split.TextBytes / 1e6:0.0##} MB of text, {split.Shards.Count} shards");

        Row("folder", $"{folder}");
        Row("source", $"{source.Files.Count:N0} files, {source.Files.Sum(f => f.Bytes) / 1e6:0.0##} MB");
        Row("tokenizer", $"vocabulary {manifest.VocabularySize:N0}, BOS {manifest.Bos?.ToString(CultureInfo.InvariantCulture) ?? "not added"}, EOS {manifest.Eos?.ToString(CultureInfo.InvariantCulture) ?? "not added"}, SHA-256 {manifest.TokenizerSha256[..Math.Min(12, manifest.TokenizerSha256.Length)]}…");
        Split("train", manifest.Train);
        Split("validation", manifest.Validation);
        LeftOut left = manifest.LeftOut;
        Row("left out", $"{left.Bad:N0} bad{(left.Bad > 0 ? " (see quarantine.jsonl)" : "")}, {left.Empty:N0} empty, {left.Duplicates:N0} duplicates");
        if (PassedOver(source) is { Count: > 0 } passedOver)
        {
            Row("passed over", $"{passedOver.Count:N0} files of other kinds, such as {passedOver[0]}");
        }

        if (manifest.Validation.Tokens < 2)
        {
            output.WriteLine("note: nothing is left to validate on; give more documents (--lines or --separator make more of a file) or a larger --validation-share");
        }
    }

    private static IReadOnlyList<string> PassedOver(IDocumentSource source) => (source as TextFiles)?.PassedOver ?? [];

    private static JsonObject Counts(SplitEntry split) => new()
    {
        ["documents"] = split.Documents,
        ["tokens"] = split.Tokens,
        ["text_bytes"] = split.TextBytes,
        ["shards"] = split.Shards.Count,
    };
}
