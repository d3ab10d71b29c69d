using System.Buffers;
using System.Collections.Frozen;
using TinyLlama.Compute;
using TinyLlama.Compute.Native;
using TinyLlama.Data;

namespace TinyLlama.Checkpoints;

/// <summary>One tensor of a PyTorch file.</summary>
/// <param name="Name">Its name.</param>
/// <param name="Type">Its type in the words of safetensors.</param>
/// <param name="Shape">Its dimensions; none for a scalar.</param>
/// <param name="Strides">For each dimension the distance of neighbours, in elements.</param>
/// <param name="Offset">First byte, counted from the beginning of the file.</param>
internal sealed record PyTorchEntry(string Name, string Type, IReadOnlyList<long> Shape, IReadOnlyList<long> Strides, long Offset)
    : TensorEntry(Name, Type, Shape)
{
    /// <summary>Gets the size of an element in bytes.</summary>
    public int ElementBytes => SizeOf(Type);

    /// <summary>Gets a value indicating whether the elements follow each other in row-major order.</summary>
    public bool IsContiguous
    {
        get
        {
            long next = 1;
            for (int i = Shape.Count - 1; i >= 0; i--)
            {
                if (Shape[i] != 1 && Strides[i] != next)
                {
                    return false;
                }

                next *= Shape[i];
            }

            return true;
        }
    }

    /// <summary>The size in bytes of an element of a type.</summary>
    public static int SizeOf(string type) => type switch
    {
        "F64" or "I64" => 8,
        "F32" or "I32" => 4,
        "F16" or "BF16" or "I16" => 2,
        _ => 1,
    };
}

/// <summary>
/// A file of <c>torch.save</c> since PyTorch 1.6, mapped into memory: a zip archive of uncompressed files,
/// <c>NAME/data.pkl</c> with names and shapes and <c>NAME/data/KEY</c> with each storage. Nothing in it is executed.
/// </summary>
/// <remarks>
/// Its value is a dictionary of tensors (a state dict), or one that has it under <c>model</c>, <c>state_dict</c> or
/// <c>model_state_dict</c>. Everything is checked at opening: storages are as long as they say, tensors lie inside theirs.
/// </remarks>
internal sealed class PyTorchFile : ITensorFile
{
    private const string PickleName = "/data.pkl";
    private const int MaximumPickleBytes = 1 << 22;
    private const int MaximumRank = 8;
    private static readonly string[] s_stateKeys = ["model", "state_dict", "model_state_dict"];

    private readonly MappedFile _file;
    private readonly FrozenDictionary<string, PyTorchEntry> _entries;

    private PyTorchFile(MappedFile file, List<PyTorchEntry> entries)
    {
        (_file, Entries) = (file, entries);
        _entries = entries.ToFrozenDictionary(static entry => entry.Name, StringComparer.Ordinal);
    }

    /// <inheritdoc/>
    public string Path => _file.Path;

    /// <inheritdoc/>
    public IReadOnlyList<TensorEntry> Entries { get; }

    /// <summary>Whether a file begins as PyTorch's do, those from before 1.6 too; such a file need not be sound.</summary>
    /// <exception cref="UserErrorException">It cannot be read.</exception>
    public static bool IsOne(string path)
    {
        try
        {
            using MappedFile file = MappedFile.Open(path);
            return StartsAsZip(file) || StartsAsPickle(file);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new UserErrorException($"{path}: cannot be read: {e.Message}", e);
        }
    }

    /// <summary>Maps a file and checks it.</summary>
    /// <exception cref="UserErrorException">It cannot be read, is no sound file of tensors, or holds something else than tensors.</exception>
    public static PyTorchFile Open(string path)
    {
        MappedFile? file = null;
        try
        {
            file = MappedFile.Open(path);
            if (!StartsAsZip(file))
            {
                throw new UserErrorException(StartsAsPickle(file)
                    ? $"{path}: is in the form that PyTorch wrote before 1.6; load and save it with a newer one"
                    : $"{path}: not a PyTorch file");
            }

            return new PyTorchFile(file, ReadEntries(file));
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            file?.Dispose();
            throw new UserErrorException($"{path}: cannot be read: {e.Message}", e);
        }
        catch
        {
            file?.Dispose();
            throw;
        }
    }

    /// <inheritdoc/>
    public void Read(Span<float> destination, string name, long first = 0)
    {
        PyTorchEntry entry = _entries[name];
        DType type = entry.ElementType!.Value;
        byte[] piece = ArrayPool<byte>.Shared.Rent(Math.Min(destination.Length, SafetensorsFile.PieceElements) * entry.ElementBytes);
        while (!destination.IsEmpty)
        {
            int count = Math.Min(piece.Length / entry.ElementBytes, destination.Length);
            Span<byte> bytes = piece.AsSpan(0, count * entry.ElementBytes);
            ReadBytes(bytes, entry, first);
            ElementCodec.Decode(bytes, type, destination[..count]);
            destination = destination[count..];
            first += count;
        }

        ArrayPool<byte>.Shared.Return(piece);
    }

    /// <inheritdoc/>
    public ReadOnlySpan<byte> MappedBytes(string name, long first, int count) =>
        _entries[name] is { IsContiguous: true } entry ? _file.Bytes(entry.Offset + first, count) : default;

    /// <inheritdoc/>
    public nint MappedAddress(string name) => _entries[name] is { IsContiguous: true } entry
        ? _file.Address(entry.Offset, entry.Shape.Aggregate((long)entry.ElementBytes, static (bytes, dimension) => bytes * dimension))
        : 0;

    /// <summary>Reads elements as they are stored, in row-major order.</summary>
    /// <param name="destination">What is filled.</param>
    /// <param name="entry">One of <see cref="Entries"/>.</param>
    /// <param name="first">The first element.</param>
    public void ReadBytes(Span<byte> destination, PyTorchEntry entry, long first)
    {
        int size = entry.ElementBytes;
        if (entry.IsContiguous)
        {
            _file.Bytes(entry.Offset + (first * size), destination.Length).CopyTo(destination);
            return;
        }

        for (; !destination.IsEmpty; destination = destination[size..])
        {
            long place = 0;
            long rest = first++;
            for (int i = entry.Shape.Count - 1; i >= 0; i--)
            {
                (rest, long index) = Math.DivRem(rest, entry.Shape[i]);
                place += index * entry.Strides[i];
            }

            _file.Bytes(entry.Offset + (place * size), size).CopyTo(destination);
        }
    }

    /// <inheritdoc/>
    public void DropPages() => _file.DropPages();

    /// <inheritdoc/>
    public void Dispose() => _file.Dispose();

    private static bool StartsAsZip(MappedFile file) => StartsWith(file, "PK"u8);

    private static bool StartsAsPickle(MappedFile file) => StartsWith(file, [0x80, 0x02]);

    private static bool StartsWith(MappedFile file, ReadOnlySpan<byte> magic) =>
        file.Length >= magic.Length && file.Bytes(0, magic.Length).SequenceEqual(magic);

    private static List<PyTorchEntry> ReadEntries(MappedFile file)
    {
        Dictionary<string, (long Offset, long ByteCount)> files = ZipDirectory.Read(file);
        string[] pickles = [.. files.Keys.Where(static name => name.EndsWith(PickleName, StringComparison.Ordinal))];
        if (pickles is not [string pickle])
        {
            throw new UserErrorException($"{file.Path}: is a zip archive with {pickles.Length} files data.pkl, where torch.save writes one");
        }

        string folder = pickle[..^PickleName.Length];
        if (files.TryGetValue($"{folder}/byteorder", out var order) && (order.ByteCount != 6 || !file.Bytes(order.Offset, 6).SequenceEqual("little"u8)))
        {
            throw new UserErrorException($"{file.Path}: its numbers are not little-endian, which is not supported");
        }

        if (files[pickle].ByteCount > MaximumPickleBytes)
        {
            throw new UserErrorException($"{file.Path}: {pickle} has {files[pickle].ByteCount} bytes, {MaximumPickleBytes} are read at most");
        }

        object? value = TorchPickle.Read(file.Bytes(files[pickle].Offset, (int)files[pickle].ByteCount), file.Path);
        var entries = new List<PyTorchEntry>();
        var names = new HashSet<string>(StringComparer.Ordinal);
        foreach ((object? key, object? item) in State(file.Path, value).Pairs)
        {
            if (key is not string name || item is not PickledTensor tensor)
            {
                throw new UserErrorException($"{file.Path}: '{key}' in its dictionary of tensors is none");
            }

            entries.Add(names.Add(name) ? Place(file, files, folder, name, tensor) : throw new UserErrorException($"{file.Path}: has the tensor '{name}' twice"));
        }

        return entries;
    }

    private static PickledDictionary State(string path, object? value)
    {
        if (value is not PickledDictionary root)
        {
            throw new UserErrorException($"{path}: holds no dictionary of tensors");
        }

        return root.Pairs.Any(static pair => pair.Value is PickledTensor) ? root
            : root.Pairs.FirstOrDefault(static pair => pair.Key is string key && s_stateKeys.Contains(key)).Value as PickledDictionary
            ?? throw new UserErrorException($"{path}: its dictionary has no tensors, and none under '{string.Join("', '", s_stateKeys)}'");
    }

    private static PyTorchEntry Place(
        MappedFile file, Dictionary<string, (long Offset, long ByteCount)> files, string folder, string name, PickledTensor tensor)
    {
        PickledStorage storage = tensor.Storage;
        int size = PyTorchEntry.SizeOf(storage.Type);
        if (!files.TryGetValue($"{folder}/data/{storage.Key}", out var data) || data.ByteCount / size != storage.Count || data.ByteCount % size != 0)
        {
            throw new UserErrorException($"{file.Path}: the storage of '{name}' is missing or not of {storage.Count} elements: cut off or damaged");
        }

        // Neither may overflow: what counts is whether both stay below the size of the storage.
        Int128 count = 1;
        Int128 last = tensor.Offset;
        bool isSound = tensor.Offset >= 0 && tensor.Shape.Length <= MaximumRank && tensor.Shape.Length == tensor.Strides.Length;
        for (int i = 0; isSound && i < tensor.Shape.Length; i++)
        {
            count *= tensor.Shape[i];
            last += (Int128)(tensor.Shape[i] - 1) * tensor.Strides[i];
            isSound = tensor.Shape[i] > 0 && tensor.Strides[i] >= 0 && count <= storage.Count && last < storage.Count;
        }

        return isSound && last < storage.Count
            ? new PyTorchEntry(name, storage.Type, tensor.Shape, tensor.Strides, data.Offset + (tensor.Offset * size))
            : throw new UserErrorException($"{file.Path}: tensor '{name}' does not lie in its storage of {storage.Count} elements: damaged");
    }
}
