using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Inference;
using TinyLlama.Model;
using TinyLlama.Tests.Model;

namespace TinyLlama.Tests.Inference;

public sealed class BatchGeneratorTests : IDisposable
{
    private static readonly Dictionary<int, double> s_neverEnd = new() { [256] = double.NegativeInfinity, [257] = double.NegativeInfinity };

    private readonly ByteTokenizer _tokenizer = new();
    private readonly ModelRun _run = new(
        ModelRun.TinyConfig() with { VocabularySize = 258, ContextLength = 64 }, 64, Keep.Nothing);

    public BatchGeneratorTests() => _run.Randomize(31);

    public void Dispose() => _run.Dispose();

    [Theory]
    [InlineData(1, 0)]
    [InlineData(3, 0)]
    [InlineData(8, 0)]
    [InlineData(1, 8)]
    [InlineData(3, 4)]
    [InlineData(8, 2)]
    public async Task Texts_together_get_the_tokens_that_each_gets_alone(int places, int lookup)
    {
        var random = new Random(places);
        (string Prompt, GenerationOptions Options)[] requests = [.. Enumerable.Range(0, 20).Select(i => (
            new string((char)('a' + i), random.Next(1, 60)),
            new GenerationOptions
            {
                MaxTokens = random.Next(0, 50),
                Temperature = i % 3 == 0 ? 0 : i % 4 == 0 ? 0.3 : 1.5,
                Seed = (ulong)i,
                RepetitionPenalty = i % 2 == 0 ? 1 : 1.3,
                LogProbabilities = i % 7 == 0 ? 1 : null,
                Overflow = ContextOverflow.Sliding,
                StopStrings = i % 5 == 0 ? ["e", "xy"] : [],
            }))];
        var alone = new List<(string Text, int Tokens, FinishReason Finish)>();
        using (var generator = new TextGenerator(_run.Model, _run.Backend, _tokenizer))
        {
            foreach ((string prompt, GenerationOptions options) in requests)
            {
                Generation generation = generator.Generate(prompt, options);
                string text = generation.ToString();
                alone.Add((text, generation.Tokens.Count, generation.Finish));
            }
        }

        using var batch = new BatchGenerator(_run.Model, _run.Backend, _tokenizer, places: places, lookup: lookup);
        Task<(string, int, FinishReason)>[] together = [.. requests.Select(async request =>
        {
            await Task.Delay(random.Next(30), TestContext.Current.CancellationToken);
            BatchGeneration generation = batch.TrySubmit(request.Prompt, request.Options)!;
            return (await Text(generation), generation.NewTokens, generation.Finish);
        })];
        Assert.Equal(alone, await Task.WhenAll(together));
        Assert.Equal(alone.Sum(text => text.Tokens), batch.NewTokens);
        Assert.Equal(0, batch.Running);
        Assert.InRange(batch.AcceptedTokens, 0, batch.ProposedTokens);
        Assert.True(lookup > 0 || batch.ProposedTokens == 0);

        // What is tried beside others depends on when they came.
        Assert.True(lookup == 0 || places > 1 || (batch.AcceptedTokens > 0 && batch.AcceptedTokens < batch.ProposedTokens));
    }

    [Theory]
    [InlineData(1, 4)]
    [InlineData(4, 8)]
    [InlineData(20, 8)]
    public void What_followed_before_is_tried_while_few_texts_run(int texts, int lookup)
    {
        // Texts of one letter.
        using ModelRun run = new(ModelRun.TinyConfig() with { VocabularySize = 258, ContextLength = 400 }, 64, Keep.Nothing);
        Dictionary<int, double> onlyA = new() { ['a'] = 1e9 };
        (int plain, _, _) = Steps(0);
        (int steps, long proposed, long accepted) = Steps(lookup);
        Assert.Equal(100, plain);
        Assert.Equal(proposed, accepted);
        Assert.Equal(texts * 100, (texts * steps) + accepted);
        Assert.Equal(texts < 16, accepted > 0);

        (int Steps, long Proposed, long Accepted) Steps(int most)
        {
            var engine = new InferenceEngine(run.Model, run.Backend, sequences: texts, moreLogits: BatchScheduler.MoreLogits(most));
            using BatchScheduler scheduler = new(engine, texts, vocabulary: 258, most);
            for (int i = 0; i < texts; i++)
            {
                GenerationState state = new(_tokenizer, [1, 2], new() { MaxTokens = 100, LogitBias = onlyA }, 400, masks: null);
                Assert.True(scheduler.TryEnter(new BatchGeneration(2, state, CancellationToken.None)));
            }

            int count = 0;
            for (; scheduler.Running > 0; count++)
            {
                Assert.Empty(scheduler.Grow());
                scheduler.Step();
            }

            Assert.Equal(texts * 100, scheduler.NewTokens);
            return (count, scheduler.ProposedTokens, scheduler.AcceptedTokens);
        }
    }

    [Fact]
    public async Task A_text_that_is_cancelled_gives_its_place_to_the_next()
    {
        using var batch = new BatchGenerator(_run.Model, _run.Backend, _tokenizer, places: 1);
        using var stop = new CancellationTokenSource();
        var endless = new GenerationOptions { MaxTokens = int.MaxValue, Overflow = ContextOverflow.Sliding, LogitBias = s_neverEnd };
        BatchGeneration first = batch.TrySubmit("a", endless, stop.Token)!;
        BatchGeneration second = batch.TrySubmit("b", new() { MaxTokens = 3, Temperature = 0 })!;
        await using (IAsyncEnumerator<GeneratedToken> pieces = first.GetAsyncEnumerator(TestContext.Current.CancellationToken))
        {
            Assert.True(await pieces.MoveNextAsync());
            await stop.CancelAsync();
            await Assert.ThrowsAnyAsync<OperationCanceledException>(async () =>
            {
                while (await pieces.MoveNextAsync())
                {
                }
            });
        }

        await Text(second);
        Assert.Equal((3, FinishReason.MaxTokens), (second.NewTokens, second.Finish));
    }

    [Fact]
    public async Task A_full_queue_takes_no_more_and_what_waits_ends_with_the_generator()
    {
        var endless = new GenerationOptions { MaxTokens = int.MaxValue, Overflow = ContextOverflow.Sliding, LogitBias = s_neverEnd };
        BatchGeneration running, waiting;
        using (var batch = new BatchGenerator(_run.Model, _run.Backend, _tokenizer, places: 1, queue: 1))
        {
            running = batch.TrySubmit("a", endless)!;
            while (batch.Running == 0)
            {
                await Task.Yield();
            }

            waiting = batch.TrySubmit("b", endless)!;
            Assert.Equal(1, batch.Waiting);
            Assert.Null(batch.TrySubmit("c", endless));
        }

        await Assert.ThrowsAsync<ObjectDisposedException>(() => Text(running));
        await Assert.ThrowsAsync<ObjectDisposedException>(() => Text(waiting));
    }

    [Fact]
    public async Task As_many_texts_are_taken_as_places_and_queue_hold_together()
    {
        var options = new GenerationOptions { MaxTokens = 3, LogitBias = s_neverEnd };
        using var batch = new BatchGenerator(_run.Model, _run.Backend, _tokenizer, places: 3, queue: 2);
        Assert.Null(batch.TrySubmit([1, 2], options, completions: 6));
        IReadOnlyList<BatchGeneration> five = batch.TrySubmit([1, 2], options, completions: 5)!;
        await Task.WhenAll(five.Select(Text));
        Assert.All(five, text => Assert.Equal(3, text.NewTokens));

        // Places are free again when their texts end.
        BatchGeneration[] again = [.. Enumerable.Range(0, 5).Select(_ => batch.TrySubmit("a", options)!)];
        Assert.All(again, Assert.NotNull);
        await Task.WhenAll(again.Select(Text));
    }

    [Fact]
    public async Task Completions_of_a_prompt_are_those_of_seeds_in_a_row()
    {
        var options = new GenerationOptions { MaxTokens = 20, Seed = 7 };
        using var batch = new BatchGenerator(_run.Model, _run.Backend, _tokenizer, places: 3, queue: 4);
        int[] prompt = batch.Encode("abc");
        Assert.Equal([256, 'a', 'b', 'c'], prompt);
        Assert.Null(batch.TrySubmit(prompt, options, completions: 8));
        IReadOnlyList<BatchGeneration> together = batch.TrySubmit(prompt, options, completions: 4)!;
        string[] texts = await Task.WhenAll(together.Select(Text));
        Assert.Equal(4, texts.Distinct().Count());
        for (ulong i = 0; i < 4; i++)
        {
            Assert.Equal(texts[i], await Text(batch.TrySubmit("abc", options with { Seed = 7 + i })!));
        }
    }

    [Fact]
    public async Task Waiting_texts_that_nobody_wants_leave_the_queue()
    {
        using var batch = new BatchGenerator(_run.Model, _run.Backend, _tokenizer, places: 1, queue: 1);
        using var stop = new CancellationTokenSource();
        using var abandon = new CancellationTokenSource();
        var endless = new GenerationOptions { MaxTokens = int.MaxValue, Overflow = ContextOverflow.Sliding, LogitBias = s_neverEnd };
        BatchGeneration running = batch.TrySubmit("a", endless, stop.Token)!;
        while (batch.Running == 0)
        {
            await Task.Yield();
        }

        BatchGeneration waiting = batch.TrySubmit("b", endless, abandon.Token)!;
        Assert.Null(batch.TrySubmit("c", endless));
        await abandon.CancelAsync();
        BatchGeneration next = batch.TrySubmit("c", new() { MaxTokens = 2, LogitBias = s_neverEnd })!;
        await Assert.ThrowsAnyAsync<OperationCanceledException>(() => Text(waiting));
        await stop.CancelAsync();
        await Assert.ThrowsAnyAsync<OperationCanceledException>(() => Text(running));
        await Text(next);
        Assert.Equal(2, next.NewTokens);
    }

    [Fact]
    public async Task Each_token_comes_with_its_log_probabilities_where_they_are_asked_for()
    {
        using var batch = new BatchGenerator(_run.Model, _run.Backend, _tokenizer);
        var options = new GenerationOptions { MaxTokens = 5, LogProbabilities = 2, LogitBias = s_neverEnd };
        await foreach (GeneratedToken token in batch.TrySubmit("abc", options)!)
        {
            Assert.Equal(token.Token, token.LogProbabilities!.Chosen.Token);
            Assert.Equal(2, token.LogProbabilities.Top.Count);
        }

        await foreach (GeneratedToken token in batch.TrySubmit("abc", options with { LogProbabilities = null })!)
        {
            Assert.Null(token.LogProbabilities);
        }
    }

    [Fact]
    public async Task An_embedding_is_the_mean_of_the_outputs_whatever_runs_beside_it()
    {
        string text = string.Concat(Enumerable.Range(0, 60).Select(i => (char)('a' + (i % 26))));
        using var batch = new BatchGenerator(_run.Model, _run.Backend, _tokenizer, places: 3, cacheType: DType.F32);
        int[] tokens = batch.Encode(text);
        BatchGeneration beside = batch.TrySubmit(tokens, new() { MaxTokens = 3, LogitBias = s_neverEnd })![0];
        BatchEmbedding[] embeddings = [.. Enumerable.Range(1, 6).Select(i => batch.TryEmbed(tokens.AsSpan(0, i * 10))!)];
        BatchEmbedding again = batch.TryEmbed(tokens.AsSpan(0, 60))!;
        float[][] vectors = await Task.WhenAll(embeddings.Select(embedding => embedding.Vector));
        Assert.Equal(vectors[5], await again.Vector);
        await Text(beside);
        for (int i = 0; i < 6; i++)
        {
            _run.Forward(tokens[..((i + 1) * 10)]);
            float[] output = _run.Read(_run.Workspace.Output((i + 1) * 10));
            double[] mean = [.. Enumerable.Range(0, vectors[i].Length).Select(c => output.Where((_, at) => at % vectors[i].Length == c).Average(x => (double)x))];
            double length = Math.Sqrt(mean.Sum(x => x * x));
            Assert.All(mean.Zip(vectors[i]), pair => Assert.Equal(pair.First / length, pair.Second, 1e-6));
        }
    }

    [Theory]
    [InlineData(false, 2)]
    [InlineData(true, 3)]
    public void A_long_prompt_is_fed_in_smaller_parts_beside_a_text(bool isBesideText, int expected)
    {
        using ModelRun run = new(ModelRun.TinyConfig() with { VocabularySize = 258, ContextLength = 400 }, 64, Keep.Nothing);
        using BatchScheduler scheduler = new(new InferenceEngine(run.Model, run.Backend, sequences: 2), places: 2, vocabulary: 258);
        if (isBesideText)
        {
            GenerationState state = new(_tokenizer, [1, 2], new() { LogitBias = s_neverEnd }, 400, masks: null);
            Assert.True(scheduler.TryEnter(new BatchGeneration(2, state, CancellationToken.None)));
            scheduler.Step();
        }

        BatchEmbedding embedding = new(new int[300], run.Model.Config.Channels, CancellationToken.None);
        Assert.True(scheduler.TryEnter(embedding));
        int steps = 0;
        for (; !embedding.Vector.IsCompleted; steps++)
        {
            scheduler.Step();
        }

        Assert.Equal(expected, steps);
    }

    [Fact]
    public async Task An_embedding_may_fill_the_context_and_may_be_stopped()
    {
        using var batch = new BatchGenerator(_run.Model, _run.Backend, _tokenizer, places: 1);
        Assert.Equal(_run.Model.Config.Channels, (await batch.TryEmbed(batch.Encode(new string('a', 63)))!.Vector).Length);
        Assert.Throws<UserErrorException>(() => batch.TryEmbed(batch.Encode(new string('a', 64))));
        Assert.Throws<UserErrorException>(() => batch.TryEmbed([]));
        Assert.Throws<UserErrorException>(() => batch.TryEmbed([258]));
        await Assert.ThrowsAnyAsync<OperationCanceledException>(() => batch.TryEmbed([1], new CancellationToken(canceled: true))!.Vector);
    }

    [Fact]
    public async Task A_damaged_model_fails_the_text_and_not_the_generator()
    {
        _run.Model.Parameters[^1].Values.HostSpan<float>()[0] = float.NaN;
        _run.Model.Pack();
        using var batch = new BatchGenerator(_run.Model, _run.Backend, _tokenizer, places: 2);
        for (int i = 0; i < 3; i++)
        {
            await Assert.ThrowsAsync<UserErrorException>(() => Text(batch.TrySubmit("a", new() { MaxTokens = 2 })!));
        }
    }

    [Fact]
    public void What_cannot_fit_is_refused_at_once()
    {
        using var batch = new BatchGenerator(_run.Model, _run.Backend, _tokenizer);
        Assert.Throws<UserErrorException>(() => batch.TrySubmit(new string('a', 64), new() { MaxTokens = 1 }));
        Assert.Throws<UserErrorException>(() => batch.TrySubmit("a", new() { Temperature = -1 }));
    }

    private static async Task<string> Text(BatchGeneration generation)
    {
        string text = "";
        await foreach (GeneratedToken token in generation)
        {
            text += token.Text;
        }

        return text;
    }
}
