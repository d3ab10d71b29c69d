using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Inference;
using TinyLlama.Model;
using TinyLlama.Tests.Model;

namespace TinyLlama.Tests.Inference;

public sealed class DraftTests : IDisposable
{
    private static readonly ByteTokenizer s_tokenizer = new();

    // Vocabularies that are padded differently; one draft nearly has the target's weights, the other has nothing of it.
    private readonly ModelRun _target = Random(31, ModelRun.TinyConfig() with { VocabularySize = 261, ContextLength = 64 });
    private readonly ModelRun _draft = Random(31, ModelRun.TinyConfig() with { VocabularySize = 261, ContextLength = 64 });
    private readonly ModelRun _padded = Random(77, ModelRun.TinyConfig() with { VocabularySize = 300, ContextLength = 64, Layers = 1 });

    public DraftTests()
    {
        float[] head = _draft.Read(_draft.Model.Parameters[^1].Values);
        var random = new Random(5);
        _draft.Backend.Write<float>(_draft.Model.Parameters[^1].Values, Array.ConvertAll(head, w => w + ((float)random.NextDouble() * 0.3f)));
        _draft.Model.Pack();
    }

    public static TheoryData<GenerationOptions, DType> Options => new()
    {
        { new GenerationOptions { Temperature = 0 }, DType.F16 },
        { new GenerationOptions { Temperature = 0, MaxTokens = 7 }, DType.F32 },
        { new GenerationOptions { Temperature = 0, MaxTokens = 300, Overflow = ContextOverflow.Sliding }, DType.Q8_0 },
        { new GenerationOptions { Temperature = 0, MaxTokens = 40, RepetitionPenalty = 1.3, PresencePenalty = 0.2, FrequencyPenalty = 0.1 }, DType.F16 },
        { new GenerationOptions { Temperature = 0, MaxTokens = 40, LogProbabilities = 2, StopTokens = ['q'] }, DType.Q8_0 },
        { new GenerationOptions { Temperature = 0, Json = JsonConstraint.FromSchema("""{"enum":["ab","abc",["abcabc","abc"]]}""") }, DType.F32 },
    };

    [Theory]
    [MemberData(nameof(Options))]
    public void A_greedy_text_is_the_same_with_any_draft(GenerationOptions options, DType cacheType)
    {
        using var generator = new TextGenerator(_target.Model, _target.Backend, s_tokenizer, cacheType: cacheType);
        (int[] tokens, string text, Generation plain) = Run(generator, options);
        Assert.Equal((0, 0), plain.Drafted);
        using DraftModel near = Model(_draft, 3);
        using DraftModel far = Model(_padded, 5);
        foreach (Draft draft in (Draft[])[near, far, new PromptLookup(4)])
        {
            generator.Draft = draft;
            (int[] drafted, string draftedText, Generation generation) = Run(generator, options);
            Assert.Equal(tokens, drafted);
            Assert.Equal(text, draftedText);
            Assert.Equal(plain.Finish, generation.Finish);
            Assert.Equal(plain.LogProbabilities.Select(token => token.Chosen.LogProbability), generation.LogProbabilities.Select(token => token.Chosen.LogProbability));
            Assert.Equal(tokens.Length - 1, generation.Decode.Tokens);
        }
    }

    [Theory]
    [InlineData(0)]
    [InlineData(0.9)]
    public void What_the_model_itself_proposes_is_always_accepted(double temperature)
    {
        using var generator = new TextGenerator(_target.Model, _target.Backend, s_tokenizer, cacheType: DType.F32);
        using DraftModel draft = Model(_target, 4);
        generator.Draft = draft;
        var options = new GenerationOptions { Temperature = temperature, TopP = 0.9, MaxTokens = 31, RepetitionPenalty = 1.1, FrequencyPenalty = 0.3 };
        (_, _, Generation generation) = Run(generator, options with { LogitBias = new Dictionary<int, double> { [256] = -1e9, [257] = -1e9 } });

        // The first token has no draft; of the other 30 each fifth follows a whole draft.
        Assert.Equal(31, generation.Tokens.Count);
        Assert.Equal((24, 24), generation.Drafted);
    }

    [Theory]
    [MemberData(nameof(Options))]
    public void A_text_is_the_same_with_what_is_looked_up_at_any_temperature(GenerationOptions options, DType cacheType)
    {
        using var generator = new TextGenerator(_target.Model, _target.Backend, s_tokenizer, cacheType: cacheType);
        (int proposed, int accepted) = (0, 0);
        var likely = "abc\"[],".ToDictionary(letter => (int)letter, _ => 4.0);
        for (ulong seed = 0; seed < 5; seed++)
        {
            GenerationOptions sampled = options with { Temperature = 0.6, TopK = 40, Seed = seed, LogitBias = likely };
            generator.Draft = null;
            (int[] tokens, string text, Generation plain) = Run(generator, sampled);
            generator.Draft = new PromptLookup(4);
            (int[] drafted, string draftedText, Generation generation) = Run(generator, sampled);
            Assert.Equal(tokens, drafted);
            Assert.Equal(text, draftedText);
            Assert.Equal(plain.Finish, generation.Finish);
            (proposed, accepted) = (proposed + generation.Drafted.Proposed, accepted + generation.Drafted.Accepted);
        }

        Assert.InRange(accepted, 1, proposed - 1);
    }

    [Theory]
    [InlineData(1, 1, 0)]
    [InlineData(0.7, 0.8, 0)]
    [InlineData(1.5, 1, 0.3)]
    public void Sampled_texts_have_the_models_distribution(double temperature, double topP, double presence)
    {
        const int Texts = 3000;
        int[] letters = ['a', 'b', 'c'];
        var options = new GenerationOptions
        {
            Temperature = temperature,
            TopP = topP,
            PresencePenalty = presence,
            MaxTokens = 4,
            LogitBias = Enumerable.Range(0, 258).Except(letters).ToDictionary(id => id, _ => double.NegativeInfinity),
        };
        using var generator = new TextGenerator(_target.Model, _target.Backend, s_tokenizer, cacheType: DType.F32);
        using DraftModel near = Model(_draft, 2);
        using DraftModel far = Model(_padded, 3);
        foreach (Draft draft in (Draft[])[near, far, new PromptLookup(2)])
        {
            generator.Draft = draft;
            var counts = new Dictionary<string, int>();
            (int proposed, int accepted) = (0, 0);
            for (int i = 0; i < Texts; i++)
            {
                (_, string text, Generation generation) = Run(generator, options with { Seed = (ulong)i });
                counts[text] = counts.GetValueOrDefault(text) + 1;
                (proposed, accepted) = (proposed + generation.Drafted.Proposed, accepted + generation.Drafted.Accepted);
            }

            Assert.InRange(accepted, 1, proposed - 1);
            (double chiSquare, int cells) = ChiSquare(counts, Texts4(options, letters), Texts);

            // Pearson's test: its deviation is the square root of 2 · cells.
            Assert.True(chiSquare < cells + (3.5 * Math.Sqrt(2 * cells)), $"{draft.GetType().Name}: {chiSquare:N1} of {cells} cells");
        }
    }

    [Fact]
    public void A_lookup_proposes_what_followed_the_longest_match_that_came_last_and_goes_on_with_it()
    {
        Assert.Equal([8, 1, 2], Proposed([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3], 3));
        Assert.Equal([8, 1], Proposed([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3], 2));
        Assert.Equal([6, 9, 2], Proposed([1, 2, 3, 5, 9, 2, 3, 6, 9, 2, 3], 3));
        Assert.Equal([5, 9, 2], Proposed([1, 2, 3, 5, 9, 2, 3, 6, 1, 2, 3], 3));
        Assert.Equal([6, 1, 2], Proposed([1, 2, 3, 5, 9, 2, 3, 6, 1, 2, 3], 3, first: 2));
        Assert.Equal([4, 4, 4], Proposed([4, 4, 4], 3));
        Assert.Equal([5, 6, 5, 6, 5], Proposed([9, 5, 6, 5, 6], 5));
        Assert.Empty(Proposed([3, 7, 5, 3], 3));
        Assert.Empty(Proposed([1, 2, 3], 3));
        Assert.Empty(Proposed([1], 3));

        static IEnumerable<int> Proposed(int[] input, int most, int first = 0)
        {
            var lookup = new PromptLookup(8);
            lookup.Learn(2, 2);
            lookup.Learn(4, 4);
            return lookup.Propose(input.AsSpan(first), 0, most).Select(token => token.Token);
        }
    }

    [Fact]
    public void A_lookup_proposes_more_where_all_came_and_less_where_nothing_did()
    {
        var lookup = new PromptLookup(6);
        (int Proposed, int Accepted)[] learned = [(0, 0), (2, 2), (4, 4), (6, 5), (6, 0), (3, 0), (1, 0), (1, 1)];
        Assert.Equal([2, 4, 6, 6, 3, 1, 1, 2], learned.Select(Next));
        lookup.Begin([1], new GenerationOptions(), CancellationToken.None);
        Assert.Equal(2, lookup.Propose([1, 1, 1], 0, 64).Count);
        Assert.Single(new PromptLookup(1).Propose([1, 1, 1], 0, 64));

        int Next((int Proposed, int Accepted) before)
        {
            if (before.Proposed > 0)
            {
                lookup.Learn(before.Proposed, before.Accepted);
            }

            return lookup.Propose([1, 1, 1], 0, 64).Count;
        }
    }

    [Fact]
    public void A_draft_of_no_or_too_many_tokens_is_refused()
    {
        Assert.Throws<UserErrorException>(() => new PromptLookup(0));
        Assert.Equal("a draft of 65 tokens is asked for, it must be 1 to 64", Assert.Throws<UserErrorException>(() => Model(_draft, 65)).Message);
    }

    [Fact]
    public void Stopping_while_a_draft_model_reads_the_prompt_leaves_it_usable()
    {
        using var generator = new TextGenerator(_target.Model, _target.Backend, s_tokenizer, cacheType: DType.F32);
        using DraftModel draft = Model(_draft, 3);
        generator.Draft = draft;
        using var stop = new CancellationTokenSource();
        Assert.Throws<OperationCanceledException>(() =>
        {
            foreach (string _ in generator.Generate("abcabc", new() { Temperature = 0 }, stop.Token))
            {
                stop.Cancel();
            }
        });
        var options = new GenerationOptions { Temperature = 0, MaxTokens = 20 };
        (int[] tokens, _, _) = Run(generator, options);
        generator.Draft = null;
        Assert.Equal(tokens, Run(generator, options).Tokens);
    }

    public void Dispose()
    {
        _target.Dispose();
        _draft.Dispose();
        _padded.Dispose();
    }

    // Every text of four letters with its probability: the product of those at each place.
    private IEnumerable<(string Text, double Probability)> Texts4(GenerationOptions options, int[] letters)
    {
        IEnumerable<(int[] Tokens, double Probability)> texts = [([], 1)];
        for (int place = 0; place < 4; place++)
        {
            texts = [.. texts.SelectMany(text => Next(text.Tokens).Select((p, i) => ((int[])[.. text.Tokens, letters[i]], text.Probability * p)))];
        }

        return texts.Where(text => text.Probability > 0).Select(text => (string.Concat(text.Tokens.Select(token => (char)token)), text.Probability));

        IEnumerable<double> Next(int[] tokens)
        {
            _target.Forward([256, 'a', 'b', 'c', 'a', 'b', .. tokens]);
            float[] logits = _target.Logits()[^261..][..258];
            Sampler.Distribution(logits, [], tokens, options);
            return letters.Select(letter => (double)logits[letter]).ToArray();
        }
    }

    // Texts that are too rare for the test count together.
    private static (double ChiSquare, int Cells) ChiSquare(
        Dictionary<string, int> counts, IEnumerable<(string Text, double Probability)> expectation, int total)
    {
        var cells = expectation.ToLookup(cell => cell.Probability * total < 5 ? "rare" : cell.Text).ToArray();
        double chiSquare = cells.Sum(cell =>
        {
            double expected = cell.Sum(text => text.Probability) * total;
            return Math.Pow(cell.Sum(text => counts.GetValueOrDefault(text.Text)) - expected, 2) / expected;
        });
        return (chiSquare, cells.Length);
    }

    private static (int[] Tokens, string Text, Generation Generation) Run(TextGenerator generator, GenerationOptions options)
    {
        Generation generation = generator.Generate("abcab", options);
        string text = generation.ToString();
        return ([.. generation.Tokens], text, generation);
    }

    private static DraftModel Model(ModelRun run, int tokens) => new(run.Model, run.Backend, 258, 64, tokens, DType.F32);

    private static ModelRun Random(int seed, ModelConfig config)
    {
        var run = new ModelRun(config, 64, Keep.Nothing);
        run.Randomize(seed);
        return run;
    }
}
