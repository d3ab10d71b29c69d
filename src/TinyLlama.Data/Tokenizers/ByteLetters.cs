namespace TinyLlama.Data.Tokenizers;

/// <summary>
/// GPT-2's alphabet: a letter for each byte, so that pieces of any bytes are text. Bytes that print in Latin-1 are themselves,
/// the others follow from U+0100 on: a space is U+0120.
/// </summary>
internal static class ByteLetters
{
    private const int FirstSubstitute = 0x100;

    private static readonly char[] s_letters = Letters();
    private static readonly Dictionary<char, byte> s_bytes = Enumerable.Range(0, 256).ToDictionary(value => s_letters[value], value => (byte)value);

    /// <summary>The letter of a byte.</summary>
    public static char Of(byte value) => s_letters[value];

    /// <summary>The bytes that a piece stands for, or null where a character of it is none of the letters.</summary>
    public static byte[]? Bytes(string piece)
    {
        byte[] bytes = new byte[piece.Length];
        for (int i = 0; i < bytes.Length; i++)
        {
            if (!s_bytes.TryGetValue(piece[i], out bytes[i]))
            {
                return null;
            }
        }

        return bytes;
    }

    /// <summary>Writes the letters of some bytes in UTF-8, one or two bytes each; returns their number.</summary>
    public static int WriteUtf8(ReadOnlySpan<byte> bytes, Span<byte> utf8)
    {
        int count = 0;
        foreach (byte value in bytes)
        {
            char letter = s_letters[value];
            if (letter >= 0x80)
            {
                utf8[count++] = (byte)(0xC0 | (letter >> 6));
                utf8[count++] = (byte)(0x80 | (letter & 0x3F));
            }
            else
            {
                utf8[count++] = (byte)letter;
            }
        }

        return count;
    }

    private static char[] Letters()
    {
        char[] letters = new char[256];
        int substitute = FirstSubstitute;
        for (int value = 0; value < letters.Length; value++)
        {
            bool prints = value is (>= '!' and <= '~') or (>= 0xA1 and <= 0xAC) or >= 0xAE;
            letters[value] = (char)(prints ? value : substitute++);
        }

        return letters;
    }
}
