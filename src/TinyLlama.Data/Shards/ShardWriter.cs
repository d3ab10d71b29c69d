using System.Buffers;
using System.Buffers.Binary;

namespace TinyLlama.Data.Shards;

/// <summary>Writes one shard: tokens as they come, the index of documents behind them, the header last.</summary>
internal sealed class ShardWriter : IDisposable
{
    private readonly string _path;
    private readonly FileStream _file;
    private readonly int _bytesPerToken;
    private readonly ArrayBufferWriter<byte> _index = new();
    private long _tokens;
    private long _documents;

    public ShardWriter(string path, int bytesPerToken)
    {
        _path = path;
        _bytesPerToken = bytesPerToken;
        _file = new FileStream(path, FileMode.Create, FileAccess.Write, FileShare.Read, bufferSize: 1 << 16);
        _file.Write(stackalloc byte[ShardFile.HeaderBytes]);
    }

    public long Tokens => _tokens;

    public long Documents => _documents;

    /// <summary>Appends a document.</summary>
    /// <param name="tokens">Its tokens as the file holds them: little-endian, as wide as the shard's.</param>
    /// <param name="file">Index of its source file.</param>
    /// <param name="line">Its line there.</param>
    public void Add(ReadOnlySpan<byte> tokens, int file, long line)
    {
        Span<byte> entry = _index.GetSpan(ShardFile.EntryBytes);
        BinaryPrimitives.WriteInt64LittleEndian(entry, _tokens);
        BinaryPrimitives.WriteInt32LittleEndian(entry[8..], file);
        BinaryPrimitives.WriteUInt32LittleEndian(entry[12..], checked((uint)line));
        _index.Advance(ShardFile.EntryBytes);
        _file.Write(tokens);
        _tokens += tokens.Length / _bytesPerToken;
        _documents++;
    }

    /// <summary>Writes index and header, and brings all to the disk.</summary>
    public ShardEntry Complete()
    {
        Span<byte> header = stackalloc byte[ShardFile.HeaderBytes];
        header.Clear();
        int padding = (int)(ShardFile.IndexOffset(_tokens, _bytesPerToken) - _file.Position);
        _file.Write(header[..padding]);
        _file.Write(_index.WrittenSpan);
        ShardFile.WriteHeader(header, _bytesPerToken, _tokens, _documents);
        _file.Position = 0;
        _file.Write(header);
        _file.Flush(flushToDisk: true);
        long bytes = _file.Length;
        _file.Dispose();
        return new ShardEntry(Path.GetFileName(_path), _tokens, _documents, bytes, WholeFile.Sha256(_path));
    }

    public void Dispose() => _file.Dispose();

    /// <summary>Tokens as a shard holds them.</summary>
    /// <param name="destination">Bytes: <paramref name="bytesPerToken"/> for each token.</param>
    /// <param name="tokens">Ids.</param>
    /// <param name="bytesPerToken">2 or 4.</param>
    public static void Pack(Span<byte> destination, ReadOnlySpan<int> tokens, int bytesPerToken)
    {
        for (int i = 0; i < tokens.Length; i++)
        {
            if (bytesPerToken == 2)
            {
                BinaryPrimitives.WriteUInt16LittleEndian(destination[(2 * i)..], checked((ushort)tokens[i]));
            }
            else
            {
                BinaryPrimitives.WriteInt32LittleEndian(destination[(4 * i)..], tokens[i]);
            }
        }
    }
}
