namespace TinyLlama.Data.Tokenizers;

/// <summary>What a piece of a vocabulary is for; the numbers are those of SentencePiece's files.</summary>
public enum PieceKind
{
    /// <summary>Text, reached by merges.</summary>
    Normal = 1,

    /// <summary>Stands for characters that the vocabulary cannot write.</summary>
    Unknown = 2,

    /// <summary>Has no text and is never found in text, such as BOS and EOS.</summary>
    Control = 3,

    /// <summary>Is found in text before any merge, whole.</summary>
    UserDefined = 4,

    /// <summary>Is never the result; only in models whose vocabulary was restricted afterwards.</summary>
    Unused = 5,

    /// <summary>One byte of a character that has no piece, written <c>&lt;0x41&gt;</c>.</summary>
    Byte = 6,
}

/// <summary>When a space is put before a text, so that a word at its start has the same token as inside.</summary>
public enum DummyPrefix
{
    /// <summary>Never.</summary>
    None,

    /// <summary>Before every text that is not empty, as SentencePiece does.</summary>
    Always,

    /// <summary>Before a text that does not begin with a space, as Hugging Face's Metaspace does.</summary>
    UnlessSpace,
}

/// <summary>One entry of a vocabulary; its id is its place in the list.</summary>
/// <param name="Text">The piece, a space written as U+2581.</param>
/// <param name="Score">Of two possible merges the one with the higher score comes first.</param>
/// <param name="Kind">What the piece is for.</param>
public readonly record struct Piece(string Text, float Score, PieceKind Kind);

/// <summary>The ids of two neighbours that may become one piece.</summary>
/// <param name="Left">The id before.</param>
/// <param name="Right">The id after.</param>
public readonly record struct Merge(int Left, int Right);

/// <summary>Everything that decides the ids of a byte-pair encoding, whatever file it came from.</summary>
public sealed record BpeModel
{
    /// <summary>The character that stands for a space inside pieces, U+2581.</summary>
    public const char Space = '\u2581';

    /// <summary>Gets the vocabulary in the order of ids.</summary>
    public required IReadOnlyList<Piece> Pieces { get; init; }

    /// <summary>
    /// Gets the permitted merges, first come first, or null where any two neighbours may merge that make a piece, in the
    /// order of the pieces' scores, as in SentencePiece.
    /// </summary>
    public IReadOnlyList<Merge>? Merges { get; init; }

    /// <summary>Gets whether a character without a piece becomes its UTF-8 bytes; else it becomes the unknown piece.</summary>
    public bool ByteFallback { get; init; }

    /// <summary>Gets when a space is put before a text.</summary>
    public DummyPrefix DummyPrefix { get; init; } = DummyPrefix.Always;

    /// <summary>Gets whether the text after each user-defined symbol counts as a text of its own, as in Hugging Face.</summary>
    public bool SymbolsSplitText { get; init; }

    /// <summary>Gets whether runs of spaces become one and spaces at both ends go.</summary>
    public bool RemoveExtraWhitespace { get; init; }

    /// <summary>Gets whether spaces are written as U+2581 in pieces.</summary>
    public bool EscapeWhitespace { get; init; } = true;

    /// <summary>
    /// Gets how a text is cut into words, where pieces are written in GPT-2's letters for bytes (byte-level BPE); no
    /// character is then without a piece.
    /// </summary>
    public WordSplit WordSplit { get; init; }

    /// <summary>Gets whether a word that is a piece becomes it whatever the merges say; only with <see cref="WordSplit"/>.</summary>
    public bool WordsComeFirst { get; init; }

    /// <summary>Gets whether a text begins with BOS, as far as the tokenizer's own file says.</summary>
    public bool AddsBos { get; init; } = true;

    /// <summary>Gets SentencePiece's name for the normalization, such as <c>identity</c> or <c>nmt_nfkc</c>.</summary>
    public string NormalizerName { get; init; } = "identity";

    /// <summary>Gets SentencePiece's compiled table of character replacements; empty for none.</summary>
    public ReadOnlyMemory<byte> CharacterMap { get; init; }

    /// <summary>Gets the text that the unknown piece decodes to.</summary>
    public string UnknownSurface { get; init; } = " \u2047 ";

    /// <summary>Gets the share of the training text's characters that the alphabet covers; for the file only.</summary>
    public float CharacterCoverage { get; init; } = 0.9995f;

    /// <summary>Gets the text of the piece that begins a document; the vocabulary may lack it.</summary>
    public string BosPiece { get; init; } = "<s>";

    /// <summary>Gets the text of the piece that ends a document; the vocabulary may lack it.</summary>
    public string EosPiece { get; init; } = "</s>";

    /// <summary>Gets the text of the piece that fills up short sequences; the vocabulary may lack it.</summary>
    public string PadPiece { get; init; } = "<pad>";

    /// <summary>The id of a control piece with this text, or null.</summary>
    public int? FindControl(string text)
    {
        for (int id = 0; id < Pieces.Count; id++)
        {
            if (Pieces[id].Kind == PieceKind.Control && string.Equals(Pieces[id].Text, text, StringComparison.Ordinal))
            {
                return id;
            }
        }

        return null;
    }

    /// <summary>The byte that a piece such as <c>&lt;0x0A&gt;</c> stands for, or -1.</summary>
    internal static int ByteOf(string piece)
    {
        return piece.Length == 6 && piece.StartsWith("<0x", StringComparison.Ordinal) && piece[5] == '>'
            && byte.TryParse(piece.AsSpan(3, 2), System.Globalization.NumberStyles.AllowHexSpecifier, null, out byte value)
            ? value
            : -1;
    }
}
