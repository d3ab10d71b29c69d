namespace TinyLlama.Data.Tokenizers;

/// <summary>Text to token ids and back. Safe for several threads at once.</summary>
public interface ITokenizer
{
    /// <summary>Gets the number of ids (V); ids are 0 … V-1.</summary>
    int VocabularySize { get; }

    /// <summary>Gets the id that begins a document, or null where the vocabulary has none.</summary>
    int? Bos { get; }

    /// <summary>Gets the id that ends a document, or null where the vocabulary has none.</summary>
    int? Eos { get; }

    /// <summary>Gets the SHA-256, in lower-case hexadecimal, of what decides ids: shards and checkpoints record it.</summary>
    string Hash { get; }

    /// <summary>Appends the ids of a text, without BOS or EOS: who wants them adds them.</summary>
    /// <param name="text">Any text; control symbols in it are text.</param>
    /// <param name="tokens">Where ids are appended.</param>
    void Encode(ReadOnlySpan<char> text, List<int> tokens);

    /// <summary>The text of a run of ids from the beginning of a document; control tokens are left out.</summary>
    /// <exception cref="ArgumentOutOfRangeException">An id is outside the vocabulary.</exception>
    string Decode(ReadOnlySpan<int> tokens);

    /// <summary>The bytes that a token stands for, as they appear inside a document; empty for a control token.</summary>
    /// <exception cref="ArgumentOutOfRangeException">The id is outside the vocabulary.</exception>
    ReadOnlyMemory<byte> TokenBytes(int token);

    /// <summary>
    /// The bytes that a token stands for where no token with bytes precedes it in its document: without the space that
    /// encoding puts before a document's first word.
    /// </summary>
    /// <exception cref="ArgumentOutOfRangeException">The id is outside the vocabulary.</exception>
    ReadOnlyMemory<byte> FirstTokenBytes(int token);
}
