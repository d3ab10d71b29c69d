using System.Text;
using System.Text.Json.Nodes;
using TinyLlama.Data.Shards;

namespace TinyLlama.Data.Tests.Shards;

public sealed class TokenShardsTests
{
    [Fact]
    public void A_shard_is_laid_out_as_documented()
    {
        using TemporaryFolder folder = new();
        folder.Shards(Split.Train, [[1, 2, 3], [258]]).Dispose();
        byte[] expected =
        [
            .. "TLTOKENS"u8, 1, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0,
            1, 0, 2, 0, 3, 0, 2, 1,
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0,
            3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0,
        ];
        Assert.Equal(expected, File.ReadAllBytes(folder["train-00000.tokens"]));
    }

    [Fact]
    public void A_shard_that_is_missing_cut_off_or_another_one_is_refused()
    {
        using TemporaryFolder folder = new();
        Write(folder);
        byte[] shard = File.ReadAllBytes(folder["train-00001.tokens"]);
        foreach (byte[] damaged in (byte[][])[[], shard[..31], shard[..^1], [.. shard, 0]])
        {
            File.WriteAllBytes(folder["train-00001.tokens"], damaged);
            Assert.Contains($"train-00001.tokens has {damaged.Length} bytes", Error(folder), StringComparison.Ordinal);
        }

        for (int at = 0; at < ShardFile.HeaderBytes; at++)
        {
            byte[] damaged = [.. shard];
            damaged[at] ^= 0x81;
            File.WriteAllBytes(folder["train-00001.tokens"], damaged);
            Assert.Contains("its header differs", Error(folder), StringComparison.Ordinal);
        }

        File.Delete(folder["train-00001.tokens"]);
        Assert.Contains("train-00001.tokens is missing", Error(folder), StringComparison.Ordinal);
    }

    [Fact]
    public void Verification_finds_every_changed_bit()
    {
        using TemporaryFolder folder = new();
        Write(folder);
        Assert.Empty(TokenShards.Verify(folder.Path));
        byte[] shard = File.ReadAllBytes(folder["train-00000.tokens"]);
        foreach (int at in (int[])[0, 40, shard.Length - 1])
        {
            byte[] damaged = [.. shard];
            damaged[at] ^= 1;
            File.WriteAllBytes(folder["train-00000.tokens"], damaged);
            Assert.Contains("SHA-256", Assert.Single(TokenShards.Verify(folder.Path)), StringComparison.Ordinal);
        }

        File.Delete(folder["train-00000.tokens"]);
        Assert.Contains("missing", Assert.Single(TokenShards.Verify(folder.Path)), StringComparison.Ordinal);
    }

    [Fact]
    public void A_token_outside_the_vocabulary_never_comes_out()
    {
        using TemporaryFolder folder = new();
        Write(folder);
        byte[] shard = File.ReadAllBytes(folder["train-00000.tokens"]);
        (shard[36], shard[37]) = (100, 0);
        File.WriteAllBytes(folder["train-00000.tokens"], shard);
        using TokenShards shards = TokenShards.Open(folder.Path);
        Assert.Contains("token 2 is 100", Assert.Throws<UserErrorException>(() => shards.ReadTokens(Split.Train, 0, new int[5])).Message, StringComparison.Ordinal);
    }

    [Fact]
    public void Hostile_indexes_neither_crash_nor_hang()
    {
        using TemporaryFolder folder = new();
        Write(folder);
        byte[] shard = File.ReadAllBytes(folder["train-00000.tokens"]);
        Random random = new(3);
        int[] starts = new int[50];
        for (int trial = 0; trial < 300; trial++)
        {
            byte[] damaged = [.. shard];
            for (int i = 0; i < 3; i++)
            {
                damaged[^(1 + random.Next(5 * ShardFile.EntryBytes))] = (byte)(random.Next(3) switch { 0 => 0xFF, 1 => 0x7F, _ => random.Next(256) });
            }

            File.WriteAllBytes(folder["train-00000.tokens"], damaged);
            using TokenShards shards = TokenShards.Open(folder.Path);
            try
            {
                int count = shards.ReadDocumentStarts(Split.Train, 0, 50, starts);
                Assert.InRange(count, 1, 50);
                Assert.All(starts[..count], s => Assert.InRange(s, 0, 49));
                shards.Documents(Split.Train, 0, 50);
            }
            catch (UserErrorException e)
            {
                Assert.Contains("damaged", e.Message, StringComparison.Ordinal);
            }
        }
    }

    [Theory]
    [InlineData("format", "\"other\"", "format")]
    [InlineData("version", "2", "version is 2")]
    [InlineData("vocabulary_size", "0", "0 ids")]
    [InlineData("vocabulary_size", "70000", "bytes per token")]
    [InlineData("vocabulary_size", "-1", "ids")]
    [InlineData("bos", "100", "BOS 100")]
    [InlineData("tokenizer_sha256", "null", "tokenizer_sha256")]
    [InlineData("train", "null", "train")]
    [InlineData("train.tokens", "51", "not the sums")]
    [InlineData("train.tokens", "1e99", "tokens")]
    [InlineData("train.text_bytes", "-1", "negative")]
    [InlineData("train.shards", "[null]", "shard is null")]
    [InlineData("files", "[null]", "file is null")]
    [InlineData("train.shards.0.file", "\"../x\"", "not a name")]
    [InlineData("train.shards.0.file", "\"/etc/passwd\"", "not a name")]
    [InlineData("train.shards.0.file", "\"train-00001.tokens\"", "not a name")]
    [InlineData("train.shards.0.tokens", "-1", "negative")]
    [InlineData("train.shards.0.tokens", "9223372036854775807", "do not make")]
    [InlineData("train.shards.0.documents", "4611686018427387904", "do not make")]
    [InlineData("train.shards.0.bytes", "9223372036854775807", "do not make")]
    [InlineData("files", "[{\"file\": \"..\", \"bytes\": 1, \"sha256\": \"\"}]", "not a name")]
    public void Hostile_manifests_are_refused_in_one_line(string key, string value, string message)
    {
        using TemporaryFolder folder = new();
        Write(folder);
        JsonNode manifest = JsonNode.Parse(File.ReadAllText(folder["manifest.json"]))!;
        string[] path = key.Split('.');
        JsonNode node = manifest;
        foreach (string step in path[..^1])
        {
            node = int.TryParse(step, out int index) ? node[index]! : node[step]!;
        }

        node[path[^1]] = JsonNode.Parse(value);
        File.WriteAllText(folder["manifest.json"], manifest.ToJsonString());
        string error = Error(folder);
        Assert.Contains(message, error, StringComparison.Ordinal);
        Assert.Contains("manifest.json is damaged", error, StringComparison.Ordinal);
        Assert.DoesNotContain('\n', error);
    }

    [Fact]
    public void A_manifest_cut_off_anywhere_is_refused()
    {
        using TemporaryFolder folder = new();
        Write(folder);
        byte[] manifest = File.ReadAllBytes(folder["manifest.json"]);
        for (int length = 0; length < manifest.Length - 1; length += 7)
        {
            File.WriteAllBytes(folder["manifest.json"], manifest[..length]);
            Assert.Contains("damaged", Error(folder), StringComparison.Ordinal);
        }

        File.WriteAllText(folder["manifest.json"], new string('[', 100_000), Encoding.UTF8);
        Assert.Contains("damaged", Error(folder), StringComparison.Ordinal);
    }

    [Fact]
    public void A_folder_without_shards_says_how_to_write_them()
    {
        using TemporaryFolder folder = new();
        Assert.Contains("tinyllama data prepare", Error(folder), StringComparison.Ordinal);
    }

    /// <summary>Two shards of 50 tokens in 5 documents each, vocabulary 100.</summary>
    private static void Write(TemporaryFolder folder) =>
        folder.Shards(Split.Train, Enumerable.Range(0, 100).Chunk(10), vocabularySize: 100, tokensPerShard: 50).Dispose();

    private static string Error(TemporaryFolder folder) => Assert.Throws<UserErrorException>(() => TokenShards.Open(folder.Path)).Message;
}
