using System.CommandLine;
using System.Text.Json.Nodes;
using TinyLlama.Cli;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Tests.Checkpoints;
using TinyLlama.Tests.Common;

namespace TinyLlama.Tests.Cli;

public sealed class TokenizerCommandTests : IDisposable
{
    private readonly TemporaryFolder _folder = new();

    public TokenizerCommandTests()
    {
        Directory.CreateDirectory(_folder["text"]);
        var text = new SeededText(1);
        for (int i = 0; i < 40; i++)
        {
            File.WriteAllText(Path.Combine(_folder["text"], $"{i}.txt"), text.Document());
        }

        Assert.Equal(0, Run("train", "--text", _folder["text"], "--vocab-size", "500", "--out", _folder["out"], "--threads", "2").Code);
    }

    public void Dispose() => _folder.Dispose();

    [Fact]
    public void A_trained_tokenizer_encodes_and_decodes_a_text()
    {
        const string Text = "The old river crossed the house.";
        (int code, string ids) = Run("encode", _folder["out"], Text);
        Assert.Equal(0, code);
        List<int> expected = [];
        Tokenizer.Load(_folder["out"]).Encode(Text, expected);
        Assert.Equal(string.Join(' ', expected) + "\n", ids);
        Assert.Equal(Text + "\n", Run("decode", _folder["out"], ids.Trim()).Text);
        Assert.StartsWith("1 ", Run("encode", _folder["out"], Text, "--bos").Text, StringComparison.Ordinal);
        Assert.EndsWith(" 2\n", Run("encode", _folder["out"], Text, "--eos").Text, StringComparison.Ordinal);
        Assert.Contains("\u2581the", Run("encode", _folder["out"], Text, "--pieces").Text, StringComparison.Ordinal);
    }

    [Fact]
    public void What_is_shown_of_a_tokenizer_counts_its_pieces_and_the_bytes_per_token()
    {
        JsonNode shown = JsonNode.Parse(Run("inspect", _folder["out"], "--text", _folder["text"], "--json").Text)!;
        Assert.Equal(500, shown["vocabulary_size"]!.GetValue<int>());
        Assert.Equal(256, shown["kinds"]!["bytes"]!.GetValue<int>());
        Assert.Equal(241, shown["kinds"]!["pieces_of_text"]!.GetValue<int>());
        Assert.InRange(shown["bytes_per_token"]!.GetValue<double>(), 3, 8);
        Assert.Equal(Tokenizer.Load(_folder["out"]).Hash, shown["sha256"]!.GetValue<string>());
        string table = Run("inspect", _folder["out"], "--text", _folder["text"]).Text;
        Assert.Contains("500 ids", table, StringComparison.Ordinal);
        Assert.Contains("bytes per token", table, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("gpt2", "as GPT-2")]
    [InlineData("smollm", "as SmolLM")]
    [InlineData("llama3", "as Llama 3")]
    public void Inspect_tells_how_a_byte_level_tokenizer_cuts_words(string kind, string told)
    {
        File.WriteAllText(_folder["tokenizer.json"], ByteLevelJson.Make(kind, "some text, some more text", 5));
        Assert.Contains($"words       {told}, in pieces of bytes", Run("inspect", _folder["tokenizer.json"]).Text, StringComparison.Ordinal);
    }

    [Fact]
    public void Mistakes_are_told_with_what_to_do()
    {
        Assert.Contains("0 to 499", Assert.Throws<UserErrorException>(() => Run("decode", _folder["out"], "7 500")).Message, StringComparison.Ordinal);
        Assert.Throws<UserErrorException>(() => Run("decode", _folder["out"], "-1 x"));
        Assert.Contains("--text", Assert.Throws<UserErrorException>(() => Run("train", "--out", _folder["x"])).Message, StringComparison.Ordinal);
        Assert.Throws<UserErrorException>(() => Run("train", "--text", _folder["text"], "--vocab-size", "-5", "--out", _folder["x"]));
        Assert.Contains("at most", Assert.Throws<UserErrorException>(() => Run(
            "train", "--text", _folder["text"], "--vocab-size", "2000000000", "--out", _folder["x"])).Message, StringComparison.Ordinal);
        Assert.Throws<UserErrorException>(() => Run("inspect", _folder["text"]));
    }

    private static (int Code, string Text) Run(params string[] arguments)
    {
        var output = new StringWriter { NewLine = "\n" };
        var configuration = new InvocationConfiguration { EnableDefaultExceptionHandler = false, Output = output, Error = TextWriter.Null };
        return (TokenizerCommand.Create().Parse(arguments).Invoke(configuration), output.ToString());
    }
}
