using TinyLlama.Data;
using TinyLlama.Data.Documents;
using TinyLlama.Data.Shards;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Evaluation;

namespace TinyLlama.Tests.Evaluation;

public sealed class EvaluationTokensTests : IDisposable
{
    private readonly string _folder = Directory.CreateTempSubdirectory("tinyllama-test-").FullName;
    private readonly ByteTokenizer _tokenizer = new();

    [Fact]
    public void The_validation_split_is_scored_whole_and_its_bytes_are_those_of_its_documents()
    {
        using TokenShards shards = Prepare();
        var tokens = EvaluationTokens.FromShards(shards, Split.Validation, _tokenizer);
        SplitEntry validation = shards.Manifest.Validation;
        Assert.True(validation.Documents > 20);
        Assert.Equal(validation.Tokens - 1, tokens.TargetCount);
        Assert.Equal(validation.TextBytes, tokens.ByteCount);
        Assert.Equal(validation.Documents, tokens.DocumentStarts.Length);
        foreach (int start in tokens.DocumentStarts)
        {
            Assert.Equal(256, tokens.Tokens[start]);
        }
    }

    [Fact]
    public void A_part_of_it_is_its_first_tokens()
    {
        using TokenShards shards = Prepare();
        var whole = EvaluationTokens.FromShards(shards, Split.Validation, _tokenizer);
        var part = EvaluationTokens.FromShards(shards, Split.Validation, _tokenizer, maxTargets: 50);
        Assert.Equal(50, part.TargetCount);
        Assert.Equal(whole.Tokens[..51].ToArray(), part.Tokens.ToArray());
        Assert.Equal(part.Tokens[1..].ToArray().Count(t => t < 256), part.ByteCount);
        Assert.Equal(whole.TargetCount, EvaluationTokens.FromShards(shards, Split.Validation, _tokenizer, maxTargets: 1 << 30).TargetCount);
    }

    [Fact]
    public void Shards_of_another_tokenizer_are_refused()
    {
        using TokenShards shards = Prepare();
        var error = Assert.Throws<UserErrorException>(
            () => EvaluationTokens.FromShards(shards, Split.Validation, new Inference.PlaceTokenizer([1, 2], null)));
        Assert.Contains("another tokenizer", error.Message, StringComparison.Ordinal);
    }

    [Fact]
    public void A_part_of_a_text_is_its_first_tokens()
    {
        var tokens = EvaluationTokens.FromText("abcdef", _tokenizer, "a text", addBos: false, maxTargets: 3);
        Assert.Equal([(int)'a', 'b', 'c', 'd'], tokens.Tokens.ToArray());
        Assert.Equal((3, 3L), (tokens.TargetCount, tokens.ByteCount));
    }

    public void Dispose() => Directory.Delete(_folder, recursive: true);

    private TokenShards Prepare()
    {
        string text = Path.Combine(_folder, "documents.txt");
        File.WriteAllLines(text, Enumerable.Range(0, 100).Select(i => $"Line {i}: {new string('é', i % 7)}"));
        string data = Path.Combine(_folder, "data");
        DataPreparation.Run(
            data,
            TextFiles.Find([text], new TextFileOptions { Lines = true }),
            _tokenizer,
            new PreparationOptions { ValidationShare = 0.5, Threads = 1, TokensPerShard = 300 });
        return TokenShards.Open(data);
    }
}
