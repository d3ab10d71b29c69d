using TinyLlama.Data.Shards;

namespace TinyLlama.Data.Tests;

/// <summary>A folder of a test, gone with it.</summary>
internal sealed class TemporaryFolder : IDisposable
{
    public string Path { get; } = Directory.CreateTempSubdirectory("tinyllama-test-").FullName;

    public string this[string name] => System.IO.Path.Combine(Path, name);

    public void Dispose() => Directory.Delete(Path, recursive: true);

    /// <summary>Writes a folder of shards of given documents, all on one side, and opens it.</summary>
    public TokenShards Shards(Split split, IEnumerable<int[]> documents, int vocabularySize = 65_536, long tokensPerShard = 100)
    {
        SplitEntry written = SplitEntry.Empty;
        int bytesPerToken = ShardFile.BytesPerToken(vocabularySize);
        long line = 1;
        foreach (IEnumerable<int[]> shard in InShards(documents, tokensPerShard))
        {
            using ShardWriter writer = new(this[$"{(split == Split.Train ? "train" : "validation")}-{written.Shards.Count:D5}.tokens"], bytesPerToken);
            foreach (int[] document in shard)
            {
                byte[] bytes = new byte[document.Length * bytesPerToken];
                ShardWriter.Pack(bytes, document, bytesPerToken);
                writer.Add(bytes, file: 0, line++);
            }

            ShardEntry entry = writer.Complete();
            written += new SplitEntry(entry.Documents, entry.Tokens, entry.Tokens, [entry]);
        }

        new Manifest(
            Manifest.FormatName,
            Manifest.FormatVersion,
            new string('0', 64),
            vocabularySize,
            bytesPerToken,
            Bos: null,
            Eos: null,
            new Dictionary<string, string>(StringComparer.Ordinal),
            new LeftOut(0, 0, 0),
            split == Split.Train ? written : SplitEntry.Empty,
            split == Split.Validation ? written : SplitEntry.Empty,
            []).Write(Path);
        return TokenShards.Open(Path);
    }

    /// <summary>Runs of documents that have so many tokens or, the last one, fewer.</summary>
    private static IEnumerable<IEnumerable<int[]>> InShards(IEnumerable<int[]> documents, long tokensPerShard)
    {
        List<int[]> shard = [];
        foreach (int[] document in documents)
        {
            shard.Add(document);
            if (shard.Sum(d => (long)d.Length) >= tokensPerShard)
            {
                yield return shard;
                shard = [];
            }
        }

        if (shard.Count > 0)
        {
            yield return shard;
        }
    }
}
