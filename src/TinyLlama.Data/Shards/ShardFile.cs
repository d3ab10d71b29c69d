using System.Buffers.Binary;
using System.Runtime.InteropServices;
using Microsoft.Win32.SafeHandles;

namespace TinyLlama.Data.Shards;

/// <summary>A document in a shard.</summary>
/// <param name="FirstToken">Its first token, counted from the beginning of the shard.</param>
/// <param name="File">The source file it came from: an index into the list of sources.</param>
/// <param name="Line">The line of that file, from 1; 0 where the whole file is the document.</param>
internal readonly record struct DocumentEntry(long FirstToken, int File, long Line);

/// <summary>
/// One token file: a header of 32 bytes, the tokens, and 16 bytes for each document, all little-endian; the layout is in
/// docs/formats/token-shards.md.
/// </summary>
internal sealed class ShardFile : IDisposable
{
    public const int HeaderBytes = 32;
    public const int EntryBytes = 16;
    public const long MaximumLine = uint.MaxValue;
    private const int Version = 1;

    private readonly string _path;
    private readonly ShardEntry _entry;
    private readonly SafeFileHandle _handle;
    private readonly int _bytesPerToken;
    private readonly int _vocabularySize;
    private readonly long _indexOffset;

    /// <summary>Opens a shard and checks that its size and header are what the manifest says.</summary>
    /// <exception cref="UserErrorException">The file is missing, cut off or another one.</exception>
    public ShardFile(string folder, ShardEntry entry, Manifest manifest)
    {
        _path = Path.Combine(folder, entry.File);
        _entry = entry;
        (_bytesPerToken, _vocabularySize) = (manifest.BytesPerToken, manifest.VocabularySize);
        _indexOffset = IndexOffset(entry.Tokens, _bytesPerToken);
        if (!File.Exists(_path))
        {
            throw new UserErrorException($"{_path} is missing: the manifest lists it; prepare the data again");
        }

        _handle = File.OpenHandle(_path, options: FileOptions.RandomAccess);
        try
        {
            long length = RandomAccess.GetLength(_handle);
            if (length != entry.Bytes)
            {
                throw new UserErrorException($"{_path} has {length} bytes, the manifest says {entry.Bytes}; prepare the data again");
            }

            Span<byte> header = stackalloc byte[HeaderBytes];
            Span<byte> expected = stackalloc byte[HeaderBytes];
            ReadExactly(header, 0);
            WriteHeader(expected, _bytesPerToken, entry.Tokens, entry.Documents);
            if (!header.SequenceEqual(expected))
            {
                throw new UserErrorException($"{_path} is no token shard of this folder: its header differs from the manifest; prepare the data again");
            }
        }
        catch
        {
            _handle.Dispose();
            throw;
        }
    }

    public long Tokens => _entry.Tokens;

    public long Documents => _entry.Documents;

    public static int BytesPerToken(int vocabularySize) => vocabularySize <= 65_536 ? 2 : 4;

    /// <summary>The length of a shard, as a number that cannot wrap for any counts.</summary>
    public static Int128 ByteCount(long tokens, long documents, int bytesPerToken) =>
        HeaderBytes + (((((Int128)tokens * bytesPerToken) + 7) / 8) * 8) + ((Int128)documents * EntryBytes);

    public static long IndexOffset(long tokens, int bytesPerToken) => HeaderBytes + ((((tokens * bytesPerToken) + 7) / 8) * 8);

    public static void WriteHeader(Span<byte> header, int bytesPerToken, long tokens, long documents)
    {
        "TLTOKENS"u8.CopyTo(header);
        BinaryPrimitives.WriteInt32LittleEndian(header[8..], Version);
        BinaryPrimitives.WriteInt32LittleEndian(header[12..], bytesPerToken);
        BinaryPrimitives.WriteInt64LittleEndian(header[16..], tokens);
        BinaryPrimitives.WriteInt64LittleEndian(header[24..], documents);
    }

    /// <summary>Reads a run of tokens of this shard. Allocates nothing.</summary>
    /// <exception cref="UserErrorException">A token is outside the vocabulary.</exception>
    public void ReadTokens(long first, Span<int> destination)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(first);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(destination.Length, Tokens - first);
        long offset = HeaderBytes + (first * _bytesPerToken);
        if (_bytesPerToken == 2)
        {
            // The narrow tokens go to the far half of the destination and are widened from the front: token i is read
            // before its place, or any place behind it, is written.
            Span<ushort> narrow = MemoryMarshal.Cast<int, ushort>(destination)[destination.Length..];
            ReadExactly(MemoryMarshal.AsBytes(narrow), offset);
            for (int i = 0; i < destination.Length; i++)
            {
                ushort token = narrow[i];
                destination[i] = BitConverter.IsLittleEndian ? token : BinaryPrimitives.ReverseEndianness(token);
            }
        }
        else
        {
            ReadExactly(MemoryMarshal.AsBytes(destination), offset);
            if (!BitConverter.IsLittleEndian)
            {
                BinaryPrimitives.ReverseEndianness(destination, destination);
            }
        }

        // Kernels look ids up without a check of their own.
        for (int i = 0; i < destination.Length; i++)
        {
            if ((uint)destination[i] >= (uint)_vocabularySize)
            {
                throw new UserErrorException($"{_path} is damaged: token {first + i} is {destination[i]}, the vocabulary has {_vocabularySize}; prepare the data again");
            }
        }
    }

    /// <summary>Reads an entry of the index and checks that it is in the shard.</summary>
    public DocumentEntry Document(long index)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(index);
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual(index, Documents);
        Span<byte> bytes = stackalloc byte[EntryBytes];
        ReadExactly(bytes, _indexOffset + (index * EntryBytes));
        DocumentEntry entry = new(
            BinaryPrimitives.ReadInt64LittleEndian(bytes),
            BinaryPrimitives.ReadInt32LittleEndian(bytes[8..]),
            BinaryPrimitives.ReadUInt32LittleEndian(bytes[12..]));
        if (entry.FirstToken < 0 || entry.FirstToken > Tokens || entry.File < 0 || (index == 0 && entry.FirstToken != 0))
        {
            throw new UserErrorException($"{_path} is damaged: document {index} begins at token {entry.FirstToken} of {Tokens}; prepare the data again");
        }

        return entry;
    }

    /// <summary>The last document that begins at or before a token: the one that it is in.</summary>
    public long DocumentOf(long token)
    {
        long low = 0;
        long high = Documents;
        while (high - low > 1)
        {
            long middle = low + ((high - low) / 2);
            if (Document(middle).FirstToken <= token)
            {
                low = middle;
            }
            else
            {
                high = middle;
            }
        }

        return low;
    }

    public void Dispose() => _handle.Dispose();

    private void ReadExactly(Span<byte> destination, long offset)
    {
        if (WholeFile.ReadAt(_handle, destination, offset) != destination.Length)
        {
            throw new UserErrorException($"{_path} was cut off behind byte {offset} while it was in use");
        }
    }
}
