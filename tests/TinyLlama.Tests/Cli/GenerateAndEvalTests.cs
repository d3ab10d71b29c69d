using System.Diagnostics;
using System.Text;
using System.Text.Json.Nodes;
using TinyLlama.Cli;
using TinyLlama.Tests.Common;

namespace TinyLlama.Tests.Cli;

public sealed class GenerateAndEvalTests
{
    private static string Stories => SharedFiles.Require("oracles/stories260K/stories260K.bin");

    [Fact]
    public async Task Generate_writes_prompt_and_text_and_then_the_rates_to_standard_error()
    {
        (int code, string output, string error) = await RunAsync(
            "generate", Stories, "-p", "Once upon a time", "--temperature", "0", "--max-tokens", "8");
        Assert.Equal((0, "Once upon a time, there was a little girl\n"), (code, output));
        Assert.StartsWith("prefill 5 tokens, ", error, StringComparison.Ordinal);
        Assert.Contains(" · decode ", error, StringComparison.Ordinal);
        Assert.Single(error.TrimEnd('\n').Split('\n'));
    }

    [Fact]
    public async Task Generate_as_json_says_what_it_took()
    {
        (int code, string output, string error) = await RunAsync(
            "generate", Stories, "-p", "Once", "--seed", "7", "--stop", ".", "--json", "--threads", "1");
        Assert.Equal((0, ""), (code, error));
        JsonObject report = JsonNode.Parse(output)!.AsObject();
        Assert.Equal("stop_string", report["finish_reason"]!.GetValue<string>());
        Assert.Equal(7, report["seed"]!.GetValue<int>());
        Assert.DoesNotContain('.', report["text"]!.GetValue<string>());
        (_, string again, _) = await RunAsync("generate", Stories, "-p", "Once", "--seed", "7", "--stop", ".", "--json");
        Assert.Equal(report["text"]!.GetValue<string>(), JsonNode.Parse(again)!["text"]!.GetValue<string>());
    }

    [Theory]
    [InlineData("more than the context of 512", "--max-tokens", "512")]
    [InlineData("top-p is 2", "--top-p", "2")]
    [InlineData("--json-schema missing.json: Could not find file", "--json-schema", "missing.json")]
    [InlineData("'sliding'", "--overflow", "ignore")]
    [InlineData("--top-k is of one that is drawn", "--beams", "2", "--top-k", "3")]
    [InlineData("it must be from 1 to 16777216", "--ctx", "2147483647")]
    [InlineData("say how many with --beams N", "--length-penalty", "2")]
    [InlineData("257 beams are asked for", "--beams", "257")]
    [InlineData("choose one of them", "--draft", "x", "--lookup", "2")]
    [InlineData("name one with --draft", "--draft-tokens", "2")]
    [InlineData("a draft of 65 tokens is asked for, it must be 1 to 64", "--lookup", "65")]
    public async Task Generate_refuses_in_one_line(string problem, params string[] options)
    {
        (int code, string output, string error) = await RunAsync(["generate", Stories, .. options]);
        Assert.Equal((2, ""), (code, output));
        Assert.Contains(problem, error, StringComparison.Ordinal);
        Assert.Single(error.TrimEnd('\n').Split('\n'));
    }

    [Theory]
    [InlineData("Once upon a time\r\n", "generate", "-p", "-", "--temperature", "0", "--max-tokens", "8")]
    [InlineData("Once upon a time\n", "generate", "-p", "-", "--temperature", "0", "--max-tokens", "8")]
    public async Task A_prompt_from_standard_input_is_without_the_end_of_its_line(string input, string verb, params string[] options)
    {
        (int code, string output, _) = await RunProcessAsync(Encoding.UTF8.GetBytes(input), [verb, Stories, .. options]);
        Assert.Equal((0, "Once upon a time, there was a little girl\n"), (code, output));
    }

    [Theory]
    [InlineData("generate", "-p", "-")]
    [InlineData("tokenizer", "encode")]
    [InlineData("chat")]
    public async Task Standard_input_that_is_not_UTF_8_is_refused(params string[] words)
    {
        string model = words[0] == "tokenizer" ? SharedFiles.Require("oracles/stories260K/tok512.bin") : Stories;
        (int code, _, string error) = await RunProcessAsync([0x61, 0xFF], words[0] == "generate" ? [words[0], model, .. words[1..]] : [.. words, model]);
        Assert.Equal(2, code);
        Assert.EndsWith("error: the input is not UTF-8 text; convert it first\n", error, StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_mistake_in_a_conversation_from_a_file_is_told_by_the_exit_code()
    {
        (int code, string output, string error) = await RunProcessAsync("/nope\nOnce\n"u8.ToArray(), ["chat", Stories, "--set", "max_tokens=4"]);
        Assert.Equal(2, code);
        Assert.EndsWith("error: there is no command /nope; /help shows them all\n", error, StringComparison.Ordinal);
        Assert.Single(output.TrimEnd('\n').Split('\n'));
    }

    [Fact]
    public async Task Generate_with_beams_writes_the_best_text_or_all_of_them()
    {
        string[] arguments = ["generate", Stories, "-p", "Once upon a time", "--beams", "3", "--max-tokens", "12"];
        (int code, string output, string error) = await RunAsync(arguments);
        Assert.Equal(0, code);
        Assert.StartsWith("the best of 3 texts: ln p -", error, StringComparison.Ordinal);
        JsonArray beams = JsonNode.Parse((await RunAsync([.. arguments, "--json"])).Output)!["beams"]!.AsArray();
        Assert.Equal(3, beams.Count);
        Assert.Equal(output, $"Once upon a time{beams[0]!["text"]}\n");
        Assert.Equal((double)beams[1]!["log_probability"]! / (int)beams[1]!["new_tokens"]!, (double)beams[1]!["score"]!, 1e-12);
        Assert.True((double)beams[0]!["score"]! >= (double)beams[1]!["score"]!);
    }

    [Fact]
    public async Task Generate_says_how_many_drafted_tokens_were_accepted()
    {
        string[] arguments = ["generate", Stories, "-p", "Tom had a big red ball. Tom had a big", "--temperature", "0", "--max-tokens", "40"];
        (_, string plain, _) = await RunAsync(arguments);
        (int code, string output, string error) = await RunAsync([.. arguments, "--draft", Stories]);
        Assert.Equal((0, plain), (code, output));
        Assert.Contains(", 31 of 31 drafted tokens accepted (100 %)", error, StringComparison.Ordinal);
        (code, output, _) = await RunAsync([.. arguments, "--lookup", "3", "--json"]);
        Assert.Equal(0, code);
        JsonObject report = JsonNode.Parse(output)!.AsObject();
        Assert.Equal(plain.TrimEnd('\n'), (string)report["prompt"]! + (string)report["text"]!);
        Assert.InRange((int)report["accepted_tokens"]!, 1, (int)report["drafted_tokens"]! - 1);
    }

    [Fact]
    public async Task Generate_keeps_to_a_schema()
    {
        string path = Path.GetTempFileName();
        try
        {
            await File.WriteAllTextAsync(path, """{"type":"array","items":{"enum":["a",1]},"minItems":3,"maxItems":3}""");
            (int code, string output, string error) = await RunAsync("generate", Stories, "-p", "x", "--json-schema", path, "--json", "--seed", "3");
            Assert.Equal((0, ""), (code, error));
            JsonObject report = JsonNode.Parse(output)!.AsObject();
            Assert.Equal(3, JsonNode.Parse((string)report["text"]!)!.AsArray().Count);
            Assert.Equal("end_of_text", (string)report["finish_reason"]!);
        }
        finally
        {
            File.Delete(path);
        }
    }

    [Fact]
    public async Task Eval_scores_every_byte_of_a_text()
    {
        string path = Path.GetTempFileName();
        try
        {
            const string Text = "One day, a girl went to the park. She saw a big tree. ☺";
            await File.WriteAllTextAsync(path, Text);
            (int code, string output, _) = await RunAsync("eval", Stories, "--tasks", "perplexity", "--text", path, "--json");
            Assert.Equal(0, code);
            JsonObject report = JsonNode.Parse(output)!.AsObject();
            Assert.Equal(Encoding.UTF8.GetByteCount(Text), report["bytes"]!.GetValue<int>());
            double nats = report["loss"]!.GetValue<double>() * report["tokens"]!.GetValue<int>();
            Assert.Equal(nats / Math.Log(2) / report["bytes"]!.GetValue<int>(), report["bits_per_byte"]!.GetValue<double>(), 1e-9);

            (_, string table, _) = await RunAsync("eval", Stories, "--text", path);
            Assert.Contains("bits per byte  ", table, StringComparison.Ordinal);

            await File.WriteAllBytesAsync(path, [0x61, 0xFF]);
            (code, _, string error) = await RunAsync("eval", Stories, "--text", path);
            Assert.Equal(2, code);
            Assert.Contains("not UTF-8", error, StringComparison.Ordinal);
        }
        finally
        {
            File.Delete(path);
        }
    }

    [Fact]
    public async Task Eval_needs_one_thing_to_score()
    {
        foreach (string[] options in (string[][])[[], ["--data", "a", "--text", "b"]])
        {
            (int code, _, string error) = await RunAsync(["eval", "run", .. options]);
            Assert.Equal(2, code);
            Assert.Contains("--data DIR", error, StringComparison.Ordinal);
        }
    }

    private static async Task<(int Code, string Output, string Error)> RunProcessAsync(byte[] input, string[] arguments)
    {
        var start = new ProcessStartInfo("dotnet", [Path.Combine(AppContext.BaseDirectory, "TinyLlama.Cli.dll"), .. arguments])
        {
            UseShellExecute = false,
            RedirectStandardInput = true,
            RedirectStandardError = true,
            RedirectStandardOutput = true,
        };
        using Process process = Process.Start(start)!;
        await process.StandardInput.BaseStream.WriteAsync(input, TestContext.Current.CancellationToken);
        process.StandardInput.Close();
        Task<string> output = process.StandardOutput.ReadToEndAsync(TestContext.Current.CancellationToken);
        string error = await process.StandardError.ReadToEndAsync(TestContext.Current.CancellationToken);
        await process.WaitForExitAsync(TestContext.Current.CancellationToken);
        return (process.ExitCode, await output, error);
    }

    private static async Task<(int Code, string Output, string Error)> RunAsync(params string[] arguments)
    {
        using StringWriter output = new() { NewLine = "\n" };
        using StringWriter error = new() { NewLine = "\n" };
        int code = await CommandLine.RunAsync(Program.CreateRoot(), arguments, output, error, CancellationToken.None);
        return (code, output.ToString(), error.ToString());
    }
}
