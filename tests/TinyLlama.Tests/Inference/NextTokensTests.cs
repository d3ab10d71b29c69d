using TinyLlama.Cli.Bench;
using TinyLlama.Compute;
using TinyLlama.Compute.Cuda;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Inference;
using TinyLlama.Model;
using TinyLlama.Tests.Common;
using TinyLlama.Tests.Model;

namespace TinyLlama.Tests.Inference;

/// <summary>Tokens from the likeliest logits are those from whole rows.</summary>
public sealed class NextTokensTests
{
    private const int Vocabulary = 2000;
    private const int Count = 256;
    private const int Seeds = 10;

    private static readonly ModelConfig s_config = new()
    {
        VocabularySize = 1002,
        ContextLength = 96,
        Layers = 2,
        Heads = 4,
        KeyValueHeads = 2,
        Channels = 64,
        Hidden = 104,
    };

    // Of 1,000 characters, BOS and EOS.
    private static readonly PlaceTokenizer s_tokenizer = new([.. Enumerable.Range(0, 1000).Select(i => (byte)(' ' + (i % 95)))], end: null);

    // Ways to choose that nearly always need none but the likeliest tokens.
    private static readonly GenerationOptions[] s_decided =
    [
        new() { Temperature = 0 },
        new() { Temperature = 0, LogProbabilities = 5 },
        new() { Temperature = 0.5 },
        new() { TopK = 40 },
        new() { TopK = 40, TopP = 0.95, Temperature = 0.8 },
        new() { TopP = 0.6, LogProbabilities = 0 },
        new() { TopP = 0.9, Temperature = 0.5, LogProbabilities = 20 },
        new() { MinP = 0.05 },
        new() { MinP = 0.1, TopP = 0.7 },
        new() { Temperature = 0, RepetitionPenalty = 1.2, LogProbabilities = 3 },
        new() { TopK = 40, TopP = 0.9, PresencePenalty = 0.5 },
        new() { TopK = 40, FrequencyPenalty = 0.5 },
        new() { MinP = 0.05, RepetitionPenalty = 1.1 },
        new() { TopP = 0.7, Temperature = 0.3, LogitBias = new Dictionary<int, double> { [7] = -100, [8] = double.NegativeInfinity } },
        new() { Temperature = 0, Json = JsonConstraint.AnyObject },
        new() { TopK = 5, Json = JsonConstraint.AnyObject, LogProbabilities = 1 },
    ];

    // Ways to choose that need whole rows.
    private static readonly GenerationOptions[] s_undecided =
    [
        new() { TopK = 256 },
        new() { Temperature = 0, RepetitionPenalty = 0.9 },
        new() { TopK = 40, PresencePenalty = -0.5 },
        new() { TopK = 40, FrequencyPenalty = -0.5 },
        new() { Temperature = 0, LogitBias = new Dictionary<int, double> { [7] = 100 } },
        new() { Temperature = 0, LogProbabilities = 257 },
    ];

    [Theory]
    [InlineData(0)]
    [InlineData(1)]
    [InlineData(2)]
    public void Likeliest_tokens_choose_as_the_whole_row_does_or_not_at_all(int digits)
    {
        var source = new Random(digits);
        (int asked, int decided) = (0, 0);
        for (int round = 0; round < 400; round++)
        {
            // From flat to peaked; rounded, so that many are equal.
            double deviation = source.NextDouble() * 5;
            float[] logits = [.. Enumerable.Range(0, Vocabulary).Select(_ => (float)Math.Round(deviation * Normal(source), digits))];
            var options = new GenerationOptions
            {
                Temperature = round % 8 == 0 ? 0 : 0.3 + (1.5 * source.NextDouble()),
                TopK = round % 3 == 0 ? source.Next(1, 300) : 0,
                TopP = round % 2 == 0 ? source.NextDouble() : 1,
                MinP = round % 5 == 0 ? source.NextDouble() * 0.2 : 0,
                RepetitionPenalty = round % 4 == 1 ? 1 + source.NextDouble() : 1,
                PresencePenalty = round % 7 == 1 ? source.NextDouble() * 5 : 0,
                FrequencyPenalty = round % 7 == 2 ? source.NextDouble() * 3 : 0,
                LogitBias = round % 6 == 1 ? Likeliest(logits).Take(20).ToDictionary(id => id, _ => -4 * source.NextDouble()) : new Dictionary<int, double>(),
            };
            if (!LikeliestTokens.MayDecide(options, Count))
            {
                continue;
            }

            int[] context = [.. Likeliest(logits).Where((_, rank) => rank % 5 == 0).Take(100)];
            asked += Seeds;
            decided += Decided(logits, options, source, context);
        }

        Assert.True(decided > asked / 2, $"{decided} of {asked} were decided");
        Assert.True(decided < asked, "some need the whole row");
    }

    [Fact]
    public void Tokens_whose_weights_round_to_the_same_are_in_the_order_of_the_whole_row()
    {
        // A hundred neighbours have the same weight, and of these the one with the smallest logit comes first.
        float[] logits = new float[Vocabulary];
        logits[0] = -1;
        for (int v = 1; v < logits.Length; v++)
        {
            logits[v] = MathF.BitDecrement(logits[v - 1]);
        }

        logits.AsSpan().Reverse();
        int decided = 0;
        for (int k = 1; k < Count; k++)
        {
            decided += Decided(logits, new() { Temperature = 100, TopK = k }, new Random(1));
        }

        Assert.InRange(decided, Seeds, Seeds * (Count - 2));
    }

    [Theory]
    [InlineData(float.NaN)]
    [InlineData(float.PositiveInfinity)]
    public void Logits_without_a_meaning_are_left_to_the_whole_row(float value)
    {
        var source = new Random(1);
        float[] row = Top([.. Enumerable.Range(0, Vocabulary).Select(_ => (float)Normal(source))], 1, source);
        SplitMix64 random = new(1);
        Assert.NotNull(Next(row, new() { Temperature = 0 }, [], ref random));
        row[3] = value;
        Assert.Null(Next(row, new() { Temperature = 0 }, [], ref random));
        Assert.Null(Next(row, new() { TopK = 5 }, [], ref random));
        row.AsSpan(0, Count).Fill(float.NegativeInfinity);
        Assert.Null(Next(row, new() { Temperature = 0 }, [], ref random));
    }

    [Fact]
    public void A_mask_leaves_the_choice_where_a_token_stays_that_is_likelier_than_those_not_known()
    {
        var source = new Random(1);
        float[] logits = [.. Enumerable.Range(0, Vocabulary).Select(_ => (float)(1.5 * Normal(source)))], row = Top(logits, 1, source);
        const int K = 5;
        GenerationOptions[] options = [new() { TopK = K }, new() { TopP = 0.5 }, new()];
        for (int masked = 0; masked < Count; masked++)
        {
            // The likeliest may not come, and none of the others.
            int[] forbidden = [.. Likeliest(logits).Take(masked), .. Likeliest(logits).Skip(Count)];
            float[] whole = [.. logits], known = row[..Count];
            Array.ForEach(forbidden, id => whole[id] = float.NegativeInfinity);
            for (int place = 0; place < Count; place++)
            {
                known[place] = whole[new TopLogitsRow(row).Column(place)];
            }

            foreach (GenerationOptions one in options)
            {
                SplitMix64 expected = new((ulong)masked), actual = expected;
                int? chosen = LikeliestTokens.Next(new TopLogitsRow(row), [.. known], isMasked: true, [], [], one, ref actual);
                Assert.True(one.TopK == 0 || masked < Count - 1 - K == chosen is not null, $"{masked} masked");
                if (chosen is int token)
                {
                    Assert.Equal(Sampler.Next([.. whole], [], [], one, ref expected), new TopLogitsRow(row).Column(token));
                }
            }
        }
    }

    [Fact]
    public void A_GPU_gives_the_tokens_of_whole_rows_and_reads_few_of_them()
    {
        CudaEmulator.Require();
        using ModelRun run = NewRun();
        foreach (GenerationOptions options in s_decided)
        {
            (int tokens, int rows, int wholeRows) = Compare(run.Model, run.Backend, s_tokenizer, options with { MaxTokens = 40, Seed = 3 });
            Assert.Equal(tokens, rows);
            Assert.InRange(wholeRows, 0, 2);
        }
    }

    [Fact]
    public void A_quantized_model_from_a_file_does_so_too()
    {
        CudaEmulator.Require();
        using LanguageModel model = LanguageModel.Load(SharedFiles.Require("goldens/gguf/tiny4-q8_0.gguf"), device: new Device(DeviceKind.Cuda));
        GenerationOptions[] options = [new() { Temperature = 0 }, new() { Temperature = 0.3 }, new() { TopK = 20, TopP = 0.9, LogProbabilities = 3 }, new() { MinP = 0.1 }];
        foreach (GenerationOptions one in options)
        {
            (int tokens, int rows, int wholeRows) = Compare(model.Model, model.Backend, model.Tokenizer, one with { MaxTokens = 12, Seed = 3 });
            Assert.Equal(tokens, rows);
            Assert.InRange(wholeRows, 0, 2);
        }
    }

    [Fact]
    public void What_needs_whole_rows_reads_nothing_else()
    {
        CudaEmulator.Require();
        using ModelRun run = NewRun();
        foreach (GenerationOptions options in s_undecided)
        {
            (int tokens, int rows, int wholeRows) = Compare(run.Model, run.Backend, s_tokenizer, options with { MaxTokens = 12, Seed = 3 });
            Assert.Equal((0, tokens), (rows, wholeRows));
        }
    }

    [Fact]
    public async Task Texts_that_need_whole_rows_and_others_run_together()
    {
        CudaEmulator.Require();
        GenerationOptions[] options = [new() { Temperature = 0 }, new() { TopK = 9, RepetitionPenalty = 0.8 }, new() { TopP = 0.5, LogProbabilities = 2 }];
        options = [.. options.Select(one => one with { MaxTokens = 20, Seed = 11 })];
        using ModelRun run = NewRun();
        (int[] Tokens, double[] LogProbabilities)[] alone;
        using (var generator = new TextGenerator(run.Model, run.Backend, s_tokenizer))
        {
            alone = [.. options.SelectMany(one => new[] { one, one with { Seed = one.Seed + 1 } }).Select(one =>
            {
                Generation generation = generator.Generate([5, 6, 7], one);
                _ = generation.ToString();
                return (generation.Tokens.ToArray(), generation.LogProbabilities.Select(p => p.Chosen.LogProbability).ToArray());
            })];
        }

        using var batch = new BatchGenerator(run.Model, run.Backend, s_tokenizer, places: 6);
        BatchGeneration[] together = [.. options.SelectMany(one => batch.TrySubmit([5, 6, 7], one, completions: 2)!)];
        for (int i = 0; i < together.Length; i++)
        {
            var tokens = new List<GeneratedToken>();
            await foreach (GeneratedToken token in together[i].WithCancellation(TestContext.Current.CancellationToken))
            {
                tokens.Add(token);
            }

            Assert.Equal(alone[i].Tokens, tokens.Select(token => token.Token));
            Assert.Equal(alone[i].LogProbabilities, tokens.Where(token => token.LogProbabilities is not null).Select(token => token.LogProbabilities!.Chosen.LogProbability));
        }
    }

    // How many seeds the likeliest tokens decide, each as the whole row does; where they do not, no number is drawn.
    private static int Decided(float[] logits, GenerationOptions options, Random source, params int[] context)
    {
        float[] row = Top(logits, options.Temperature == 0 ? 1 : options.Temperature, source);
        int decided = 0;
        for (ulong seed = 0; seed < Seeds; seed++)
        {
            SplitMix64 expected = new(seed), actual = new(seed);
            if (Next(row, options, context, ref actual) is int place)
            {
                decided++;
                Assert.Equal(Sampler.Next((float[])logits.Clone(), context, context, options, ref expected), new TopLogitsRow(row).Column(place));
            }

            Assert.Equal(expected.NextUniform(), actual.NextUniform());
        }

        return decided;
    }

    private static int? Next(float[] row, GenerationOptions options, int[] context, ref SplitMix64 random) =>
        LikeliestTokens.Next(new TopLogitsRow(row), row.AsSpan(0, Count).ToArray(), isMasked: false, context, context, options, ref random);

    private static ModelRun NewRun()
    {
        var run = new ModelRun(CudaBackend.Create(), s_config, 64, Keep.Nothing);
        run.Randomize(31);
        return run;
    }

    // The number of tokens, which are those of whole rows; how often the largest logits were found, and how many whole rows were read.
    private static (int Tokens, int Rows, int WholeRows) Compare(
        LlamaModel model, Backend backend, ITokenizer tokenizer, GenerationOptions options)
    {
        List<GeneratedToken> expected = FromWholeRows(model, backend, tokenizer, options);
        using var timed = new TimedBackend(backend);
        using var generator = new TextGenerator(model, timed, tokenizer);
        Generation generation = generator.Generate([5, 6, 7], options);
        _ = generation.ToString();
        Assert.Equal(expected.Select(token => token.Token), generation.Tokens);
        foreach ((LogProbabilities e, LogProbabilities a) in expected.Select(token => token.LogProbabilities!).Zip(generation.LogProbabilities))
        {
            Assert.Equal(e.Top.Select(token => token.Token), a.Top.Select(token => token.Token));
            foreach ((TokenLogProbability one, TokenLogProbability other) in e.Top.Append(e.Chosen).Zip(a.Top.Append(a.Chosen)))
            {
                Assert.Equal(one.LogProbability, other.LogProbability, 1e-4);
                Assert.Equal(one.Bytes.ToArray(), other.Bytes.ToArray());
            }
        }

        timed.EndRound();
        OperationTimes[] times = timed.TakeTimes();
        (int rows, int reads) = (Calls(nameof(Backend.TopLogits)), Calls(nameof(Backend.Read)));
        return (expected.Count, rows, reads - rows);

        int Calls(string operation) => times.SingleOrDefault(one => one.Operation.Name == operation)?.Calls ?? 0;
    }

    private static List<GeneratedToken> FromWholeRows(LlamaModel model, Backend backend, ITokenizer tokenizer, GenerationOptions options)
    {
        using var engine = new InferenceEngine(model, backend);
        var state = new GenerationState(tokenizer, [5, 6, 7], options, engine.ContextLength, new ConstraintCache(tokenizer).For(options.Json));
        CachedSequence sequence = engine.Begin();
        float[] logits = new float[engine.VocabularySize];
        var tokens = new List<GeneratedToken>();
        while (state.Finish == FinishReason.None)
        {
            engine.Feed(sequence, state.Input[sequence.Length..]);
            engine.ReadLogits(logits);
            tokens.Add(state.Accept(logits));
        }

        return tokens;
    }

    // What a device finds, with sums that are as far off as they may be.
    private static float[] Top(float[] logits, double temperature, Random source)
    {
        int[] order = Likeliest(logits);
        var likeliest = order.Take(Count).ToHashSet();
        float[] row = new float[TopLogitsRow.Width(Count)];
        double largest = logits[order[0]], before = 0, atOne = 0;
        int place = 0;
        for (int v = 0; v < logits.Length; v++)
        {
            if (likeliest.Contains(v))
            {
                (row[place], row[Count + place], row[(2 * Count) + place]) = (logits[v], v, Off(before));
                place++;
            }
            else
            {
                before += Math.Exp((logits[v] - largest) / temperature);
                atOne += Math.Exp(logits[v] - largest);
            }
        }

        (row[^2], row[^1]) = (Off(before), Off(atOne));
        return row;

        float Off(double sum) => (float)(sum * (1 + (0.99 * TopLogitsRow.OthersError * ((2 * source.Next(2)) - 1))));
    }

    private static int[] Likeliest(float[] logits) => [.. Enumerable.Range(0, logits.Length).OrderByDescending(v => logits[v]).ThenBy(v => v)];

    private static double Normal(Random source) =>
        Math.Sqrt(-2 * Math.Log(1 - source.NextDouble())) * Math.Cos(2 * Math.PI * source.NextDouble());
}
