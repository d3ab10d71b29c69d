using System.Text;
using TinyLlama.Compute;

namespace TinyLlama.Checkpoints;

/// <summary>A tensor to be written to a GGUF file.</summary>
/// <param name="Name">Its name there.</param>
/// <param name="Shape">Its dimensions, the slowest first.</param>
/// <param name="Type">How its elements are stored.</param>
/// <param name="Write">Writes all its bytes.</param>
internal sealed record GgufTensor(string Name, IReadOnlyList<long> Shape, DType Type, Action<Stream> Write)
{
    /// <summary>Gets the size in bytes.</summary>
    public long ByteCount => Shape.SkipLast(1).Aggregate(Type.RowBytes(Shape[^1]), static (product, dimension) => checked(product * dimension));
}

/// <summary>Writes a GGUF file of version 3; see <see cref="GgufFile"/> for its parts.</summary>
internal sealed class GgufWriter
{
    private const uint Version = 3;
    private const int Alignment = 32;

    private static readonly byte[] s_zeros = new byte[Alignment];

    private readonly List<Action<BinaryWriter>> _metadata = [];

    /// <summary>Adds a text.</summary>
    public void Add(string key, string value) => Add(key, GgufValueType.String, writer => WriteText(writer, value));

    /// <summary>Adds a whole number, not negative.</summary>
    public void Add(string key, int value) => Add(key, GgufValueType.UInt32, writer => writer.Write(checked((uint)value)));

    /// <summary>Adds a real number.</summary>
    public void Add(string key, float value) => Add(key, GgufValueType.Float32, writer => writer.Write(value));

    /// <summary>Adds true or false.</summary>
    public void Add(string key, bool value) => Add(key, GgufValueType.Bool, writer => writer.Write(value));

    /// <summary>Adds an array of texts.</summary>
    public void Add(string key, IEnumerable<string> values) => AddArray(key, GgufValueType.String, [.. values], WriteText);

    /// <summary>Adds an array of reals.</summary>
    public void Add(string key, IEnumerable<float> values) =>
        AddArray(key, GgufValueType.Float32, [.. values], static (writer, value) => writer.Write(value));

    /// <summary>Adds an array of whole numbers.</summary>
    public void Add(string key, IEnumerable<int> values) =>
        AddArray(key, GgufValueType.Int32, [.. values], static (writer, value) => writer.Write(value));

    /// <summary>Writes the file: what was added, then the tensors, each where it begins aligned.</summary>
    /// <exception cref="IOException">The disk is full or gone.</exception>
    public void Write(Stream destination, IReadOnlyList<GgufTensor> tensors)
    {
        using var header = new MemoryStream();
        using var writer = new BinaryWriter(header);
        writer.Write("GGUF"u8);
        writer.Write(Version);
        writer.Write((long)tensors.Count);
        writer.Write((long)_metadata.Count);
        _metadata.ForEach(write => write(writer));
        long offset = 0;
        foreach (GgufTensor tensor in tensors)
        {
            WriteText(writer, tensor.Name);
            writer.Write(tensor.Shape.Count);
            foreach (long dimension in tensor.Shape.Reverse())
            {
                writer.Write(dimension);
            }

            writer.Write(GgufType.NumberOf(tensor.Type));
            writer.Write(offset);
            offset += tensor.ByteCount + Padding(tensor.ByteCount);
        }

        writer.Write(s_zeros.AsSpan(0, Padding(header.Length)));
        destination.Write(header.GetBuffer().AsSpan(0, (int)header.Length));
        foreach (GgufTensor tensor in tensors)
        {
            tensor.Write(destination);
            destination.Write(s_zeros.AsSpan(0, Padding(tensor.ByteCount)));
        }
    }

    private static int Padding(long length) => (int)((Alignment - (length % Alignment)) % Alignment);

    private static void WriteText(BinaryWriter writer, string text)
    {
        byte[] bytes = Encoding.UTF8.GetBytes(text);
        writer.Write((long)bytes.Length);
        writer.Write(bytes);
    }

    private void AddArray<T>(string key, GgufValueType type, T[] values, Action<BinaryWriter, T> write) => Add(key, GgufValueType.Array, writer =>
    {
        writer.Write((uint)type);
        writer.Write((long)values.Length);
        foreach (T value in values)
        {
            write(writer, value);
        }
    });

    private void Add(string key, GgufValueType type, Action<BinaryWriter> write) => _metadata.Add(writer =>
    {
        WriteText(writer, key);
        writer.Write((uint)type);
        write(writer);
    });
}
