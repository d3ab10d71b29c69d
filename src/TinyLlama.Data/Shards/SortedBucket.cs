using Microsoft.Win32.SafeHandles;

namespace TinyLlama.Data.Shards;

/// <summary>The documents of a bucket in the order of their keys, from the files that all ranks wrote of it.</summary>
internal sealed class SortedBucket : IDisposable
{
    private readonly string[] _paths;
    private readonly int[] _ranksOfFiles;
    private readonly SafeFileHandle?[] _files;

    /// <summary>Reads what a bucket knows of its documents, and leaves the tokens.</summary>
    /// <param name="rankFolders">Where each rank's buckets are.</param>
    /// <param name="bucket">Which bucket.</param>
    /// <param name="bytes">How long it is in each folder.</param>
    /// <param name="ranksOfFiles">The rank that read each source file.</param>
    /// <param name="key">The key of a document.</param>
    /// <exception cref="UserErrorException">The bucket is damaged.</exception>
    public SortedBucket(string[] rankFolders, int bucket, long[] bytes, int[] ranksOfFiles, Func<BucketEntry, ulong> key)
    {
        _paths = [.. rankFolders.Select(folder => BucketWriter.PathOf(folder, bucket))];
        _ranksOfFiles = ranksOfFiles;
        _files = new SafeFileHandle?[_paths.Length];
        for (int rank = 0; rank < _paths.Length; rank++)
        {
            if (bytes[rank] > 0)
            {
                ReadEntries(rank, bytes[rank], key);
            }
        }

        Entries.Sort((a, b) =>
        {
            int order = a.Key.CompareTo(b.Key);
            order = order != 0 ? order : a.Entry.Hash.CompareTo(b.Entry.Hash);
            order = order != 0 ? order : a.Entry.File.CompareTo(b.Entry.File);
            return order != 0 ? order : a.Entry.Line.CompareTo(b.Entry.Line);
        });
    }

    /// <summary>Gets the documents, and where in the file of its rank the tokens of each are.</summary>
    public List<(ulong Key, BucketEntry Entry, long Offset)> Entries { get; } = [];

    /// <summary>Reads the tokens of a document.</summary>
    /// <param name="index">Which of the entries.</param>
    /// <param name="tokens">As many bytes as the entry says.</param>
    /// <exception cref="UserErrorException">The file is shorter than it was.</exception>
    public void ReadTokens(int index, Span<byte> tokens)
    {
        int rank = _ranksOfFiles[Entries[index].Entry.File];
        SafeFileHandle file = _files[rank] ??= File.OpenHandle(_paths[rank], share: FileShare.ReadWrite);
        if (WholeFile.ReadAt(file, tokens, Entries[index].Offset) != tokens.Length)
        {
            throw Damaged(rank, Entries[index].Offset);
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        foreach (SafeFileHandle? file in _files)
        {
            file?.Dispose();
        }
    }

    private void ReadEntries(int rank, long bytes, Func<BucketEntry, ulong> key)
    {
        using FileStream file = new(_paths[rank], FileMode.Open, FileAccess.Read, FileShare.ReadWrite, bufferSize: 1 << 16);
        Span<byte> header = stackalloc byte[BucketEntry.HeaderBytes];
        for (long offset = 0; offset < bytes;)
        {
            BucketEntry entry = file.ReadAtLeast(header, header.Length, throwOnEndOfStream: false) == header.Length ? BucketEntry.Read(header) : default;
            offset += header.Length;
            if (entry.TokenBytes <= 0 || entry.TokenBytes > bytes - offset || (uint)entry.File >= _ranksOfFiles.Length || _ranksOfFiles[entry.File] != rank)
            {
                throw Damaged(rank, offset);
            }

            Entries.Add((key(entry), entry, offset));
            offset += entry.TokenBytes;
            file.Seek(entry.TokenBytes, SeekOrigin.Current);
        }
    }

    private UserErrorException Damaged(int rank, long offset) =>
        new($"{_paths[rank]} is damaged at byte {offset}; delete {Path.GetDirectoryName(Path.GetDirectoryName(_paths[rank]))} to begin again");
}
