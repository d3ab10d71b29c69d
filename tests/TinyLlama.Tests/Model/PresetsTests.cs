using TinyLlama.Model;

namespace TinyLlama.Tests.Model;

public sealed class PresetsTests
{
    [Theory]
    [InlineData("tinyllama-1.1b", 1_100_048_384)]
    [InlineData("tinyllama-120m", 121_129_728)]
    [InlineData("tinyllama-1.1b-code-8k", 1_100_048_384)]
    [InlineData("tinyllama-39m", 39_330_304)]
    [InlineData("tinyllama-16m", 15_954_816)]
    [InlineData("quickstart", 6_309_632)]
    [InlineData("smoke", 158_016)]
    public void A_preset_has_exactly_its_published_number_of_parameters(string name, long parameters) =>
        Assert.Equal(parameters, Presets.Find(name)!.Config.ParameterCount);

    [Fact]
    public void Every_preset_is_a_model_and_the_list_grows()
    {
        Assert.All(Presets.All, preset => Assert.Empty(preset.Config.Problems()));
        Assert.Equal(Presets.All.OrderBy(preset => preset.Config.ParameterCount), Presets.All);
        Assert.Equal(Presets.All.Count, Presets.All.DistinctBy(preset => preset.Name).Count());
    }

    [Fact]
    public void The_code_preset_divides_positions_by_four_to_reach_four_times_the_context()
    {
        ModelConfig code = Presets.Find("tinyllama-1.1b-code-8k")!.Config;
        Assert.Equal((8192, 4f), (code.ContextLength, code.RopeFactor));
    }

    [Fact]
    public void Operations_per_token_equal_the_published_formulas()
    {
        ModelConfig model = Presets.Find("tinyllama-1.1b")!.Config;
        Assert.Equal(7_314_370_560, Flops.PerToken(model, 2048));
        Assert.Equal(15_785_137_274_880, Flops.PerTokenAsTinyLlama(model, 2048) * 2048);
    }

    [Fact]
    public void A_tied_embedding_is_counted_once_and_multiplied_by()
    {
        ModelConfig untied = Presets.Find("smoke")!.Config;
        ModelConfig tied = untied with { TiedEmbeddings = true };
        Assert.Equal(untied.ParameterCount - (512 * 64), tied.ParameterCount);
        Assert.Equal(Flops.PerToken(untied, 64), Flops.PerToken(tied, 64));
    }

    [Fact]
    public void The_problems_of_a_shape_are_all_named()
    {
        ModelConfig shape = Presets.Find("smoke")!.Config with { Channels = 66, KeyValueHeads = 3, NormEpsilon = 0, RopeFactor = float.NaN };
        Assert.Equal(
            ["channels 66 is not a multiple of heads 4", "heads 4 is not a multiple of key_value_heads 3",
                "norm_epsilon is 0, which is not a positive number", "rope_factor is NaN, which is not a positive number"],
            shape.Problems());
    }
}
