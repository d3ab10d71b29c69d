using System.Buffers.Binary;
using System.Text;

namespace TinyLlama.Tests.Checkpoints;

/// <summary>Alters files as damage and malice do: the same seed, the same file.</summary>
internal static class Mutation
{
    private static readonly long[] s_extremes =
        [0, 1, 2, 255, short.MaxValue, ushort.MaxValue, int.MaxValue, uint.MaxValue, 1L << 32, long.MaxValue, long.MinValue, -1, -2, 1L << 62, 1L << 40];

    private static readonly string[] s_words =
        ["0", "-1", "2147483647", "2147483648", "9223372036854775807", "1e999", "1e-999", "null", "true", "\"\"", "[]", "{}", "[[[[[[[[", "\"\\ud800\"", "\"../x\"", "4294967296"];

    /// <summary>One to three alterations, one after the other.</summary>
    /// <param name="file">What is altered; a copy is returned.</param>
    /// <param name="other">A file from which pieces may come.</param>
    /// <param name="random">Decides.</param>
    public static byte[] Apply(byte[] file, byte[] other, Random random)
    {
        for (int count = random.Next(1, 4); count > 0 && file.Length > 0; count--)
        {
            file = Once(file, other, random);
        }

        return file;
    }

    private static byte[] Once(byte[] file, byte[] other, Random random)
    {
        int place = Place(file.Length, random);
        int length = Math.Min(file.Length - place, 1 + random.Next(random.Next(2) == 0 ? 16 : 4096));
        byte[] altered = [.. file];
        switch (random.Next(9))
        {
            case 0:
                return file[..place];
            case 1:
                altered[place] ^= (byte)(1 << random.Next(8));
                return altered;
            case 2:
                altered[place] = (byte)random.Next(256);
                return altered;
            case 3:
                place = random.Next(2) == 0 ? place : Field(file, place);
                byte[] number = new byte[8];
                BinaryPrimitives.WriteInt64LittleEndian(number, random.Next(4) == 0 ? file.Length - place + random.Next(-2, 3) : s_extremes[random.Next(s_extremes.Length)]);
                number.AsSpan(0, Math.Min(1 << random.Next(4), file.Length - place)).CopyTo(altered.AsSpan(place));
                return altered;
            case 4:
                return [.. file[..place], .. file[(place + length)..]];
            case 5:
                return [.. file[..(place + length)], .. file[place..]];
            case 6:
                altered.AsSpan(place, length).Fill((byte)random.Next(256));
                return altered;
            case 7:
                int from = Place(other.Length, random);
                return [.. file[..place], .. other[from..Math.Min(other.Length, from + length)], .. file[(random.Next(2) == 0 ? place : place + length)..]];
            default:
                return ReplaceWord(file, place, random);
        }
    }

    // Headers come first or, in zip files, last: each power of two from the nearer end is as likely as the next.
    private static int Place(int length, Random random)
    {
        int distance = (int)Math.Pow(length, random.NextDouble()) - 1;
        return random.Next(3) == 0 ? length - 1 - distance : distance;
    }

    // The next four bytes that look like a count or a length.
    private static int Field(byte[] file, int place)
    {
        int field = place;
        while (field + 4 <= file.Length && BinaryPrimitives.ReadUInt32LittleEndian(file.AsSpan(field)) is 0 or > ushort.MaxValue)
        {
            field++;
        }

        return field + 4 <= file.Length ? field : place;
    }

    // A number or a quoted text of JSON becomes another value.
    private static byte[] ReplaceWord(byte[] file, int place, Random random)
    {
        static bool IsWord(byte value) => char.IsAsciiLetterOrDigit((char)value) || value is (byte)'.' or (byte)'-' or (byte)'"' or (byte)'_';
        while (place < file.Length && !IsWord(file[place]))
        {
            place++;
        }

        int start = place;
        while (start > 0 && IsWord(file[start - 1]))
        {
            start--;
        }

        while (place < file.Length && IsWord(file[place]))
        {
            place++;
        }

        return [.. file[..start], .. Encoding.UTF8.GetBytes(s_words[random.Next(s_words.Length)]), .. file[place..]];
    }
}
