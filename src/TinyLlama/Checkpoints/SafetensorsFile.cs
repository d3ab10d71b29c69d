using System.Buffers.Binary;
using System.Collections.Frozen;
using System.Text.Json;
using TinyLlama.Compute;
using TinyLlama.Compute.Native;
using TinyLlama.Data;

namespace TinyLlama.Checkpoints;

/// <summary>One tensor of a safetensors file.</summary>
/// <param name="Name">Its name.</param>
/// <param name="Type">Its type in the format's words, such as <c>BF16</c>.</param>
/// <param name="Shape">Its dimensions; none for a scalar.</param>
/// <param name="Offset">First byte, counted from the beginning of the file.</param>
/// <param name="ByteCount">Size in bytes.</param>
public sealed record SafetensorsEntry(string Name, string Type, IReadOnlyList<long> Shape, long Offset, long ByteCount)
    : TensorEntry(Name, Type, Shape);

/// <summary>
/// A safetensors file, mapped into memory: an 8-byte little-endian header length, a JSON header
/// {name: {dtype, shape, data_offsets}}, then the raw bytes.
/// </summary>
/// <remarks>
/// Everything the header claims is checked at opening, before anything is read or allocated by it: the tensors lie
/// inside the file, cover it without gap or overlap, and are as long as their shapes say.
/// </remarks>
public sealed class SafetensorsFile : ITensorFile
{
    /// <summary>The longest header that is read, as in the format's reference implementation.</summary>
    public const int MaximumHeaderBytes = 100_000_000;

    private const int LengthBytes = 8;
    private const int MaximumRank = 8;

    // Elements on their way through singles; a piece of any type stays below 1 MiB.
    internal const int PieceElements = 1 << 16;

    private readonly MappedFile _file;
    private readonly FrozenDictionary<string, SafetensorsEntry> _entries;

    private SafetensorsFile(MappedFile file, List<SafetensorsEntry> entries, Dictionary<string, string> metadata)
    {
        (_file, Entries, Metadata) = (file, entries, metadata);
        _entries = entries.ToFrozenDictionary(entry => entry.Name, StringComparer.Ordinal);
    }

    /// <summary>Gets the path the file was opened by.</summary>
    public string Path => _file.Path;

    /// <summary>Gets the tensors, in the order of their data.</summary>
    public IReadOnlyList<SafetensorsEntry> Entries { get; }

    /// <inheritdoc/>
    IReadOnlyList<TensorEntry> ITensorFile.Entries => Entries;

    /// <summary>Gets the texts under <c>__metadata__</c>.</summary>
    public IReadOnlyDictionary<string, string> Metadata { get; }

    /// <summary>Maps a file and checks its header.</summary>
    /// <exception cref="UserErrorException">The file cannot be read or is not a sound safetensors file.</exception>
    public static SafetensorsFile Open(string path)
    {
        MappedFile? file = null;
        try
        {
            file = MappedFile.Open(path);
            (List<SafetensorsEntry> entries, Dictionary<string, string> metadata) = ReadHeader(file);
            return new SafetensorsFile(file, entries, metadata);
        }
        catch (Exception e)
        {
            file?.Dispose();
            switch (e)
            {
                case IOException or UnauthorizedAccessException:
                    throw new UserErrorException($"{path}: cannot be read: {e.Message}", e);
                // GetString complains about ill-formed UTF-8 with InvalidOperationException, numbers with FormatException.
                case JsonException or InvalidOperationException or FormatException:
                    throw new UserErrorException($"{path}: not a safetensors file: its header is not the JSON it must be: {e.Message}", e);
                default:
                    throw;
            }
        }
    }

    /// <summary>Whether there is a tensor of that name.</summary>
    public bool Contains(string name) => _entries.ContainsKey(name);

    /// <summary>The tensor of that name.</summary>
    /// <exception cref="UserErrorException">There is none.</exception>
    public SafetensorsEntry Entry(string name) =>
        _entries.GetValueOrDefault(name) ?? throw new UserErrorException($"{Path}: has no tensor '{name}'");

    /// <summary>Bytes of a tensor, as a view of the mapped file: not to be used after <see cref="Dispose"/>.</summary>
    /// <param name="entry">A tensor of this file.</param>
    /// <param name="first">First byte, counted from the beginning of the tensor.</param>
    /// <param name="count">Number of bytes.</param>
    public ReadOnlySpan<byte> Bytes(SafetensorsEntry entry, long first, int count)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThan(first, entry.ByteCount - count);
        return _file.Bytes(entry.Offset + first, count);
    }

    /// <summary>Reads elements as singles, from any floating-point type.</summary>
    /// <param name="destination">What is filled.</param>
    /// <param name="name">The tensor.</param>
    /// <param name="first">Its first element to read, in row-major order.</param>
    /// <exception cref="UserErrorException">The tensor is missing or of another type.</exception>
    public void Read(Span<float> destination, string name, long first = 0)
    {
        SafetensorsEntry entry = Entry(name);
        DType type = FloatingPoint(entry);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(first, entry.Count - destination.Length);
        while (!destination.IsEmpty)
        {
            int count = Math.Min(PieceElements, destination.Length);
            ReadOnlySpan<byte> bytes = Bytes(entry, first * type.ByteCount(), count * type.ByteCount());
            ElementCodec.Decode(bytes, type, destination[..count]);
            destination = destination[count..];
            first += count;
        }
    }

    /// <inheritdoc/>
    public ReadOnlySpan<byte> MappedBytes(string name, long first, int count) => Bytes(Entry(name), first, count);

    /// <inheritdoc/>
    public nint MappedAddress(string name) => _file.Address(Entry(name).Offset, Entry(name).ByteCount);

    /// <summary>Copies a tensor to a device, piece by piece, converting between floating-point types.</summary>
    /// <param name="backend">The device.</param>
    /// <param name="destination">Contiguous; (R, C) for the shape [R, C], (1, C) also for [C].</param>
    /// <param name="name">The tensor.</param>
    /// <exception cref="UserErrorException">The tensor is missing, or of another shape, or of a type that does not convert.</exception>
    public void CopyTo(Backend backend, Tensor destination, string name)
    {
        SafetensorsEntry entry = Entry(name);
        RequireShape(Path, name, entry.Shape, destination.Rows, destination.Columns);
        if (entry.ElementType == destination.Type)
        {
            CopyBytes(backend, destination, entry);
            return;
        }

        DType type = FloatingPoint(entry);
        if (!ElementCodec.IsFloatingPoint(destination.Type))
        {
            throw new UserErrorException($"{Path}: tensor '{name}' is {entry.Type}, {destination.Type} is needed");
        }

        float[] piece = new float[(int)Math.Min(PieceElements, destination.Count)];
        for (long first = 0; first < destination.Count;)
        {
            int count = (int)Math.Min(piece.Length, destination.Count - first);
            ElementCodec.Decode(Bytes(entry, first * type.ByteCount(), count * type.ByteCount()), type, piece.AsSpan(0, count));
            DeviceElements.Write(backend, destination.Elements(first, count), piece.AsSpan(0, count));
            first += count;
        }
    }

    /// <summary>Drops what has been read from memory; it can be read again.</summary>
    public void DropPages() => _file.DropPages();

    /// <inheritdoc/>
    public void Dispose() => _file.Dispose();

    /// <summary>Throws unless a stored shape fits a tensor of (rows, columns).</summary>
    internal static void RequireShape(string path, string name, IReadOnlyList<long> shape, int rows, int columns)
    {
        bool fits = shape.Count switch
        {
            1 => rows == 1 && shape[0] == columns,
            2 => shape[0] == rows && shape[1] == columns,
            _ => false,
        };
        if (!fits)
        {
            string needed = rows == 1 ? $"[{columns}]" : $"[{rows}, {columns}]";
            throw new UserErrorException($"{path}: tensor '{name}' has the shape [{string.Join(", ", shape)}], {needed} is needed");
        }
    }

    private DType FloatingPoint(SafetensorsEntry entry) =>
        entry.ElementType is { } type && ElementCodec.IsFloatingPoint(type)
            ? type
            : throw new UserErrorException($"{Path}: tensor '{entry.Name}' is {entry.Type}, not F32, BF16, F16 or F64");

    private void CopyBytes(Backend backend, Tensor destination, SafetensorsEntry entry)
    {
        int size = destination.Type.ByteCount();
        for (long first = 0; first < destination.Count;)
        {
            int count = (int)Math.Min(PieceElements, destination.Count - first);
            ReadOnlySpan<byte> bytes = Bytes(entry, first * size, count * size);
            DeviceElements.WriteBytes(backend, destination.Elements(first, count), bytes);
            first += count;
        }
    }

    private static (List<SafetensorsEntry> Entries, Dictionary<string, string> Metadata) ReadHeader(MappedFile file)
    {
        if (file.Length < LengthBytes)
        {
            throw new UserErrorException($"{file.Path}: not a safetensors file: {file.Length} bytes are too few");
        }

        ulong claimed = BinaryPrimitives.ReadUInt64LittleEndian(file.Bytes(0, LengthBytes));
        if (claimed > MaximumHeaderBytes || (long)claimed > file.Length - LengthBytes)
        {
            throw new UserErrorException(
                $"{file.Path}: not a safetensors file, or cut off: it claims a header of {claimed} bytes, "
                + $"{Math.Min(MaximumHeaderBytes, file.Length - LengthBytes)} are possible");
        }

        long firstData = LengthBytes + (long)claimed;
        var reader = new Utf8JsonReader(file.Bytes(LengthBytes, (int)claimed));
        var entries = new List<SafetensorsEntry>();
        var names = new HashSet<string>(StringComparer.Ordinal);
        var metadata = new Dictionary<string, string>(StringComparer.Ordinal);
        Expect(ref reader, JsonTokenType.StartObject);
        while (NextKey(ref reader) is { } name)
        {
            if (!names.Add(name))
            {
                throw new JsonException($"'{name}' appears twice");
            }

            if (name == "__metadata__")
            {
                ReadMetadata(ref reader, metadata);
            }
            else
            {
                entries.Add(ReadEntry(ref reader, name, firstData, file));
            }
        }

        if (reader.Read())
        {
            throw new JsonException("something follows the object");
        }

        RequireCover(file, entries, firstData);
        return (entries, metadata);
    }

    private static void ReadMetadata(ref Utf8JsonReader reader, Dictionary<string, string> metadata)
    {
        Expect(ref reader, JsonTokenType.StartObject);
        while (NextKey(ref reader) is { } key)
        {
            Expect(ref reader, JsonTokenType.String);
            if (!metadata.TryAdd(key, reader.GetString()!))
            {
                throw new JsonException($"'__metadata__.{key}' appears twice");
            }
        }
    }

    private static SafetensorsEntry ReadEntry(ref Utf8JsonReader reader, string name, long firstData, MappedFile file)
    {
        string? type = null;
        List<long>? shape = null;
        List<long>? range = null;
        Expect(ref reader, JsonTokenType.StartObject);
        while (NextKey(ref reader) is { } key)
        {
            switch (key)
            {
                case "dtype" when type is null:
                    Expect(ref reader, JsonTokenType.String);
                    type = reader.GetString();
                    break;
                case "shape" when shape is null:
                    shape = ReadNumbers(ref reader, MaximumRank, name);
                    break;
                case "data_offsets" when range is null:
                    range = ReadNumbers(ref reader, 2, name);
                    break;
                default:
                    throw new JsonException($"'{name}.{key}' is unknown or appears twice");
            }
        }

        if (type is null || shape is null || range is not [long first, long end])
        {
            throw new JsonException($"'{name}' needs dtype, shape and two data_offsets");
        }

        if (first > end)
        {
            throw new JsonException($"'{name}' lies at {first} to {end}");
        }

        if (end > file.Length - firstData)
        {
            throw new UserErrorException(
                $"{file.Path}: tensor '{name}' ends at byte {end} of the data, the file has {file.Length - firstData} of them: cut off or damaged");
        }

        // Only sizes that fit the file pass, so the product cannot overflow unseen.
        Int128 bytes = ByteCount(type, name);
        foreach (long dimension in shape)
        {
            bytes = bytes > long.MaxValue ? bytes : bytes * dimension;
        }

        if (bytes != end - first)
        {
            throw new JsonException(
                $"'{name}' of {type} with shape [{string.Join(", ", shape)}] does not fill its {end - first} bytes");
        }

        return new SafetensorsEntry(name, type, shape, firstData + first, end - first);
    }

    private static int ByteCount(string type, string name) => type switch
    {
        "F64" or "I64" or "U64" => 8,
        "F32" or "I32" or "U32" => 4,
        "F16" or "BF16" or "I16" or "U16" => 2,
        "I8" or "U8" or "BOOL" or "F8_E4M3" or "F8_E5M2" => 1,
        _ => throw new JsonException($"'{name}' has the unknown dtype '{type}'"),
    };

    private static List<long> ReadNumbers(ref Utf8JsonReader reader, int most, string name)
    {
        var numbers = new List<long>(2);
        Expect(ref reader, JsonTokenType.StartArray);
        while (Next(ref reader) != JsonTokenType.EndArray)
        {
            if (reader.TokenType != JsonTokenType.Number || !reader.TryGetInt64(out long number) || number < 0 || numbers.Count == most)
            {
                throw new JsonException($"'{name}' needs at most {most} whole numbers from 0 on, here and in its shape");
            }

            numbers.Add(number);
        }

        return numbers;
    }

    // Data without gap or overlap: nothing hides in a file, and no two tensors share bytes.
    private static void RequireCover(MappedFile file, List<SafetensorsEntry> entries, long firstData)
    {
        entries.Sort(static (a, b) => (a.Offset, a.ByteCount).CompareTo((b.Offset, b.ByteCount)));
        long next = firstData;
        foreach (SafetensorsEntry entry in entries)
        {
            if (entry.Offset != next)
            {
                throw new UserErrorException(
                    $"{file.Path}: tensor '{entry.Name}' begins at byte {entry.Offset}, the one before it ends at {next}");
            }

            next += entry.ByteCount;
        }

        if (next != file.Length)
        {
            throw new UserErrorException($"{file.Path}: the tensors end at byte {next}, the file has {file.Length}: cut off or damaged");
        }
    }

    private static string? NextKey(ref Utf8JsonReader reader) =>
        Next(ref reader) == JsonTokenType.EndObject ? null : reader.GetString();

    private static void Expect(ref Utf8JsonReader reader, JsonTokenType expected)
    {
        if (Next(ref reader) != expected)
        {
            throw new JsonException($"{reader.TokenType} at byte {LengthBytes + reader.TokenStartIndex}, {expected} is needed");
        }
    }

    private static JsonTokenType Next(ref Utf8JsonReader reader) =>
        reader.Read() ? reader.TokenType : throw new JsonException("the header ends too early");
}
