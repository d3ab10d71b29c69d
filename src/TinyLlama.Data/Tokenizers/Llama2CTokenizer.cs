using System.Buffers.Binary;
using System.Text;

namespace TinyLlama.Data.Tokenizers;

/// <summary>
/// Reads the vocabulary files of llama2.c (<c>tokenizer.bin</c>): the longest piece (int32), then for each piece its score
/// (float32), its length in bytes (int32) and its text, in which a space is a space; all little endian. Ids 0, 1, 2 are
/// unknown, BOS and EOS, ids 3 … 258 the bytes.
/// </summary>
public static class Llama2CTokenizer
{
    private const int MaximumFileBytes = 64 << 20;
    private const int FirstText = 259;

    /// <summary>Reads a file.</summary>
    /// <exception cref="UserErrorException">It is damaged or of another kind.</exception>
    public static BpeModel Read(string path)
    {
        ArgumentNullException.ThrowIfNull(path);
        return Read(TokenizerFile.ReadBytes(path, MaximumFileBytes), path);
    }

    /// <summary>Reads the content of a file.</summary>
    /// <param name="content">The bytes of the file.</param>
    /// <param name="source">The file's name, for error messages.</param>
    /// <exception cref="UserErrorException">It is damaged or of another kind.</exception>
    public static BpeModel Read(ReadOnlySpan<byte> content, string source)
    {
        var pieces = new List<Piece>();
        int position = 4;
        while (position < content.Length)
        {
            int left = content.Length - position - 8;
            int length = left < 0 ? -1 : BinaryPrimitives.ReadInt32LittleEndian(content[(position + 4)..]);
            if (length < 0 || length > left)
            {
                throw new UserErrorException($"{source}: piece {pieces.Count} at byte {position} has a length of {length} bytes where "
                    + $"{Math.Max(0, left)} are left; this is no tokenizer.bin of llama2.c, or it is damaged");
            }

            ReadOnlySpan<byte> text = content.Slice(position + 8, length);
            float score = BinaryPrimitives.ReadSingleLittleEndian(content[position..]);
            pieces.Add(ToPiece(pieces.Count, text, score));
            position += 8 + length;
        }

        return pieces.Count >= FirstText
            ? new BpeModel { Pieces = pieces, ByteFallback = true }
            : throw new UserErrorException($"{source}: has {pieces.Count} pieces, fewer than the {FirstText} that every tokenizer.bin of "
                + "llama2.c has");
    }

    private static Piece ToPiece(int id, ReadOnlySpan<byte> text, float score)
    {
        return id switch
        {
            0 => new Piece("<unk>", 0, PieceKind.Unknown),
            1 => new Piece("<s>", 0, PieceKind.Control),
            2 => new Piece("</s>", 0, PieceKind.Control),
            < FirstText => new Piece($"<0x{id - 3:X2}>", 0, PieceKind.Byte),
            _ => new Piece(Encoding.UTF8.GetString(text).Replace(' ', BpeModel.Space), score, PieceKind.Normal),
        };
    }
}
