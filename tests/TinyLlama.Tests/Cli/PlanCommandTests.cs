using System.Text.Json.Nodes;
using TinyLlama.Cli;
using TinyLlama.Tests.Common;

namespace TinyLlama.Tests.Cli;

public sealed class PlanCommandTests
{
    private static readonly string[] s_parts = ["compute_seconds", "exposed_seconds", "slowdown_seconds", "optimizer_seconds", "fixed_seconds"];

    [Fact]
    public async Task A_recipe_is_planned_for_three_sizes_and_five_networks()
    {
        (int code, string output, _) = await Run();
        Assert.Equal(ExitCode.Success, code);
        Assert.Equal(["16", "64", "1,024"], output.Split('\n').Where(line => line.Contains(" GPUs, 8 a node", StringComparison.Ordinal)).Select(line => line[..line.IndexOf(' ', StringComparison.Ordinal)]));
        Assert.Equal(3, output.Split("50 GB/s     25 GB/s   6.25 GB/s    3.1 GB/s   1.25 GB/s").Length - 1);
    }

    [Fact]
    public async Task The_parts_of_a_step_add_up()
    {
        (int code, string output, _) = await Run("--nodes", "2", "--per-node", "4", "--device", "4090", "--network", "3.1", "--wire", "bf16", "--share", "0.5", "--json");
        Assert.Equal(ExitCode.Success, code);
        JsonNode plan = Assert.Single(JsonNode.Parse(output)!.AsArray())!;
        Assert.Equal((8, 4, "bf16", 0.5), ((int)plan["ranks"]!, (int)plan["per_node"]!, (string?)plan["wire"], (double)plan["share_of_peak"]!));
        Assert.Equal([(1, 4), (1, 8), (2, 4), (2, 8), (3, 4), (3, 8)], plan["ways"]!.AsArray().Select(way => ((int)way!["zero"]!, (int)way["shard"]!)));
        Assert.All(plan["ways"]!.AsArray(), way =>
        {
            JsonNode step = Assert.Single(way!["steps"]!.AsArray())!;
            double sum = s_parts.Sum(part => (double)step[part]!);
            Assert.Equal(sum, (double)step["step_seconds"]!, 1e-9);
            Assert.Equal(2_097_152 / sum, (double)step["tokens_per_second"]!, 1e-3);
        });
    }

    [Theory]
    [InlineData("--nodes takes the place of --ranks; leave one of them out", "--nodes", "2", "--ranks", "16")]
    [InlineData("--network is -1, which is not more than 0", "--network", "-1")]
    [InlineData("48 GPUs, 8 a node: both must be powers of two and divide the 1,024 sequences of a step", "--ranks", "48")]
    public async Task A_mistake_is_one_line(string message, params string[] arguments)
    {
        (int code, _, string error) = await Run(arguments);
        Assert.Equal(ExitCode.UserError, code);
        Assert.Contains(message, Assert.Single(error.Split('\n', StringSplitOptions.RemoveEmptyEntries)), StringComparison.Ordinal);
    }

    private static async Task<(int Code, string Output, string Error)> Run(params string[] arguments)
    {
        using var output = new StringWriter();
        using var error = new StringWriter();
        string recipe = Path.Combine(Checkout.Root, "recipes", "tinyllama-1.1b.yaml");
        int code = await CommandLine.RunAsync(
            Program.CreateRoot(), ["plan", "--recipe", recipe, .. arguments], output, error, TestContext.Current.CancellationToken);
        return (code, output.ToString(), error.ToString());
    }
}
