using System.IO.MemoryMappedFiles;

namespace TinyLlama.Compute.Native;

/// <summary>
/// A file mapped into memory for reading: its pages are read when they are touched, and the system may drop them again.
/// </summary>
/// <remarks>
/// Views are checked against the length at opening. A file that another program shortens while it is mapped ends the
/// process when a lost page is touched; that is the price of mapping on every system.
/// </remarks>
public sealed unsafe class MappedFile : IDisposable
{
    private readonly MemoryMappedFile? _file;
    private readonly MemoryMappedViewAccessor? _view;
    private byte* _first;

    private MappedFile(string path, long length, MemoryMappedFile? file)
    {
        (Path, Length, _file) = (path, length, file);
        if (file is not null)
        {
            _view = file.CreateViewAccessor(0, length, MemoryMappedFileAccess.Read);
            _view.SafeMemoryMappedViewHandle.AcquirePointer(ref _first);
            _first += _view.PointerOffset;
        }
    }

    /// <summary>Gets the path the file was opened by.</summary>
    public string Path { get; }

    /// <summary>Gets the length in bytes.</summary>
    public long Length { get; }

    /// <summary>Maps a whole file. Another program may replace the file meanwhile; the mapping keeps the old one.</summary>
    /// <exception cref="IOException">The file is missing or cannot be mapped.</exception>
    /// <exception cref="UnauthorizedAccessException">The file may not be read, or is a directory.</exception>
    public static MappedFile Open(string path)
    {
        var stream = new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.ReadWrite | FileShare.Delete, bufferSize: 0);
        try
        {
            // No system maps zero bytes.
            long length = stream.Length;
            MemoryMappedFile? file = length == 0 ? null : MemoryMappedFile.CreateFromFile(
                stream, null, length, MemoryMappedFileAccess.Read, HandleInheritability.None, leaveOpen: false);
            return new MappedFile(path, length, file);
        }
        catch
        {
            stream.Dispose();
            throw;
        }
    }

    /// <summary>The bytes of a range. Must not be used after <see cref="Dispose"/>.</summary>
    /// <param name="offset">First byte.</param>
    /// <param name="count">Number of bytes.</param>
    /// <exception cref="ArgumentOutOfRangeException">The range is not inside the file.</exception>
    public ReadOnlySpan<byte> Bytes(long offset, int count) => new((void*)Address(offset, count), count);

    /// <summary>The address of a range. Must not be used after <see cref="Dispose"/>.</summary>
    /// <param name="offset">First byte.</param>
    /// <param name="count">Number of bytes.</param>
    /// <exception cref="ArgumentOutOfRangeException">The range is not inside the file.</exception>
    public nint Address(long offset, long count)
    {
        ObjectDisposedException.ThrowIf(_first is null && Length > 0, this);
        ArgumentOutOfRangeException.ThrowIfNegative(offset);
        ArgumentOutOfRangeException.ThrowIfNegative(count);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(offset, Length - count);
        return (nint)_first + (nint)offset;
    }

    /// <summary>Drops what has been read from memory: a copy of it then takes its place, not more. It can be read again.</summary>
    public void DropPages()
    {
        if (_first is not null)
        {
            PageMemory.DropFilePages((nint)_first, Length);
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        if (_first is not null)
        {
            _first = null;
            _view!.SafeMemoryMappedViewHandle.ReleasePointer();
            _view.Dispose();
            _file!.Dispose();
        }
    }
}
