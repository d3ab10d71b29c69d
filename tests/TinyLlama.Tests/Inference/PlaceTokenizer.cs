using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Tests.Inference;

/// <summary>Token i is the byte at place i of one text; BOS and EOS follow. For models that can say that text only.</summary>
/// <param name="text">The text's bytes.</param>
/// <param name="end">A character in whose place the text ends with EOS.</param>
internal sealed class PlaceTokenizer(byte[] text, char? end) : ITokenizer
{
    public int VocabularySize => text.Length + 2;

    public int? Bos => text.Length;

    public int? Eos => text.Length + 1;

    public string Hash => "place";

    /// <summary>The token after which the model is to say a token.</summary>
    public int Before(int token)
    {
        int endPlace = end is char c ? Array.IndexOf(text, (byte)c) : -1;
        return token == endPlace || token == Bos ? token
            : token == Eos ? (endPlace < 0 ? token : endPlace - 1)
            : token == 0 ? Bos!.Value
            : token - 1;
    }

    public void Encode(ReadOnlySpan<char> text, List<int> tokens)
    {
        if (text.Length > 0)
        {
            throw new NotSupportedException("it continues the empty prompt only");
        }
    }

    public string Decode(ReadOnlySpan<int> tokens) => throw new NotSupportedException();

    public ReadOnlyMemory<byte> TokenBytes(int token) => token < text.Length ? text.AsMemory(token, 1) : default;

    public ReadOnlyMemory<byte> FirstTokenBytes(int token) => TokenBytes(token);
}
