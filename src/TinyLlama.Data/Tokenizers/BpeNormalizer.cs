using System.Buffers;
using System.Text;

namespace TinyLlama.Data.Tokenizers;

/// <summary>
/// SentencePiece's normalization of a text, for models that do more than put a space before it. Spaces stay spaces, and those
/// at the end of the text stay: the caller trims them.
/// </summary>
/// <param name="model">What to do.</param>
/// <param name="map">The character replacements, or null.</param>
/// <param name="symbols">The user-defined symbols as a text has them, which are not normalized.</param>
internal sealed class BpeNormalizer(BpeModel model, CharacterMap? map, SymbolMatcher symbols)
{
    /// <summary>Appends the normalized form of a text that is not empty.</summary>
    public void Normalize(ReadOnlySpan<byte> text, ArrayBufferWriter<byte> output)
    {
        bool trim = model.RemoveExtraWhitespace;
        bool afterSpace = trim;
        bool prefixDue = model.DummyPrefix == DummyPrefix.Always;
        if (prefixDue && !trim)
        {
            output.Write(" "u8);
            prefixDue = false;
        }

        while (!text.IsEmpty)
        {
            int consumed = Prefix(text, out ReadOnlySpan<byte> characters);
            text = text[consumed..];
            characters = afterSpace ? characters.TrimStart((byte)' ') : characters;
            if (characters.IsEmpty)
            {
                continue;
            }

            if (prefixDue)
            {
                output.Write(" "u8);
                prefixDue = false;
            }

            output.Write(characters);
            afterSpace = trim && characters[^1] == ' ';
        }
    }

    private int Prefix(ReadOnlySpan<byte> text, out ReadOnlySpan<byte> characters)
    {
        int length = symbols.Any ? symbols.Match(text, out _) : 0;
        if (length > 0)
        {
            characters = text[..length];
            return length;
        }

        if (map is not null)
        {
            length = map.Match(text, out characters);
            if (length > 0)
            {
                return length;
            }
        }

        bool valid = Rune.DecodeFromUtf8(text, out _, out length) == OperationStatus.Done;
        characters = valid ? text[..length] : "\uFFFD"u8;
        return valid ? length : 1;
    }
}
