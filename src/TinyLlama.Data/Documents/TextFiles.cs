using System.Buffers;
using System.IO.Enumeration;
using System.Text;
using System.Text.Json;
using System.Text.Unicode;

namespace TinyLlama.Data.Documents;

/// <summary>How text files become documents.</summary>
public sealed record TextFileOptions
{
    /// <summary>Gets the field of a JSON line that holds the text.</summary>
    public string Field { get; init; } = "text";

    /// <summary>Gets a value indicating whether each line of a .txt file is a document, and not the whole file.</summary>
    public bool Lines { get; init; }

    /// <summary>
    /// Gets the line that stands between the documents of a .txt file, such as <c>&lt;|endoftext|&gt;</c>, or an empty one
    /// where paragraphs are documents; null where the whole file is one. Not with <see cref="Lines"/>.
    /// </summary>
    public string? Separator { get; init; }

    /// <summary>Gets the longest document or line, in bytes, at most 512 MiB: what is longer ends the reading with an error.</summary>
    public int MaximumDocumentBytes { get; init; } = 256 << 20;

    /// <summary>
    /// Gets what unpacks .zst files: from a compressed stream to its content, disposing of it with itself, throwing
    /// <see cref="InvalidDataException"/> where the content is damaged. Null where there is nothing to do so.
    /// </summary>
    public Func<Stream, Stream>? OpenZstandard { get; init; }
}

/// <summary>
/// Documents of .txt and .jsonl files, each also as .gz and .zst. Everything is UTF-8; a byte order mark is passed over.
/// </summary>
public sealed class TextFiles : IDocumentSource
{
    private static readonly string[] s_kinds = [".txt", ".jsonl"];
    private static readonly string[] s_packings = ["", ".gz", ".zst"];

    private readonly TextFileOptions _options;
    private long _bytesRead;

    private TextFiles(IReadOnlyList<SourceFile> files, IReadOnlyList<string> passedOver, TextFileOptions options)
    {
        (Files, PassedOver, _options) = (files, passedOver, options);
        Settings = new Dictionary<string, string>(StringComparer.Ordinal)
        {
            ["source"] = "files",
            ["field"] = options.Field,
            ["lines"] = options.Lines ? "true" : "false",
            ["separator"] = options.Separator is null ? "none" : $"'{options.Separator}'",
        };
    }

    /// <inheritdoc/>
    public IReadOnlyList<SourceFile> Files { get; }

    /// <summary>Gets the files of the folders that are of no kind that is read.</summary>
    public IReadOnlyList<string> PassedOver { get; }

    /// <inheritdoc/>
    public IReadOnlyDictionary<string, string> Settings { get; }

    /// <inheritdoc/>
    public long BytesRead => Interlocked.Read(ref _bytesRead);

    /// <summary>
    /// Finds the files: those named, in the order named, and those in the folders named and below, sorted by name
    /// (ordinally, with '/'), so that every machine reads the same order. Links to folders are not followed.
    /// </summary>
    /// <param name="paths">Files and folders.</param>
    /// <param name="options">How files become documents.</param>
    /// <exception cref="UserErrorException">A path is missing, a named file is of no kind that is read, or nothing was found.</exception>
    public static TextFiles Find(IReadOnlyList<string> paths, TextFileOptions options)
    {
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(options.MaximumDocumentBytes);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(options.MaximumDocumentBytes, 1 << 29);
        if (options.Lines && options.Separator is not null)
        {
            throw new UserErrorException("either each line is a document or a separator stands between them; choose one");
        }

        List<SourceFile> files = [];
        List<string> passedOver = [];
        foreach (string path in paths)
        {
            if (File.Exists(path))
            {
                if (!IsRead(path))
                {
                    throw new UserErrorException($"{path} is none of {Kinds()}; rename it if it is text");
                }

                files.Add(new SourceFile(Path.GetFileName(path), path, new FileInfo(path).Length));
                continue;
            }

            if (!Directory.Exists(path))
            {
                throw new UserErrorException($"{path} does not exist");
            }

            // With several folders, names say which one.
            string prefix = paths.Count > 1 ? Path.GetFileName(Path.TrimEndingDirectorySeparator(Path.GetFullPath(path))) + "/" : "";
            foreach ((string name, string full, long bytes) in Enumerate(path))
            {
                if (IsRead(name))
                {
                    files.Add(new SourceFile(prefix + name, full, bytes));
                }
                else
                {
                    passedOver.Add(full);
                }
            }
        }

        if (files.Count == 0)
        {
            string others = passedOver.Count == 0 ? "" : $"; {passedOver.Count} files of other kinds are there, such as {passedOver[0]}";
            throw new UserErrorException($"no text under {string.Join(", ", paths)}: looked for {Kinds()}{others}");
        }

        return new TextFiles(files, passedOver, options);
    }

    /// <inheritdoc/>
    public IEnumerable<Document> Read(int firstFile, int endFile = int.MaxValue)
    {
        Interlocked.Exchange(ref _bytesRead, Files.Take(firstFile).Sum(f => f.Bytes));
        for (int i = firstFile; i < Math.Min(endFile, Files.Count); i++)
        {
            long before = BytesRead;
            using IEnumerator<Document> documents = ReadFile(i).GetEnumerator();
            while (Next(documents, Files[i]) is Document document)
            {
                yield return document;
            }

            Interlocked.Exchange(ref _bytesRead, before + Files[i].Bytes);
        }
    }

    private static string Kinds() => string.Join(", ", s_kinds.SelectMany(k => s_packings.Select(p => k + p)));

    private static bool IsRead(string name) => s_kinds.Any(k => s_packings.Any(p => name.EndsWith(k + p, StringComparison.OrdinalIgnoreCase)));

    private static List<(string Name, string Path, long Bytes)> Enumerate(string folder)
    {
        FileSystemEnumerable<(string Path, long Bytes)> entries = new(
            folder,
            (ref FileSystemEntry entry) => (entry.ToSpecifiedFullPath(), entry.Length),
            new EnumerationOptions { RecurseSubdirectories = true, AttributesToSkip = FileAttributes.None, IgnoreInaccessible = false })
        {
            ShouldIncludePredicate = (ref FileSystemEntry entry) => !entry.IsDirectory,
            ShouldRecursePredicate = (ref FileSystemEntry entry) => !entry.Attributes.HasFlag(FileAttributes.ReparsePoint),
        };
        List<(string Name, string Path, long Bytes)> files = [];
        foreach ((string path, long bytes) in entries)
        {
            // The length of a link is not that of its file.
            FileInfo info = new(path);
            long length = info.LinkTarget is null ? bytes : info.ResolveLinkTarget(returnFinalTarget: true) is FileInfo { Exists: true } target ? target.Length : bytes;
            files.Add((Path.GetRelativePath(folder, path).Replace('\\', '/'), path, length));
        }

        files.Sort((a, b) => string.CompareOrdinal(a.Name, b.Name));
        return files;
    }

    /// <summary>The next document, or null behind the last; what goes wrong with the file is told with its name.</summary>
    private static Document? Next(IEnumerator<Document> documents, SourceFile file)
    {
        try
        {
            return documents.MoveNext() ? documents.Current : null;
        }
        catch (InvalidDataException e)
        {
            throw new UserErrorException($"{file.Path}: {e.Message}", e);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new UserErrorException($"{file.Path} cannot be read: {e.Message}", e);
        }
    }

    private IEnumerable<Document> ReadFile(int index)
    {
        SourceFile file = Files[index];
        long before = BytesRead;
        using FileStream raw = new(file.Path, FileMode.Open, FileAccess.Read, FileShare.Read, bufferSize: 1 << 16, FileOptions.SequentialScan);
        using Stream content = Unpack(raw, file);
        LineReader reader = new(content, _options.MaximumDocumentBytes);
        string name = file.Name;
        foreach (string packing in s_packings.Where(p => p.Length > 0 && name.EndsWith(p, StringComparison.OrdinalIgnoreCase)))
        {
            name = name[..^packing.Length];
        }

        bool json = name.EndsWith(".jsonl", StringComparison.OrdinalIgnoreCase);
        if (!json && !_options.Lines && _options.Separator is null)
        {
            yield return Text(index, 0, WithoutMark(reader.ReadToEnd()));
            yield break;
        }

        if (!json && _options.Separator is string separator)
        {
            ArrayBufferWriter<byte> text = new();
            byte[] between = Encoding.UTF8.GetBytes(separator);
            while (ReadSeparated(reader, index, between, text) is Document document)
            {
                yield return document;
                Interlocked.Exchange(ref _bytesRead, before + raw.Position);
            }

            yield break;
        }

        while (ReadLine(reader, index, json) is Document document)
        {
            // A line without text is the space between documents.
            if (document.Text.Length > 0 || document.Fault is not null || json)
            {
                yield return document;
            }

            Interlocked.Exchange(ref _bytesRead, before + raw.Position);
        }
    }

    /// <summary>Reads up to the next separator; what has no text between two of them is no document.</summary>
    private Document? ReadSeparated(LineReader reader, int file, ReadOnlySpan<byte> separator, ArrayBufferWriter<byte> text)
    {
        text.ResetWrittenCount();
        long first = 0;
        while (reader.TryRead(out ReadOnlySpan<byte> line))
        {
            line = reader.Line == 1 ? WithoutMark(line) : line;
            if (!line.SequenceEqual(separator))
            {
                if (text.WrittenCount + line.Length > _options.MaximumDocumentBytes)
                {
                    throw new InvalidDataException($"the document of line {first} is longer than {_options.MaximumDocumentBytes} bytes");
                }

                first = text.WrittenCount == 0 ? reader.Line : first;
                if (text.WrittenCount > 0 || !line.IsEmpty)
                {
                    text.Write(line);
                    text.Write("\n"u8);
                }
            }
            else if (text.WrittenCount > 0)
            {
                break;
            }
        }

        return text.WrittenCount > 0 ? Text(file, first, text.WrittenSpan) : null;
    }

    private Document? ReadLine(LineReader reader, int file, bool json)
    {
        while (reader.TryRead(out ReadOnlySpan<byte> line))
        {
            line = reader.Line == 1 ? WithoutMark(line) : line;
            if (!json)
            {
                return Text(file, reader.Line, line);
            }

            if (!line.Trim(" \t"u8).IsEmpty)
            {
                return Json(file, reader.Line, line);
            }
        }

        return null;
    }

    private Stream Unpack(FileStream raw, SourceFile file)
    {
        if (file.Name.EndsWith(".gz", StringComparison.OrdinalIgnoreCase))
        {
            return new GzipContent(raw);
        }

        if (file.Name.EndsWith(".zst", StringComparison.OrdinalIgnoreCase))
        {
            return _options.OpenZstandard is { } open
                ? open(raw)
                : throw new UserErrorException($"{file.Path}: nothing here unpacks .zst; unpack it first (`zstd -d`)");
        }

        return raw;
    }

    private static ReadOnlySpan<byte> WithoutMark(ReadOnlySpan<byte> text) => text.StartsWith("\uFEFF"u8) ? text[3..] : text;

    private static Document Text(int file, long line, ReadOnlySpan<byte> text)
    {
        if (Utf8.IsValid(text))
        {
            return new Document(file, line, Encoding.UTF8.GetString(text));
        }

        // Stops before the first byte that is no UTF-8.
        char[] valid = ArrayPool<char>.Shared.Rent(text.Length);
        Utf8.ToUtf16(text, valid, out int read, out _, replaceInvalidSequences: false);
        ArrayPool<char>.Shared.Return(valid);
        return new Document(file, line, Encoding.UTF8.GetString(text), $"byte {read} is not UTF-8");
    }

    private Document Json(int file, long line, ReadOnlySpan<byte> text)
    {
        Document Bad(ReadOnlySpan<byte> text, string fault) => new(file, line, Encoding.UTF8.GetString(text), fault);

        if (!Utf8.IsValid(text))
        {
            return Text(file, line, text);
        }

        try
        {
            string? value = null;
            bool found = false;
            Utf8JsonReader json = new(text);
            json.Read();
            if (json.TokenType != JsonTokenType.StartObject)
            {
                return Bad(text, "it is not a JSON object");
            }

            while (json.Read() && json.TokenType == JsonTokenType.PropertyName)
            {
                bool wanted = !found && json.ValueTextEquals(_options.Field);
                json.Read();
                if (wanted)
                {
                    found = true;
                    value = json.TokenType == JsonTokenType.String ? json.GetString() : null;
                }
                else
                {
                    json.Skip();
                }
            }

            // Whatever follows the object is an error of the reader.
            json.Read();
            return value is not null
                ? new Document(file, line, value)
                : Bad(text, found ? $"its field '{_options.Field}' is not a text" : $"it has no field '{_options.Field}'");
        }
        catch (JsonException e)
        {
            return Bad(text, $"it is not JSON: byte {e.BytePositionInLine ?? 0}");
        }
        catch (InvalidOperationException)
        {
            // A \u escape of half a surrogate pair is JSON, but no text.
            return Bad(text, $"its field '{_options.Field}' has half a surrogate pair");
        }
    }
}
