using System.Security.Cryptography;
using System.Text;
using TinyLlama.Compute;

namespace TinyLlama.Checkpoints;

/// <summary>A file of a folder, as a manifest lists it.</summary>
/// <param name="Name">Its name, without a path.</param>
/// <param name="ByteCount">Its size in bytes.</param>
/// <param name="Sha256">SHA-256 of its bytes, in lower-case hexadecimal.</param>
public sealed record ListedFile(string Name, long ByteCount, string Sha256);

/// <summary>Writes the files of one folder: each is hashed on its way and on the disk (fsync) when its call returns.</summary>
public sealed class FolderWriter
{
    private readonly string _folder;
    private readonly List<ListedFile> _files = [];

    internal FolderWriter(string folder) => _folder = folder;

    /// <summary>Gets what has been written.</summary>
    public IReadOnlyList<ListedFile> Files => _files;

    /// <summary>Writes a file of tensors; see <see cref="Safetensors"/>.</summary>
    /// <exception cref="IOException">The disk is full or gone.</exception>
    public void WriteTensors(
        string name, Backend backend, IReadOnlyList<NamedTensor> tensors, DType? storeAs = null) =>
        Write(name, stream => Safetensors.Write(stream, backend, tensors, FormatMetadata, storeAs));

    /// <summary>Writes a text file in UTF-8.</summary>
    /// <exception cref="IOException">The disk is full or gone.</exception>
    public void WriteText(string name, string text) => Write(name, stream => stream.Write(Encoding.UTF8.GetBytes(text)));

    /// <summary>Copies a file from elsewhere, under its own name.</summary>
    /// <exception cref="IOException">The file is missing, or the disk is full or gone.</exception>
    public void Copy(string path)
    {
        using var source = new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.Read, bufferSize: 0);
        Write(Path.GetFileName(path), stream => source.CopyTo(stream));
    }

    /// <summary>Writes a file.</summary>
    /// <param name="name">Its name, without a path; each name once.</param>
    /// <param name="write">Writes the bytes.</param>
    /// <exception cref="IOException">The disk is full or gone.</exception>
    public void Write(string name, Action<Stream> write)
    {
        ArgumentOutOfRangeException.ThrowIfNotEqual(Path.GetFileName(name), name);
        using var file = new FileStream(
            Path.Combine(_folder, name), FileMode.CreateNew, FileAccess.Write, FileShare.None, bufferSize: 0);
        using var hash = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);
        using (var hashing = new HashingStream(file, hash))
        {
            write(hashing);
        }

        file.Flush(flushToDisk: true);
        _files.Add(new ListedFile(name, file.Length, Convert.ToHexStringLower(hash.GetHashAndReset())));
    }

    // Other programs look for the framework that a file was written for; "pt" is what all of them accept.
    internal static readonly IReadOnlyDictionary<string, string> FormatMetadata =
        new Dictionary<string, string>(StringComparer.Ordinal) { ["format"] = "pt" };

    /// <summary>Passes bytes on and hashes them.</summary>
    private sealed class HashingStream(Stream destination, IncrementalHash hash) : Stream
    {
        public override bool CanRead => false;

        public override bool CanSeek => false;

        public override bool CanWrite => true;

        public override long Length => destination.Length;

        public override long Position
        {
            get => destination.Position;
            set => throw new NotSupportedException();
        }

        public override void Write(ReadOnlySpan<byte> buffer)
        {
            destination.Write(buffer);
            hash.AppendData(buffer);
        }

        public override void Write(byte[] buffer, int offset, int count) => Write(buffer.AsSpan(offset, count));

        public override void Flush() => destination.Flush();

        public override int Read(byte[] buffer, int offset, int count) => throw new NotSupportedException();

        public override long Seek(long offset, SeekOrigin origin) => throw new NotSupportedException();

        public override void SetLength(long value) => throw new NotSupportedException();
    }
}
