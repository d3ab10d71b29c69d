using System.Text;

namespace TinyLlama.Data.Tokenizers;

/// <summary>
/// Turns tokens into text as they come. A character whose bytes are spread over several tokens comes out whole with the
/// last of them, so that what <see cref="Append"/> and <see cref="Finish"/> return, put together, is what
/// <see cref="ITokenizer.Decode"/> returns for all tokens at once.
/// </summary>
/// <param name="tokenizer">The vocabulary of the tokens.</param>
/// <param name="startsDocument">
/// Whether the first token begins a document, where the space before the first word is dropped; false to go on after a
/// prompt.
/// </param>
public sealed class StreamingDecoder(ITokenizer tokenizer, bool startsDocument = true)
{
    private readonly Decoder _utf8 = Encoding.UTF8.GetDecoder();
    private char[] _characters = new char[64];
    private bool _atStart = startsDocument;

    /// <summary>Takes one token and returns the text that is now complete, which is often empty.</summary>
    /// <exception cref="ArgumentOutOfRangeException">The id is outside the vocabulary.</exception>
    public string Append(int token)
    {
        ReadOnlyMemory<byte> inside = tokenizer.TokenBytes(token);
        if (inside.IsEmpty)
        {
            return "";
        }

        ReadOnlySpan<byte> bytes = (_atStart ? tokenizer.FirstTokenBytes(token) : inside).Span;
        _atStart = false;
        return Convert(bytes, flush: false);
    }

    /// <summary>Returns what is left: U+FFFD where the tokens end inside a character, else nothing.</summary>
    public string Finish() => Convert([], flush: true);

    private string Convert(ReadOnlySpan<byte> bytes, bool flush)
    {
        int count = _utf8.GetCharCount(bytes, flush);
        if (count > _characters.Length)
        {
            _characters = new char[count];
        }

        count = _utf8.GetChars(bytes, _characters, flush);
        return new string(_characters, 0, count);
    }
}
