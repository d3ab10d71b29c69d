using System.Text;

namespace TinyLlama.Tests.Cli;

/// <summary>
/// English-like text from a seeded grammar: a few hundred words with Zipf's frequencies, agreement of number, clauses and
/// paragraphs. The same bytes on every machine, so that the loss of a run on it can be recorded.
/// </summary>
internal sealed class SeededText(ulong seed)
{
    private const string Nouns = "river stone child house bird garden window letter road night winter friend mountain boat candle story door field "
        + "teacher lamp song cloud horse village forest clock book market island bridge wolf king baker sailor mirror";

    private const string Verbs = "find see carry follow remember leave watch open cross paint build forget hear hold love mend bring answer";
    private const string Adjectives = "old small bright quiet cold green long lost warm dark strange golden heavy kind empty wild";
    private static readonly string[] s_adverbs = ["slowly", "often", "again", "at dawn", "in silence", "with care", "every year", "before the rain"];
    private static readonly string[] s_links = [", and", ", but", ", because", " while", ", so"];

    private ulong _state = seed;

    /// <summary>A document of some paragraphs.</summary>
    public string Document()
    {
        var text = new StringBuilder();
        for (int paragraph = 1 + Below(4); paragraph > 0; paragraph--)
        {
            for (int sentence = 2 + Below(5); sentence > 0; sentence--)
            {
                string words = Clause() + (Below(3) == 0 ? s_links[Below(s_links.Length)] + " " + Clause() : "");
                text.Append(char.ToUpperInvariant(words[0])).Append(words.AsSpan(1)).Append(sentence > 1 ? ". " : ".\n");
            }
        }

        return text.ToString();
    }

    private string Clause()
    {
        bool plural = Below(3) == 0;
        string verb = Pick(Verbs) + (plural ? "" : "s");
        string end = Below(3) == 0 ? " " + s_adverbs[Below(s_adverbs.Length)] : "";
        return $"{Phrase(plural)} {verb} {Phrase(Below(4) == 0)}{end}";
    }

    private string Phrase(bool plural)
    {
        string adjective = Below(2) == 0 ? Pick(Adjectives) + " " : "";
        string noun = Pick(Nouns);
        return plural ? $"the {adjective}{noun}s" : $"{(Below(3) == 0 ? "a" : "the")} {adjective}{noun}";
    }

    /// <summary>A word, the first ones most often.</summary>
    private string Pick(string words)
    {
        string[] list = words.Split(' ');
        double uniform = (Next() >> 11) * (1.0 / (1UL << 53));
        return list[(int)(list.Length * uniform * uniform)];
    }

    private int Below(int bound) => (int)(Next() % (ulong)bound);

    // SplitMix64 (Steele et al. 2014).
    private ulong Next()
    {
        _state += 0x9E3779B97F4A7C15;
        ulong z = _state;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
        return z ^ (z >> 31);
    }
}
