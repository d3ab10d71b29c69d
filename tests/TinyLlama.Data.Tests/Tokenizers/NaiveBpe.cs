using System.Globalization;
using System.Text;
using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Data.Tests.Tokenizers;

/// <summary>Byte-pair encoding as its definition reads, slow and on strings, to hold against the product.</summary>
internal static class NaiveBpe
{
    /// <summary>The ids of a text: the best pair of all neighbours merges, the leftmost of equals, until none is left.</summary>
    public static List<int> Encode(BpeModel model, string text)
    {
        var ids = new Dictionary<string, int>(StringComparer.Ordinal);
        for (int id = 0; id < model.Pieces.Count; id++)
        {
            if (model.Pieces[id].Kind == PieceKind.Normal)
            {
                ids.Add(model.Pieces[id].Text, id);
            }
        }

        List<string> parts = text.Length == 0 ? []
            : [.. ("\u2581" + text.Replace(' ', '\u2581')).EnumerateRunes().Select(rune => rune.ToString())];
        while (true)
        {
            int best = -1;
            float bestScore = float.NegativeInfinity;
            for (int i = 0; i + 1 < parts.Count; i++)
            {
                if (ids.TryGetValue(parts[i] + parts[i + 1], out int id) && model.Pieces[id].Score > bestScore)
                {
                    best = i;
                    bestScore = model.Pieces[id].Score;
                }
            }

            if (best < 0)
            {
                break;
            }

            parts[best] += parts[best + 1];
            parts.RemoveAt(best + 1);
        }

        List<int> result = [];
        foreach (string part in parts)
        {
            if (ids.TryGetValue(part, out int id))
            {
                result.Add(id);
            }
            else
            {
                foreach (byte value in Encoding.UTF8.GetBytes(part))
                {
                    string piece = $"<0x{value:X2}>";
                    result.Add(Enumerable.Range(0, model.Pieces.Count).First(i => model.Pieces[i].Text == piece));
                }
            }
        }

        return result;
    }

    /// <summary>The stretches of a text within which pieces may lie.</summary>
    public static IEnumerable<List<string>> Chunks(string document)
    {
        List<string> chunk = [];
        int current = -1;
        foreach (Rune rune in document.Length == 0 ? [] : (" " + document).Replace(' ', '\u2581').EnumerateRunes())
        {
            int kind = Kind(rune);
            if ((kind != current || kind == 1) && chunk.Count > 0)
            {
                bool keepsSpace = current == 3 && kind is 0 or 2;
                if (keepsSpace)
                {
                    chunk.RemoveAt(0);
                }

                yield return chunk;
                chunk = keepsSpace ? ["\u2581"] : [];
            }

            current = kind;
            if (kind != 4)
            {
                chunk.Add(rune.ToString());
            }
        }

        if (chunk.Count > 0)
        {
            yield return chunk;
        }
    }

    /// <summary>The first pieces of a vocabulary, all pairs counted anew for each.</summary>
    public static IEnumerable<string> Train(IEnumerable<string> documents, int pieces, int maximumCharacters)
    {
        List<List<string>> chunks = [.. documents.SelectMany(Chunks)];
        var made = new List<string>();
        while (made.Count < pieces)
        {
            var counts = new Dictionary<(string Left, string Right), int>();
            foreach (List<string> chunk in chunks)
            {
                for (int i = 0; i + 1 < chunk.Count; i++)
                {
                    if (IsPiece(chunk[i] + chunk[i + 1], maximumCharacters))
                    {
                        counts[(chunk[i], chunk[i + 1])] = counts.GetValueOrDefault((chunk[i], chunk[i + 1])) + 1;
                    }
                }
            }

            (string left, string right) = counts.OrderByDescending(pair => pair.Value)
                .ThenBy(pair => (pair.Key.Left + pair.Key.Right).EnumerateRunes().Count())
                .ThenBy(pair => Convert.ToHexString(Encoding.UTF8.GetBytes((pair.Key.Left + pair.Key.Right).Replace('\u2581', ' '))), StringComparer.Ordinal)
                .ThenByDescending(pair => pair.Key.Left.Length)
                .First().Key;
            made.Add(left + right);
            foreach (List<string> chunk in chunks)
            {
                Apply(chunk, (a, b) => a == left && b == right);
                foreach (string earlier in made)
                {
                    Apply(chunk, (a, b) => a + b == earlier);
                }
            }
        }

        return made;
    }

    private static void Apply(List<string> chunk, Func<string, string, bool> merges)
    {
        for (int i = 0; i + 1 < chunk.Count; i++)
        {
            if (merges(chunk[i], chunk[i + 1]))
            {
                chunk[i] += chunk[i + 1];
                chunk.RemoveAt(i + 1);
            }
        }
    }

    private static bool IsPiece(string text, int maximumCharacters)
    {
        return text.EnumerateRunes().Count() <= maximumCharacters;
    }

    private static int Kind(Rune rune)
    {
        return rune.Value == 0x2581 ? 3 : Rune.GetUnicodeCategory(rune) switch
        {
            <= UnicodeCategory.EnclosingMark => 0,
            UnicodeCategory.DecimalDigitNumber => 1,
            UnicodeCategory.Control => 4,
            _ => 2,
        };
    }
}
