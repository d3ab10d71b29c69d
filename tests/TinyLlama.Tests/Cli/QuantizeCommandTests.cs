using System.Text.Json.Nodes;
using TinyLlama.Checkpoints;
using TinyLlama.Cli;
using TinyLlama.Tests.Checkpoints;
using TinyLlama.Tests.Common;

namespace TinyLlama.Tests.Cli;

public sealed class QuantizeCommandTests : IDisposable
{
    private readonly TemporaryFolder _folder = new();

    public QuantizeCommandTests() => File.WriteAllText(Text, "Once upon a time, there was a little girl named Lily. She loved to play outside.");

    private static string Stories => SharedFiles.Require("oracles/stories260K/stories260K.bin");

    private string Text => _folder["text.txt"];

    private string Result => _folder["out/x.gguf"];

    public void Dispose() => _folder.Dispose();

    [Fact]
    public async Task Size_perplexity_and_speed_are_told_before_and_after()
    {
        (int code, string output, _) = await RunAsync("quantize", Stories, "--type", "q8_0", "--out", Result, "--text", Text, "--json");
        Assert.Equal(0, code);
        JsonNode report = JsonNode.Parse(output)!;
        Assert.Equal(new FileInfo(Result).Length, report["bytes"]!.GetValue<long>());
        Assert.Equal(32, report["before"]!["bits_per_weight"]!.GetValue<double>());
        Assert.InRange(report["after"]!["bits_per_weight"]!.GetValue<double>(), 8.5, 11);
        Assert.InRange(report["after"]!["decode_tokens_per_second"]!.GetValue<double>(), 1, 1e6);
        double before = report["before"]!["perplexity"]!.GetValue<double>();
        double after = report["after"]!["perplexity"]!.GetValue<double>();
        Assert.Equal(((after / before) - 1) * 100, report["perplexity_increase_percent"]!.GetValue<double>(), 1e-9);
        foreach ((string model, double perplexity) in new[] { (Stories, before), (Result, after) })
        {
            (_, string eval, _) = await RunAsync("eval", model, "--text", Text, "--json");
            Assert.Equal(JsonNode.Parse(eval)!["perplexity"]!.GetValue<double>(), perplexity);
        }
    }

    [Fact]
    public async Task Without_a_text_perplexity_is_skipped_with_a_word()
    {
        (int code, string output, _) = await RunAsync("quantize", Stories, "--type", "q4_k_m", "--out", Result);
        Assert.Equal(0, code);
        Assert.Contains("perplexity        not measured: name a text with --text", output, StringComparison.Ordinal);
        ModelSource.Open(Result, Assert.Fail).Dispose();
    }

    [Fact]
    public async Task Beyond_the_limit_nothing_is_written()
    {
        (int code, string output, string error) = await RunAsync(
            "quantize", Stories, "--type", "q4_0", "--out", Result, "--text", Text, "--max-perplexity-increase", "0.001");
        Assert.Equal((2, ""), (code, output));
        Assert.Contains("more than --max-perplexity-increase 0.001; nothing is written", error, StringComparison.Ordinal);
        Assert.Single(error.TrimEnd('\n').Split('\n'));
        Assert.Empty(Directory.GetFiles(_folder.Path, "*.gguf", SearchOption.AllDirectories));

        (code, _, _) = await RunAsync(
            "quantize", Stories, "--type", "q4_0", "--out", Result, "--text", Text, "--max-perplexity-increase", "1000");
        Assert.Equal(0, code);
        Assert.Equal([Result], Directory.GetFiles(_folder["out"]));
    }

    [Fact]
    public async Task What_cannot_be_done_is_said_before_the_work()
    {
        (int code, _, string error) = await RunAsync("quantize", Stories, "--type", "q8_0", "--out", Result, "--max-perplexity-increase", "1");
        Assert.Equal(2, code);
        Assert.Contains("needs a text", error, StringComparison.Ordinal);
        (code, _, error) = await RunAsync("quantize", Stories, "--type", "q8_0", "--out", Text);
        Assert.Equal(2, code);
        Assert.Contains("is there already", error, StringComparison.Ordinal);
        (code, _, error) = await RunAsync("quantize", Stories, "--type", "q2_k", "--out", Result);
        Assert.Equal(2, code);
        Assert.Contains("q2_k", error, StringComparison.Ordinal);
    }

    private static async Task<(int Code, string Output, string Error)> RunAsync(params string[] arguments)
    {
        var output = new StringWriter { NewLine = "\n" };
        var error = new StringWriter { NewLine = "\n" };
        int code = await CommandLine.RunAsync(Program.CreateRoot(), arguments, output, error, TestContext.Current.CancellationToken);
        return (code, output.ToString(), error.ToString());
    }
}
