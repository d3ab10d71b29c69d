using System.Text;
using System.Text.Unicode;

namespace TinyLlama.Data.Documents;

/// <summary>
/// English prose of a Unix machine, for where no SDK carries documentation: licences, the notes of installed packages and
/// manual pages, under <c>/usr/share</c>. A paragraph that occurred before is left out.
/// </summary>
public sealed class MachineText : IDocumentSource
{
    /// <summary>Characters after which a document ends with its paragraph, and a paragraph with its line.</summary>
    private const int DocumentCharacters = 4000;

    /// <summary>What is longer is a list that a program wrote.</summary>
    private const int MaximumFileBytes = 4 << 20;

    /// <summary>Bytes of files, mostly compressed, that are enough; and fewer than which are not worth the reading.</summary>
    private const long EnoughBytes = 16 << 20;
    private const long LeastBytes = 256 << 10;

    private static readonly string[] s_notes = ["copyright", "README", "NEWS", "TODO", "FAQ", "HISTORY", "AUTHORS", "THANKS", "INSTALL"];
    private static readonly string[] s_kinds = [".txt", ".md", ".rst", ".Debian"];

    private long _bytesRead;

    private MachineText(IReadOnlyList<SourceFile> files)
    {
        Files = files;
        Settings = new Dictionary<string, string>(StringComparer.Ordinal) { ["source"] = "machine-text" };
    }

    /// <inheritdoc/>
    public IReadOnlyList<SourceFile> Files { get; }

    /// <inheritdoc/>
    public IReadOnlyDictionary<string, string> Settings { get; }

    /// <inheritdoc/>
    public long BytesRead => Interlocked.Read(ref _bytesRead);

    /// <summary>Finds the texts of this machine.</summary>
    /// <returns>Null where there are too few.</returns>
    public static MachineText? Find() => FindIn("/usr/share", LeastBytes);

    /// <summary>Finds texts in the folders <c>common-licenses</c>, <c>doc</c> and <c>man</c> of a folder.</summary>
    /// <param name="share">The folder.</param>
    /// <param name="leastBytes">Fewer bytes of files are too few.</param>
    internal static MachineText? FindIn(string share, long leastBytes)
    {
        List<SourceFile> files = [];
        long bytes = 0;
        foreach ((string folder, Func<string, bool> isText) in (ReadOnlySpan<(string, Func<string, bool>)>)[("common-licenses", _ => true), ("doc", IsNote), ("man", IsEnglishManual)])
        {
            foreach (SourceFile file in FilesBelow(share, folder).Where(f => isText(f.Name)))
            {
                if (bytes < EnoughBytes)
                {
                    files.Add(file);
                    bytes += file.Bytes;
                }
            }
        }

        return bytes < leastBytes ? null : new MachineText(files);
    }

    /// <inheritdoc/>
    public IEnumerable<Document> Read(int firstFile, int endFile = int.MaxValue)
    {
        // Which paragraph is a repetition depends on all files before, so those are read wherever the reading begins.
        Interlocked.Exchange(ref _bytesRead, 0);
        HashSet<string> seen = new(StringComparer.Ordinal);
        for (int i = 0; i < Math.Min(endFile, Files.Count); i++)
        {
            foreach (Document document in Join(i, Paragraphs(Files[i]), seen))
            {
                if (i >= firstFile)
                {
                    yield return document;
                }
            }

            Interlocked.Add(ref _bytesRead, Files[i].Bytes);
        }
    }

    /// <summary>A line of a manual page's source as it reads: without requests and escapes. Empty between paragraphs.</summary>
    internal static string FromRoff(string line)
    {
        if (line.Length > 0 && line[0] is '.' or '\'')
        {
            string[] words = line[1..].Split(' ', StringSplitOptions.RemoveEmptyEntries);

            // Requests that put their words into the text: fonts, headings.
            if (words is not ["B" or "I" or "BR" or "BI" or "IB" or "IR" or "RB" or "RI" or "SM" or "SB", ..])
            {
                return words is ["SH" or "SS", .. string[] heading] ? "\n" + FromRoff(string.Join(' ', heading)).Trim('"') : "";
            }

            string space = words[0].Length == 1 ? " " : "";
            line = string.Join(space, words[1..]).Replace("\"", "", StringComparison.Ordinal);
        }

        StringBuilder text = new(line.Length);
        for (int i = 0; i < line.Length; i++)
        {
            if (line[i] != '\\' || i + 1 == line.Length)
            {
                text.Append(line[i]);
                continue;
            }

            // \fB, \f(CW, \f[CW], \*(xx and \(xx name fonts, strings and characters.
            char escape = line[++i];
            bool named = escape is 'f' or '*';
            char next = named && i + 1 < line.Length ? line[i + 1] : escape;
            switch (next)
            {
                case '(':
                    i += named ? 3 : 2;
                    break;
                case '[':
                    i = line.IndexOf(']', i) is int end and > 0 ? end : line.Length;
                    break;
                default:
                    i += named ? 1 : 0;
                    text.Append(named ? "" : escape switch { '-' => "-", 'e' => "\\", ' ' or '~' => " ", '"' => "", '\'' => "'", _ => "" });
                    break;
            }
        }

        return text.ToString();
    }

    private static bool IsNote(string name)
    {
        string file = WithoutPacking(Path.GetFileName(name));
        return s_notes.Any(n => file == n || file.StartsWith(n + ".", StringComparison.Ordinal)) || s_kinds.Any(k => file.EndsWith(k, StringComparison.Ordinal));
    }

    /// <summary>Manual pages lie in man/man1 …; those of other languages in man/de/man1 ….</summary>
    private static bool IsEnglishManual(string name) => name.StartsWith("man/man", StringComparison.Ordinal);

    private static string WithoutPacking(string name) => name.EndsWith(".gz", StringComparison.Ordinal) ? name[..^3] : name;

    private static IEnumerable<SourceFile> FilesBelow(string share, string folder)
    {
        string path = Path.Combine(share, folder);
        EnumerationOptions options = new() { RecurseSubdirectories = true, IgnoreInaccessible = true, AttributesToSkip = FileAttributes.ReparsePoint };
        return !Directory.Exists(path) ? [] : new DirectoryInfo(path)
            .EnumerateFiles("*", options)
            .Select(f => new SourceFile(Path.GetRelativePath(share, f.FullName).Replace('\\', '/'), f.FullName, f.Length))
            .OrderBy(f => f.Name, StringComparer.Ordinal);
    }

    private static List<string> Paragraphs(SourceFile file)
    {
        string text;
        try
        {
            using Stream raw = new FileStream(file.Path, FileMode.Open, FileAccess.Read, FileShare.Read, bufferSize: 1 << 16, FileOptions.SequentialScan);
            using Stream content = file.Name.EndsWith(".gz", StringComparison.Ordinal) ? new GzipContent(raw) : raw;
            ReadOnlySpan<byte> bytes = new LineReader(content, MaximumFileBytes).ReadToEnd();
            text = Utf8.IsValid(bytes) && !bytes.Contains((byte)0) ? Encoding.UTF8.GetString(bytes) : "";
        }
        catch (Exception e) when (e is IOException or InvalidDataException or UnauthorizedAccessException)
        {
            // Nobody asked for this very file, and others say as much.
            return [];
        }

        IEnumerable<string> lines = text.ReplaceLineEndings("\n").Split('\n');
        lines = file.Name.StartsWith("man/", StringComparison.Ordinal) ? lines.SelectMany(l => FromRoff(l).Split('\n')) : lines;
        List<string> paragraphs = [];
        StringBuilder paragraph = new();
        foreach (string line in lines.Append(""))
        {
            string words = string.Join(' ', line.Split([' ', '\t'], StringSplitOptions.RemoveEmptyEntries));
            if (words.Length > 0)
            {
                paragraph.Append(words).Append('\n');
            }

            // Long lists have no empty lines.
            if (words.Length == 0 ? paragraph.Length > 0 : paragraph.Length >= DocumentCharacters)
            {
                paragraphs.Add(paragraph.ToString());
                paragraph.Clear();
            }
        }

        return paragraphs;
    }

    private static IEnumerable<Document> Join(int file, List<string> paragraphs, HashSet<string> seen)
    {
        StringBuilder text = new();
        foreach (string paragraph in paragraphs.Where(seen.Add))
        {
            text.Append(paragraph);
            if (text.Length >= DocumentCharacters)
            {
                yield return new Document(file, 0, text.ToString());
                text.Clear();
            }
        }

        if (text.Length > 0)
        {
            yield return new Document(file, 0, text.ToString());
        }
    }
}
