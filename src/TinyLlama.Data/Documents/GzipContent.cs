using System.IO.Compression;

namespace TinyLlama.Data.Documents;

/// <summary>The content of a gzip file (RFC 1952) of one or more members, which says so where it was cut off.</summary>
/// <remarks>
/// <see cref="GZipStream"/> takes a file that ends too early for a complete one. Here a last member of known content is put
/// behind the file: where a member is cut off, that one is taken for the missing rest, and its content does not come out.
/// </remarks>
internal sealed class GzipContent : ForwardStream
{
    private static readonly byte[] s_mark = "the end of a gzip file"u8.ToArray();
    private static readonly byte[] s_markMember = Compress(s_mark);

    private readonly GZipStream _unpacked;
    private readonly byte[] _buffer = new byte[1 << 16];
    private int _start;
    private int _end;
    private bool _ended;

    /// <summary>Unpacks a stream, and disposes of it with itself.</summary>
    public GzipContent(Stream compressed) => _unpacked = new GZipStream(new FollowedStream(compressed, s_markMember), CompressionMode.Decompress);

    /// <exception cref="InvalidDataException">The file is damaged or cut off.</exception>
    public override int Read(Span<byte> buffer)
    {
        // What may be the mark is held back until more has come.
        while (!_ended && _end - _start <= s_mark.Length)
        {
            _buffer.AsSpan(_start, _end - _start).CopyTo(_buffer);
            (_start, _end) = (0, _end - _start);
            int read = _unpacked.Read(_buffer.AsSpan(_end));
            _ended = read == 0;
            _end += read;
        }

        int ready = _end - _start - s_mark.Length;
        if (_ended && (ready < 0 || !_buffer.AsSpan(_end - s_mark.Length, s_mark.Length).SequenceEqual(s_mark)))
        {
            throw new InvalidDataException("the gzip file is cut off, or something else follows it");
        }

        int count = Math.Min(ready, buffer.Length);
        _buffer.AsSpan(_start, count).CopyTo(buffer);
        _start += count;
        return count;
    }

    protected override void Dispose(bool disposing)
    {
        if (disposing)
        {
            _unpacked.Dispose();
        }

        base.Dispose(disposing);
    }

    private static byte[] Compress(byte[] content)
    {
        using MemoryStream compressed = new();
        using (GZipStream stream = new(compressed, CompressionLevel.Optimal))
        {
            stream.Write(content);
        }

        return compressed.ToArray();
    }

    /// <summary>A stream with some bytes behind it.</summary>
    private sealed class FollowedStream(Stream first, byte[] last) : ForwardStream
    {
        private readonly MemoryStream _last = new(last);

        public override int Read(Span<byte> buffer) => first.Read(buffer) is int read and > 0 ? read : _last.Read(buffer);

        protected override void Dispose(bool disposing)
        {
            if (disposing)
            {
                first.Dispose();
            }

            base.Dispose(disposing);
        }
    }
}
