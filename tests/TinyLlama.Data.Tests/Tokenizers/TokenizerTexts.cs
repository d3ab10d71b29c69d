using System.Text;

namespace TinyLlama.Data.Tests.Tokenizers;

/// <summary>Seeded text for tests.</summary>
internal static class TokenizerTexts
{
    private const string Letters = "aaabbcdeeeinorst\u00E9\u0436\u65E5";

    /// <summary>Documents of repeated random words, spaces, digits, punctuation and lines.</summary>
    public static string[] RandomDocuments(int seed, int count, int wordCount = 60)
    {
        var random = new Random(seed);
        string[] words = [.. Enumerable.Range(0, wordCount).Select(_ => RandomWord(random))];
        string[] between = [" ", " ", " ", " ", " ", "  ", "    ", ", ", ".", "\n", "\n    ", " (", ")", "::", " 17 ", "\t", "'"];
        string[] documents = new string[count];
        for (int d = 0; d < count; d++)
        {
            var text = new StringBuilder();
            for (int i = random.Next(1, 30); i > 0; i--)
            {
                text.Append(words[(int)(words.Length * Math.Pow(random.NextDouble(), 2))]);
                text.Append(between[random.Next(between.Length)]);
            }

            documents[d] = text.ToString();
        }

        return documents;
    }

    /// <summary>Any Unicode text, most of it plain, without unpaired surrogates.</summary>
    public static string RandomUnicode(Random random, int length)
    {
        var text = new StringBuilder();
        for (int i = 0; i < length; i++)
        {
            int value = random.Next(8) switch
            {
                0 => ' ',
                1 => random.Next(0x80),
                2 => random.Next(0x80, 0x800),
                3 => random.Next(0xE000, 0x10000),
                4 => random.Next(0x10000, 0x110000),
                5 => 0x2581,
                _ => 'a' + random.Next(26),
            };
            text.Append(new Rune(value));
        }

        return text.ToString();
    }

    private static string RandomWord(Random random)
    {
        return string.Concat(Enumerable.Range(0, random.Next(1, 8)).Select(_ => Letters[random.Next(Letters.Length)]));
    }
}
