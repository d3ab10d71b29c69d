using System.Buffers.Binary;

namespace TinyLlama.Data.Tokenizers;

/// <summary>Reads the fields of a message in Protocol Buffers' wire format; every length is checked before it is used.</summary>
/// <param name="message">The bytes of the message.</param>
/// <param name="start">Where the message begins in its file, for error messages.</param>
/// <param name="source">The file's name, for error messages.</param>
internal ref struct ProtobufReader(ReadOnlySpan<byte> message, int start, string source)
{
    private readonly ReadOnlySpan<byte> _message = message;
    private int _position;
    private int _wireType;

    /// <summary>Gets the number of the current field.</summary>
    public int Field { get; private set; }

    /// <summary>Goes to the next field; false at the end of the message.</summary>
    public bool Next()
    {
        if (_position == _message.Length)
        {
            return false;
        }

        ulong tag = RawVarint();
        _wireType = (int)(tag & 7);
        if (tag >> 3 is 0 or > 0x1FFFFFFF)
        {
            throw Damaged("a field number out of range");
        }

        Field = (int)(tag >> 3);
        return true;
    }

    /// <summary>The current field as an integer.</summary>
    public long Varint()
    {
        Require(0);
        return (long)RawVarint();
    }

    /// <summary>The current field as a Boolean.</summary>
    public bool Bool() => Varint() != 0;

    /// <summary>The current field as a 32-bit floating-point number.</summary>
    public float Float()
    {
        Require(5);
        return BinaryPrimitives.ReadSingleLittleEndian(Take(4));
    }

    /// <summary>The current field as bytes of the message.</summary>
    public ReadOnlySpan<byte> Bytes()
    {
        Require(2);
        return Take(RawVarint());
    }

    /// <summary>The current field as text.</summary>
    public string Text()
    {
        ReadOnlySpan<byte> bytes = Bytes();
        return System.Text.Unicode.Utf8.IsValid(bytes)
            ? System.Text.Encoding.UTF8.GetString(bytes)
            : throw Damaged("text that is not UTF-8");
    }

    /// <summary>The current field as a message inside this one.</summary>
    public ProtobufReader Message()
    {
        ReadOnlySpan<byte> bytes = Bytes();
        return new ProtobufReader(bytes, start + _position - bytes.Length, source);
    }

    /// <summary>Passes over the current field.</summary>
    public void Skip()
    {
        switch (_wireType)
        {
            case 0:
                RawVarint();
                break;
            case 1:
                Take(8);
                break;
            case 2:
                Take(RawVarint());
                break;
            case 5:
                Take(4);
                break;
            default:
                throw Damaged($"wire type {_wireType}");
        }
    }

    /// <summary>The error for a file that this is no valid part of.</summary>
    public readonly UserErrorException Damaged(string what)
    {
        return new UserErrorException($"{source}: {what} at byte {start + _position}; "
            + "this is not a SentencePiece model, or it is damaged");
    }

    private readonly void Require(int wireType)
    {
        if (_wireType != wireType)
        {
            throw Damaged($"field {Field} has wire type {_wireType} where {wireType} is due");
        }
    }

    private ulong RawVarint()
    {
        ulong value = 0;
        for (int shift = 0; shift < 64; shift += 7)
        {
            if (_position == _message.Length)
            {
                throw Damaged("the data ends inside a number");
            }

            byte next = _message[_position++];
            value |= (ulong)(next & 0x7F) << shift;
            if (next < 0x80)
            {
                return value;
            }
        }

        throw Damaged("a number of more than 64 bits");
    }

    private ReadOnlySpan<byte> Take(ulong count)
    {
        if (count > (ulong)(_message.Length - _position))
        {
            throw Damaged($"a field of {count} bytes where {_message.Length - _position} are left");
        }

        ReadOnlySpan<byte> bytes = _message.Slice(_position, (int)count);
        _position += (int)count;
        return bytes;
    }
}
