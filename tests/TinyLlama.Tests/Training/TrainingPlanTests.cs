using TinyLlama.Compute;
using TinyLlama.Compute.Cpu;
using TinyLlama.Data;
using TinyLlama.Model;
using TinyLlama.Tests.Common;
using TinyLlama.Training;

namespace TinyLlama.Tests.Training;

public sealed class TrainingPlanTests
{
    private const string Least = "model: smoke\nbatch: {global_tokens: 1024, micro_sequences: 8}\nbudget: {steps: 100}\nschedule: {warmup: 10}\n";

    public static TheoryData<string> Recipes =>
        [.. Directory.GetFiles(Path.Combine(Checkout.Root, "recipes"), "*.yaml").Select(path => Path.GetFileName(path)!).Order()];

    [Theory]
    [MemberData(nameof(Recipes))]
    public void Every_recipe_of_the_repository_is_a_plan_without_warnings(string name)
    {
        Recipe recipe = RecipeFile.Read(Path.Combine(Checkout.Root, "recipes", name));
        TrainingPlan plan = TrainingPlan.Create(recipe, sequencesPerEpoch: 4000);
        Assert.Empty(plan.Warnings);
        Assert.Equal(recipe, RecipeFile.Parse(RecipeFile.Write(recipe), "written"));
    }

    [Fact]
    public void The_plan_of_TinyLlama_has_its_published_numbers()
    {
        TrainingPlan plan = TrainingPlan.Create(RecipeFile.Read(Path.Combine(Checkout.Root, "recipes", "tinyllama-1.1b.yaml")));
        Assert.Equal((2048, 8, 128), (plan.ContextLength, plan.SequencesPerMicroBatch, plan.AccumulationSteps));
        Assert.Equal((2_097_152, 1_430_512, 3_000_001_101_824), (plan.TokensPerStep, plan.Steps, plan.Tokens));
        Assert.Equal((2000, 7_314_370_560), (plan.WarmupSteps, plan.FlopsPerToken));
        Assert.Equal(1.75e-7, plan.LearningRateAt(0), 1e-18);
        Assert.Equal(4e-5, plan.LearningRateAt(1_430_511), 1e-12);
        Assert.Equal(800, plan.ValidationSequences);
        Assert.Null(plan.Epochs);

        // 24,000 tokens a second on each of 16 devices: the published 90 days.
        Assert.Equal(90, plan.Tokens / (16 * 24_000.0) / 86_400, 0.5);
    }

    [Theory]
    [InlineData(1, 1, "", "1 1 1 1")]
    [InlineData(1, 1, "reduction_lanes=4", "1 1 1 4")]
    [InlineData(4, 1, "", "4 4 1 4")]
    [InlineData(4, 2, "", "4 2 1 4")]
    [InlineData(4, 2, "shard=4", "4 4 1 4")]
    [InlineData(2, 1, "reduction_lanes=8", "2 2 1 8")]
    [InlineData(2, 1, "shard=8", "2 2 1 2")]
    [InlineData(2, 1, "zero=3", "2 2 3 8")]
    public void Ranks_share_the_micro_batches_of_a_step(int ranks, int neighbours, string setting, string expected)
    {
        Sharding sharding = EightMicroBatches(ranks, neighbours, setting).Sharding;
        Assert.Equal(expected, $"{sharding.Ranks} {sharding.Shards} {sharding.Stage} {sharding.Lanes}");
    }

    [Theory]
    [InlineData(3, "", "3 ranks cannot share a step in equal parts of one tree; use 2")]
    [InlineData(16, "", "ranks: reduction_lanes 16 is not a power of two that divides the 8 micro-batches of a step; change batch.micro_sequences or batch.global_tokens, or use 8 or less")]
    [InlineData(2, "reduction_lanes=6", "--set distribution.reduction_lanes=6: distribution.reduction_lanes 6 is not a power of two that divides the 8 micro-batches of a step; change batch.micro_sequences or batch.global_tokens, or use 8 or less")]
    [InlineData(4, "reduction_lanes=2", "--set distribution.reduction_lanes=2: distribution.reduction_lanes 2 is less than the 4 ranks, which need one each; use fewer ranks, or set it to 4, which changes last bits")]
    [InlineData(2, "zero=2; distribution.reduction_lanes=2", "--set distribution.zero=2: distribution.zero 2 sums gradients over ranks in each of the 8 micro-batches, so each is a lane of its own; set distribution.reduction_lanes to 8, or use zero: 1")]
    [InlineData(8, "shard=3", "--set distribution.shard=3: distribution.shard 3 is not a power of two")]
    public void Ranks_that_cannot_share_them_are_refused(int ranks, string setting, string expected) =>
        Assert.Equal(expected, Assert.Throws<UserErrorException>(() => EightMicroBatches(ranks, 1, setting)).Message);

    [Theory]
    [InlineData(2, "tensor=2", "2 1 1 1 2 1: 8")]
    [InlineData(2, "pipeline=2", "2 1 1 1 1 2: 8")]
    [InlineData(8, "tensor=2; pipeline=2", "8 1 1 2 2 2: 4")]
    [InlineData(6, "pipeline=3; reduction_lanes=4; model.layers=3", "6 1 1 4 1 3: 4")]
    public void Ranks_that_have_one_model_between_them_have_the_same_micro_batches(int ranks, string setting, string expected)
    {
        TrainingPlan plan = EightMicroBatches(ranks, ranks, setting);
        Sharding sharding = plan.Sharding;
        Assert.Equal(
            expected,
            $"{sharding.Ranks} {sharding.Shards} {sharding.Stage} {sharding.Lanes} {sharding.Tensor} {sharding.Pipeline}: {plan.MicroBatchesOfRank}");
    }

    [Theory]
    [InlineData(2, "tensor=4", "distribution.tensor 4 × distribution.pipeline 1 = 4 ranks have a model between them: start that many, or a multiple, not 2\n--set distribution.tensor=4: distribution.tensor 4 does not divide model.key_value_heads 2")]
    [InlineData(4, "tensor=2147483647; pipeline=2147483647", "distribution.tensor 2,147,483,647 × distribution.pipeline 2,147,483,647 = 4,611,686,014,132,420,609 ranks have a model between them: start that many, or a multiple, not 4")]
    [InlineData(3, "tensor=3", "--set distribution.tensor=3: distribution.tensor 3 is not a power of two")]
    [InlineData(2, "tensor=2; model.hidden=177", "--set distribution.tensor=2: distribution.tensor 2 does not divide model.hidden 177")]
    [InlineData(4, "pipeline=4", "--set distribution.pipeline=4: distribution.pipeline 4 is more than model.layers 2: every stage has a layer or more")]
    [InlineData(2, "pipeline=2; model.tied_embeddings=true", "--set distribution.pipeline=2: distribution.pipeline parts the embedding from the head, and model.tied_embeddings makes them one; use distribution.tensor")]
    [InlineData(2, "pipeline=2; samples.every_steps=5", "--set samples.every_steps=5: samples.every_steps wants text of a model that no stage of distribution.pipeline has whole; set it to 0")]
    [InlineData(2, "tensor=2; zero=2", "--set distribution.zero=2: distribution.zero is for ranks that shard a state, which distribution.tensor 2 × distribution.pipeline 1 divides already; leave it out")]
    [InlineData(4, "tensor=2; shard=2", "--set distribution.shard=2: distribution.shard is for ranks that shard a state, which distribution.tensor 2 × distribution.pipeline 1 divides already; leave it out")]
    [InlineData(2, "pipeline=2; wire=bf16", "--set distribution.wire=bf16: distribution.wire is for ranks that shard a state, which distribution.tensor 1 × distribution.pipeline 2 divides already; leave it out")]
    [InlineData(6, "tensor=2", "3 groups of ranks cannot share a step in equal parts of one tree; use 2")]
    public void Ranks_that_cannot_have_one_model_between_them_are_refused(int ranks, string setting, string expected) =>
        Assert.StartsWith(expected, Assert.Throws<UserErrorException>(() => EightMicroBatches(ranks, 1, setting)).Message, StringComparison.Ordinal);

    [Fact]
    public void What_would_fit_can_be_shared_by_the_ranks()
    {
        using CpuBackend backend = CpuBackend.Create(1);
        TrainingPlan plan = EightMicroBatches(2, 1, "");
        Assert.All(new MemoryPlan(plan, backend).Choices(), choice => Assert.Equal(plan.SequencesPerStep / 2, choice.Sequences));
    }

    private static TrainingPlan EightMicroBatches(int ranks, int neighbours, string setting)
    {
        string[] settings = ["batch.micro_sequences=2", .. setting.Split("; ", StringSplitOptions.RemoveEmptyEntries).Select(
            static s => s.Contains('.', StringComparison.Ordinal) ? s : "distribution." + s)];
        return TrainingPlan.Create(RecipeFile.Parse(Least, "r", null, settings), ranks: ranks, neighbours: neighbours);
    }

    [Fact]
    public void Three_trillion_tokens_are_rounded_up_to_whole_steps()
    {
        Recipe recipe = RecipeFile.Read(
            Path.Combine(Checkout.Root, "recipes", "tinyllama-1.1b.yaml"), "budget.tokens=3e12");
        Assert.Equal(1_430_512, TrainingPlan.Create(recipe).Steps);
    }

    [Fact]
    public void Epochs_are_counted_in_the_sequences_of_the_data()
    {
        Recipe recipe = RecipeFile.Parse(Least, "r", null, "budget.epochs=2.5");
        TrainingPlan plan = TrainingPlan.Create(recipe, sequencesPerEpoch: 100);
        Assert.Equal(16, plan.Steps);
        Assert.Equal(2.56, plan.Epochs!.Value, 1e-12);
    }

    [Fact]
    public void A_schedule_in_tokens_has_the_same_rates_as_in_steps()
    {
        TrainingPlan bySteps = TrainingPlan.Create(RecipeFile.Parse(Least, "r"));
        TrainingPlan byTokens = TrainingPlan.Create(RecipeFile.Parse(Least, "r", null, "schedule.by=tokens", "schedule.warmup=10240"));
        Assert.Equal(10, byTokens.WarmupSteps);
        Assert.All(Enumerable.Range(0, 101), step => Assert.Equal(bySteps.LearningRateAt(step), byTokens.LearningRateAt(step), 1e-15));
    }

    [Fact]
    public void What_happens_at_a_step_follows_from_its_number()
    {
        TrainingPlan plan = TrainingPlan.Create(RecipeFile.Parse(
            Least + "validation: {every_steps: 40}\nsamples: {every_steps: 50}\ncheckpoints: {every_steps: 30}", "r"));
        Assert.Equal([0, 40, 80, 100], Enumerable.Range(0, 101).Where(step => plan.ValidatesAt(step)));
        Assert.Equal([0, 50, 100], Enumerable.Range(0, 101).Where(step => plan.SamplesAt(step)));
        Assert.Equal([30, 60, 90, 100], Enumerable.Range(0, 101).Where(step => plan.SavesAt(step)));

        plan = TrainingPlan.Create(RecipeFile.Parse(
            Least + "validation: {every_steps: 0}\nsamples: {every_steps: 0}\ncheckpoints: {every_steps: 0}", "r"));
        Assert.Equal([100], Enumerable.Range(0, 101).Where(step => plan.ValidatesAt(step)));
        Assert.DoesNotContain(Enumerable.Range(0, 101), step => plan.SamplesAt(step));
        Assert.Equal([100], Enumerable.Range(0, 101).Where(step => plan.SavesAt(step)));
    }

    [Theory]
    [InlineData("batch.global_tokens=1000", "--set batch.global_tokens=1000: batch.global_tokens 1,000 is not a multiple of micro-batch 8 × context 64 = 512; use 512 or 1,024")]
    [InlineData("batch.global_tokens=640", "--set batch.global_tokens=640: batch.global_tokens 640 is not a multiple of micro-batch 8 × context 64 = 512; use 512 or 1,024, or batch.micro_sequences 5")]
    [InlineData("batch.global_tokens=5", "--set batch.global_tokens=5: batch.global_tokens 5 is not a multiple of micro-batch 8 × context 64 = 512; use 512")]
    [InlineData("batch.micro_sequences=2147483647", "--set batch.micro_sequences=2147483647: batch.micro_sequences 2,147,483,647 × context 64 = 137,438,953,408 tokens in one micro-batch, but 16,777,216 are the most; let it accumulate more micro-batches")]
    [InlineData("batch.context=128", "--set batch.context=128: batch.context 128 is more than the model's context of 64; raise model.context too")]
    [InlineData("optimizer.min_learning_rate=4e-4", "--set optimizer.min_learning_rate=4e-4: optimizer.min_learning_rate 0.0004 is not below optimizer.learning_rate 0.0004: the rate would not fall; for that say schedule.kind: constant")]
    [InlineData("schedule.warmup=100", "--set schedule.warmup=100: schedule.warmup of 100 steps is not less than the run of 100 steps; use about 5")]
    [InlineData("budget.epochs=3", "--set budget.epochs=3: budget.epochs needs the data, which is not known here; give budget.tokens or budget.steps")]
    [InlineData("budget.steps=1e12", "--set budget.steps=1e12: budget.steps: 1,000,000,000,000 steps of 1,099,511,627,776 tokens are more than anybody trains", "batch.global_tokens=1099511627776", "batch.micro_sequences=1024")]
    [InlineData("model.heads=3", "model.channels 64 is not a multiple of heads 3")]
    public void A_number_that_does_not_fit_is_refused_with_the_arithmetic(string set, string message, params string[] more)
    {
        var error = Assert.Throws<UserErrorException>(() => TrainingPlan.Create(RecipeFile.Parse(Least, "r", null, [set, .. more])));
        Assert.Contains(message, error.Message.Split('\n'));
    }

    [Fact]
    public void All_that_is_missing_or_wrong_is_said_at_once()
    {
        var error = Assert.Throws<UserErrorException>(() => TrainingPlan.Create(RecipeFile.Parse(
            "optimizer:\n  learning_rate: 1e-4\n  min_learning_rate: 2e-4\n", "r")));
        string[] problems = error.Message.Split('\n');
        Assert.Equal(4, problems.Length);
        Assert.StartsWith("model is missing: name a preset (smoke, quickstart,", problems[0], StringComparison.Ordinal);
        Assert.Equal("batch.global_tokens is missing: how many tokens is one step?", problems[1]);
        Assert.Equal("budget is missing: give one of budget.tokens, budget.steps and budget.epochs", problems[2]);
        Assert.StartsWith("r:3:3: optimizer.min_learning_rate 0.0002 is not below", problems[3], StringComparison.Ordinal);
    }

    [Fact]
    public void A_model_without_preset_needs_every_number()
    {
        Recipe recipe = RecipeFile.Parse("model: {channels: 64, layers: 2}\nbatch: {global_tokens: 64}\nbudget: {steps: 1}", "r");
        var error = Assert.Throws<UserErrorException>(() => TrainingPlan.Create(recipe));
        Assert.Contains("model lacks vocabulary, context, heads, key_value_heads, hidden: give every number, or name a preset", error.Message, StringComparison.Ordinal);
    }

    [Fact]
    public void Two_budgets_contradict_each_other()
    {
        Recipe recipe = RecipeFile.Parse("model: smoke\nbatch: {global_tokens: 512}\nbudget:\n  steps: 1\n  tokens: 512", "r");
        var error = Assert.Throws<UserErrorException>(() => TrainingPlan.Create(recipe));
        Assert.Equal("r:4:3: budget.steps contradicts budget.tokens: a budget is one of tokens, steps and epochs", error.Message);
    }

    [Fact]
    public void The_shape_comes_from_what_a_run_begins_with_and_may_not_contradict_it()
    {
        ModelConfig initial = Presets.Find("smoke")!.Config;
        Recipe recipe = RecipeFile.Parse("init: runs/a\nbatch: {global_tokens: 512}\nbudget: {steps: 10}", "r");
        Assert.Equal(initial, TrainingPlan.Create(recipe, initial).Model);

        recipe = RecipeFile.Parse("model: {preset: smoke, layers: 3}\ninit: runs/a\nbatch: {global_tokens: 512}\nbudget: {steps: 10}", "r");
        var error = Assert.Throws<UserErrorException>(() => TrainingPlan.Create(recipe, initial));
        Assert.Equal("r:1:24: model.layers is 3, but that of init runs/a is 2; leave model out to take its shape", error.Message);

        recipe = RecipeFile.Parse("model: {preset: smoke, context: 128, rope_factor: 2}\ninit: runs/a\nbatch: {global_tokens: 1024}\nbudget: {steps: 10}", "r");
        Assert.Equal(128, TrainingPlan.Create(recipe, initial).ContextLength);
    }

    [Fact]
    public void A_minimum_that_is_not_given_is_a_tenth_of_the_peak()
    {
        TrainingPlan plan = TrainingPlan.Create(RecipeFile.Parse(Least, "r", null, "optimizer.learning_rate=1e-5"));
        Assert.Equal(1e-6, plan.LearningRateAt(plan.Steps), 1e-18);
    }

    [Theory]
    [InlineData("schedule.warmup=0", "schedule.warmup is 0")]
    [InlineData("schedule.warmup=30", "more than a quarter")]
    [InlineData("schedule.decay_share=0.1", "has no effect")]
    [InlineData("validation.every_steps=1000", "more than the 100 steps")]
    public void What_is_allowed_but_odd_is_warned_of(string set, string words)
    {
        TrainingPlan plan = TrainingPlan.Create(RecipeFile.Parse(Least, "r", null, "validation.every_steps=50", set));
        Assert.Contains(words, Assert.Single(plan.Warnings), StringComparison.Ordinal);
    }

    [Fact]
    public void The_recipe_that_a_run_keeps_is_warned_of_as_little_as_the_one_that_began_it()
    {
        Recipe recipe = RecipeFile.Parse(Least, "r", null, "validation.every_steps=50");
        Assert.Empty(TrainingPlan.Create(recipe).Warnings);
        Assert.Empty(TrainingPlan.Create(RecipeFile.Parse(RecipeFile.Write(recipe), "r")).Warnings);
    }

    [Fact]
    public void Packed_weights_take_half_the_memory_in_bf16_and_all_else_the_same()
    {
        TrainingPlan plan = TrainingPlan.Create(RecipeFile.Parse(Least, "r"));
        using CpuBackend single = CpuBackend.Create(1), half = CpuBackend.Create(1, products: DType.BF16);
        using TrainingMemory before = TrainingMemory.Plan(plan.Shape, single), after = TrainingMemory.Plan(plan.Shape, half);
        Assert.Equal(
            before.Arenas.Select(arena => arena.Name == "packed weights" ? (arena.Name, arena.Bytes / 2) : arena), after.Arenas);
    }

    [Fact]
    public void A_run_that_memory_cannot_hold_is_refused_with_a_remedy()
    {
        TrainingPlan plan = TrainingPlan.Create(RecipeFile.Parse(Least, "r"));
        using CpuBackend backend = CpuBackend.Create(1);
        long bytes = new MemoryPlan(plan, backend).Bytes;
        new MemoryPlan(plan, backend, bytes).RequireFits();
        string Refusal(long available) => Assert.Throws<UserErrorException>(() => new MemoryPlan(plan, backend, available).RequireFits()).Message;
        Assert.Matches(
            @"^the run needs 0\.\d\d GiB \(weights 0\.\d\d GiB, .*, batch 0\.\d\d GiB\), but the device has 0\.\d\d GiB; try r:2:30: batch\.micro_sequences 4, which takes 0\.\d\d GiB$",
            Refusal(bytes - 1));
        Assert.EndsWith("; try a smaller model or context", Refusal(1), StringComparison.Ordinal);
    }

    [Fact]
    public void What_is_said_to_fit_fits_and_the_next_does_not()
    {
        TrainingPlan plan = TrainingPlan.Create(RecipeFile.Parse(Least, "r"));
        using CpuBackend backend = CpuBackend.Create(1);
        long available = new MemoryPlan(plan, backend).Bytes * 2 / 3;
        IReadOnlyList<MemoryChoice> choices = new MemoryPlan(plan, backend, available).Choices();
        Assert.Equal([Keep.Everything, Keep.Products, Keep.BlockInputs], choices.Select(choice => choice.Keep));
        foreach (MemoryChoice choice in choices)
        {
            Assert.Equal(0, plan.SequencesPerStep % choice.Sequences);
            Assert.Equal(choice.Bytes, BytesOf(choice.Sequences));
            Assert.InRange(choice.Bytes, 1, available);
            Assert.True(BytesOf(2 * choice.Sequences) > available);

            long BytesOf(int sequences)
            {
                using TrainingMemory memory = TrainingMemory.Plan(plan.Shape with { Keep = choice.Keep, Sequences = sequences }, backend);
                return memory.Arenas.Sum(arena => arena.Bytes);
            }
        }
    }

    [Fact]
    public void A_run_that_no_micro_batch_makes_fit_is_told_what_to_recompute()
    {
        TrainingPlan plan = TrainingPlan.Create(RecipeFile.Parse(Least, "r", null, "packed_weights=none"));
        using CpuBackend backend = CpuBackend.Create(1);
        using TrainingMemory least = TrainingMemory.Plan(plan.Shape with { Sequences = 1 }, backend);
        long available = least.Arenas.Sum(arena => arena.Bytes) - 1;
        var error = Assert.Throws<UserErrorException>(() => new MemoryPlan(plan, backend, available).RequireFits());
        Assert.Contains("; try r:2:30: batch.micro_sequences 1 and recompute elementwise, which takes", error.Message, StringComparison.Ordinal);
    }

    [Fact]
    public void Any_recipe_that_is_accepted_divides_evenly()
    {
        var random = new Random(3);
        int accepted = 0;
        for (int i = 0; i < 3000; i++)
        {
            Recipe recipe = RecipeFile.Parse(Least, "r") with
            {
                Batch = new BatchSettings
                {
                    GlobalTokens = random.Next(1, 9) * 64L * random.Next(1, 9),
                    MicroSequences = random.Next(1, 9),
                    Context = random.Next(1, 65),
                },
            };
            try
            {
                TrainingPlan plan = TrainingPlan.Create(recipe);
                accepted++;
                Assert.Equal(recipe.Batch.GlobalTokens, plan.SequencesPerMicroBatch * (long)plan.ContextLength * plan.AccumulationSteps);
            }
            catch (UserErrorException)
            {
                Assert.NotEqual(0, recipe.Batch.GlobalTokens % (recipe.Batch.MicroSequences * (long)recipe.Batch.Context!));
            }
        }

        Assert.InRange(accepted, 100, 2900);
    }
}
