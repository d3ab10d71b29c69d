using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Data.Tests;

/// <summary>An id for each UTF-16 unit, behind those of BOS and EOS: easy to follow by eye.</summary>
internal sealed class CharacterTokenizer(int vocabularySize = 65_538) : ITokenizer
{
    public int VocabularySize => vocabularySize;

    public int? Bos => 0;

    public int? Eos => 1;

    public string Hash => new('c', 64);

    public void Encode(ReadOnlySpan<char> text, List<int> tokens)
    {
        foreach (char c in text)
        {
            tokens.Add(c + 2);
        }
    }

    public string Decode(ReadOnlySpan<int> tokens) => string.Concat(tokens.ToArray().Where(t => t > 1).Select(t => (char)(t - 2)));

    public ReadOnlyMemory<byte> TokenBytes(int token) => throw new NotSupportedException();

    public ReadOnlyMemory<byte> FirstTokenBytes(int token) => throw new NotSupportedException();
}
