using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Inference;
using TinyLlama.Model;
using TinyLlama.Tests.Model;

namespace TinyLlama.Tests.Inference;

public sealed class BeamSearchTests : IDisposable
{
    // The tokens a, b, c, BOS and EOS; the model's vocabulary is padded.
    private static readonly PlaceTokenizer s_letters = new("abc"u8.ToArray(), end: null);

    private readonly ModelRun _small = Random(ModelRun.TinyConfig() with { VocabularySize = 7 }, 3);
    private readonly ModelRun _bytes = Random(ModelRun.TinyConfig() with { VocabularySize = 258, ContextLength = 160 }, 4);

    public void Dispose()
    {
        _small.Dispose();
        _bytes.Dispose();
    }

    [Theory]
    [InlineData(0)]
    [InlineData(1)]
    [InlineData(-0.5)]
    [InlineData(2)]
    public void Beams_for_every_text_find_all_texts_in_the_order_of_their_scores(double penalty)
    {
        var options = new BeamSearchOptions { Beams = 256, LengthPenalty = penalty, MaxTokens = 4 };
        IReadOnlyList<BeamText> found = BeamSearch.Run(_small.Model, _small.Backend, s_letters, 96, DType.F32, [3, 0], options);
        var expected = Texts([], 0).OrderByDescending(text => text.LogProbability / Math.Pow(text.Tokens.Length, penalty)).ToArray();

        // Of 3 letters: all texts of four, and those of up to three with either ending.
        Assert.Equal(81 + (2 * (1 + 3 + 9 + 27)), found.Count);
        Assert.Equal(expected.Select(text => string.Join(' ', text.Tokens)), found.Select(text => string.Join(' ', text.Tokens)));
        foreach ((BeamText text, (int[] tokens, double logProbability)) in found.Zip(expected))
        {
            Assert.Equal(logProbability, text.LogProbability, 1e-9);
            Assert.Equal(logProbability / Math.Pow(tokens.Length, penalty), text.Score, 1e-9);
            Assert.Equal(string.Concat(tokens.Where(token => token < 3).Select(token => "abc"[token])), text.Text);
            Assert.Equal(tokens[^1] < 3 ? FinishReason.MaxTokens : FinishReason.EndOfText, text.Finish);
        }

        IEnumerable<(int[] Tokens, double LogProbability)> Texts(int[] begun, double logProbability) =>
            LogSoftmax(_small, [3, 0, .. begun], 5).SelectMany((p, token) =>
                token < 3 && begun.Length < 3 ? Texts([.. begun, token], logProbability + p) : [([.. begun, token], logProbability + p)]);
    }

    [Theory]
    [InlineData(2, 0, 3)]
    [InlineData(3, 1, 2)]
    [InlineData(4, 1.5, 3)]
    [InlineData(5, 0.6, 7)]
    [InlineData(3, -1, 2)]
    [InlineData(2, -2, 2)]
    [InlineData(3, 2, 300)]
    public void Few_beams_find_what_the_definition_finds(int beams, double penalty, int ending)
    {
        var options = new BeamSearchOptions
        {
            Beams = beams,
            LengthPenalty = penalty,
            MaxTokens = 12,
            StopTokens = [.. Enumerable.Range(0, 256).Where(id => id % ending == 0)],
        };
        for (int round = 0; round < 8; round++)
        {
            // Prompts that end inside a cache block, and texts that go over into the next.
            int[] prompt = [256, .. Enumerable.Range(round, 59).Select(i => 'a' + (i * i % 7))];
            IReadOnlyList<BeamText> found = BeamSearch.Run(_bytes.Model, _bytes.Backend, new ByteTokenizer(), 160, DType.F32, prompt, options);
            var expected = Definition(prompt, options);
            Assert.Equal(expected.Select(text => string.Join(' ', text.Tokens)), found.Select(text => string.Join(' ', text.Tokens)));
            Assert.All(expected.Zip(found), pair => Assert.Equal(pair.First.Score, pair.Second.Score, 1e-9));
        }
    }

    [Fact]
    public void One_beam_is_the_greedy_text()
    {
        using var generator = new TextGenerator(_bytes.Model, _bytes.Backend, new ByteTokenizer());
        Generation greedy = generator.Generate("ab", new() { Temperature = 0, MaxTokens = 30 });
        string text = greedy.ToString();
        BeamText found = BeamSearch.Run(
            _bytes.Model, _bytes.Backend, new ByteTokenizer(), 160, DType.F16, [256, 'a', 'b'], new() { Beams = 1, MaxTokens = 30 }).Single();
        Assert.Equal((text, greedy.Finish), (found.Text, found.Finish));
        Assert.Equal(greedy.Tokens, found.Tokens);
    }

    [Fact]
    public void Without_a_number_of_tokens_texts_end_with_the_context()
    {
        var options = new BeamSearchOptions { Beams = 2, LengthPenalty = 3 };
        IReadOnlyList<BeamText> found = BeamSearch.Run(_small.Model, _small.Backend, s_letters, 9, DType.F32, [3], options);
        Assert.Contains(found, text => text.Finish == FinishReason.ContextFull && text.Tokens.Count == 8);
    }

    [Fact]
    public void Stopping_ends_the_search()
    {
        using var stop = new CancellationTokenSource();
        Assert.Throws<OperationCanceledException>(() => BeamSearch.Run(
            _bytes.Model, _bytes.Backend, new ByteTokenizer(), 160, DType.F16, [256], new(), length => { Assert.Equal(1, length); stop.Cancel(); }, stop.Token));
    }

    [Theory]
    [InlineData("0 beams are asked for, it must be 1 to 256")]
    [InlineData("length penalty is NaN, it must be a number (0 for none)")]
    [InlineData("max tokens is 0, it must be 1 or more")]
    public void Options_out_of_range_are_refused_by_name(string problem)
    {
        BeamSearchOptions options = problem[0] switch
        {
            '0' => new() { Beams = 0 },
            'l' => new() { LengthPenalty = double.NaN },
            _ => new() { MaxTokens = 0 },
        };
        Assert.Equal(problem, Assert.Throws<UserErrorException>(options.Validate).Message);
    }

    // Beam search without a cache: each text's distribution is that of a full forward.
    private List<(int[] Tokens, double Score)> Definition(int[] prompt, BeamSearchOptions options)
    {
        List<(int[] Tokens, double LogProbability)> beams = [([], 0)];
        List<(int[] Tokens, double Score)> ended = [];
        for (int length = 1; length <= options.MaxTokens && beams.Count > 0; length++)
        {
            var ranked = beams
                .SelectMany(beam => LogSoftmax(_bytes, [.. prompt, .. beam.Tokens], 258).Select((p, token) => (Tokens: (int[])[.. beam.Tokens, token], LogProbability: beam.LogProbability + p)))
                .OrderByDescending(text => text.LogProbability)
                .ToArray();
            ended.AddRange(ranked.Take(options.Beams).Where(Ends).Select(Scored));
            beams = [.. ranked.Where(text => !Ends(text)).Take(options.Beams)];
            ended = [.. ended.OrderByDescending(text => text.Score).Take(options.Beams)];
            if (ended.Count == options.Beams && Scored(beams[0]).Score <= ended[^1].Score)
            {
                return ended;
            }
        }

        return [.. ended.Concat(beams.Select(Scored)).OrderByDescending(text => text.Score).Take(options.Beams)];

        bool Ends((int[] Tokens, double LogProbability) text) => text.Tokens[^1] >= 256 || options.StopTokens.Contains(text.Tokens[^1]);

        (int[] Tokens, double Score) Scored((int[] Tokens, double LogProbability) text) =>
            (text.Tokens, text.LogProbability / Math.Pow(text.Tokens.Length, options.LengthPenalty));
    }

    private static double[] LogSoftmax(ModelRun run, int[] text, int tokens)
    {
        run.Forward(text);
        double[] logits = Array.ConvertAll(run.Logits()[^run.Model.Config.VocabularySize..][..tokens], logit => (double)logit);
        double logSum = Math.Log(logits.Sum(Math.Exp));
        return Array.ConvertAll(logits, logit => logit - logSum);
    }

    private static ModelRun Random(ModelConfig config, int seed)
    {
        var run = new ModelRun(config, 160, Keep.Nothing);
        run.Randomize(seed);
        return run;
    }
}
