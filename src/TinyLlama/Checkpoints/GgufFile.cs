using System.Buffers.Binary;
using System.Collections.Frozen;
using System.Numerics;
using System.Text;
using TinyLlama.Compute;
using TinyLlama.Compute.Native;
using TinyLlama.Data;

namespace TinyLlama.Checkpoints;

/// <summary>One tensor of a GGUF file.</summary>
/// <param name="Name">Its name.</param>
/// <param name="Type">How it stores its elements.</param>
/// <param name="Shape">Its dimensions, the slowest first (the file has them the other way round).</param>
/// <param name="Offset">First byte, counted from the beginning of the file.</param>
/// <param name="ByteCount">Size in bytes.</param>
internal sealed record GgufEntry(string Name, DType Type, IReadOnlyList<long> Shape, long Offset, long ByteCount);

/// <summary>
/// A GGUF file of version 2 or 3, mapped into memory: a magic, a version and two counts, then metadata (key, type, value),
/// then for each tensor its name, dimensions, type and offset, then the data, each tensor aligned; all little endian.
/// </summary>
/// <remarks>
/// Everything the header claims is checked at opening, before anything is allocated by it: what is counted fits the rest of
/// the file, the tensors lie inside it, are aligned and share no bytes.
/// </remarks>
internal sealed class GgufFile : IDisposable
{
    private const int HeaderBytes = 24;
    private const int DefaultAlignment = 32;
    private const int MaximumAlignment = 1 << 16;
    private const int MaximumNameBytes = 1 << 10;
    private const int MaximumRank = 4;

    // The least that a key with its value, and a tensor's description, take.
    private const int LeastPairBytes = 8 + 4 + 1;
    private const int LeastTensorBytes = 8 + 4 + 8 + 4 + 8;

    private static readonly UTF8Encoding s_strictUtf8 = new(false, throwOnInvalidBytes: true);

    private readonly MappedFile _file;
    private readonly FrozenDictionary<string, object> _metadata;

    private GgufFile(MappedFile file, Dictionary<string, object> metadata, List<GgufEntry> entries)
    {
        (_file, Entries) = (file, entries);
        _metadata = metadata.ToFrozenDictionary(StringComparer.Ordinal);
    }

    /// <summary>Gets the path the file was opened by.</summary>
    public string Path => _file.Path;

    /// <summary>Gets the tensors, in the order of their data.</summary>
    public IReadOnlyList<GgufEntry> Entries { get; }

    /// <summary>Maps a file and checks its header.</summary>
    /// <exception cref="UserErrorException">The file cannot be read or is not a sound GGUF file of a supported kind.</exception>
    public static GgufFile Open(string path)
    {
        MappedFile? file = null;
        try
        {
            file = MappedFile.Open(path);
            var reader = new Reader(file);
            (ulong tensors, ulong pairs) = ReadHeader(ref reader);
            Dictionary<string, object> metadata = ReadMetadata(ref reader, pairs);
            return new GgufFile(file, metadata, ReadEntries(ref reader, tensors, Alignment(path, metadata)));
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

    /// <summary>Whether there is metadata of that key.</summary>
    public bool Has(string key) => _metadata.ContainsKey(key);

    /// <summary>The value of a key, or what stands for its absence; integers are <see cref="long"/>, reals <see cref="double"/>.</summary>
    /// <typeparam name="T">Long, double, bool, string, or an array of one of them.</typeparam>
    /// <exception cref="UserErrorException">The value is of another type.</exception>
    public T Value<T>(string key, T absent) => !_metadata.TryGetValue(key, out object? value) ? absent
        : value is T typed ? typed
        : throw new UserErrorException($"{Path}: '{key}' is of another type than it has in every Llama's GGUF file");

    /// <summary>The value of a key.</summary>
    /// <typeparam name="T">As in <see cref="Value{T}(string, T)"/>.</typeparam>
    /// <exception cref="UserErrorException">It is missing or of another type.</exception>
    public T Value<T>(string key)
        where T : notnull =>
        Has(key) ? Value<T>(key, default!) : throw new UserErrorException($"{Path}: the metadata has no '{key}'");

    /// <summary>Bytes of a tensor, as a view of the mapped file: not to be used after <see cref="Dispose"/>.</summary>
    /// <param name="entry">A tensor of this file.</param>
    /// <param name="first">First byte, counted from the beginning of the tensor.</param>
    /// <param name="count">Number of bytes.</param>
    public ReadOnlySpan<byte> Bytes(GgufEntry entry, long first, int count)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThan(first, entry.ByteCount - count);
        return _file.Bytes(entry.Offset + first, count);
    }

    /// <summary>Where a tensor lies in memory, until <see cref="Dispose"/>.</summary>
    public nint Address(GgufEntry entry) => _file.Address(entry.Offset, entry.ByteCount);

    /// <summary>Drops what has been read from memory; it can be read again.</summary>
    public void DropPages() => _file.DropPages();

    /// <inheritdoc/>
    public void Dispose() => _file.Dispose();

    private static (ulong Tensors, ulong Pairs) ReadHeader(ref Reader reader)
    {
        if (reader.Left < HeaderBytes || !reader.Take(4).SequenceEqual("GGUF"u8))
        {
            throw reader.Error("not a GGUF file");
        }

        uint version = reader.UInt32();
        if (version is not (2 or 3))
        {
            throw BinaryPrimitives.ReverseEndianness(version) is 2 or 3
                ? reader.Error("is a big-endian GGUF file, which is not supported; convert it to little-endian")
                : reader.Error($"is of version {version} of GGUF; only 2 and 3 are supported");
        }

        return (reader.UInt64(), reader.UInt64());
    }

    private static Dictionary<string, object> ReadMetadata(ref Reader reader, ulong count)
    {
        reader.RequireRoom(count, LeastPairBytes, "metadata keys");
        var metadata = new Dictionary<string, object>(StringComparer.Ordinal);
        for (ulong i = 0; i < count; i++)
        {
            string key = reader.Text(MaximumNameBytes);
            if (!metadata.TryAdd(key, ReadValue(ref reader, (GgufValueType)reader.UInt32(), key)))
            {
                throw reader.Error($"the metadata has '{key}' twice");
            }
        }

        return metadata;
    }

    private static object ReadValue(ref Reader reader, GgufValueType type, string key) => type switch
    {
        GgufValueType.Float32 or GgufValueType.Float64 => reader.Real(type),
        GgufValueType.Bool => reader.Bool(),
        GgufValueType.String => reader.Text(int.MaxValue),
        GgufValueType.Array => ReadArray(ref reader, key),
        _ => reader.Integer(type, key),
    };

    private static object ReadArray(ref Reader reader, string key)
    {
        var type = (GgufValueType)reader.UInt32();
        ulong count = reader.UInt64();
        if (type == GgufValueType.Array)
        {
            throw reader.Error($"'{key}' is an array of arrays, which is not supported");
        }

        reader.RequireRoom(count, Reader.LeastBytes(type), $"elements of '{key}'");
        switch (type)
        {
            case GgufValueType.String:
                string[] texts = new string[count];
                for (int i = 0; i < texts.Length; i++)
                {
                    texts[i] = reader.Text(int.MaxValue);
                }

                return texts;
            case GgufValueType.Float32 or GgufValueType.Float64:
                double[] reals = new double[count];
                for (int i = 0; i < reals.Length; i++)
                {
                    reals[i] = reader.Real(type);
                }

                return reals;
            case GgufValueType.Bool:
                bool[] flags = new bool[count];
                for (int i = 0; i < flags.Length; i++)
                {
                    flags[i] = reader.Bool();
                }

                return flags;
            default:
                long[] integers = new long[count];
                for (int i = 0; i < integers.Length; i++)
                {
                    integers[i] = reader.Integer(type, key);
                }

                return integers;
        }
    }

    private static int Alignment(string path, Dictionary<string, object> metadata) =>
        metadata.GetValueOrDefault("general.alignment", (long)DefaultAlignment) is long alignment
        && alignment is >= 8 and <= MaximumAlignment && BitOperations.IsPow2(alignment)
            ? (int)alignment
            : throw new UserErrorException($"{path}: 'general.alignment' is not a power of two from 8 to {MaximumAlignment}");

    private static List<GgufEntry> ReadEntries(ref Reader reader, ulong count, int alignment)
    {
        reader.RequireRoom(count, LeastTensorBytes, "tensors");
        var names = new HashSet<string>(StringComparer.Ordinal);
        var entries = new List<GgufEntry>();
        for (ulong i = 0; i < count; i++)
        {
            GgufEntry entry = ReadEntry(ref reader, alignment);
            entries.Add(names.Add(entry.Name) ? entry : throw reader.Error($"has the tensor '{entry.Name}' twice"));
        }

        // Offsets count from the first aligned byte behind the descriptions.
        long firstData = (reader.Position + alignment - 1) / alignment * alignment;
        long next = firstData;
        entries.Sort(static (a, b) => a.Offset.CompareTo(b.Offset));
        for (int i = 0; i < entries.Count; i++)
        {
            GgufEntry entry = entries[i];
            if (entry.Offset > reader.Length - firstData || entry.ByteCount > reader.Length - firstData - entry.Offset)
            {
                throw reader.Error($"tensor '{entry.Name}' of {entry.ByteCount} bytes goes beyond the end of the file: cut off or damaged");
            }

            entries[i] = entry with { Offset = firstData + entry.Offset };
            if (entries[i].Offset < next)
            {
                throw reader.Error($"tensor '{entry.Name}' shares bytes with another");
            }

            next = entries[i].Offset + entry.ByteCount;
        }

        return entries;
    }

    private static GgufEntry ReadEntry(ref Reader reader, int alignment)
    {
        string name = reader.Text(MaximumNameBytes);
        uint rank = reader.UInt32();
        if (rank is 0 or > MaximumRank)
        {
            throw reader.Error($"tensor '{name}' has {rank} dimensions, from 1 to {MaximumRank} are possible");
        }

        long[] shape = new long[rank];
        Int128 elements = 1;
        for (int i = shape.Length - 1; i >= 0; i--)
        {
            ulong dimension = reader.UInt64();
            elements *= dimension;
            if (dimension == 0 || elements > long.MaxValue)
            {
                throw reader.Error($"tensor '{name}' has a dimension of {dimension}: damaged");
            }

            shape[i] = (long)dimension;
        }

        uint number = reader.UInt32();
        DType type = GgufType.Find(number) ?? throw reader.Error(
            $"tensor '{name}' is of type {GgufType.NameOf(number)}, which is not supported; F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K and Q6_K are");
        Int128 bytes = elements / type.BlockElements() * type.BlockBytes();
        ulong offset = reader.UInt64();
        return shape[^1] % type.BlockElements() != 0
            ? throw reader.Error($"tensor '{name}' has rows of {shape[^1]} elements, {type} needs a multiple of {type.BlockElements()}")
            : offset % (ulong)alignment != 0
            ? throw reader.Error($"tensor '{name}' at offset {offset} is not aligned to {alignment}: damaged")
            : bytes > reader.Length || offset > long.MaxValue
            ? throw reader.Error($"tensor '{name}' of {bytes} bytes goes beyond the end of the file: cut off or damaged")
            : new GgufEntry(name, type, shape, (long)offset, (long)bytes);
    }

    /// <summary>Goes through the header; whatever it hands out lies inside the file.</summary>
    private ref struct Reader(MappedFile file)
    {
        public long Position { get; private set; }

        public readonly long Length => file.Length;

        public readonly long Left => file.Length - Position;

        public static int LeastBytes(GgufValueType type) => type switch
        {
            GgufValueType.UInt8 or GgufValueType.Int8 or GgufValueType.Bool => 1,
            GgufValueType.UInt16 or GgufValueType.Int16 => 2,
            GgufValueType.UInt32 or GgufValueType.Int32 or GgufValueType.Float32 => 4,
            _ => 8,
        };

        public readonly UserErrorException Error(string what) => new($"{file.Path}: {what}");

        public readonly void RequireRoom(ulong count, int leastBytes, string what)
        {
            if (count > (ulong)(Left / leastBytes) || count > (ulong)Array.MaxLength)
            {
                throw Error($"claims {count} {what}, for which {Left} bytes are left: cut off or damaged");
            }
        }

        public ReadOnlySpan<byte> Take(int count)
        {
            if (count > Left)
            {
                throw Error($"ends inside its header, at byte {file.Length}: cut off or damaged");
            }

            ReadOnlySpan<byte> bytes = file.Bytes(Position, count);
            Position += count;
            return bytes;
        }

        public uint UInt32() => BinaryPrimitives.ReadUInt32LittleEndian(Take(4));

        public ulong UInt64() => BinaryPrimitives.ReadUInt64LittleEndian(Take(8));

        public bool Bool() => Take(1)[0] != 0;

        public double Real(GgufValueType type) => type == GgufValueType.Float32
            ? BinaryPrimitives.ReadSingleLittleEndian(Take(4))
            : BinaryPrimitives.ReadDoubleLittleEndian(Take(8));

        public long Integer(GgufValueType type, string key)
        {
            switch (type)
            {
                case GgufValueType.UInt8:
                    return Take(1)[0];
                case GgufValueType.Int8:
                    return (sbyte)Take(1)[0];
                case GgufValueType.UInt16:
                    return BinaryPrimitives.ReadUInt16LittleEndian(Take(2));
                case GgufValueType.Int16:
                    return BinaryPrimitives.ReadInt16LittleEndian(Take(2));
                case GgufValueType.UInt32:
                    return UInt32();
                case GgufValueType.Int32:
                    return (int)UInt32();
                case GgufValueType.UInt64:
                    ulong value = UInt64();
                    return value <= long.MaxValue ? (long)value : throw Error($"'{key}' is {value}, which is too large");
                case GgufValueType.Int64:
                    return (long)UInt64();
                default:
                    throw Error($"'{key}' is of the unknown type {(uint)type}: damaged");
            }
        }

        public string Text(int mostBytes)
        {
            ulong length = UInt64();
            if (length > (ulong)Math.Min(Left, mostBytes))
            {
                throw Error($"has a text of {length} bytes before byte {Position}: cut off or damaged");
            }

            try
            {
                return s_strictUtf8.GetString(Take((int)length));
            }
            catch (DecoderFallbackException e)
            {
                throw new UserErrorException($"{file.Path}: the text that ends at byte {Position} is not UTF-8: damaged", e);
            }
        }
    }
}
