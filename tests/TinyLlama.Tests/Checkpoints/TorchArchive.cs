using System.Globalization;
using System.IO.Compression;
using System.Text;
using TinyLlama.Compute;

namespace TinyLlama.Tests.Checkpoints;

/// <summary>Makes files as <c>torch.save</c> writes them, by the description of pickles in Python's <c>pickletools</c>.</summary>
internal sealed class TorchArchive
{
    private readonly List<(string Name, byte[] Bytes)> _files = [];
    private readonly List<byte> _pickle = [];
    private int _tensors;

    /// <summary>Gets a value indicating whether files are compressed, as torch.save never does.</summary>
    public bool Compresses { get; init; }

    /// <summary>Gets a value indicating whether the pickle is of protocol 5 and numbers its storages, as lit-gpt writes it.</summary>
    public bool IsOfLitGpt { get; init; }

    public static string StorageName(DType type) => type switch
    {
        DType.F32 => "FloatStorage",
        DType.F16 => "HalfStorage",
        DType.BF16 => "BFloat16Storage",
        _ => "DoubleStorage",
    };

    public static byte[] Encode(IEnumerable<float> values, DType type) => [.. values.SelectMany(value => type switch
    {
        DType.F32 => BitConverter.GetBytes(value),
        DType.F16 => BitConverter.GetBytes((Half)value),
        DType.BF16 => BitConverter.GetBytes((ushort)(BitConverter.SingleToUInt32Bits(value) >> 16)),
        _ => BitConverter.GetBytes((double)value),
    })];

    /// <summary>The same archive with sizes and places in 64 bits, as archives beyond 4 GiB have them.</summary>
    public static byte[] With64BitDirectory(byte[] archive)
    {
        int end = archive.Length - 22;
        int position = BitConverter.ToInt32(archive, end + 16);
        List<byte> result = [.. archive[..position]];
        byte[] start = BitConverter.GetBytes((long)position);
        byte[] unknown = [255, 255, 255, 255];
        while (position < end)
        {
            byte[] entry = archive[position..(position + 46 + BitConverter.ToUInt16(archive, position + 28))];
            byte[] size = BitConverter.GetBytes((long)BitConverter.ToUInt32(entry, 24));
            byte[] place = BitConverter.GetBytes((long)BitConverter.ToUInt32(entry, 42));
            position += entry.Length + BitConverter.ToUInt16(entry, 30) + BitConverter.ToUInt16(entry, 32);

            // An extension that is none of ours, then ours: the size, the size as stored, the place.
            result.AddRange([.. entry[..20], .. unknown, .. unknown, .. entry[28..30], 33, 0, 0, 0, .. entry[34..42], .. unknown, .. entry[46..]]);
            result.AddRange([7, 0, 1, 0, 9, 1, 0, 24, 0, .. size, .. size, .. place]);
        }

        byte[] end64 = BitConverter.GetBytes((long)result.Count);
        byte[] length = BitConverter.GetBytes(result.Count - BitConverter.ToInt64(start));
        result.AddRange([.. "PK"u8, 6, 6, 44, .. new byte[19], .. archive[(end + 8)..(end + 10)], .. new byte[6], .. archive[(end + 8)..(end + 10)], .. new byte[6], .. length, .. start]);
        result.AddRange([.. "PK"u8, 6, 7, 0, 0, 0, 0, .. end64, 1, 0, 0, 0]);
        result.AddRange([.. archive[end..(end + 12)], .. unknown, .. unknown, 0, 0]);
        return [.. result];
    }

    public TorchArchive File(string name, byte[] bytes)
    {
        _files.Add((name, bytes));
        return this;
    }

    public TorchArchive Emit(params ReadOnlySpan<byte> bytes)
    {
        _pickle.AddRange(bytes);
        return this;
    }

    public TorchArchive Text(string text)
    {
        byte[] bytes = Encoding.UTF8.GetBytes(text);
        return IsOfLitGpt
            ? Emit(0x8C, (byte)bytes.Length).Emit(bytes).Emit(0x94)
            : Emit((byte)'X').Emit(BitConverter.GetBytes(bytes.Length)).Emit(bytes);
    }

    public TorchArchive Number(long value) => value is >= 0 and < 256 ? Emit((byte)'K', (byte)value)
        : value is >= 0 and < 65536 ? Emit((byte)'M', (byte)value, (byte)(value >> 8))
        : value is >= int.MinValue and <= int.MaxValue ? Emit((byte)'J').Emit(BitConverter.GetBytes((int)value))
        : Emit(0x8A, 8).Emit(BitConverter.GetBytes(value));

    public TorchArchive Name(string module, string name) => IsOfLitGpt
        ? Text(module).Text(name).Emit(0x93)
        : Emit((byte)'c').Emit(Encoding.UTF8.GetBytes($"{module}\n{name}\n"));

    /// <summary>An empty dictionary, in which pairs are put between <see cref="Begin"/> and <see cref="End"/>.</summary>
    public TorchArchive Dictionary() => Name("collections", "OrderedDict").Emit(")R"u8);

    public TorchArchive Begin() => Emit((byte)'(');

    public TorchArchive End() => Emit((byte)'u');

    /// <summary>The attribute that state dicts of modules have.</summary>
    public TorchArchive Metadata() =>
        Emit((byte)'}').Text("_metadata").Dictionary().Begin().Text("").Emit((byte)'}').Text("version").Number(1).Emit("sus"u8).Emit((byte)'b');

    /// <summary>A tensor in a storage of its own, unless one is named.</summary>
    public TorchArchive Tensor(string type, byte[] data, int elementBytes, long[] shape, long[]? strides = null, long offset = 0, string? storage = null, long? count = null)
    {
        string key = storage ?? $"{_tensors++}";
        if (storage is null)
        {
            File($"data/{key}", data);
        }

        Name("torch._utils", "_rebuild_tensor_v2").Emit("(("u8).Text("storage").Name("torch", type);
        _ = IsOfLitGpt ? Number(long.Parse(key, CultureInfo.InvariantCulture)) : Text(key);
        Text("cpu").Number(count ?? (data.Length / elementBytes)).Emit("tQ"u8).Number(offset);
        Tuple(shape);
        Tuple(strides ?? [.. shape.Select((_, i) => shape[(i + 1)..].Aggregate(1L, (a, b) => a * b))]);
        return Emit(0x89).Dictionary().Emit("tR"u8);
    }

    public byte[] Bytes()
    {
        byte[] header = IsOfLitGpt ? [0x80, 5, 0x95, .. BitConverter.GetBytes(_pickle.Count + 1L)] : [0x80, 2];
        using var stream = new MemoryStream();
        using (var archive = new ZipArchive(stream, ZipArchiveMode.Create, leaveOpen: true))
        {
            foreach ((string name, byte[] bytes) in (IEnumerable<(string, byte[])>)[("data.pkl", [.. header, .. _pickle, (byte)'.']), .. _files])
            {
                using Stream entry = archive.CreateEntry($"archive/{name}", Compresses ? CompressionLevel.Fastest : CompressionLevel.NoCompression).Open();
                entry.Write(bytes);
            }
        }

        return stream.ToArray();
    }

    private void Tuple(long[] values)
    {
        Begin();
        foreach (long value in values)
        {
            Number(value);
        }

        Emit((byte)'t');
    }
}
