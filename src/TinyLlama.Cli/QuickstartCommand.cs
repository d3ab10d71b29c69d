using System.CommandLine;
using System.Globalization;
using TinyLlama.Compute;
using TinyLlama.Compute.Native;
using TinyLlama.Data;
using TinyLlama.Data.Documents;
using TinyLlama.Data.Shards;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Evaluation;
using TinyLlama.Inference;
using TinyLlama.Training;

namespace TinyLlama.Cli;

/// <summary>
/// <c>tinyllama quickstart</c>: the main job in minutes. Text, tokenizer, token shards, a small model, what it has
/// learned, and what it writes. Every stage that is done is kept: the same command again goes on.
/// </summary>
internal static class QuickstartCommand
{
    // What is not training of a sitting: validations, checkpoints, and a machine that slows down after it was measured.
    private const double ShareForTraining = 0.88;
    private const double MostEpochs = 8;
    private const int FewFiles = 100;

    // Of less text a hundredth is too little to validate on.
    private const long FewBytes = 5_000_000;
    private const string RecipeResource = "quickstart.yaml";

    /// <summary>The verb.</summary>
    public static Command Create()
    {
        var text = new Option<string[]>("--text")
        {
            Description = "Files and folders of .txt and .jsonl (also .gz, .zst) [default: the prose of this SDK's documentation]",
            HelpName = "PATH",
            AllowMultipleArgumentsPerToken = true,
            DefaultValueFactory = _ => [],
        };
        var minutes = new Option<double>("--minutes")
        {
            Description = "Time to train; the number of steps follows from this machine's measured speed",
            HelpName = "X",
            DefaultValueFactory = _ => 5,
        };
        var output = CommonOptions.Out("The run's folder [default: runs/quickstart]");
        var set = CommonOptions.Set();
        var device = CommonOptions.Device();
        var threads = CommonOptions.Threads();
        var command = new Command("quickstart", "From text to a model that writes text, in minutes; the same command again goes on")
        {
            text, minutes, output, set, device, threads,
        };
        command.SetAction((parse, stop) =>
        {
            double time = parse.GetValue(minutes);
            if (!(time > 0 && time <= 1e6))
            {
                throw new UserErrorException($"--minutes {time} is not a time to train");
            }

            string folder = parse.GetValue(output) ?? Path.Combine("runs", "quickstart");
            string[] settings = [.. parse.GetValue(set)!, .. parse.GetValue(device) is Device chosen ? [$"device={chosen}"] : Array.Empty<string>()];
            var job = new Job(
                folder, parse.GetValue(text)!, TimeSpan.FromMinutes(time), settings,
                parse.GetValue(threads) ?? Environment.ProcessorCount, parse.InvocationConfiguration.Output, stop);
            return Task.FromResult(job.Run() ? ExitCode.Success : ExitCode.Stopped);
        });
        return command;
    }

    private sealed class Job(
        string folder, string[] text, TimeSpan time, string[] settings, int threads, TextWriter output, CancellationToken stop)
    {
        private readonly string _tokenizerFolder = Path.Combine(folder, "tokenizer");
        private readonly string _dataFolder = Path.Combine(folder, "data");

        public bool Run()
        {
            IDocumentSource source = Gather();
            BpeTokenizer tokenizer = TrainTokenizer(source);
            Manifest manifest = Prepare(source, tokenizer);
            Recipe recipe = ChooseRecipe(manifest, tokenizer);

            using var display = new TrainingDisplay();
            using TrainingRun run = TrainingRun.Open(recipe, folder, display);
            Say($"4. pretrain: {run.Plan.Model.ParameterCount:N0} parameters, {run.Plan.Steps:N0} steps of {run.Plan.TokensPerStep:N0} tokens, {run.Backend.Description}");
            TrainingState before = run.Trainer.State;
            if (before.Step > 0)
            {
                Say($"   goes on from step {before.Step:N0}");
            }

            display.Start(run.Plan, before.Tokens);
            run.Trainer.Run(stop);
            display.Dispose();
            if (!run.Trainer.IsFinished)
            {
                Say($"stopped after step {run.Trainer.State.Step:N0}; the same command goes on from there");
                return false;
            }

            Report(run, tokenizer, display.LastValidation!);
            return true;
        }

        private IDocumentSource Gather()
        {
            IDocumentSource source;
            if (text.Length > 0)
            {
                var options = new TextFileOptions { OpenZstandard = compressed => new ZstdStream(compressed) };
                source = TextFiles.Find(text, options);
                string documents = "";
                if (source.Files.Count < FewFiles)
                {
                    // One book is one document, and nothing would be left to validate on.
                    source = TextFiles.Find(text, options with { Separator = "" });
                    documents = "; so few that paragraphs are the documents";
                }

                Say($"1. text: {source.Files.Count:N0} files of {string.Join(", ", text)}, {Size(source)}{documents}");
            }
            else if (SdkDocumentation.Find(threads) is { } sdk)
            {
                source = sdk;
                Say($"1. text: the prose of this SDK's documentation, {source.Files.Count:N0} files, {Size(source)} of XML");
            }
            else if (MachineText.Find() is { } machine)
            {
                source = machine;
                Say($"1. text: this SDK carries no documentation, so the licences, package notes and manuals under /usr/share, {source.Files.Count:N0} files, {Size(source)}");
            }
            else
            {
                throw new UserErrorException(
                    "no text was found: the SDK beside the running runtime, in DOTNET_ROOT and at dotnet on PATH carries no documentation, and /usr/share no prose; name a folder of .txt or .jsonl files with --text");
            }

            return source;
        }

        private BpeTokenizer TrainTokenizer(IDocumentSource source)
        {
            if (Directory.Exists(_tokenizerFolder))
            {
                BpeTokenizer kept = Tokenizer.Load(_tokenizerFolder);
                Say($"2. tokenizer: {_tokenizerFolder}, {kept.VocabularySize:N0} pieces, is there already");
                return kept;
            }

            Recipe recipe = RecipeFile.Parse(ReadRecipe(), RecipeResource, variable: null, settings);
            var options = new BpeTrainingOptions { VocabularySize = recipe.Model!.VocabularySize, AllowsFewer = true, Threads = threads };
            using var display = ProgressDisplay.Start("tokenizer", 0, "characters");
            var progress = new Relay<BpeTrainingProgress>(p => display.Report(p.Characters, p.TotalPieces > 0 ? $"{p.Pieces:N0} of {p.TotalPieces:N0} pieces" : null));
            IEnumerable<string> documents = source.Read(0).Where(document => document.Fault is null).Select(document => document.Text);
            var tokenizer = new BpeTokenizer(BpeTrainer.Train(documents, options, progress, stop));
            string unfinished = _tokenizerFolder + ".tmp";
            tokenizer.Save(unfinished);
            Directory.Move(unfinished, _tokenizerFolder);
            Say($"2. tokenizer: {tokenizer.VocabularySize:N0} pieces, BPE with byte fallback, in {_tokenizerFolder}");
            return tokenizer;
        }

        private Manifest Prepare(IDocumentSource source, BpeTokenizer tokenizer)
        {
            var options = new PreparationOptions
            {
                Deduplicate = true,
                ValidationShare = source.Files.Sum(static file => file.Bytes) < FewBytes ? 0.1 : 0.01,
                Threads = threads,
                TokenizerFiles = [.. Directory.GetFiles(_tokenizerFolder).Order(StringComparer.Ordinal)],
            };
            Manifest manifest = DataCommand.Run(_dataFolder, source, tokenizer, options, ranks: null, stop);
            if (manifest.Train.Tokens == 0 || manifest.Validation.Tokens < 2)
            {
                throw new UserErrorException($"{_dataFolder}: too little text or too few documents to train and to validate on; name more with --text, after deleting {folder}");
            }

            double bytesPerToken = (double)manifest.Train.TextBytes / manifest.Train.Tokens;
            Say($"3. data: {manifest.Train.Documents:N0} documents, {manifest.Train.Tokens:N0} tokens to train on, {manifest.Validation.Tokens:N0} to validate on, {bytesPerToken:0.00} bytes a token, in {_dataFolder}");
            return manifest;
        }

        // The first sitting decides how many steps this machine does in the time; later ones keep to it.
        private Recipe ChooseRecipe(Manifest manifest, BpeTokenizer tokenizer)
        {
            string path = Path.Combine(folder, TrainingRun.RecipeName);
            if (File.Exists(path))
            {
                return RecipeFile.Read(path, settings);
            }

            Recipe recipe = RecipeFile.Parse(ReadRecipe(), RecipeResource, Environment.GetEnvironmentVariable(RecipeFile.Variable), settings) with
            {
                Data = new DataSettings { Path = _dataFolder },
                Threads = threads,
            };
            recipe = recipe with { Model = recipe.Model! with { VocabularySize = tokenizer.VocabularySize } };
            if (text.Length > 0)
            {
                // What the recipe begins samples with is of the SDK's documentation.
                recipe = recipe with { Samples = recipe.Samples with { Prompts = [""] } };
            }

            if (settings.Any(setting => setting.StartsWith("budget.", StringComparison.Ordinal)))
            {
                return recipe;
            }

            TrainingPlan plan = TrainingPlan.Create(recipe);
            using Backend backend = TrainingRun.OpenDevice(recipe);
            TimeSpan step = TrainingSpeed.Measure(plan.Shape, backend, stop) * plan.AccumulationSteps;
            double steps = Math.Min(time * ShareForTraining / step, MostEpochs * manifest.Train.Tokens / plan.TokensPerStep);
            return recipe with { Budget = new BudgetSettings { Steps = Math.Max(plan.WarmupSteps + 1, (long)steps) } };
        }

        private void Report(TrainingRun run, BpeTokenizer tokenizer, ValidationMetrics trained)
        {
            using TokenShards shards = TokenShards.Open(_dataFolder);
            EvaluationTokens tokens = EvaluationTokens.FromShards(shards, Split.Validation, tokenizer, run.Plan.Recipe.Validation.Tokens);
            int[] training = new int[shards.TokenCount(Split.Train)];
            shards.ReadTokens(Split.Train, 0, training);
            NGramBaselines tables = NGramBaselines.Count(training, tokenizer.VocabularySize);
            (Score unigram, Score bigram) = (tables.Unigram(tokens), tables.Bigram(tokens));
            ValidationMetrics untrained = MetricsLog.Read(Path.Combine(folder, MetricsLog.FileName)).OfType<ValidationMetrics>().First();

            Say($"5. validation: {tokens.TargetCount:N0} tokens, {tokens.ByteCount:N0} bytes of text that was not trained on");
            Say($"   {"",-26}{"loss",8}{"perplexity",13}{"bits per byte",15}");
            Row("untrained model", untrained.Loss, untrained.BitsPerByte!.Value);
            Row("unigram table", unigram.Loss, unigram.BitsPerByte);
            Row("interpolated bigram table", bigram.Loss, bigram.BitsPerByte);
            Row($"this model", trained.Loss, trained.BitsPerByte!.Value);

            TrainingState state = run.Trainer.State;
            Say($"   {state.Tokens:N0} tokens in {ProgressDisplay.Duration(TimeSpan.FromSeconds(state.Seconds))}, {state.Tokens / state.Seconds:N0} tokens/s");
            Say($"6. samples, at temperature 0.7:");
            using var generator = new TextGenerator(run.Trainer.Model, run.Backend, tokenizer);
            var options = new GenerationOptions { MaxTokens = 60, Temperature = 0.7, TopP = 0.95, Seed = 1, Overflow = ContextOverflow.Sliding };
            string[] prompts = Prompts(shards, tokenizer);
            foreach (string prompt in prompts)
            {
                Say($"   “{prompt}”{string.Concat(generator.Generate(prompt, options)).ReplaceLineEndings(" ")}");
            }

            Say($"The run is in {folder}. Try next:");
            string model = Quoted(folder);
            Say($"   tinyllama generate {model} -p {Quoted(prompts[0])}");
            Say($"   tinyllama serve {model}");
            Say($"   tinyllama eval {model} --tasks perplexity");
            Say($"   tinyllama export {model} --out my-llama");
        }

        // One word to a shell, whatever is in it.
        private static string Quoted(string text) =>
            text.All(static c => char.IsAsciiLetterOrDigit(c) || c is '/' or '.' or '-' or '_') ? text : $"'{text.Replace("'", "'\\''", StringComparison.Ordinal)}'";

        // What documents that the model has not seen begin with.
        private static string[] Prompts(TokenShards shards, BpeTokenizer tokenizer)
        {
            const int Wanted = 3;
            int count = (int)Math.Min(4096, shards.TokenCount(Split.Validation));
            int[] tokens = new int[count];
            shards.ReadTokens(Split.Validation, 0, tokens);
            int[] starts = new int[count];
            int documents = shards.ReadDocumentStarts(Split.Validation, 0, count, starts);
            List<string> prompts = [];
            for (int d = 0; d + 1 < documents && prompts.Count < Wanted; d++)
            {
                string document = tokenizer.Decode(tokens.AsSpan(starts[d]..starts[d + 1]));
                string[] words = document.Split(' ', StringSplitOptions.RemoveEmptyEntries);
                if (words.Length >= 8)
                {
                    prompts.Add(string.Join(' ', words.Take(4)).ReplaceLineEndings(" "));
                }
            }

            return prompts.Count > 0 ? [.. prompts] : ["The"];
        }

        private void Row(string name, double loss, double bitsPerByte) =>
            Say($"   {name,-26}{loss,8:0.000}{Math.Exp(loss),13:#,0.0}{bitsPerByte,15:0.000}");

        private void Say(FormattableString line) => output.WriteLine(line.ToString(CultureInfo.InvariantCulture));

        private static string Size(IDocumentSource source) => ProgressDisplay.Quantity(source.Files.Sum(static file => file.Bytes), "bytes");

        private static string ReadRecipe()
        {
            using Stream stream = typeof(QuickstartCommand).Assembly.GetManifestResourceStream(RecipeResource)!;
            using var reader = new StreamReader(stream);
            return reader.ReadToEnd();
        }
    }

    // Progress<T> would post to another thread; a bar may be told from any.
    private sealed class Relay<T>(Action<T> report) : IProgress<T>
    {
        public void Report(T value) => report(value);
    }
}
