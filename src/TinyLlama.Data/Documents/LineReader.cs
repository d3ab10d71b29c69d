namespace TinyLlama.Data.Documents;

/// <summary>Cuts a stream of bytes into lines, with a limit on their length.</summary>
/// <param name="stream">The stream; the caller disposes of it.</param>
/// <param name="maximumBytes">The longest line that is read, at most 512 MiB.</param>
internal sealed class LineReader(Stream stream, int maximumBytes)
{
    private byte[] _buffer = new byte[1 << 16];
    private int _start;
    private int _end;
    private bool _ended;

    /// <summary>Gets the number of the last line read, from 1.</summary>
    public long Line { get; private set; }

    /// <summary>Reads the next line, without its end (LF or CR LF).</summary>
    /// <param name="line">Valid until the next call.</param>
    /// <returns>False at the end of the stream.</returns>
    /// <exception cref="InvalidDataException">The line is too long.</exception>
    public bool TryRead(out ReadOnlySpan<byte> line)
    {
        int searched = 0;
        while (true)
        {
            int length = _buffer.AsSpan(_start + searched, _end - _start - searched).IndexOf((byte)'\n');
            if (length >= 0 || (_ended && _end > _start))
            {
                length = length >= 0 ? length + searched : _end - _start;
                RequireWithin(length);
                line = _buffer.AsSpan(_start, length);
                _start = Math.Min(_end, _start + length + 1);
                if (line.Length > 0 && line[^1] == '\r')
                {
                    line = line[..^1];
                }

                Line++;
                return true;
            }

            if (_ended)
            {
                line = default;
                return false;
            }

            searched = _end - _start;
            RequireWithin(searched);
            Fill();
        }
    }

    /// <summary>Reads all that is left.</summary>
    /// <exception cref="InvalidDataException">It is too long.</exception>
    public ReadOnlySpan<byte> ReadToEnd()
    {
        while (!_ended)
        {
            Fill();
            if (_end - _start > maximumBytes)
            {
                throw new InvalidDataException($"the file is longer than {maximumBytes} bytes, too long to be one document (one document per line is an option)");
            }
        }

        return _buffer.AsSpan(_start, _end - _start);
    }

    private void RequireWithin(int length)
    {
        if (length > maximumBytes)
        {
            throw new InvalidDataException($"line {Line + 1} is longer than {maximumBytes} bytes");
        }
    }

    private void Fill()
    {
        if (_start > 0)
        {
            _buffer.AsSpan(_start, _end - _start).CopyTo(_buffer);
            (_start, _end) = (0, _end - _start);
        }

        if (_end == _buffer.Length)
        {
            Array.Resize(ref _buffer, 2 * _buffer.Length);
        }

        int read = stream.Read(_buffer, _end, _buffer.Length - _end);
        _ended = read == 0;
        _end += read;
    }
}
