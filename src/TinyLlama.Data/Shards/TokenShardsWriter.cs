namespace TinyLlama.Data.Shards;

/// <summary>
/// Writes the token files of a folder. The caller writes the manifest from what <see cref="Complete"/> returns; until
/// then the folder is not one of token shards.
/// </summary>
public sealed class TokenShardsWriter : IDisposable
{
    /// <summary>Tokens after which a shard ends with its document: 256 MiB of 16-bit tokens.</summary>
    public const long DefaultTokensPerShard = 1L << 27;

    /// <summary>Documents after which a shard ends, so that the index of an open shard stays small in memory.</summary>
    private const long DocumentsPerShard = 1L << 22;

    private readonly string _folder;
    private readonly int _bytesPerToken;
    private readonly long _tokensPerShard;
    private readonly ShardWriter?[] _open = new ShardWriter?[2];
    private readonly SplitEntry[] _written;
    private readonly SplitEntry[] _finished;
    private byte[] _packed = [];

    /// <summary>Begins a folder.</summary>
    /// <param name="folder">Where the files go; created where it is missing.</param>
    /// <param name="vocabularySize">Number of ids (V): decides the width of a token.</param>
    /// <param name="tokensPerShard">Tokens after which a shard ends with its document.</param>
    public TokenShardsWriter(string folder, int vocabularySize, long tokensPerShard = DefaultTokensPerShard)
        : this(folder, ShardFile.BytesPerToken(vocabularySize), tokensPerShard, new(0, 0, 0, []), new(0, 0, 0, []))
    {
    }

    /// <summary>Goes on behind shards that are finished.</summary>
    internal TokenShardsWriter(string folder, int bytesPerToken, long tokensPerShard, SplitEntry train, SplitEntry validation)
    {
        Directory.CreateDirectory(folder);
        (_folder, _bytesPerToken, _tokensPerShard) = (folder, bytesPerToken, tokensPerShard);
        _written = [train, validation];
        _finished = [train, validation];
    }

    /// <summary>Appends a document.</summary>
    /// <param name="split">Which side.</param>
    /// <param name="tokens">Its ids, with BOS and EOS where the corpus has them.</param>
    /// <param name="file">Its source file: an index into the list of sources.</param>
    /// <param name="line">Its line there, from 1; 0 where the whole file is the document.</param>
    /// <param name="textBytes">Bytes of UTF-8 text that the tokens stand for.</param>
    public void Add(Split split, ReadOnlySpan<int> tokens, int file, long line, long textBytes)
    {
        int bytes = checked(tokens.Length * _bytesPerToken);
        if (_packed.Length < bytes)
        {
            _packed = new byte[Math.Max(bytes, 1 << 16)];
        }

        ShardWriter.Pack(_packed, tokens, _bytesPerToken);
        AddPacked(split, _packed.AsSpan(0, bytes), file, line, textBytes);
    }

    /// <summary>Ends the last shard of each split and returns what the manifest says of them.</summary>
    public (SplitEntry Train, SplitEntry Validation) Complete()
    {
        EndShard(Split.Train);
        EndShard(Split.Validation);
        return (_finished[0], _finished[1]);
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        foreach (ShardWriter? shard in _open)
        {
            shard?.Dispose();
        }
    }

    /// <summary>Appends a document whose tokens are bytes as the shard holds them.</summary>
    /// <returns>Whether the document ended a shard: <see cref="Finished"/> then includes it.</returns>
    internal bool AddPacked(Split split, ReadOnlySpan<byte> tokens, int file, long line, long textBytes)
    {
        SplitEntry written = _written[(int)split];
        ShardWriter shard = _open[(int)split] ??= new ShardWriter(Path.Combine(_folder, ShardName(split, written.Shards.Count)), _bytesPerToken);
        shard.Add(tokens, file, line);
        _written[(int)split] = written with
        {
            Documents = written.Documents + 1,
            Tokens = written.Tokens + (tokens.Length / _bytesPerToken),
            TextBytes = written.TextBytes + textBytes,
        };
        if (shard.Tokens < _tokensPerShard && shard.Documents < DocumentsPerShard)
        {
            return false;
        }

        EndShard(split);
        return true;
    }

    /// <summary>What the finished shards of a split hold; an open shard is not part of it.</summary>
    internal SplitEntry Finished(Split split) => _finished[(int)split];

    private static string ShardName(Split split, int index) => $"{(split == Split.Train ? "train" : "validation")}-{index:D5}.tokens";

    /// <summary>Ends the open shard of a split, if there is one.</summary>
    internal void EndShard(Split split)
    {
        if (_open[(int)split] is { } shard)
        {
            SplitEntry written = _written[(int)split];
            _finished[(int)split] = _written[(int)split] = written with { Shards = [.. written.Shards, shard.Complete()] };
            shard.Dispose();
            _open[(int)split] = null;
        }
    }
}
