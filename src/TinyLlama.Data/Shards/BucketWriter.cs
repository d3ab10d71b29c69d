using System.Buffers.Binary;
using TinyLlama.Data.Batches;

namespace TinyLlama.Data.Shards;

/// <summary>What a bucket knows of a document besides its tokens.</summary>
/// <param name="Hash">The first 16 bytes of the SHA-256 of its text.</param>
/// <param name="File">Its source file.</param>
/// <param name="Line">Its line there.</param>
/// <param name="TextBytes">Bytes of its text as UTF-8.</param>
/// <param name="TokenBytes">Bytes of its tokens.</param>
internal readonly record struct BucketEntry(UInt128 Hash, int File, long Line, long TextBytes, int TokenBytes)
{
    public const int HeaderBytes = 40;

    /// <summary>The side a text is on: it depends on the text alone, so it stays whatever else is in the corpus.</summary>
    public static Split SplitOf(UInt128 hash, double validationShare) =>
        (ulong)(hash >> 64) < validationShare * 18446744073709551616.0 ? Split.Validation : Split.Train;

    /// <summary>
    /// The place of a document in the shuffled corpus: documents are in the order of this number. Where duplicates are to
    /// meet it depends on the text alone, else equal texts are spread.
    /// </summary>
    public ulong Key(ulong seed, bool duplicatesMeet)
    {
        ulong key = Permutation.Mix(Permutation.Mix(Permutation.Mix(seed) ^ (ulong)(Hash >> 64)) ^ (ulong)Hash);
        return duplicatesMeet ? key : Permutation.Mix(Permutation.Mix(key ^ (ulong)File) ^ (ulong)Line);
    }

    /// <summary>Cuts the keys into parts of equal width, in order.</summary>
    /// <returns>The part of a key, 0 … <paramref name="parts"/>-1.</returns>
    public static int Part(ulong key, int parts) => (int)Math.BigMul(key, (ulong)parts, out _);

    public void Write(Span<byte> header)
    {
        BinaryPrimitives.WriteUInt128LittleEndian(header, Hash);
        BinaryPrimitives.WriteInt64LittleEndian(header[16..], Line);
        BinaryPrimitives.WriteInt64LittleEndian(header[24..], TextBytes);
        BinaryPrimitives.WriteInt32LittleEndian(header[32..], File);
        BinaryPrimitives.WriteInt32LittleEndian(header[36..], TokenBytes);
    }

    public static BucketEntry Read(ReadOnlySpan<byte> header) => new(
        BinaryPrimitives.ReadUInt128LittleEndian(header),
        BinaryPrimitives.ReadInt32LittleEndian(header[32..]),
        BinaryPrimitives.ReadInt64LittleEndian(header[16..]),
        BinaryPrimitives.ReadInt64LittleEndian(header[24..]),
        BinaryPrimitives.ReadInt32LittleEndian(header[36..]));
}

/// <summary>
/// Encoded documents on their way into shuffled order: each bucket is a file that holds a range of keys, small enough to
/// be sorted in memory. The first half of the buckets is the training split, the second the validation split; bucket by
/// bucket, each sorted, is the order of the keys, however many buckets there are.
/// </summary>
internal sealed class BucketWriter : IDisposable
{
    private readonly string _folder;
    private readonly FileStream?[] _files;

    /// <summary>Opens the buckets of a folder, and cuts off what is behind a length that was written down.</summary>
    /// <exception cref="UserErrorException">A bucket is shorter than was written down.</exception>
    public BucketWriter(string folder, long[] bytes)
    {
        _folder = folder;
        _files = new FileStream?[bytes.Length];
        Bytes = [.. bytes];
        for (int b = 0; b < bytes.Length; b++)
        {
            string path = PathOf(b);
            long length = File.Exists(path) ? new FileInfo(path).Length : 0;
            if (length < bytes[b])
            {
                throw new UserErrorException($"{path} is shorter than when it was left; delete {folder} to begin again");
            }

            if (length > bytes[b])
            {
                using FileStream file = new(path, FileMode.Open, FileAccess.Write);
                file.SetLength(bytes[b]);
            }
        }
    }

    /// <summary>Gets the length of each bucket.</summary>
    public long[] Bytes { get; }

    /// <summary>The file of a bucket.</summary>
    public static string PathOf(string folder, int bucket) => Path.Combine(folder, $"bucket-{bucket:D4}");

    public void Append(int bucket, ReadOnlySpan<byte> document)
    {
        FileStream file = _files[bucket] ??= new FileStream(PathOf(bucket), FileMode.Append, FileAccess.Write, FileShare.Read, bufferSize: 1 << 16);
        file.Write(document);
        Bytes[bucket] += document.Length;
    }

    /// <summary>Brings all that was appended to the disk.</summary>
    public void Flush()
    {
        foreach (FileStream? file in _files)
        {
            file?.Flush(flushToDisk: true);
        }
    }

    public void Dispose()
    {
        foreach (FileStream? file in _files)
        {
            file?.Dispose();
        }
    }

    private string PathOf(int bucket) => PathOf(_folder, bucket);
}
