using TinyLlama.Compute;
using TinyLlama.Inference;
using TinyLlama.Model;
using TinyLlama.Tests.Model;

namespace TinyLlama.Tests.Inference;

public sealed class InferenceEngineTests : IDisposable
{
    private readonly ModelRun _run = new(ModelRun.TinyConfig() with { ContextLength = 200 }, 200, Keep.Nothing, threads: 2);

    public InferenceEngineTests() => _run.Randomize(21);

    private int Vocabulary => _run.Model.Config.VocabularySize;

    [Theory]
    [InlineData(1)]
    [InlineData(7)]
    [InlineData(64)]
    [InlineData(100)]
    public void Prefill_and_decode_give_the_bits_of_one_full_forward(int prompt)
    {
        int[] tokens = Tokens(200, seed: 1);
        float[] expected = FullForward(tokens);
        using var engine = new InferenceEngine(_run.Model, _run.Backend, tokensPerForward: 48, cacheType: DType.F32);
        CachedSequence sequence = engine.Begin();
        engine.Feed(sequence, tokens.AsMemory(0, prompt));
        AssertRow(expected, prompt - 1, engine, part: 0, parts: 1);
        for (int position = prompt; position < tokens.Length; position++)
        {
            engine.Feed(sequence, tokens.AsMemory(position, 1));
            AssertRow(expected, position, engine, part: 0, parts: 1);
        }

        Assert.Equal(200, sequence.Length);
    }

    [Theory]
    [InlineData(DType.F16, 2e-3)]
    [InlineData(DType.Q8_0, 3e-2)]
    public void A_rounded_cache_changes_logits_little_and_takes_its_share_of_the_memory(DType type, double most)
    {
        int[] tokens = Tokens(200, seed: 1);
        float[] expected = FullForward(tokens);
        using var engine = new InferenceEngine(_run.Model, _run.Backend, tokensPerForward: 48, cacheType: type);
        CachedSequence sequence = engine.Begin();
        engine.Feed(sequence, tokens.AsMemory(0, 100));
        float[] logits = new float[engine.VocabularySize];
        for (int position = 100; position < tokens.Length; position++)
        {
            engine.Feed(sequence, tokens.AsMemory(position, 1));
            engine.ReadLogits(logits);
            Span<float> row = expected.AsSpan(position * logits.Length, logits.Length);
            double difference = Math.Sqrt(logits.Zip(row.ToArray(), (a, b) => Math.Pow(a - b, 2)).Sum());
            Assert.InRange(difference / Math.Sqrt(row.ToArray().Sum(a => (double)a * a)), 1e-6, most);
        }

        double share = KeyValueCache.BlockBytes(_run.Backend, _run.Model.Config, type) / (double)KeyValueCache.BlockBytes(_run.Backend, _run.Model.Config, DType.F32);
        Assert.Equal(type == DType.F16 ? 0.5 : 34 / 128.0, share, 0.02);
    }

    [Fact]
    public void Sequences_that_prefill_and_decode_together_give_the_bits_of_each_alone()
    {
        var random = new Random(8);
        using var engine = new InferenceEngine(_run.Model, _run.Backend, sequences: 5, tokensPerForward: 64, cacheType: DType.F32);
        int[][] tokens = [Tokens(130, 100), Tokens(64, 101), Tokens(65, 102), Tokens(3, 103), Tokens(200, 104)];
        float[][] expected = [.. tokens.Select(FullForward)];
        CachedSequence[] sequences = [.. tokens.Select(_ => engine.Begin())];
        int forwards = 0;
        while (sequences.Where((s, i) => s.Length < tokens[i].Length).Any())
        {
            // A random choice of sequences, each by one token or by many, as a scheduler would mix them.
            int room = engine.Capacity;
            var parts = new List<(int Index, int Count)>();
            foreach (int i in Enumerable.Range(0, 5).OrderBy(_ => random.Next()))
            {
                int left = tokens[i].Length - sequences[i].Length;
                int count = Math.Min(Math.Min(left, room), random.Next(3) switch { 0 => 0, 1 => 1, _ => random.Next(1, 40) });
                if (count > 0)
                {
                    parts.Add((i, count));
                    room -= count;
                }
            }

            if (parts.Count == 0)
            {
                continue;
            }

            engine.Forward([.. parts.Select(p => new Continuation(sequences[p.Index], tokens[p.Index].AsMemory(sequences[p.Index].Length, p.Count)))]);
            forwards++;
            for (int part = 0; part < parts.Count; part++)
            {
                int i = parts[part].Index;
                AssertRow(expected[i], sequences[i].Length - 1, engine, part, parts.Count);
            }
        }

        Assert.True(forwards > 5);
    }

    [Fact]
    public void Blocks_return_when_a_sequence_ends_and_serve_the_next_ones()
    {
        int[] tokens = Tokens(150, seed: 4);
        float[] expected = FullForward(tokens);
        using var engine = new InferenceEngine(_run.Model, _run.Backend, sequences: 2, cacheType: DType.F32);
        int all = engine.Cache.FreeBlocks;
        Assert.Equal(8, all);
        CachedSequence first = engine.Begin();
        CachedSequence second = engine.Begin();
        Assert.Throws<InvalidOperationException>(() => engine.Begin());
        engine.Feed(first, Tokens(65, seed: 5));
        Assert.Equal(all - 2, engine.Cache.FreeBlocks);
        engine.Feed(second, Tokens(10, seed: 6));
        engine.End(first);
        Assert.Equal(all - 1, engine.Cache.FreeBlocks);

        // Takes blocks that the first had, in another order.
        CachedSequence third = engine.Begin();
        engine.Feed(third, tokens);
        AssertRow(expected, 149, engine, part: 0, parts: 1);
        engine.Truncate(third, 0);
        engine.End(second);
        engine.Feed(third, tokens.AsMemory(0, 20));
        AssertRow(expected, 19, engine, part: 0, parts: 1);
        engine.End(third);
        Assert.Equal(all, engine.Cache.FreeBlocks);
    }

    [Fact]
    public void A_sequence_never_leaves_the_context()
    {
        using var engine = new InferenceEngine(_run.Model, _run.Backend, contextLength: 70, cacheType: DType.F32);
        CachedSequence sequence = engine.Begin();
        engine.Feed(sequence, Tokens(70, seed: 1));
        Assert.Throws<ArgumentException>(() => engine.Feed(sequence, Tokens(1, seed: 1)));
        Assert.Equal(70, sequence.Length);
    }

    [Fact]
    public void A_longer_context_than_the_trained_one_changes_no_bit_of_the_positions_within()
    {
        int[] tokens = Tokens(60, seed: 9);
        float[] expected = FullForward(tokens);
        using var engine = new InferenceEngine(_run.Model, _run.Backend, contextLength: 1000, cacheType: DType.F32);
        engine.Feed(engine.Begin(), tokens);
        AssertRow(expected, 59, engine, part: 0, parts: 1);
    }

    [Fact]
    public void A_decode_step_allocates_nothing()
    {
        using var engine = new InferenceEngine(_run.Model, _run.Backend, cacheType: DType.F32);
        CachedSequence sequence = engine.Begin();
        int[] tokens = Tokens(100, seed: 2);
        float[] logits = new float[Vocabulary];
        engine.Feed(sequence, tokens.AsMemory(0, 60));
        for (int i = 60; i < 80; i++)
        {
            engine.Feed(sequence, tokens.AsMemory(i, 1));
            engine.ReadLogits(logits);
        }

        long before = GC.GetAllocatedBytesForCurrentThread();
        for (int i = 80; i < 100; i++)
        {
            engine.Feed(sequence, tokens.AsMemory(i, 1));
            engine.ReadLogits(logits);
        }

        Assert.Equal(0, GC.GetAllocatedBytesForCurrentThread() - before);
    }

    public void Dispose() => _run.Dispose();

    private int[] Tokens(int count, int seed)
    {
        var random = new Random(seed);
        return [.. Enumerable.Range(0, count).Select(_ => random.Next(Vocabulary))];
    }

    private float[] FullForward(int[] tokens)
    {
        _run.Forward(tokens);
        return _run.Logits();
    }

    private void AssertRow(float[] expected, int row, InferenceEngine engine, int part, int parts)
    {
        float[] logits = new float[parts * Vocabulary];
        engine.ReadLogits(logits);
        Assert.Equal(
            Array.ConvertAll(expected[(row * Vocabulary)..((row + 1) * Vocabulary)], BitConverter.SingleToUInt32Bits),
            Array.ConvertAll(logits[(part * Vocabulary)..((part + 1) * Vocabulary)], BitConverter.SingleToUInt32Bits));
    }
}
