using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Model;
using TinyLlama.Tests.Common;
using TinyLlama.Training;

namespace TinyLlama.Tests.Training;

public sealed class RecipeTests
{
    private const string Least = "model: smoke\nbatch: {global_tokens: 1024}\nbudget: {steps: 10}\n";

    [Fact]
    public void A_recipe_without_optional_keys_has_the_defaults_of_TinyLlama()
    {
        Recipe recipe = RecipeFile.Parse(Least, "r.yaml");
        Assert.Equal(new Recipe
        {
            Preset = "smoke",
            Model = Presets.Find("smoke")!.Config,
            Batch = new BatchSettings { GlobalTokens = 1024 },
            Budget = new BudgetSettings { Steps = 10 },
        }, recipe);
        Assert.Equal((0.9, 0.95, 1e-8, 0.1, 1.0), (recipe.Optimizer.Beta1, recipe.Optimizer.Beta2, recipe.Optimizer.Epsilon,
            recipe.Optimizer.WeightDecay, recipe.Optimizer.Clip));
        Assert.Equal(DecayGroup.All, recipe.Optimizer.Decay);
    }

    [Theory]
    [InlineData("2097152", 2_097_152)]
    [InlineData("2_097_152", 2_097_152)]
    [InlineData("'2097152'", 2_097_152)]
    [InlineData("3e12", 3_000_000_000_000)]
    [InlineData("1.5e3", 1500)]
    public void Whole_numbers_may_have_underscores_and_exponents(string text, long number) =>
        Assert.Equal(number, RecipeFile.Parse($"{Least}schedule: {{warmup: {text}}}", "r").Schedule.Warmup);

    [Theory]
    [InlineData("optimizer: {learning_rate: 4e-4}", 4e-4)]
    [InlineData("optimizer: {learning_rate: 0.000_4}", 4e-4)]
    [InlineData("optimizer:\n  learning_rate: 4.0E-4", 4e-4)]
    public void Numbers_may_have_exponents(string yaml, double rate) =>
        Assert.Equal(rate, RecipeFile.Parse(Least + yaml, "r").Optimizer.LearningRate);

    [Theory]
    [InlineData("sead: 1", "r.yaml:4:1: sead is no key of a recipe; did you mean seed?")]
    [InlineData("learning_rate: 1", "r.yaml:4:1: learning_rate is no key of a recipe; did you mean optimizer.learning_rate?")]
    [InlineData("optimizer: {learning_rat: 1}", "r.yaml:4:13: optimizer.learning_rat is no key of a recipe; did you mean optimizer.learning_rate?")]
    [InlineData("schedule: {lr: 1}", "r.yaml:4:12: schedule.lr is no key of a recipe; below schedule may stand kind, by, warmup, decay_share, offset")]
    [InlineData("data:\n\tpath: d", "r.yaml:5:1: indented with a tab; YAML is indented with spaces")]
    [InlineData("optimiser: {beta1: 0.9}", "r.yaml:4:1: optimiser is no key of a recipe; did you mean optimizer?")]
    [InlineData("schedule: cosine", "r.yaml:4:1: schedule is a section; below it may stand kind, by, warmup, decay_share, offset")]
    [InlineData("seed: {a: 1}", "r.yaml:4:1: seed has keys below it, but a single value is wanted")]
    [InlineData("seed: [1]", "r.yaml:4:1: seed is a list, but one text is wanted")]
    [InlineData("seed: -1", "r.yaml:4:1: seed is '-1', but a whole number from 0 to 18446744073709551615 is wanted")]
    [InlineData("threads: many", "r.yaml:4:1: threads is 'many', but a whole number is wanted")]
    [InlineData("threads: 1.5", "r.yaml:4:1: threads is '1.5', but a whole number is wanted")]
    [InlineData("threads: 2000", "r.yaml:4:1: threads is 2000, but must be from 0 to 1,024")]
    [InlineData("optimizer: {learning_rate: nan}", "r.yaml:4:13: optimizer.learning_rate is 'nan', but a number above 0 is wanted")]
    [InlineData("optimizer: {beta2: 1}", "r.yaml:4:13: optimizer.beta2 is '1', but a number from 0 to below 1 is wanted")]
    [InlineData("recompute: yes", "r.yaml:4:1: recompute is 'yes', but one of these is wanted: none, elementwise, blocks")]
    [InlineData("precision: fp16", "r.yaml:4:1: precision is 'fp16', but one of these is wanted: auto, fp32, bf16")]
    [InlineData("budget: {steps: 5}", "r.yaml:4:10: budget.steps is already set at r.yaml:3:10")]
    [InlineData("seed: 1\nseed: 2", "r.yaml:5:1: seed is already set at r.yaml:4:1")]
    [InlineData("? [a]\n: 1", "r.yaml:4:3: a key is wanted")]
    [InlineData("init: &a x\ndata: {path: *a}", "r.yaml:5:8: data.path is an alias, which a recipe does not have")]
    [InlineData("--- \nseed: 1", "r.yaml:4:1: a second document begins; a recipe is one")]
    public void A_mistake_is_named_with_its_place_and_the_remedy(string yaml, string message)
    {
        var error = Assert.Throws<UserErrorException>(() => RecipeFile.Parse(Least + yaml, "r.yaml"));
        Assert.Equal(message, error.Message);
    }

    [Theory]
    [InlineData("- a", "r.yaml:1:1: a recipe is a mapping, lines of 'key: value'")]
    [InlineData("model: big", "r.yaml:1:1: model.preset is 'big', which is no preset; there are smoke, quickstart, tinyllama-16m, tinyllama-39m, tinyllama-120m, tinyllama-1.1b, tinyllama-1.1b-code-8k")]
    public void A_text_that_is_no_recipe_is_refused(string yaml, string message) =>
        Assert.Equal(message, Assert.Throws<UserErrorException>(() => RecipeFile.Parse(yaml, "r.yaml")).Message);

    [Theory]
    [InlineData("seed: [")]
    [InlineData("seed: 'a")]
    [InlineData("a: b: c")]
    [InlineData("%YAML 9")]
    public void Text_that_is_not_YAML_is_refused_with_its_place(string yaml)
    {
        var error = Assert.Throws<UserErrorException>(() => RecipeFile.Parse(yaml, "r.yaml"));
        Assert.Matches(@"^r\.yaml:\d+:\d+: not YAML: [^\n]+$", error.Message);
    }

    [Fact]
    public void All_mistakes_are_reported_at_once()
    {
        var error = Assert.Throws<UserErrorException>(() => RecipeFile.Parse(
            "model: smoke\nsead: 1\nthreads: x\n", "r", "batch=1", "oops", "recompute=always"));
        Assert.Equal(
            [
                "r:2:1: sead is no key of a recipe; did you mean seed?",
                "TINYLLAMA_SET batch=1: batch is a section; below it may stand global_tokens, micro_sequences, context",
                "--set oops: want key=value, such as optimizer.learning_rate=3e-4",
                "--set recompute=always: recompute is 'always', but one of these is wanted: none, elementwise, blocks",
                "r:3:1: threads is 'x', but a whole number is wanted",
            ],
            error.Message.Split('\n'));
    }

    [Fact]
    public void What_is_nearer_to_the_user_wins()
    {
        const string Yaml = "model: {preset: smoke, layers: 3}\nseed: 1\nthreads: 1\ninit: a";
        Recipe recipe = RecipeFile.Parse(Yaml, "r", "threads=2; seed=2", "seed=3");
        Assert.Equal((3UL, 2, "a"), (recipe.Seed, recipe.Threads, recipe.Init));
        Assert.Equal(Presets.Find("smoke")!.Config with { Layers = 3 }, recipe.Model);
        Assert.Equal("--set seed=3: seed", recipe.Origins.Describe("seed"));

        recipe = RecipeFile.Parse(Yaml, "r", null, "model=quickstart", "model.vocabulary=100");
        Assert.Equal(Presets.Find("quickstart")!.Config with { Layers = 3, VocabularySize = 100 }, recipe.Model);
    }

    [Fact]
    public void A_flag_replaces_the_budget_of_the_file_whatever_it_counts()
    {
        Recipe recipe = RecipeFile.Parse(Least, "r", null, "budget.tokens=4096");
        Assert.Equal(new BudgetSettings { Tokens = 4096 }, recipe.Budget);
    }

    [Fact]
    public void Flags_take_lists_and_any_text()
    {
        Recipe recipe = RecipeFile.Parse(Least, "r", null, "samples.prompts=[\"a, b\", c]", "init=C:\\runs\\x = y");
        Assert.Equal(["a, b", "c"], recipe.Samples.Prompts);
        Assert.Equal(@"C:\runs\x = y", recipe.Init);
        Assert.Equal(["one"], RecipeFile.Parse(Least, "r", null, "samples.prompts=one").Samples.Prompts);
    }

    [Fact]
    public void A_hostile_text_is_refused_without_harm()
    {
        foreach (string text in new[]
        {
            new string('[', 300_000), new string('{', 300_000), string.Concat(Enumerable.Repeat("a:\n ", 20_000)),
            "seed: " + new string('[', 300_000), new string('k', 500_000) + ": 1", "seed: " + new string('9', 100_000),
            "batch: {global_tokens: 99999999999999999999999999999999999}", "model: {layers: 2147483648}",
        })
        {
            Assert.Throws<UserErrorException>(() => RecipeFile.Parse(text, "r.yaml"));
        }
    }

    [Fact]
    public void A_file_that_is_missing_or_huge_is_refused()
    {
        string path = Path.Combine(Path.GetTempPath(), Path.GetRandomFileName());
        Assert.Equal($"{path}: there is no such recipe", Assert.Throws<UserErrorException>(() => RecipeFile.Read(path)).Message);
        try
        {
            File.WriteAllText(path, new string(' ', (1 << 20) + 1));
            Assert.StartsWith($"{path}: larger than", Assert.Throws<UserErrorException>(() => RecipeFile.Read(path)).Message);
        }
        finally
        {
            File.Delete(path);
        }
    }

    [Fact]
    public void Written_and_read_again_any_recipe_is_equal()
    {
        var random = new Random(7);
        for (int i = 0; i < 300; i++)
        {
            Recipe recipe = Any(random);
            string yaml = RecipeFile.Write(recipe);
            Assert.Equal(recipe, RecipeFile.Parse(yaml, "written"));
        }
    }

    [Fact]
    public void Every_key_is_documented()
    {
        string page = File.ReadAllText(Path.Combine(Checkout.Root, "docs", "formats", "recipe.md"));
        Assert.All(RecipeKeys.All, key => Assert.True(
            page.Contains($"`{key.Name}`", StringComparison.Ordinal)
            || (page.Contains($"`{key.Name[(key.Name.IndexOf('.', StringComparison.Ordinal) + 1)..]}`", StringComparison.Ordinal)
                && key.Name.Contains('.', StringComparison.Ordinal)),
            key.Name));
    }

    [Fact]
    public void Two_recipes_that_differ_in_a_prompt_are_not_equal()
    {
        Recipe recipe = RecipeFile.Parse(Least, "r");
        Recipe other = RecipeFile.Parse(Least + "samples: {prompts: [x]}", "r");
        Assert.NotEqual(recipe, other);
    }

    private static Recipe Any(Random random)
    {
        bool preset = random.Next(2) == 0;
        ModelConfig shape = Presets.All[random.Next(Presets.All.Count)].Config with
        {
            Layers = random.Next(1, 100),
            NormEpsilon = random.NextSingle() + 1e-9f,
            RopeTheta = random.NextSingle() * 1e6f + 1,
            RopeFactor = random.NextSingle() + 0.1f,
            TiedEmbeddings = random.Next(2) == 0,
        };
        long? Maybe(long value) => random.Next(2) == 0 ? value : null;
        return new Recipe
        {
            Preset = preset ? Presets.All[random.Next(Presets.All.Count)].Name : null,
            Model = preset || random.Next(2) == 0 ? shape : null,
            Init = AnyText(random),
            Initialization = (InitializationScheme)random.Next(2),
            Seed = (ulong)random.NextInt64() * 2,
            Data = new DataSettings { Path = random.Next(2) == 0 ? AnyText(random) : null, MaskedDocuments = random.Next(2) == 0 },
            Batch = new BatchSettings
            {
                GlobalTokens = random.NextInt64(0, 1L << 40),
                MicroSequences = random.Next(1, int.MaxValue),
                Context = (int?)Maybe(random.Next(1, 9999)),
            },
            Budget = new BudgetSettings
            {
                Tokens = Maybe(random.NextInt64(1, 1L << 60)),
                Steps = Maybe(random.NextInt64(1, 1L << 40)),
                Epochs = random.Next(2) == 0 ? random.NextDouble() + 1e-9 : null,
            },
            Optimizer = new OptimizerSettings
            {
                LearningRate = random.NextDouble() * 1e-5 + 1e-12,
                MinLearningRate = random.Next(2) == 0 ? random.NextDouble() : null,
                EmbeddingFactor = random.NextDouble() + 1e-9,
                HeadFactor = random.NextDouble() + 1e-9,
                Beta1 = random.NextDouble(),
                Beta2 = random.NextDouble(),
                Epsilon = random.NextDouble() + 1e-300,
                WeightDecay = random.NextDouble() * 1e20,
                Decay = (DecayGroup)random.Next(2),
                Clip = random.NextDouble() + 1e-9,
            },
            Schedule = new ScheduleSettings
            {
                Kind = (ScheduleKind)random.Next(4),
                By = (ScheduleUnit)random.Next(2),
                Warmup = random.NextInt64(1L << 60),
                DecayShare = 1 - random.NextDouble(),
                Offset = random.NextDouble(),
            },
            Validation = new ValidationSettings { EverySteps = random.NextInt64(), Tokens = random.NextInt64(1, 1L << 40) },
            Samples = new SampleSettings
            {
                EverySteps = random.NextInt64(),
                Prompts = [.. Enumerable.Range(0, random.Next(4)).Select(_ => AnyText(random))],
                MaxTokens = random.Next(1, int.MaxValue),
                Temperature = random.NextDouble(),
            },
            Checkpoints = new CheckpointSettings
            {
                EverySteps = random.NextInt64(),
                KeepLast = random.Next(1, int.MaxValue),
                KeepEvery = random.NextInt64(),
                KeepBest = random.Next(2) == 0,
            },
            Precision = new DType?[] { null, DType.F32, DType.BF16 }[random.Next(3)],
            PackedWeights = (PackedForms)random.Next(3),
            Keep = (Keep)random.Next((int)Keep.BlockInputs, (int)Keep.Everything + 1),
            Device = new Device[] { default, new(DeviceKind.Auto), new(DeviceKind.Cuda, random.Next(3)) }[random.Next(3)],
            Threads = random.Next(1025),
        };
    }

    private static string AnyText(Random random)
    {
        const string Awkward = "\"'\\:#{}[],&*!|>%@`- \t\r\n\0\u0007\u007f\u0085\u00a0\u2028\u2029\ufeff\ufffdäλ漢null~?";
        var text = new System.Text.StringBuilder();
        for (int i = random.Next(12); i > 0; i--)
        {
            _ = random.Next(5) switch
            {
                0 => text.Append(char.ConvertFromUtf32(0x1F600 + random.Next(50))),
                1 => text.Append((char)random.Next('a', 'z')),
                _ => text.Append(Awkward[random.Next(Awkward.Length)]),
            };
        }

        return text.ToString();
    }
}
