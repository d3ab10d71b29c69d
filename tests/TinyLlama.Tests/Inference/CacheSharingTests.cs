using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Inference;
using TinyLlama.Model;
using TinyLlama.Tests.Model;

namespace TinyLlama.Tests.Inference;

public sealed class CacheSharingTests : IDisposable
{
    private const int Context = 200;

    private readonly ModelRun _run = new(
        ModelRun.TinyConfig() with { VocabularySize = 258, ContextLength = Context }, Context, Keep.Nothing, threads: 2);

    public CacheSharingTests() => _run.Randomize(21);

    public void Dispose() => _run.Dispose();

    [Fact]
    public void A_text_that_begins_like_another_takes_its_full_blocks()
    {
        using var engine = new InferenceEngine(_run.Model, _run.Backend, sequences: 4, cacheType: DType.F32);
        int[] text = Text(150, seed: 1);
        CachedSequence first = engine.Begin(text);
        Assert.Equal(0, first.Length);
        engine.Feed(first, text);
        int free = engine.Cache.FreeBlocks;

        CachedSequence second = engine.Begin(text);
        Assert.Equal(128, second.Length);
        Assert.Equal(free, engine.Cache.FreeBlocks);
        engine.Feed(second, text.AsMemory(128));
        AssertLogits(engine, text);

        // The last token is always fed, and a block with one other token is another block.
        Assert.Equal(64, engine.Begin(text.AsSpan(0, 128)).Length);
        int[] other = [.. text];
        other[100]++;
        Assert.Equal(64, engine.Begin(other).Length);
    }

    [Fact]
    public void Blocks_are_found_after_their_text_ended_until_the_room_is_needed()
    {
        using var engine = new InferenceEngine(_run.Model, _run.Backend, sequences: 2, cacheBlocks: 5, cacheType: DType.F32);
        int[] old = Text(129, seed: 1);
        int[] recent = Text(129, seed: 2);
        Run(engine, old);
        Run(engine, recent);
        Assert.Equal((5, 4), (engine.Cache.FreeBlocks, engine.Cache.PublishedBlocks));
        Assert.Equal(128, Found(engine, old));
        Assert.Equal(128, Found(engine, recent));

        // Two blocks are needed: one was never full, the other is the end of what was unused for longest.
        Run(engine, Text(70, seed: 3));
        Assert.Equal(64, Found(engine, old));
        Assert.Equal(128, Found(engine, recent));
        Run(engine, Text(200, seed: 4));
        Assert.Equal(0, Found(engine, old));
    }

    [Fact]
    public void A_block_that_changes_is_found_by_its_new_tokens()
    {
        using var engine = new InferenceEngine(_run.Model, _run.Backend, sequences: 2, cacheType: DType.F32);
        int[] text = Text(130, seed: 1);
        CachedSequence sequence = engine.Begin(text);
        engine.Feed(sequence, text);
        engine.Truncate(sequence, 100);
        int[] other = [.. text.AsSpan(0, 100), .. Text(30, seed: 2)];
        engine.Feed(sequence, other.AsMemory(100));
        AssertLogits(engine, other);
        Assert.Equal(64, Found(engine, text));
        Assert.Equal(128, Found(engine, other));
    }

    [Fact]
    public void A_sequence_begun_without_its_text_shares_nothing()
    {
        using var engine = new InferenceEngine(_run.Model, _run.Backend, sequences: 2, cacheType: DType.F32);
        int[] text = Text(150, seed: 1);
        engine.Feed(engine.Begin(), text);
        Assert.Equal(0, engine.Cache.PublishedBlocks);
        Assert.Equal(0, engine.Begin(text).Length);
    }

    [Fact]
    public void Texts_that_become_alike_share_blocks_too()
    {
        using var engine = new InferenceEngine(_run.Model, _run.Backend, sequences: 2, tokensPerForward: 260, cacheType: DType.F32);
        int[] text = Text(130, seed: 1);
        CachedSequence[] both = [engine.Begin(text), engine.Begin(text)];
        engine.Forward(new Continuation(both[0], text), new Continuation(both[1], text));
        Assert.Equal(engine.Cache.BlockCount - 4, engine.Cache.FreeBlocks);
    }

    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(3)]
    public void Whatever_sequences_share_each_has_the_bits_of_its_own_tokens(int seed)
    {
        var random = new Random(seed);
        using var engine = new InferenceEngine(_run.Model, _run.Backend, sequences: 6, tokensPerForward: 64, cacheBlocks: 12, cacheType: DType.F32);
        int[][] stems = [Text(Context, 1), Text(Context, 2)];
        var open = new List<(CachedSequence Sequence, List<int> Tokens)>();
        (int forks, int found) = (0, 0);
        for (int round = 0; round < 500; round++)
        {
            int choice = open.Count == 0 ? 0 : random.Next(10);
            (CachedSequence sequence, List<int> tokens) = open.Count == 0 ? default : open[random.Next(open.Count)];
            if (choice == 0 && open.Count < 6)
            {
                int[] text = [.. stems[random.Next(2)].AsSpan(0, random.Next(Context)), random.Next(258)];
                CachedSequence begun = engine.Begin(text);
                found += begun.Length;
                open.Add((begun, [.. text.AsSpan(0, begun.Length)]));
            }
            else if (choice == 1 && open.Count < 6)
            {
                open.Add((engine.Fork(sequence), [.. tokens]));
                forks++;
            }
            else if (choice == 2)
            {
                engine.End(sequence);
                open.Remove((sequence, tokens));
            }
            else if (choice == 3)
            {
                int length = random.Next(sequence.Length + 1);
                engine.Truncate(sequence, length);
                tokens.RemoveRange(length, tokens.Count - length);
            }
            else if (tokens.Count < Context)
            {
                // Often what another sequence has there, so that blocks become alike.
                int count = Math.Min(random.Next(1, 60), Context - tokens.Count);
                int stem = tokens.Count == 0 ? random.Next(2) : Array.FindIndex(stems, text => text[0] == tokens[0]);
                int[] next = stem < 0 || random.Next(6) == 0 ? Text(count, random.Next()) : [.. stems[stem].AsSpan(tokens.Count, count)];
                if (engine.TryReserve(sequence, tokens.Count + count))
                {
                    tokens.AddRange(next);
                    engine.Feed(sequence, next);
                    AssertLogits(engine, [.. tokens]);
                }
            }
        }

        open.ForEach(entry => engine.End(entry.Sequence));
        Assert.Equal(engine.Cache.BlockCount, engine.Cache.FreeBlocks);
        Assert.True(forks > 5 && found > 500, $"{forks} forks, {found} tokens found");
    }

    [Theory]
    [InlineData(1, 5, 0)]
    [InlineData(2, 6, 0)]
    [InlineData(3, 9, 0)]
    [InlineData(4, 5, 8)]
    [InlineData(5, 6, 3)]
    [InlineData(6, 9, 8)]
    public async Task Texts_that_share_a_small_cache_get_the_tokens_that_each_gets_alone(int seed, int cacheBlocks, int lookup)
    {
        var random = new Random(seed);
        var tokenizer = new ByteTokenizer();
        string[] stems = ["", new('s', 70), new('t', 150)];
        (string Prompt, GenerationOptions Options, int Completions)[] requests = [.. Enumerable.Range(0, 24).Select(i => (
            stems[i % 3] + new string((char)('a' + i), random.Next(1, 30)),
            new GenerationOptions
            {
                MaxTokens = random.Next(1, 120),
                Temperature = i % 3 == 0 ? 0 : 1.5,
                Seed = (ulong)(100 * i),
                FrequencyPenalty = i % 2,
                Overflow = ContextOverflow.Sliding,
            },
            random.Next(1, 4)))];
        var alone = new List<string[]>();
        using (var generator = new TextGenerator(_run.Model, _run.Backend, tokenizer))
        {
            foreach ((string prompt, GenerationOptions options, int completions) in requests)
            {
                alone.Add([.. Enumerable.Range(0, completions)
                    .Select(i => Ids(generator.Generate(prompt, options with { Seed = options.Seed + (ulong)i })))]);
            }
        }

        using var batch = new BatchGenerator(
            _run.Model, _run.Backend, tokenizer, places: 5, cacheBytes: cacheBlocks * KeyValueCache.BlockBytes(_run.Backend, _run.Model.Config, DType.F16), lookup: lookup);
        Assert.Equal(cacheBlocks, batch.CacheBlocks);
        async Task<string[]> Request(int i)
        {
            await Task.Delay(random.Next(60), TestContext.Current.CancellationToken);
            (string prompt, GenerationOptions options, int completions) = requests[i];
            return await Task.WhenAll(batch.TrySubmit(batch.Encode(prompt), options, completions)!.Select(Ids));
        }

        async Task Cancelled(int i)
        {
            using var stop = new CancellationTokenSource();
            int most = random.Next(20);
            IReadOnlyList<BatchGeneration> texts = batch.TrySubmit(batch.Encode(requests[i].Prompt), requests[i].Options, 2, stop.Token)!;
            try
            {
                await foreach (GeneratedToken token in texts[0])
                {
                    if (--most < 0)
                    {
                        await stop.CancelAsync();
                    }
                }
            }
            catch (OperationCanceledException)
            {
            }

            await stop.CancelAsync();
        }

        Task<string[]>[] whole = [.. Enumerable.Range(0, requests.Length).Select(Request)];
        await Task.WhenAll(Enumerable.Range(0, requests.Length).Select(Cancelled));
        string[][] together = await Task.WhenAll(whole);
        Assert.Equal(alone, together);
        while (batch.Running + batch.Waiting > 0)
        {
            await Task.Yield();
        }

        Assert.Equal(0, batch.UsedCacheBlocks);
        Assert.True(lookup > 0 || batch.ProposedTokens == 0);
        Assert.True(batch.Preemptions > 0 && batch.CachedPromptTokens > 0, $"{batch.Preemptions} preemptions, {batch.CachedPromptTokens} cached");
    }

    [Fact]
    public async Task Completions_compute_their_prompt_once()
    {
        using var batch = new BatchGenerator(_run.Model, _run.Backend, new ByteTokenizer(), places: 4);
        int[] prompt = batch.Encode(new string('p', 100));
        IReadOnlyList<BatchGeneration> texts = batch.TrySubmit(prompt, new() { MaxTokens = 5 }, completions: 4)!;
        await Task.WhenAll(texts.Select(Ids));
        Assert.Equal((101, 303), (batch.PromptTokens, batch.CachedPromptTokens));
        Assert.Equal([0, 101, 101, 101], texts.Select(text => text.CachedPromptTokens));

        BatchGeneration again = batch.TrySubmit(prompt, new() { MaxTokens = 5 })![0];
        await Ids(again);
        Assert.Equal(64, again.CachedPromptTokens);
    }

    [Fact]
    public void A_cache_smaller_than_one_context_is_refused()
    {
        var error = Assert.Throws<UserErrorException>(
            () => new BatchGenerator(_run.Model, _run.Backend, new ByteTokenizer(), cacheBytes: 1000));
        Assert.Contains("one context of 200 tokens", error.Message, StringComparison.Ordinal);
    }

    private static int Found(InferenceEngine engine, int[] text)
    {
        CachedSequence sequence = engine.Begin(text);
        int length = sequence.Length;
        engine.End(sequence);
        return length;
    }

    private static void Run(InferenceEngine engine, int[] text)
    {
        CachedSequence sequence = engine.Begin(text);
        engine.Feed(sequence, text.AsMemory(sequence.Length));
        engine.End(sequence);
    }

    private static string Ids(Generation generation)
    {
        _ = generation.ToString();
        return string.Join(' ', generation.Tokens);
    }

    private static async Task<string> Ids(BatchGeneration generation)
    {
        var ids = new List<int>();
        await foreach (GeneratedToken token in generation)
        {
            ids.Add(token.Token);
        }

        return string.Join(' ', ids);
    }

    private static int[] Text(int count, int seed)
    {
        var random = new Random(seed);
        return [.. Enumerable.Range(0, count).Select(_ => random.Next(258))];
    }

    private void AssertLogits(InferenceEngine engine, int[] text)
    {
        float[] logits = new float[258];
        engine.ReadLogits(logits);
        _run.Forward(text);
        Assert.Equal(
            Array.ConvertAll(_run.Logits()[^258..], BitConverter.SingleToUInt32Bits), Array.ConvertAll(logits, BitConverter.SingleToUInt32Bits));
    }
}
