using System.Text;

namespace TinyLlama.Data.Tokenizers;

/// <summary>
/// A model in the form that encoding works on. Text is UTF-8 in which U+2581 is the single byte 0x20 (where the model
/// writes spaces so): both mean the same to SentencePiece. A symbol is an id of the vocabulary, or a number from V on for a
/// character that occurs inside pieces but is none itself, or -1 for any other character.
/// </summary>
internal sealed class BpeTables
{
    /// <summary>The symbol of a character that is in no piece.</summary>
    public const int UnknownSymbol = -1;

    /// <summary>The longest piece that is read.</summary>
    public const int MaximumPieceCharacters = 1024;

    private const int CodePointsPerPage = 256;
    private readonly int[]?[] _pages = new int[]?[0x110000 / CodePointsPerPage];

    /// <summary>One bit for each pair of bytes: whether they are neighbours, each in another character, in some piece.</summary>
    private readonly byte[] _joined = new byte[65536 / 8];

    /// <param name="model">A model.</param>
    /// <param name="source">The name of its file, for error messages.</param>
    /// <exception cref="UserErrorException">The model contradicts itself or asks for what is not implemented.</exception>
    public BpeTables(BpeModel model, string source)
    {
        VocabularySize = model.Pieces.Count;
        EscapesSpace = model.EscapeWhitespace;
        Dictionary<string, int> normal = SortPieces(model, source);
        Merges = model.Merges is null ? FollowScores(model, normal, source) : Follow(model, model.Merges, normal, source);
    }

    /// <summary>Gets the number of ids (V).</summary>
    public int VocabularySize { get; }

    /// <summary>Gets the merges.</summary>
    public MergeTable Merges { get; }

    /// <summary>Gets the merges with their ranks, in order: pieces that merge earlier have lower ranks.</summary>
    public List<(int Rank, int Left, int Right, int Result)> MergeList { get; } = [];

    /// <summary>Gets the ids of the 256 byte pieces, or null where there is no byte fallback.</summary>
    public int[]? ByteIds { get; private set; }

    /// <summary>Gets the id of the unknown piece, or -1.</summary>
    public int UnknownId { get; private set; } = -1;

    /// <summary>Gets whether U+2581 of the text is written as the byte 0x20 here.</summary>
    public bool EscapesSpace { get; }

    /// <summary>Gets whether a merge needs a character that has no piece of its own.</summary>
    public bool HasHiddenCharacters { get; private set; }

    /// <summary>The form in which the tables hold a piece's text.</summary>
    public static string Unescape(BpeModel model, string piece)
    {
        return model.EscapeWhitespace ? piece.Replace(BpeModel.Space, ' ') : piece;
    }

    /// <summary>
    /// Whether no merge can join a character that ends with one byte to a character that begins with the other. The text
    /// may be cut there, because each merge's place in the order depends on its two symbols alone.
    /// </summary>
    public bool CanCut(byte last, byte first) => (_joined[(last << 5) | (first >> 3)] & (1 << (first & 7))) == 0;

    /// <summary>The symbol of a character given as UTF-8.</summary>
    public int SymbolOf(ReadOnlySpan<byte> character)
    {
        if (character[0] < 0x80)
        {
            return _pages[0] is { } ascii ? ascii[character[0]] : UnknownSymbol;
        }

        return Rune.DecodeFromUtf8(character, out Rune rune, out int length) == System.Buffers.OperationStatus.Done
            && length == character.Length
            ? SymbolOf(rune)
            : UnknownSymbol;
    }

    private int SymbolOf(Rune rune)
    {
        return _pages[rune.Value / CodePointsPerPage] is { } page ? page[rune.Value % CodePointsPerPage] : UnknownSymbol;
    }

    private void SetSymbol(Rune rune, int symbol)
    {
        ref int[]? page = ref _pages[rune.Value / CodePointsPerPage];
        if (page is null)
        {
            page = new int[CodePointsPerPage];
            Array.Fill(page, UnknownSymbol);
        }

        page[rune.Value % CodePointsPerPage] = symbol;
    }

    /// <summary>Fills everything that concerns single pieces; returns the pieces that merges can make.</summary>
    private Dictionary<string, int> SortPieces(BpeModel model, string source)
    {
        var normal = new Dictionary<string, int>(model.Pieces.Count, StringComparer.Ordinal);
        var reserved = new HashSet<string>(StringComparer.Ordinal);
        int[] byteIds = new int[256];
        Array.Fill(byteIds, -1);
        for (int id = 0; id < model.Pieces.Count; id++)
        {
            Piece piece = model.Pieces[id];
            if (piece.Text.Length is 0 or > MaximumPieceCharacters)
            {
                throw new UserErrorException($"{source}: piece {id} has {piece.Text.Length} characters; "
                    + $"1 to {MaximumPieceCharacters} are possible");
            }

            bool isText = piece.Kind is PieceKind.Normal or PieceKind.UserDefined;
            bool isNew = isText ? normal.TryAdd(piece.Text, id) : reserved.Add(piece.Text);
            if (!isNew)
            {
                throw new UserErrorException($"{source}: piece {id} \"{piece.Text}\" is there twice");
            }

            switch (piece.Kind)
            {
                case PieceKind.Unknown when UnknownId >= 0:
                    throw new UserErrorException($"{source}: pieces {UnknownId} and {id} are both the unknown piece");
                case PieceKind.Unknown:
                    UnknownId = id;
                    break;
                case PieceKind.Byte:
                    int value = BpeModel.ByteOf(piece.Text);
                    if (value < 0)
                    {
                        throw new UserErrorException($"{source}: byte piece {id} is \"{piece.Text}\", not of the form <0x41>");
                    }

                    byteIds[value] = id;
                    break;
                case PieceKind.Unused:
                    throw new UserErrorException($"{source}: piece {id} \"{piece.Text}\" is of the kind UNUSED (a restricted "
                        + "vocabulary), which is not supported");
                default:
                    break;
            }
        }

        if (model.ByteFallback)
        {
            int missing = Array.IndexOf(byteIds, -1);
            ByteIds = missing < 0 ? byteIds
                : throw new UserErrorException($"{source}: says byte_fallback but has no piece <0x{missing:X2}>");
        }
        else if (model.WordSplit == WordSplit.None && UnknownId < 0)
        {
            throw new UserErrorException($"{source}: has neither an unknown piece nor byte_fallback");
        }

        // User-defined symbols are found before merges; a text has no such neighbours left that could merge into one.
        var mergeable = new Dictionary<string, int>(normal.Count, StringComparer.Ordinal);
        foreach ((string text, int id) in normal)
        {
            if (model.Pieces[id].Kind == PieceKind.Normal && !(model.EscapeWhitespace && text.Contains(' ')))
            {
                mergeable.Add(Unescape(model, text), id);
            }
        }

        for (int value = 0; value < 256 && model.WordSplit != WordSplit.None; value++)
        {
            if (!mergeable.ContainsKey(ByteLetters.Of((byte)value).ToString()))
            {
                throw new UserErrorException($"{source}: is a byte-level BPE without a piece for the byte 0x{value:X2}");
            }
        }

        foreach ((string text, int id) in mergeable)
        {
            if (Rune.TryGetRuneAt(text, 0, out Rune rune) && rune.Utf16SequenceLength == text.Length)
            {
                SetSymbol(rune, id);
            }
        }

        return mergeable;
    }

    private MergeTable FollowScores(BpeModel model, Dictionary<string, int> normal, string source)
    {
        var lookup = normal.GetAlternateLookup<ReadOnlySpan<char>>();
        int hidden = VocabularySize;
        var found = new List<(float Score, int Left, int Right, int Result)>();
        foreach ((string text, int id) in normal)
        {
            float score = model.Pieces[id].Score;
            if (float.IsNaN(score))
            {
                throw new UserErrorException($"{source}: the score of piece {id} is not a number");
            }

            for (int i = 1; i < text.Length; i++)
            {
                if (!char.IsLowSurrogate(text[i])
                    && TrySymbol(text.AsSpan(0, i), lookup, ref hidden, out int left)
                    && TrySymbol(text.AsSpan(i), lookup, ref hidden, out int right))
                {
                    found.Add((score, left, right, id));
                }
            }
        }

        // Equal scores share a rank, so that the leftmost goes first.
        found.Sort((a, b) => a.Score != b.Score ? b.Score.CompareTo(a.Score)
            : a.Result != b.Result ? a.Result.CompareTo(b.Result)
            : a.Left != b.Left ? LengthOf(model, b.Left).CompareTo(LengthOf(model, a.Left)) : 0);
        var table = new MergeTable(found.Count);
        int rank = -1;
        for (int i = 0; i < found.Count; i++)
        {
            (float score, int left, int right, int result) = found[i];
            rank += i == 0 || score != found[i - 1].Score ? 1 : 0;
            table.Set(left, right, rank, result);
            MergeList.Add((rank, left, right, result));
            Join(Unescape(model, model.Pieces[result].Text));
        }

        HasHiddenCharacters = hidden > VocabularySize;
        return table;
    }

    private MergeTable Follow(BpeModel model, IReadOnlyList<Merge> merges, Dictionary<string, int> normal, string source)
    {
        var table = new MergeTable(merges.Count);
        for (int rank = 0; rank < merges.Count; rank++)
        {
            (int left, int right) = merges[rank];
            if ((uint)left >= (uint)VocabularySize || (uint)right >= (uint)VocabularySize)
            {
                throw new UserErrorException($"{source}: merge {rank} names the ids {left} and {right} of {VocabularySize}");
            }

            string text = Unescape(model, model.Pieces[left].Text + model.Pieces[right].Text);
            if (model.Pieces[left].Kind != PieceKind.Normal || model.Pieces[right].Kind != PieceKind.Normal
                || !normal.TryGetValue(text, out int result))
            {
                throw new UserErrorException($"{source}: merge {rank} of \"{model.Pieces[left].Text}\" and \"{model.Pieces[right].Text}\": "
                    + "both and their result must be pieces of text, neither bytes nor added tokens");
            }

            table.Set(left, right, rank, result);
            MergeList.Add((rank, left, right, result));
            Join(text);
        }

        return table;
    }

    private static int LengthOf(BpeModel model, int symbol)
    {
        return symbol < model.Pieces.Count ? model.Pieces[symbol].Text.Length : 1;
    }

    private bool TrySymbol(
        ReadOnlySpan<char> text,
        Dictionary<string, int>.AlternateLookup<ReadOnlySpan<char>> normal,
        ref int hidden,
        out int symbol)
    {
        if (normal.TryGetValue(text, out symbol))
        {
            return true;
        }

        if (Rune.DecodeFromUtf16(text, out Rune rune, out int length) != System.Buffers.OperationStatus.Done
            || length != text.Length)
        {
            return false;
        }

        symbol = SymbolOf(rune);
        if (symbol == UnknownSymbol)
        {
            symbol = hidden++;
            SetSymbol(rune, symbol);
        }

        return true;
    }

    private void Join(string text)
    {
        Span<byte> utf8 = stackalloc byte[4];
        int last = -1;
        foreach (Rune rune in text.EnumerateRunes())
        {
            int count = rune.EncodeToUtf8(utf8);
            if (last >= 0)
            {
                _joined[(last << 5) | (utf8[0] >> 3)] |= (byte)(1 << (utf8[0] & 7));
            }

            last = utf8[count - 1];
        }
    }
}
