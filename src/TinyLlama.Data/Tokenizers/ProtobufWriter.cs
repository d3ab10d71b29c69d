using System.Buffers.Binary;
using System.Text;

namespace TinyLlama.Data.Tokenizers;

/// <summary>Writes the fields of a message in Protocol Buffers' wire format.</summary>
internal sealed class ProtobufWriter
{
    private readonly List<byte> _message = [];

    public byte[] ToArray() => [.. _message];

    public void Varint(int field, long value)
    {
        RawVarint((ulong)field << 3);
        RawVarint((ulong)value);
    }

    public void Bool(int field, bool value) => Varint(field, value ? 1 : 0);

    public void Float(int field, float value)
    {
        Span<byte> bytes = stackalloc byte[4];
        BinaryPrimitives.WriteSingleLittleEndian(bytes, value);
        RawVarint(((ulong)field << 3) | 5);
        _message.AddRange(bytes);
    }

    public void Bytes(int field, ReadOnlySpan<byte> value)
    {
        RawVarint(((ulong)field << 3) | 2);
        RawVarint((ulong)value.Length);
        _message.AddRange(value);
    }

    public void Text(int field, string value) => Bytes(field, Encoding.UTF8.GetBytes(value));

    public void Message(int field, ProtobufWriter value) => Bytes(field, value.ToArray());

    private void RawVarint(ulong value)
    {
        for (; value >= 0x80; value >>= 7)
        {
            _message.Add((byte)(value | 0x80));
        }

        _message.Add((byte)value);
    }
}
