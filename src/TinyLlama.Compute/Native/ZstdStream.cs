using System.Runtime.InteropServices;

namespace TinyLlama.Compute.Native;

/// <summary>The content of a Zstandard file (RFC 8878), unpacked as it is read by the system's libzstd.</summary>
/// <remarks>Several frames one after the other are one content. A window of up to 128 MiB is accepted, libzstd's own limit.</remarks>
public sealed partial class ZstdStream : Stream
{
    private const string Library = SystemLibraries.Zstd;

    private readonly Stream _compressed;
    private readonly DecompressionHandle _context;
    private readonly byte[] _input;
    private int _inputStart;
    private int _inputEnd;
    private bool _insideFrame;

    static ZstdStream() => SystemLibraries.Resolve();

    /// <summary>Unpacks a stream, and disposes of it with itself.</summary>
    /// <param name="compressed">The compressed bytes.</param>
    /// <exception cref="DeviceException">libzstd is not on this machine.</exception>
    public ZstdStream(Stream compressed)
    {
        ArgumentNullException.ThrowIfNull(compressed);
        _compressed = compressed;
        try
        {
            _context = CreateContext();
        }
        catch (DllNotFoundException e)
        {
            throw new DeviceException(
                "libzstd, which unpacks .zst files, is not on this machine; install it (Debian, Ubuntu: libzstd1; Fedora: libzstd; Alpine: zstd-libs; macOS: brew install zstd) or unpack the files first", e);
        }

        if (_context.IsInvalid)
        {
            throw new DeviceException("libzstd could not begin: too little memory");
        }

        _input = new byte[(int)InputSize()];
    }

    /// <summary>Gets the version of the system's library as major × 10,000 + minor × 100 + release.</summary>
    /// <exception cref="DllNotFoundException">libzstd is not on this machine.</exception>
    public static int LibraryVersion => (int)VersionNumber();

    /// <inheritdoc/>
    public override bool CanRead => true;

    /// <inheritdoc/>
    public override bool CanSeek => false;

    /// <inheritdoc/>
    public override bool CanWrite => false;

    /// <inheritdoc/>
    public override long Length => throw new NotSupportedException();

    /// <inheritdoc/>
    public override long Position
    {
        get => throw new NotSupportedException();
        set => throw new NotSupportedException();
    }

    /// <inheritdoc/>
    /// <exception cref="InvalidDataException">The content is damaged or cut off.</exception>
    public override unsafe int Read(Span<byte> buffer)
    {
        ObjectDisposedException.ThrowIf(_context.IsClosed, this);
        if (buffer.IsEmpty)
        {
            return 0;
        }

        while (true)
        {
            if (_inputStart == _inputEnd)
            {
                (_inputStart, _inputEnd) = (0, _compressed.Read(_input));
            }

            bool ended = _inputEnd == 0;
            if (ended && !_insideFrame)
            {
                return 0;
            }

            // At the end of the input libzstd may still hold content that did not fit into the last buffer.
            int produced;
            fixed (byte* source = _input, destination = buffer)
            {
                InBuffer input = new(source, (nuint)_inputEnd, (nuint)_inputStart);
                OutBuffer output = new(destination, (nuint)buffer.Length, 0);
                nuint result = Decompress(_context, ref output, ref input);
                if (IsError(result) != 0)
                {
                    throw new InvalidDataException($"the Zstandard content is damaged: {Marshal.PtrToStringUTF8((nint)ErrorName(result))}");
                }

                // 0: a frame has ended, and what follows is another one or nothing.
                _insideFrame = result != 0;
                _inputStart = (int)input.Position;
                produced = (int)output.Position;
            }

            if (produced > 0)
            {
                return produced;
            }

            if (ended && _insideFrame)
            {
                throw new InvalidDataException("the Zstandard content is cut off");
            }
        }
    }

    /// <inheritdoc/>
    public override int Read(byte[] buffer, int offset, int count) => Read(buffer.AsSpan(offset, count));

    /// <inheritdoc/>
    public override void Flush()
    {
    }

    /// <inheritdoc/>
    public override long Seek(long offset, SeekOrigin origin) => throw new NotSupportedException();

    /// <inheritdoc/>
    public override void SetLength(long value) => throw new NotSupportedException();

    /// <inheritdoc/>
    public override void Write(byte[] buffer, int offset, int count) => throw new NotSupportedException();

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (disposing)
        {
            _context.Dispose();
            _compressed.Dispose();
        }

        base.Dispose(disposing);
    }

    [LibraryImport(Library, EntryPoint = "ZSTD_createDStream")]
    private static partial DecompressionHandle CreateContext();

    [LibraryImport(Library, EntryPoint = "ZSTD_freeDStream")]
    private static partial nuint FreeContext(nint context);

    [LibraryImport(Library, EntryPoint = "ZSTD_DStreamInSize")]
    private static partial nuint InputSize();

    [LibraryImport(Library, EntryPoint = "ZSTD_decompressStream")]
    private static partial nuint Decompress(DecompressionHandle context, ref OutBuffer output, ref InBuffer input);

    [LibraryImport(Library, EntryPoint = "ZSTD_versionNumber")]
    private static partial uint VersionNumber();

    [LibraryImport(Library, EntryPoint = "ZSTD_isError")]
    private static partial uint IsError(nuint result);

    [LibraryImport(Library, EntryPoint = "ZSTD_getErrorName")]
    private static unsafe partial byte* ErrorName(nuint result);

    /// <summary>ZSTD_inBuffer: bytes to unpack, and how many of them were.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private unsafe struct InBuffer(byte* source, nuint size, nuint position)
    {
        public byte* Source = source;
        public nuint Size = size;
        public nuint Position = position;
    }

    /// <summary>ZSTD_outBuffer: room for content, and how much of it is filled.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private unsafe struct OutBuffer(byte* destination, nuint size, nuint position)
    {
        public byte* Destination = destination;
        public nuint Size = size;
        public nuint Position = position;
    }

    /// <summary>A ZSTD_DStream.</summary>
    private sealed class DecompressionHandle() : SafeHandle(0, ownsHandle: true)
    {
        public override bool IsInvalid => handle == 0;

        protected override bool ReleaseHandle() => FreeContext(handle) == 0;
    }
}
