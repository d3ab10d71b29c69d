using System.Buffers.Binary;

namespace TinyLlama.Data.Tokenizers;

/// <summary>
/// SentencePiece's precompiled_charsmap, such as nmt_nfkc: the size of a trie in bytes (32 bits, little endian), the trie, a
/// double array as Darts-clone writes it, and the replacements, each ended by a zero byte.
/// </summary>
internal sealed class CharacterMap
{
    private readonly uint[] _trie;
    private readonly byte[] _replacements;

    /// <exception cref="UserErrorException">The table is damaged.</exception>
    public CharacterMap(ReadOnlySpan<byte> content, string source)
    {
        uint trieBytes = content.Length < 4 ? 0 : BinaryPrimitives.ReadUInt32LittleEndian(content);
        if (trieBytes == 0 || trieBytes % 4 != 0 || trieBytes > content.Length - 4)
        {
            throw new UserErrorException($"{source}: precompiled_charsmap is damaged: a trie of {trieBytes} bytes in a table of "
                + $"{content.Length}");
        }

        _trie = new uint[trieBytes / 4];
        for (int i = 0; i < _trie.Length; i++)
        {
            _trie[i] = BinaryPrimitives.ReadUInt32LittleEndian(content[(4 + (4 * i))..]);
        }

        _replacements = content[(4 + (int)trieBytes)..].ToArray();
    }

    /// <summary>The replacement of the longest key that the text begins with; 0 bytes consumed where there is none.</summary>
    public int Match(ReadOnlySpan<byte> text, out ReadOnlySpan<byte> replacement)
    {
        int consumed = 0;
        uint found = 0;
        uint node = Offset(_trie[0]);
        for (int i = 0; i < text.Length; i++)
        {
            node ^= text[i];
            if (node >= _trie.Length || (_trie[node] & 0x800000FF) != text[i])
            {
                break;
            }

            bool isKey = ((_trie[node] >> 8) & 1) == 1;
            node ^= Offset(_trie[node]);
            if (isKey && node < _trie.Length)
            {
                found = _trie[node] & 0x7FFFFFFF;
                consumed = i + 1;
            }
        }

        replacement = default;
        if (consumed > 0 && found < _replacements.Length)
        {
            ReadOnlySpan<byte> rest = _replacements.AsSpan((int)found);
            int end = rest.IndexOf((byte)0);
            replacement = end < 0 ? rest : rest[..end];
        }

        return consumed;
    }

    private static uint Offset(uint unit) => (unit >> 10) << (int)((unit & (1u << 9)) >> 6);
}
