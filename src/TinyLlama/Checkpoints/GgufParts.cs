using System.Globalization;
using System.Text.RegularExpressions;
using TinyLlama.Data;

namespace TinyLlama.Checkpoints;

/// <summary>A tensor and the file that has it.</summary>
/// <param name="File">The file.</param>
/// <param name="Entry">The tensor.</param>
internal readonly record struct GgufPlace(GgufFile File, GgufEntry Entry)
{
    /// <summary>Bytes of the tensor, as a view of the mapped file: not to be used after its end.</summary>
    /// <param name="first">First byte, counted from the beginning of the tensor.</param>
    /// <param name="count">Number of bytes.</param>
    public ReadOnlySpan<byte> Bytes(long first, int count) => File.Bytes(Entry, first, count);
}

/// <summary>
/// One GGUF file, or the files that one was split into: <c>NAME-00001-of-00003.gguf</c> and so on, of which the first has the
/// metadata and each some tensors.
/// </summary>
internal sealed partial class GgufParts : IDisposable
{
    private const string CountKey = "split.count";
    private const string NumberKey = "split.no";

    private readonly List<GgufFile> _files = [];

    private GgufParts()
    {
    }

    /// <summary>Gets the file with the metadata.</summary>
    public GgufFile First => _files[0];

    /// <summary>Opens a file, and where it is one of several all of them.</summary>
    /// <param name="path">The file; of several any.</param>
    /// <exception cref="UserErrorException">A file is missing, damaged, or not of the others.</exception>
    public static GgufParts Open(string path)
    {
        var parts = new GgufParts();
        try
        {
            GgufFile named = GgufFile.Open(path);
            parts._files.Add(named);
            if (named.Value(CountKey, 1L) is > 1 and var count)
            {
                parts.OpenOthers(named, count);
            }

            return parts;
        }
        catch
        {
            parts.Dispose();
            throw;
        }
    }

    /// <summary>The tensors of all files by their names.</summary>
    /// <exception cref="UserErrorException">Two files have the same, or some are missing.</exception>
    public Dictionary<string, GgufPlace> Tensors()
    {
        var places = new Dictionary<string, GgufPlace>(StringComparer.Ordinal);
        foreach (GgufFile file in _files)
        {
            foreach (GgufEntry entry in file.Entries)
            {
                if (!places.TryAdd(entry.Name, new GgufPlace(file, entry)))
                {
                    throw new UserErrorException($"{file.Path}: has the tensor '{entry.Name}', which another part has too");
                }
            }
        }

        return First.Value("split.tensors.count", (long)places.Count) is var expected && expected == places.Count
            ? places
            : throw new UserErrorException($"{First.Path}: its parts have {places.Count} tensors, {expected} are said to be there");
    }

    /// <summary>Drops what has been read from memory; it can be read again.</summary>
    public void DropPages() => _files.ForEach(static file => file.DropPages());

    /// <inheritdoc/>
    public void Dispose() => _files.ForEach(static file => file.Dispose());

    [GeneratedRegex(@"-\d{5}-of-(?<count>\d{5})\.gguf$", RegexOptions.ExplicitCapture, matchTimeoutMilliseconds: 1000)]
    private static partial Regex PartName();

    private void OpenOthers(GgufFile named, long count)
    {
        Match name = PartName().Match(named.Path);
        if (!name.Success || count != long.Parse(name.Groups["count"].ValueSpan, CultureInfo.InvariantCulture))
        {
            throw new UserErrorException($"{named.Path}: is one of {count} files of a model, but not named so: NAME-00001-of-{count:00000}.gguf");
        }

        for (int number = 0; number < count; number++)
        {
            string path = $"{named.Path[..name.Index]}-{number + 1:00000}-of-{count:00000}.gguf";
            GgufFile file = path == named.Path ? named : GgufFile.Open(path);
            _files.Add(file);
            if (file.Value<long>(NumberKey) != number || file.Value<long>(CountKey) != count)
            {
                throw new UserErrorException($"{path}: is not part {number + 1} of {count}, as its name says");
            }
        }

        _files.RemoveAt(0);
    }
}
