using System.Globalization;
using System.Text;

namespace TinyLlama.Data.Tokenizers;

/// <summary>
/// Counts the chunks of text within which a tokenizer's pieces may lie: a word or a run of punctuation, either with one space
/// before it, a digit, a run of spaces. One thread at a time; the counts of several counters add up to the same whatever the
/// division.
/// </summary>
internal sealed class ChunkCounter
{
    private static readonly CharacterClass[] s_ascii = MakeAscii();
    private int[] _places = new int[1 << 12];
    private Entry[] _entries = new Entry[1 << 11];
    private byte[] _text = new byte[1 << 16];
    private int _textCount;
    private byte[] _buffer = [];

    private enum CharacterClass : byte
    {
        Letter,
        Digit,
        Other,
        Space,

        /// <summary>Separates chunks and is in none: the control characters, which stay byte tokens.</summary>
        Control,
    }

    /// <summary>Gets the number of different chunks.</summary>
    public int Count { get; private set; }

    /// <summary>Gets the number of bytes of all different chunks.</summary>
    public long TextBytes => _textCount;

    /// <summary>The UTF-8 text of a chunk, in which a space is the byte 0x20.</summary>
    public ReadOnlySpan<byte> Text(int index) => _text.AsSpan(_entries[index].Start, _entries[index].Length);

    /// <summary>How often a chunk has occurred.</summary>
    public long Occurrences(int index) => _entries[index].Occurrences;

    /// <summary>Counts the chunks of a text.</summary>
    /// <param name="text">A document, or a part of one that ends with a line.</param>
    /// <param name="startsDocument">Whether a space is put before it, as encoding does.</param>
    public void Add(ReadOnlySpan<char> text, bool startsDocument)
    {
        int capacity = Encoding.UTF8.GetMaxByteCount(text.Length) + 1;
        if (_buffer.Length < capacity)
        {
            _buffer = new byte[capacity];
        }

        _buffer[0] = (byte)' ';
        int end = 1 + Encoding.UTF8.GetBytes(text, _buffer.AsSpan(1));
        if (end > 1)
        {
            int start = startsDocument ? 0 : 1;
            Split(_buffer.AsSpan(start, end - start));
        }
    }

    /// <summary>Adds the counts of another counter.</summary>
    public void Add(ChunkCounter other)
    {
        for (int i = 0; i < other.Count; i++)
        {
            Add(other.Text(i), other.Occurrences(i));
        }
    }

    private static CharacterClass[] MakeAscii()
    {
        var classes = new CharacterClass[128];
        for (int i = 0; i < 128; i++)
        {
            classes[i] = i == ' ' ? CharacterClass.Space
                : char.IsAsciiLetter((char)i) ? CharacterClass.Letter
                : char.IsAsciiDigit((char)i) ? CharacterClass.Digit
                : char.IsControl((char)i) ? CharacterClass.Control
                : CharacterClass.Other;
        }

        return classes;
    }

    private static CharacterClass ClassOf(ReadOnlySpan<byte> text, out int length)
    {
        if (text[0] < 0x80)
        {
            length = 1;
            return s_ascii[text[0]];
        }

        Rune.DecodeFromUtf8(text, out Rune rune, out length);
        if (rune.Value == BpeModel.Space)
        {
            return CharacterClass.Space;
        }

        return Rune.GetUnicodeCategory(rune) switch
        {
            UnicodeCategory.UppercaseLetter or UnicodeCategory.LowercaseLetter or UnicodeCategory.TitlecaseLetter
                or UnicodeCategory.ModifierLetter or UnicodeCategory.OtherLetter or UnicodeCategory.NonSpacingMark
                or UnicodeCategory.SpacingCombiningMark or UnicodeCategory.EnclosingMark => CharacterClass.Letter,
            UnicodeCategory.DecimalDigitNumber => CharacterClass.Digit,
            UnicodeCategory.Control => CharacterClass.Control,
            _ => CharacterClass.Other,
        };
    }

    private void Split(Span<byte> text)
    {
        int start = 0;
        var current = CharacterClass.Control;
        for (int position = 0; position < text.Length;)
        {
            CharacterClass next = ClassOf(text[position..], out int length);
            if (next == CharacterClass.Space && length > 1)
            {
                // U+2581 means a space; its three bytes are written as one, the chunk being cut before and after it.
                Flush(text, start, position);
                text[position + 2] = (byte)' ';
                start = position + 2;
                current = CharacterClass.Space;
                position += length;
                continue;
            }

            // The last space goes with the word or the punctuation after it; a digit stands alone.
            if (next != current || next == CharacterClass.Digit)
            {
                bool joins = current == CharacterClass.Space && next is CharacterClass.Letter or CharacterClass.Other;
                int cut = joins ? position - 1 : position;
                Flush(text, start, cut);
                start = cut;
            }

            current = next;
            position += length;
            if (next == CharacterClass.Control)
            {
                start = position;
            }
        }

        Flush(text, start, text.Length);
    }

    private void Flush(ReadOnlySpan<byte> text, int start, int end)
    {
        if (end > start)
        {
            Add(text[start..end], 1);
        }
    }

    private void Add(ReadOnlySpan<byte> chunk, long occurrences)
    {
        if (Count * 2 > _places.Length)
        {
            Rehash();
        }

        uint hash = Hash(chunk);
        int mask = _places.Length - 1;
        int place = (int)(hash & (uint)mask);
        while (_places[place] != 0)
        {
            ref Entry entry = ref _entries[_places[place] - 1];
            if (entry.Hash == hash && _text.AsSpan(entry.Start, entry.Length).SequenceEqual(chunk))
            {
                entry.Occurrences += occurrences;
                return;
            }

            place = (place + 1) & mask;
        }

        if (chunk.Length > _text.Length - _textCount)
        {
            Array.Resize(ref _text, checked(Math.Max(_text.Length * 2, _textCount + chunk.Length)));
        }

        if (Count == _entries.Length)
        {
            Array.Resize(ref _entries, Count * 2);
        }

        chunk.CopyTo(_text.AsSpan(_textCount));
        _entries[Count] = new Entry { Hash = hash, Start = _textCount, Length = chunk.Length, Occurrences = occurrences };
        _textCount += chunk.Length;
        _places[place] = ++Count;
    }

    private void Rehash()
    {
        _places = new int[_places.Length * 2];
        int mask = _places.Length - 1;
        for (int i = 0; i < Count; i++)
        {
            int place = (int)(_entries[i].Hash & (uint)mask);
            while (_places[place] != 0)
            {
                place = (place + 1) & mask;
            }

            _places[place] = i + 1;
        }
    }

    private static uint Hash(ReadOnlySpan<byte> chunk)
    {
        ulong hash = (ulong)chunk.Length;
        while (chunk.Length >= 8)
        {
            hash = (hash ^ System.Buffers.Binary.BinaryPrimitives.ReadUInt64LittleEndian(chunk)) * 0x9E3779B97F4A7C15UL;
            hash ^= hash >> 32;
            chunk = chunk[8..];
        }

        ulong rest = 0;
        foreach (byte value in chunk)
        {
            rest = (rest << 8) | value;
        }

        hash = (hash ^ rest) * 0xD6E8FEB86659FD93UL;
        return (uint)(hash >> 32);
    }

    private struct Entry
    {
        public uint Hash;
        public int Start;
        public int Length;
        public long Occurrences;
    }
}
