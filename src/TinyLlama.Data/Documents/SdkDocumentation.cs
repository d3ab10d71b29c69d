using System.Text;
using System.Xml;

namespace TinyLlama.Data.Documents;

/// <summary>
/// English prose that every machine with a .NET SDK has: the XML documentation of its reference packs. Texts of
/// <c>summary</c>, <c>remarks</c>, <c>param</c>, <c>returns</c> and the like, each once, one a line.
/// </summary>
/// <remarks>
/// A document is a type with its members, in the order of the file, because a member's prose alone is a line or two of
/// which the next resembles the last; a long type is cut between members so that documents have about a thousand characters,
/// a sample of a small model. A text that occurred before, anywhere, is left out: overloads, parameters and exceptions repeat theirs by the
/// thousand, and what was seen in training must not be validated on.
/// </remarks>
public sealed class SdkDocumentation : IDocumentSource
{
    /// <summary>Characters after which a document ends with its member.</summary>
    private const int DocumentCharacters = 1000;

    private static readonly string[] s_packs = ["Microsoft.NETCore.App.Ref", "Microsoft.AspNetCore.App.Ref"];

    private readonly int _threads;
    private long _bytesRead;

    private SdkDocumentation(IReadOnlyList<SourceFile> files, int threads)
    {
        (Files, _threads) = (files, threads);
        Settings = new Dictionary<string, string>(StringComparer.Ordinal) { ["source"] = "sdk-documentation" };
    }

    /// <inheritdoc/>
    public IReadOnlyList<SourceFile> Files { get; }

    /// <inheritdoc/>
    public IReadOnlyDictionary<string, string> Settings { get; }

    /// <inheritdoc/>
    public long BytesRead => Interlocked.Read(ref _bytesRead);

    /// <summary>
    /// Finds the documentation of the newest reference packs: beside the runtime that runs this program, else below
    /// DOTNET_ROOT, else where the <c>dotnet</c> on PATH lies.
    /// </summary>
    /// <param name="threads">Files read at once; the documents do not depend on it.</param>
    /// <returns>Null where no SDK with XML documentation is found.</returns>
    public static SdkDocumentation? Find(int threads) =>
        Roots().Select(root => FindIn(root, threads)).FirstOrDefault(found => found is not null);

    /// <summary>Finds the documentation of an SDK.</summary>
    /// <param name="root">The folder that <c>dotnet</c> lies in.</param>
    /// <param name="threads">Files read at once.</param>
    /// <returns>Null where the folder has none.</returns>
    internal static SdkDocumentation? FindIn(string root, int threads)
    {
        List<SourceFile> files = [];
        foreach (string pack in s_packs)
        {
            string folder = Path.Combine(root, "packs", pack);
            string? newest = Subfolders(folder)
                .SelectMany(version => Subfolders(Path.Combine(version, "ref")))
                .Where(framework => Directory.EnumerateFiles(framework, "*.xml").Any())
                .MaxBy(framework => VersionOf(Path.GetFileName(Path.GetDirectoryName(Path.GetDirectoryName(framework))!)));
            if (newest is not null)
            {
                files.AddRange(Directory.EnumerateFiles(newest, "*.xml")
                    .Order(StringComparer.Ordinal)
                    .Select(path => new SourceFile($"{pack}/{Path.GetFileName(path)}", path, new FileInfo(path).Length)));
            }
        }

        return files.Count == 0 ? null : new SdkDocumentation(files, threads);
    }

    /// <inheritdoc/>
    public IEnumerable<Document> Read(int firstFile, int endFile = int.MaxValue)
    {
        // Which text is a repetition depends on all files before, so those are read wherever the reading begins.
        Interlocked.Exchange(ref _bytesRead, 0);
        HashSet<string> seen = new(StringComparer.Ordinal);
        TaskScheduler threads = new ConcurrentExclusiveSchedulerPair(TaskScheduler.Default, Math.Max(1, _threads)).ConcurrentScheduler;
        Queue<Task<List<MemberProse>>> reading = new();
        int started = 0;
        int end = Math.Min(endFile, Files.Count);
        for (int file = 0; file < end; file++)
        {
            while (started < end && started <= file + (2 * _threads))
            {
                SourceFile next = Files[started++];
                reading.Enqueue(Task.Factory.StartNew(() => ReadMembers(next), CancellationToken.None, TaskCreationOptions.None, threads));
            }

            foreach (Document document in Join(file, reading.Dequeue().GetAwaiter().GetResult(), seen))
            {
                if (file >= firstFile)
                {
                    yield return document;
                }
            }

            Interlocked.Add(ref _bytesRead, Files[file].Bytes);
        }
    }

    private static IEnumerable<string> Roots()
    {
        // …/shared/Microsoft.NETCore.App/10.0.1/ is where the runtime's own library lies.
        yield return Path.GetFullPath(Path.Combine(System.Runtime.InteropServices.RuntimeEnvironment.GetRuntimeDirectory(), "..", "..", ".."));
        if (Environment.GetEnvironmentVariable("DOTNET_ROOT") is { Length: > 0 } root)
        {
            yield return root;
        }

        foreach (string folder in (Environment.GetEnvironmentVariable("PATH") ?? "").Split(Path.PathSeparator, StringSplitOptions.RemoveEmptyEntries))
        {
            FileInfo command = new(Path.Combine(folder, OperatingSystem.IsWindows() ? "dotnet.exe" : "dotnet"));
            if (command.Exists && (command.ResolveLinkTarget(returnFinalTarget: true) ?? command) is FileInfo { Directory: { } directory })
            {
                yield return directory.FullName;
            }
        }
    }

    private static IEnumerable<string> Subfolders(string folder) => Directory.Exists(folder) ? Directory.EnumerateDirectories(folder) : [];

    /// <summary>The version of a pack's folder; a preview is older than its release.</summary>
    private static (Version Version, bool Release, string Name) VersionOf(string name)
    {
        string[] parts = name.Split('-', 2);
        return (Version.TryParse(parts[0], out Version? version) ? version : new Version(), parts.Length == 1, name);
    }

    private static IEnumerable<Document> Join(int file, List<MemberProse> members, HashSet<string> seen)
    {
        StringBuilder text = new();
        string type = "";
        long line = 0;
        foreach (MemberProse member in members)
        {
            if (text.Length > 0 && (member.Type != type || text.Length >= DocumentCharacters))
            {
                yield return new Document(file, line, text.ToString());
                text.Clear();
            }

            type = member.Type;
            foreach (string paragraph in member.Texts.Where(seen.Add))
            {
                line = text.Length == 0 ? member.Line : line;
                text.Append(paragraph).Append('\n');
            }
        }

        if (text.Length > 0)
        {
            yield return new Document(file, line, text.ToString());
        }
    }

    private static List<MemberProse> ReadMembers(SourceFile file)
    {
        List<MemberProse> members = [];
        try
        {
            using FileStream stream = new(file.Path, FileMode.Open, FileAccess.Read, FileShare.Read, bufferSize: 1 << 16, FileOptions.SequentialScan);
            using XmlReader xml = XmlReader.Create(stream, new XmlReaderSettings { DtdProcessing = DtdProcessing.Prohibit, IgnoreComments = true, XmlResolver = null });
            Prose prose = new();
            while (xml.Read())
            {
                if (xml.NodeType == XmlNodeType.Element && xml.Name == "member")
                {
                    long line = ((IXmlLineInfo)xml).LineNumber;
                    string type = TypeOf(xml.GetAttribute("name") ?? "");
                    List<string> texts = prose.ReadMember(xml);
                    if (texts.Count > 0)
                    {
                        members.Add(new MemberProse(type, line, texts));
                    }
                }
            }

            return members;
        }
        catch (Exception e) when (e is XmlException or IOException or UnauthorizedAccessException)
        {
            throw new UserErrorException($"{file.Path} cannot be read: {e.Message.ReplaceLineEndings(" ")}", e);
        }
    }

    /// <summary>The type that a documentation identifier such as <c>M:A.B.C(D.E)</c> is about: A.B.</summary>
    private static string TypeOf(string id)
    {
        string name = WithoutParameters(id);
        return id.StartsWith("T:", StringComparison.Ordinal) || name.LastIndexOf('.') <= 2 ? name[Math.Min(2, name.Length)..] : name[2..name.LastIndexOf('.')];
    }

    private static string WithoutParameters(string id) => id.IndexOf('(', StringComparison.Ordinal) is int end and > 0 ? id[..end] : id;

    /// <summary>What of a member was written by people.</summary>
    private sealed record MemberProse(string Type, long Line, List<string> Texts);

    /// <summary>Takes the prose out of a member's elements.</summary>
    private sealed class Prose
    {
        private readonly StringBuilder _text = new();
        private bool _space;

        /// <summary>Reads to the end of a member.</summary>
        /// <returns>The text of each of its elements, with white space normalized, one line for each of its paragraphs.</returns>
        public List<string> ReadMember(XmlReader xml)
        {
            List<string> texts = [];
            if (xml.IsEmptyElement)
            {
                return texts;
            }

            int depth = xml.Depth;
            Begin();
            xml.Read();
            while (xml.Depth > depth)
            {
                if (xml.NodeType == XmlNodeType.Element && xml.Name == "code")
                {
                    // Programs are not prose.
                    xml.Skip();
                    continue;
                }

                switch (xml.NodeType)
                {
                    case XmlNodeType.Element when xml.Name is "see" or "seealso" or "paramref" or "typeparamref":
                        if (xml.IsEmptyElement)
                        {
                            Add(Reference(xml));
                        }

                        break;
                    case XmlNodeType.Element when xml.Name is "para" or "item" or "br" or "list" or "term" or "description":
                        Break();
                        break;
                    case XmlNodeType.EndElement when xml.Name is "para" or "item" or "term" or "description":
                        Break();
                        break;
                    case XmlNodeType.Text or XmlNodeType.CDATA or XmlNodeType.Whitespace or XmlNodeType.SignificantWhitespace:
                        Add(xml.Value);
                        break;
                    default:
                        break;
                }

                if (xml.NodeType == XmlNodeType.EndElement && xml.Depth == depth + 1)
                {
                    End(texts);
                }

                xml.Read();
            }

            End(texts);
            return texts;
        }

        /// <summary>How a reference reads in a sentence: the name without namespace, parameters and number of type parameters.</summary>
        private static string Reference(XmlReader xml)
        {
            if (xml.GetAttribute("cref") is not { Length: > 0 } cref)
            {
                return xml.GetAttribute("langword") ?? xml.GetAttribute("name") ?? xml.GetAttribute("href") ?? "";
            }

            bool member = cref.Length > 2 && cref[1] == ':' && cref[0] is 'M' or 'P' or 'F' or 'E';
            string name = WithoutParameters(cref.Length > 2 && cref[1] == ':' ? cref[2..] : cref);
            string[] parts = name.Split('.', StringSplitOptions.RemoveEmptyEntries);
            for (int i = 0; i < parts.Length; i++)
            {
                parts[i] = parts[i].Split('`', 2)[0];
            }

            return parts switch
            {
                [.., string type, "#ctor"] => type,
                [.., string type, string last] when member => $"{type}.{last}",
                [.., string last] => last,
                [] => "",
            };
        }

        private void Begin()
        {
            _text.Clear();
            _space = false;
        }

        private void Add(string text)
        {
            foreach (char c in text)
            {
                if (char.IsWhiteSpace(c))
                {
                    _space = _text.Length > 0 && _text[^1] != '\n';
                    continue;
                }

                if (_space)
                {
                    _text.Append(' ');
                    _space = false;
                }

                _text.Append(c);
            }
        }

        private void Break()
        {
            _space = false;
            if (_text.Length > 0 && _text[^1] != '\n')
            {
                _text.Append('\n');
            }
        }

        private void End(List<string> texts)
        {
            string text = _text.ToString().TrimEnd('\n');
            if (text.Length > 0)
            {
                texts.Add(text);
            }

            Begin();
        }
    }
}
