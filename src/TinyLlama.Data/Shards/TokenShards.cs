using System.Security.Cryptography;
using System.Text;
using System.Text.Json;

namespace TinyLlama.Data.Shards;

/// <summary>Where a document came from.</summary>
/// <param name="File">Name of the source file, relative to the folder that was prepared.</param>
/// <param name="Line">Its line there, from 1; 0 where the whole file is the document.</param>
/// <param name="FirstToken">Its first token, counted over the whole split.</param>
public sealed record DocumentOrigin(string File, long Line, long FirstToken)
{
    /// <inheritdoc/>
    public override string ToString() => Line == 0 ? File : $"{File}:{Line}";
}

/// <summary>
/// A corpus as tokens, opened for reading: per split one long run of tokens, the concatenation of its shards. Reading is
/// safe from several threads at once.
/// </summary>
public sealed class TokenShards : IDisposable
{
    /// <summary>The file that lists the source files.</summary>
    internal const string SourcesFile = "sources.json";

    private readonly string _folder;
    private readonly ShardFile[][] _shards;
    private readonly long[][] _ends;
    private readonly Lazy<string[]> _sources;

    private TokenShards(string folder, Manifest manifest)
    {
        (_folder, Manifest) = (folder, manifest);
        _shards = [new ShardFile[manifest.Train.Shards.Count], new ShardFile[manifest.Validation.Shards.Count]];
        _ends = [new long[_shards[0].Length], new long[_shards[1].Length]];
        _sources = new Lazy<string[]>(() => [.. ReadSources(_folder).Select(s => s?.File ?? "")]);
    }

    /// <summary>Gets what the folder holds.</summary>
    public Manifest Manifest { get; }

    /// <summary>Gets what tells this corpus from another: the SHA-256 of the shards' hashes, in lower-case hexadecimal.</summary>
    public string Sha256 => Convert.ToHexStringLower(
        SHA256.HashData(Encoding.ASCII.GetBytes(string.Join('\n', Manifest.Shards.Select(shard => shard.Sha256)))));

    /// <summary>Opens a folder that was written by <see cref="DataPreparation"/>, and checks sizes and headers against its manifest.</summary>
    /// <param name="folder">The folder.</param>
    /// <exception cref="UserErrorException">The folder is not complete, or a file is damaged.</exception>
    public static TokenShards Open(string folder)
    {
        TokenShards shards = new(folder, Manifest.Read(folder));
        try
        {
            foreach (Split split in new[] { Split.Train, Split.Validation })
            {
                long end = 0;
                IReadOnlyList<ShardEntry> entries = shards.Manifest[split].Shards;
                for (int i = 0; i < entries.Count; i++)
                {
                    shards._shards[(int)split][i] = new ShardFile(folder, entries[i], shards.Manifest);
                    shards._ends[(int)split][i] = end += entries[i].Tokens;
                }
            }

            return shards;
        }
        catch
        {
            shards.Dispose();
            throw;
        }
    }

    /// <summary>Compares every file with the SHA-256 of the manifest. Reads everything.</summary>
    /// <param name="folder">The folder of token shards.</param>
    /// <returns>One line for each file that is missing or differs; empty where all is well.</returns>
    public static IReadOnlyList<string> Verify(string folder)
    {
        Manifest manifest = Manifest.Read(folder);
        List<string> faults = [];
        foreach (FileEntry file in manifest.Shards.Select(s => new FileEntry(s.File, s.Bytes, s.Sha256)).Concat(manifest.Files))
        {
            string path = Path.Combine(folder, file.File);
            if (!File.Exists(path))
            {
                faults.Add($"{path} is missing");
            }
            else if (new FileInfo(path).Length is long bytes && bytes != file.Bytes)
            {
                faults.Add($"{path} has {bytes} bytes, the manifest says {file.Bytes}");
            }
            else if (WholeFile.Sha256(path) != file.Sha256)
            {
                faults.Add($"{path} differs from what was written: its SHA-256 is not the manifest's");
            }
        }

        return faults;
    }

    /// <summary>The number of tokens of a split.</summary>
    /// <param name="split">Which side.</param>
    public long TokenCount(Split split) => Manifest[split].Tokens;

    /// <summary>Reads a run of tokens, across shards and documents. Allocates nothing.</summary>
    /// <param name="split">Which side.</param>
    /// <param name="first">The first token, counted over the whole split.</param>
    /// <param name="destination">Receives the ids, each within the vocabulary.</param>
    /// <exception cref="ArgumentOutOfRangeException">The run is not inside the split.</exception>
    /// <exception cref="UserErrorException">A shard is damaged.</exception>
    public void ReadTokens(Split split, long first, Span<int> destination)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(first);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(destination.Length, TokenCount(split) - first);
        for (int s = ShardOf(split, first); destination.Length > 0; s++)
        {
            ShardFile shard = _shards[(int)split][s];
            long inShard = first - (_ends[(int)split][s] - shard.Tokens);
            int count = (int)Math.Min(destination.Length, shard.Tokens - inShard);
            shard.ReadTokens(inShard, destination[..count]);
            destination = destination[count..];
            first += count;
        }
    }

    /// <summary>
    /// Where documents begin in a run of tokens, relative to the run. The first is always 0, even inside a document.
    /// Allocates nothing.
    /// </summary>
    /// <param name="split">Which side.</param>
    /// <param name="first">The first token of the run, counted over the whole split.</param>
    /// <param name="count">Number of tokens in the run.</param>
    /// <param name="starts">Receives the beginnings; <paramref name="count"/> places always suffice.</param>
    /// <returns>How many there are.</returns>
    public int ReadDocumentStarts(Split split, long first, int count, Span<int> starts)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(first);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(count, TokenCount(split) - first);
        if (count <= 0)
        {
            return 0;
        }

        int found = 0;
        starts[found++] = 0;
        for (int s = ShardOf(split, first); s < _shards[(int)split].Length; s++)
        {
            ShardFile shard = _shards[(int)split][s];
            long shardStart = _ends[(int)split][s] - shard.Tokens;
            for (long d = shard.DocumentOf(first - shardStart); d < shard.Documents; d++)
            {
                long start = shardStart + shard.Document(d).FirstToken - first;
                if (start >= count)
                {
                    return found;
                }

                // Documents without tokens begin where the next one does.
                if (start > starts[found - 1])
                {
                    starts[found++] = (int)start;
                }
            }
        }

        return found;
    }

    /// <summary>The documents that a run of tokens is part of, in order: for messages.</summary>
    /// <param name="split">Which side.</param>
    /// <param name="first">The first token of the run, counted over the whole split.</param>
    /// <param name="count">Number of tokens in the run.</param>
    public IReadOnlyList<DocumentOrigin> Documents(Split split, long first, int count)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(first);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(count, TokenCount(split) - first);
        List<DocumentOrigin> origins = [];
        for (int s = ShardOf(split, first); count > 0 && s < _shards[(int)split].Length; s++)
        {
            ShardFile shard = _shards[(int)split][s];
            long shardStart = _ends[(int)split][s] - shard.Tokens;
            for (long d = shard.DocumentOf(first - shardStart); d < shard.Documents; d++)
            {
                DocumentEntry entry = shard.Document(d);
                if (shardStart + entry.FirstToken >= first + count)
                {
                    return origins;
                }

                string file = entry.File < _sources.Value.Length ? _sources.Value[entry.File] : $"source {entry.File}";
                origins.Add(new DocumentOrigin(file, entry.Line, shardStart + entry.FirstToken));
            }
        }

        return origins;
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        foreach (ShardFile shard in _shards.SelectMany(s => s))
        {
            shard?.Dispose();
        }
    }

    /// <summary>
    /// The source files of a folder; none where the list is missing or damaged. Names are for messages: one about a batch
    /// is better without them than not at all.
    /// </summary>
    internal static SourceEntry?[] ReadSources(string folder)
    {
        try
        {
            return JsonSerializer.Deserialize(File.ReadAllBytes(Path.Combine(folder, SourcesFile)), ManifestJson.Default.SourceEntryArray) ?? [];
        }
        catch (Exception e) when (e is IOException or JsonException or UnauthorizedAccessException)
        {
            return [];
        }
    }

    /// <summary>The shard that a token is in; shards without tokens are passed over.</summary>
    private int ShardOf(Split split, long token)
    {
        int index = Array.BinarySearch(_ends[(int)split], token + 1);
        if (index < 0)
        {
            return ~index;
        }

        while (index > 0 && _ends[(int)split][index - 1] > token)
        {
            index--;
        }

        return index;
    }
}

/// <summary>A source file of a corpus.</summary>
/// <param name="File">Its name, relative to the folder that was prepared.</param>
/// <param name="Bytes">Its length in bytes, before decompression.</param>
internal sealed record SourceEntry(string File, long Bytes);
