using System.Text;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Inference;
using TinyLlama.Model;
using TinyLlama.Tests.Model;

namespace TinyLlama.Tests.Inference;

public sealed class TextGeneratorTests : IDisposable
{
    private readonly ByteTokenizer _tokenizer = new();
    private readonly ModelRun _run = new(
        ModelRun.TinyConfig() with { VocabularySize = 258, ContextLength = 64 }, 64, Keep.Nothing);

    private readonly List<ModelRun> _scripts = [];

    public TextGeneratorTests()
    {
        // Random weights, except that BOS and EOS never are the likeliest.
        _run.Randomize(31);
        Parameter head = _run.Model.Parameters[^1];
        _run.Backend.Zero(head.Values.RowRange(256, 2));
        _run.Model.Pack();
    }

    [Fact]
    public void Greedy_tokens_are_the_likeliest_of_full_forwards()
    {
        using TextGenerator generator = Generator();
        Generation generation = generator.Generate("ab", new() { Temperature = 0, MaxTokens = 20 });
        _ = generation.ToString();
        List<int> text = [256, 'a', 'b'];
        Assert.Equal(text, generation.PromptTokens);
        for (int i = 0; i < 20; i++)
        {
            _run.Forward([.. text]);
            float[] last = _run.Logits()[^258..];
            Assert.Equal(Array.IndexOf(last, last.Max()), generation.Tokens[i]);
            text.Add(generation.Tokens[i]);
        }

        Assert.Equal(FinishReason.MaxTokens, generation.Finish);
        Assert.Equal(19, generation.Decode.Tokens);
    }

    [Fact]
    public void The_same_seed_gives_the_same_text_and_another_seed_another()
    {
        using TextGenerator generator = Generator();
        Generation generation = generator.Generate("x", new() { MaxTokens = 30, Seed = 3 });
        string text = generation.ToString();
        Assert.Equal(text, generation.ToString());
        Assert.Equal(text, generator.Generate("x", new() { MaxTokens = 30, Seed = 3 }).ToString());
        Assert.NotEqual(text, generator.Generate("x", new() { MaxTokens = 30, Seed = 4 }).ToString());
    }

    [Fact]
    public void Pieces_are_whole_characters_and_together_the_decoded_text()
    {
        // Emoji of four bytes, one token each: none of the pieces may hold half of one.
        using TextGenerator generator = Script("a😀é😀b");
        string[] pieces = [.. generator.Generate("", new() { Temperature = 0, MaxTokens = 12 })];
        Assert.Equal(["a", "😀", "é", "😀", "b"], pieces);
    }

    [Fact]
    public void A_character_cut_off_by_the_end_becomes_the_replacement_character()
    {
        using TextGenerator generator = Script("a😀");
        Assert.Equal("a\ufffd", generator.Generate("", new() { Temperature = 0, MaxTokens = 3 }).ToString());
    }

    [Fact]
    public void End_of_text_ends_it_and_is_not_shown()
    {
        using TextGenerator generator = Script("one\u0003two", end: '\u0003');
        Generation generation = generator.Generate("", new() { Temperature = 0, MaxTokens = 20 });
        Assert.Equal("one", generation.ToString());
        Assert.Equal(FinishReason.EndOfText, generation.Finish);
        Assert.Equal(generator.Tokenizer.Eos, generation.Tokens[^1]);
    }

    [Fact]
    public void A_stop_string_across_tokens_ends_the_text_before_it()
    {
        using TextGenerator generator = Script("Hi.\nUs\nUser: more");
        Generation generation = generator.Generate("", new() { Temperature = 0, MaxTokens = 18, StopStrings = ["\nUser:"] });
        string[] pieces = [.. generation];
        Assert.Equal("Hi.\nUs", string.Concat(pieces));
        Assert.Equal(["H", "i", ".", "\nUs"], pieces);
        Assert.Equal(FinishReason.StopString, generation.Finish);
    }

    [Fact]
    public void A_stop_token_ends_the_text_and_is_not_shown()
    {
        using TextGenerator generator = Script("one two");
        Generation generation = generator.Generate("", new() { Temperature = 0, MaxTokens = 7, StopTokens = [3] });
        Assert.Equal("one", generation.ToString());
        Assert.Equal(FinishReason.StopToken, generation.Finish);
        Assert.Equal([0, 1, 2, 3], generation.Tokens);
    }

    [Fact]
    public void Log_probabilities_are_of_the_model_whatever_the_sampler_does()
    {
        using TextGenerator generator = Generator();
        var options = new GenerationOptions { MaxTokens = 10, Temperature = 0, LogProbabilities = 1 };
        Generation plain = Run(generator, "abc", options);
        Assert.All(plain.LogProbabilities, token => Assert.Equal(token.Chosen.Token, token.Top[0].Token));
        Generation bent = Run(generator, "abc", options with { LogitBias = new Dictionary<int, double> { ['q'] = 1000 } });
        Assert.All(bent.LogProbabilities, token => Assert.Equal('q', token.Chosen.Token));
        Assert.Equal(plain.LogProbabilities[0].Top[0], bent.LogProbabilities[0].Top[0]);
        Assert.Empty(Run(generator, "abc", options with { LogProbabilities = null }).LogProbabilities);
    }

    [Fact]
    public void Tokens_as_a_prompt_are_taken_as_they_are()
    {
        using TextGenerator generator = Generator();
        var options = new GenerationOptions { MaxTokens = 5, Temperature = 0 };
        Assert.Equal(
            generator.Generate("ab", options).ToString(), generator.Generate([256, 'a', 'b'], options).ToString());
        Assert.Equal([(int)'a'], generator.Generate([(int)'a'], options).PromptTokens);
        var error = Assert.Throws<UserErrorException>(() => generator.Generate([258], options));
        Assert.StartsWith("the prompt has token 258; tokens are 0 to 257", error.Message, StringComparison.Ordinal);
        Assert.Throws<UserErrorException>(() => generator.Generate((int[])[], options));
    }

    [Fact]
    public void What_looked_like_a_stop_string_is_given_out_at_the_end()
    {
        using TextGenerator generator = Script("Hi\nUse");
        Assert.Equal("Hi\nUse", generator.Generate("", new() { Temperature = 0, MaxTokens = 6, StopStrings = ["\nUser:"] }).ToString());
    }

    [Fact]
    public void Without_a_number_of_tokens_the_text_ends_with_the_context()
    {
        using TextGenerator generator = Script(new string('z', 100));
        Generation generation = generator.Generate("", new() { Temperature = 0 });
        Assert.Equal(new string('z', 63), generation.ToString());
        Assert.Equal(FinishReason.ContextFull, generation.Finish);
    }

    [Fact]
    public void More_than_the_context_holds_is_refused_with_the_numbers()
    {
        using TextGenerator generator = Generator();
        var error = Assert.Throws<UserErrorException>(() => generator.Generate("abc", new() { MaxTokens = 61 }));
        Assert.Contains("4 tokens of the prompt and 61 new ones are more than the context of 64; ask for 60", error.Message, StringComparison.Ordinal);
        error = Assert.Throws<UserErrorException>(() => generator.Generate(new string('a', 63)));
        Assert.Contains("64 tokens", error.Message, StringComparison.Ordinal);
        Assert.Equal(60, Run(generator, "abc", new() { MaxTokens = 60 }).Tokens.Count);
    }

    [Fact]
    public void A_sliding_context_goes_on_from_its_last_half()
    {
        using TextGenerator generator = Generator();
        Generation generation = Run(generator, "abc", new() { Temperature = 0, MaxTokens = 200, Overflow = ContextOverflow.Sliding });
        Assert.Equal(200, generation.Tokens.Count);

        // The context is full with token 63; the one after the next forward sees BOS and the last 31 tokens.
        List<int> text = [.. generation.PromptTokens, .. generation.Tokens];
        List<int> window = [.. text[..64]];
        for (int i = 64; i < text.Count; i++)
        {
            if (i > 64)
            {
                window.Add(text[i - 1]);
            }

            if (window.Count > 64)
            {
                window = [256, .. window[^31..]];
            }

            _run.Forward([.. window]);
            float[] last = _run.Logits()[^258..];
            Assert.Equal(Array.IndexOf(last, last.Max()), text[i]);
        }
    }

    [Fact]
    public void A_prompt_longer_than_the_context_slides_too()
    {
        using TextGenerator generator = Generator();
        string prompt = string.Concat(Enumerable.Range(0, 300).Select(i => (char)('a' + (i % 26))));
        Generation generation = Run(generator, prompt, new() { Temperature = 0, MaxTokens = 1, Overflow = ContextOverflow.Sliding });
        _run.Forward([256, .. generation.PromptTokens.TakeLast(31)]);
        float[] last = _run.Logits()[^258..];
        Assert.Equal(Array.IndexOf(last, last.Max()), generation.Tokens[0]);
    }

    [Fact]
    public void An_empty_prompt_needs_a_token_to_begin_with()
    {
        using var generator = new TextGenerator(_run.Model, _run.Backend, _tokenizer, addBos: false);
        Assert.Throws<UserErrorException>(() => generator.Generate(""));
        Assert.Equal([(int)'q'], generator.Generate("q").PromptTokens);
    }

    [Fact]
    public void Stopping_ends_the_enumeration_and_leaves_the_generator_usable()
    {
        using TextGenerator generator = Generator();
        using var stop = new CancellationTokenSource();
        var options = new GenerationOptions { Temperature = 0, MaxTokens = 40 };
        Assert.Throws<OperationCanceledException>(() =>
        {
            foreach (string _ in generator.Generate("abc", options, stop.Token))
            {
                stop.Cancel();
            }
        });
        Assert.Equal(40, Run(generator, "abc", options).Tokens.Count);
    }

    [Fact]
    public void Leaving_the_enumeration_early_frees_the_sequence()
    {
        using TextGenerator generator = Generator();
        for (int i = 0; i < 3; i++)
        {
            Assert.NotEmpty(generator.Generate("abc", new() { Temperature = 0 }).First());
        }
    }

    [Fact]
    public void A_repetition_penalty_keeps_tokens_from_coming_again()
    {
        using TextGenerator generator = Generator();
        var options = new GenerationOptions { Temperature = 0, MaxTokens = 50 };
        Assert.NotEqual(50, Run(generator, "ab", options).Tokens.Distinct().Count());
        Generation generation = Run(generator, "ab", options with { RepetitionPenalty = 1e6 });
        Assert.Equal(53, generation.Tokens.Concat(generation.PromptTokens).Distinct().Count());
    }

    [Theory]
    [InlineData("temperature is -1")]
    [InlineData("top-k is -1")]
    [InlineData("top-p is 0")]
    [InlineData("min-p is 2")]
    [InlineData("repetition penalty is 0")]
    [InlineData("presence penalty is NaN")]
    [InlineData("frequency penalty is NaN")]
    [InlineData("log-probabilities are asked for -1")]
    [InlineData("a logit bias is not a number")]
    [InlineData("a logit bias is for token 258")]
    [InlineData("a stop token is token -1")]
    [InlineData("max tokens is -1")]
    [InlineData("a stop string is empty")]
    public void Options_out_of_range_are_refused_by_name(string problem)
    {
        using TextGenerator generator = Generator();
        GenerationOptions options = problem switch
        {
            "temperature is -1" => new() { Temperature = -1 },
            "top-k is -1" => new() { TopK = -1 },
            "top-p is 0" => new() { TopP = 0 },
            "min-p is 2" => new() { MinP = 2 },
            "repetition penalty is 0" => new() { RepetitionPenalty = 0 },
            "presence penalty is NaN" => new() { PresencePenalty = double.NaN },
            "frequency penalty is NaN" => new() { FrequencyPenalty = double.NaN },
            "log-probabilities are asked for -1" => new() { LogProbabilities = -1 },
            "a logit bias is not a number" => new() { LogitBias = new Dictionary<int, double> { [0] = double.NaN } },
            "a logit bias is for token 258" => new() { LogitBias = new Dictionary<int, double> { [258] = 1 } },
            "a stop token is token -1" => new() { StopTokens = [-1] },
            "max tokens is -1" => new() { MaxTokens = -1 },
            _ => new() { StopStrings = ["x", ""] },
        };
        var error = Assert.Throws<UserErrorException>(() => generator.Generate("a", options));
        Assert.StartsWith(problem, error.Message, StringComparison.Ordinal);
    }

    [Fact]
    public void A_tokenizer_larger_than_the_model_is_refused()
    {
        using var run = new ModelRun(ModelRun.TinyConfig(), 8, Keep.Nothing);
        var error = Assert.Throws<UserErrorException>(() => new TextGenerator(run.Model, run.Backend, _tokenizer));
        Assert.Contains("258", error.Message, StringComparison.Ordinal);
    }

    public void Dispose()
    {
        _run.Dispose();
        _scripts.ForEach(run => run.Dispose());
    }

    private static Generation Run(TextGenerator generator, string prompt, GenerationOptions options)
    {
        Generation generation = generator.Generate(prompt, options);
        _ = generation.ToString();
        return generation;
    }

    private TextGenerator Generator() => new(_run.Model, _run.Backend, _tokenizer);

    /// <summary>
    /// A model that says a text: attention and feed-forward write nothing, and the embedding of each token has the
    /// direction of the head of the token after it. Every place of the text is a token of its own.
    /// </summary>
    private TextGenerator Script(string text, char? end = null)
    {
        var tokenizer = new PlaceTokenizer(Encoding.UTF8.GetBytes(text), end);
        var config = ModelRun.TinyConfig() with
        {
            VocabularySize = tokenizer.VocabularySize,
            ContextLength = 64,
            Channels = 128,
            Heads = 2,
            KeyValueHeads = 1,
            Layers = 1,
        };
        var run = new ModelRun(config, 64, Keep.Nothing);
        _scripts.Add(run);
        foreach (Parameter parameter in run.Model.Parameters)
        {
            float[] values = new float[parameter.Values.Count];
            if (parameter.IsVector)
            {
                Array.Fill(values, 1);
            }
            else if (parameter.Name.StartsWith("model.embed", StringComparison.Ordinal))
            {
                for (int t = 0; t < config.VocabularySize; t++)
                {
                    values[(t * config.Channels) + t] = 1;
                }
            }
            else if (parameter.Name.StartsWith("lm_head", StringComparison.Ordinal))
            {
                for (int t = 0; t < config.VocabularySize; t++)
                {
                    values[(t * config.Channels) + tokenizer.Before(t)] = 1;
                }
            }

            run.Backend.Write<float>(parameter.Values, values);
        }

        run.Model.Pack();
        return new TextGenerator(run.Model, run.Backend, tokenizer);
    }
}
