using System.Text;

namespace TinyLlama.Data.Tokenizers;

/// <summary>How a byte-level BPE cuts a text into words, which no merge joins.</summary>
public enum WordSplit
{
    /// <summary>Not a byte-level BPE.</summary>
    None,

    /// <summary>
    /// GPT-2: English contractions; runs of letters, of digits and of other characters, each with a space before; whitespace.
    /// </summary>
    Gpt2,

    /// <summary>As GPT-2, but each digit stands alone: SmolLM.</summary>
    SingleDigits,

    /// <summary>Llama 3: letters take any one character before them, digits come in threes, line ends stay together.</summary>
    Llama3,
}

/// <summary>Finds the words of a text, as the regular expressions do that the programs of these models are written with.</summary>
internal static class WordSplitter
{
    /// <summary>Llama 3's expression, as <c>tokenizer.json</c> has it.</summary>
    public const string Llama3Pattern =
        @"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

    private const int MostDigits = 3;

    private enum Kind
    {
        End,
        Letter,
        Number,
        Space,
        Other,
    }

    /// <summary>The length in bytes of the first word.</summary>
    /// <param name="split">Which words; not <see cref="WordSplit.None"/>.</param>
    /// <param name="text">UTF-8, not empty; a byte that is none counts as a character that is no letter.</param>
    public static int Next(WordSplit split, ReadOnlySpan<byte> text) =>
        split == WordSplit.Llama3 ? NextOfLlama3(text) : NextOfGpt2(text, singleDigits: split == WordSplit.SingleDigits);

    private static int NextOfGpt2(ReadOnlySpan<byte> text, bool singleDigits)
    {
        int contraction = Contraction(text, ignoreCase: false);
        if (contraction > 0)
        {
            return contraction;
        }

        int space = text[0] == ' ' ? 1 : 0;
        Kind kind = KindAt(text, space, out int length);
        if (kind == Kind.Number && singleDigits)
        {
            // A digit is cut off first: what is before it ends there.
            return space == 0 ? length : 1;
        }

        return kind is Kind.Letter or Kind.Number or Kind.Other ? Run(text, space, kind) : Whitespace(text, singleDigits);
    }

    private static int NextOfLlama3(ReadOnlySpan<byte> text)
    {
        int contraction = Contraction(text, ignoreCase: true);
        if (contraction > 0)
        {
            return contraction;
        }

        Kind first = KindAt(text, 0, out int length);
        if (first == Kind.Letter)
        {
            return Run(text, 0, Kind.Letter);
        }

        if (first != Kind.Number && text[0] is not ((byte)'\r' or (byte)'\n') && KindAt(text, length, out _) == Kind.Letter)
        {
            return Run(text, length, Kind.Letter);
        }

        if (first == Kind.Number)
        {
            return Run(text, 0, Kind.Number, MostDigits);
        }

        int space = text[0] == ' ' ? 1 : 0;
        if (KindAt(text, space, out _) == Kind.Other)
        {
            int end = Run(text, space, Kind.Other);
            int lineEnds = text[end..].IndexOfAnyExcept((byte)'\r', (byte)'\n');
            return lineEnds < 0 ? text.Length : end + lineEnds;
        }

        int lastLineEnd = text[..Run(text, 0, Kind.Space)].LastIndexOfAny((byte)'\r', (byte)'\n');
        return lastLineEnd >= 0 ? lastLineEnd + 1 : Whitespace(text, singleDigits: false);
    }

    // The last character of a run of whitespace goes with the word after it, if there is one.
    private static int Whitespace(ReadOnlySpan<byte> text, bool singleDigits)
    {
        int end = Run(text, 0, Kind.Space);
        Kind next = KindAt(text, end, out _);
        if (next == Kind.End || (next == Kind.Number && singleDigits))
        {
            return end;
        }

        _ = Rune.DecodeLastFromUtf8(text[..end], out _, out int last);
        return end > last ? end - last : end;
    }

    /// <summary>Where a run of characters of one kind ends.</summary>
    private static int Run(ReadOnlySpan<byte> text, int start, Kind kind, int most = int.MaxValue)
    {
        int end = start;
        for (int count = 0; count < most && KindAt(text, end, out int length) == kind; count++)
        {
            end += length;
        }

        return end;
    }

    private static Kind KindAt(ReadOnlySpan<byte> text, int position, out int length)
    {
        length = 0;
        if (position >= text.Length)
        {
            return Kind.End;
        }

        bool valid = Rune.DecodeFromUtf8(text[position..], out Rune rune, out length) == System.Buffers.OperationStatus.Done;
        return !valid ? Kind.Other
            : Rune.IsLetter(rune) ? Kind.Letter
            : Rune.IsNumber(rune) ? Kind.Number
            : Rune.IsWhiteSpace(rune) ? Kind.Space
            : Kind.Other;
    }

    private static int Contraction(ReadOnlySpan<byte> text, bool ignoreCase)
    {
        if (text[0] != '\'' || text.Length < 2)
        {
            return 0;
        }

        int mask = ignoreCase ? 0x20 : 0;
        int first = text[1] | mask;
        if (first is 's' or 't' or 'm' or 'd')
        {
            return 2;
        }

        int second = text.Length > 2 ? text[2] | mask : 0;
        return (first, second) is ('r', 'e') or ('v', 'e') or ('l', 'l') ? 3 : 0;
    }
}
