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
        using TokenShardsWriter writer = new(Path, vocabularySize, tokensPerShard);
        int line = 1;
        foreach (int[] document in documents)
        {
            writer.Add(split, document, file: 0, line++, textBytes: document.Length);
        }

        (SplitEntry train, SplitEntry validation) = writer.Complete();
        new Manifest(
            Manifest.FormatName,
            Manifest.FormatVersion,
            new string('0', 64),
            vocabularySize,
            vocabularySize <= 65_536 ? 2 : 4,
            Bos: null,
            Eos: null,
            new Dictionary<string, string>(StringComparer.Ordinal),
            new LeftOut(0, 0, 0),
            train,
            validation,
            []).Write(Path);
        return TokenShards.Open(Path);
    }
}
