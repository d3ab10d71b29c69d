using System.Buffers.Binary;
using System.Text;

namespace TinyLlama.Data.Tokenizers;

/// <summary>
/// Reads and writes the vocabulary files of llama2.c (<c>tokenizer.bin</c>): the longest piece (int32), then for each piece its score
/// (float32), its length in bytes (int32) and its text, in which a space is a space; all little endian. Ids 0, 1, 2 are
/// unknown, BOS and EOS, ids 3 … 258 the bytes.
/// </summary>
public static class Llama2CTokenizer
{
    private const int MaximumFileBytes = 64 << 20;
    private const int FirstText = 259;

    // run.c merges only to pieces with a score above it.
    private const float SurplusScore = -1e10f;

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

    /// <summary>The content of a file with which llama2.c gives the same ids.</summary>
    /// <param name="model">The tokenizer.</param>
    /// <param name="count">How many ids the file has, at least as many as the tokenizer: the rows of the model's embedding table.</param>
    /// <exception cref="UserErrorException">llama2.c would give other ids.</exception>
    public static byte[] Write(BpeModel model, int count)
    {
        ArgumentNullException.ThrowIfNull(model);
        ArgumentOutOfRangeException.ThrowIfLessThan(count, model.Pieces.Count);
        if (WhyNotWritable(model) is { } reason)
        {
            throw new UserErrorException($"this tokenizer cannot be written as tokenizer.bin of llama2.c: {reason}");
        }

        byte[][] texts = [.. model.Pieces.Select(TextOf), .. Enumerable.Range(model.Pieces.Count, count - model.Pieces.Count).Select(SurplusText)];
        using var content = new MemoryStream();
        using var writer = new BinaryWriter(content);
        writer.Write(texts.Max(static text => text.Length));
        for (int id = 0; id < count; id++)
        {
            writer.Write(id < model.Pieces.Count ? model.Pieces[id].Score : SurplusScore);
            writer.Write(texts[id].Length);
            writer.Write(texts[id]);
        }

        return content.ToArray();
    }

    private static string? WhyNotWritable(BpeModel model)
    {
        if (model.WordSplit != WordSplit.None)
        {
            return "it is byte-level BPE, llama2.c has that of SentencePiece";
        }

        if (model.Merges is not null)
        {
            return "its merges do not follow from an order of the pieces";
        }

        if (model.DummyPrefix != DummyPrefix.Always || model.RemoveExtraWhitespace || !model.EscapeWhitespace || !model.CharacterMap.IsEmpty)
        {
            return "it normalizes text, or puts no space before it";
        }

        for (int id = 0; id < Math.Max(FirstText, model.Pieces.Count); id++)
        {
            bool isExpected = id < model.Pieces.Count && id switch
            {
                0 => model.Pieces[id].Kind == PieceKind.Unknown,
                1 => model.FindControl(model.BosPiece) == id,
                2 => model.FindControl(model.EosPiece) == id,
                < FirstText => model.Pieces[id].Kind == PieceKind.Byte && BpeModel.ByteOf(model.Pieces[id].Text) == id - 3,
                _ => model.Pieces[id].Kind == PieceKind.Normal,
            };
            if (!isExpected)
            {
                string found = id < model.Pieces.Count ? $"'{model.Pieces[id].Text}' ({model.Pieces[id].Kind})" : "missing";
                return $"id {id} is {found}; ids 0, 1, 2 must be unknown, BOS and EOS, 3 … 258 the bytes, and the others plain text";
            }
        }

        return null;
    }

    private static byte[] TextOf(Piece piece) => Encoding.UTF8.GetBytes(
        piece.Kind == PieceKind.Control ? $"\n{piece.Text}\n" : piece.Text.Replace(BpeModel.Space, ' '));

    private static byte[] SurplusText(int id) => Encoding.UTF8.GetBytes($"[PAD{id}]");

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
