using TinyLlama.Evaluation;
using TinyLlama.Inference;
using TinyLlama.Model;
using TinyLlama.Tests.Common;

namespace TinyLlama.Tests.Inference;

/// <summary>A trained model of another program: 260,000 parameters that tell stories (oracles/stories260K).</summary>
public sealed class StoriesTests
{
    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    public void Two_hundred_greedy_tokens_are_the_text_of_the_program_it_comes_from(int threads)
    {
        string expected = File.ReadAllText(SharedFiles.Require("oracles/stories260K/expected_stdout_200.txt"));
        using LanguageModel model = LanguageModel.Load(SharedFiles.Require("oracles/stories260K/stories260K.bin"), threads);
        Generation generation = model.Generate("", new() { Temperature = 0, MaxTokens = 200 });

        Assert.Equal(expected, generation.ToString());
        Assert.Equal(200, generation.Tokens.Count);
    }

    [Fact]
    public void A_story_costs_few_bits_and_other_text_many()
    {
        string story = File.ReadAllText(SharedFiles.Require("oracles/stories260K/expected_stdout_200.txt"));
        string plays = File.ReadAllText(Path.Combine(SharedFiles.Require("oracles/tinyshakespeare"), "input.txt"))[..2000];
        using LanguageModel model = LanguageModel.Load(SharedFiles.Require("oracles/stories260K/stories260K.bin"));
        using Workspace workspace = Workspace.Allocate(model.Model, model.Backend, 512, Keep.Nothing);
        Assert.InRange(BitsPerByte(story), 0.1, 0.8);
        Assert.InRange(BitsPerByte(plays), 1.5, 6);

        double BitsPerByte(string text) => Perplexity.Measure(
            model.Model, model.Backend, workspace, EvaluationTokens.FromText(text, model.Tokenizer, "text")).BitsPerByte;
    }
}
