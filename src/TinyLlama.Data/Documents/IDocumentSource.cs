namespace TinyLlama.Data.Documents;

/// <summary>A file that documents come from.</summary>
/// <param name="Name">Its name in messages and shards: relative to what the user named, with '/' between folders.</param>
/// <param name="Path">Where it lies.</param>
/// <param name="Bytes">Its length in bytes, before decompression.</param>
public sealed record SourceFile(string Name, string Path, long Bytes);

/// <summary>One text, or a record that should have been one.</summary>
/// <param name="File">The file it is in: an index into <see cref="IDocumentSource.Files"/>.</param>
/// <param name="Line">Its line there, from 1; 0 where the whole file is the document.</param>
/// <param name="Text">The text; of a bad record, what could be read of it.</param>
/// <param name="Fault">Why the record is bad; null for a document.</param>
public readonly record struct Document(int File, long Line, string Text, string? Fault = null);

/// <summary>Documents in a fixed order.</summary>
public interface IDocumentSource
{
    /// <summary>Gets the files in the order in which they are read.</summary>
    IReadOnlyList<SourceFile> Files { get; }

    /// <summary>Gets what decides the documents of a file, such as the field that holds the text; recorded with the shards.</summary>
    IReadOnlyDictionary<string, string> Settings { get; }

    /// <summary>Gets how many bytes of the files have been read, for progress: any thread may ask.</summary>
    long BytesRead { get; }

    /// <summary>Reads documents and bad records, in the same order each time. A file that fails as a whole is an error.</summary>
    /// <param name="firstFile">The file to begin with.</param>
    /// <param name="endFile">The file to end before; all files are read where there are fewer.</param>
    /// <exception cref="UserErrorException">A file cannot be read or is beyond a limit.</exception>
    IEnumerable<Document> Read(int firstFile, int endFile = int.MaxValue);
}
