using System.Security.Cryptography;
using System.Text;

namespace TinyLlama.Data.Tokenizers;

/// <summary>Every byte of a text's UTF-8 form is a token: ids 0 … 255, then BOS and EOS. For tests and tiny models.</summary>
public sealed class ByteTokenizer : ITokenizer
{
    private const int BosId = 256;
    private const int EosId = 257;
    private static readonly byte[] s_bytes = [.. Enumerable.Range(0, 256).Select(b => (byte)b)];

    /// <inheritdoc/>
    public int VocabularySize => 258;

    /// <inheritdoc/>
    public int? Bos => BosId;

    /// <inheritdoc/>
    public int? Eos => EosId;

    /// <inheritdoc/>
    public string Hash { get; } = Convert.ToHexStringLower(SHA256.HashData("tinyllama byte tokenizer, 258 ids"u8));

    /// <inheritdoc/>
    public void Encode(ReadOnlySpan<char> text, List<int> tokens)
    {
        ArgumentNullException.ThrowIfNull(tokens);
        Span<byte> utf8 = stackalloc byte[4];
        tokens.EnsureCapacity(tokens.Count + text.Length);
        foreach (Rune rune in text.EnumerateRunes())
        {
            foreach (byte value in utf8[..rune.EncodeToUtf8(utf8)])
            {
                tokens.Add(value);
            }
        }
    }

    /// <inheritdoc/>
    public string Decode(ReadOnlySpan<int> tokens)
    {
        byte[] bytes = new byte[tokens.Length];
        int count = 0;
        foreach (int token in tokens)
        {
            foreach (byte value in TokenBytes(token).Span)
            {
                bytes[count++] = value;
            }
        }

        return Encoding.UTF8.GetString(bytes, 0, count);
    }

    /// <inheritdoc/>
    public ReadOnlyMemory<byte> TokenBytes(int token)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(token);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(token, EosId);
        return token < BosId ? s_bytes.AsMemory(token, 1) : default;
    }

    /// <inheritdoc/>
    public ReadOnlyMemory<byte> FirstTokenBytes(int token) => TokenBytes(token);
}
