using System.Buffers.Binary;
using System.Text.Json;

namespace TinyLlama.Tests.Common;

/// <summary>Reads the safetensors files of the goldens, any element type as doubles. For trusted files only.</summary>
internal sealed class GoldenFile
{
    private readonly byte[] _bytes;
    private readonly JsonElement _header;
    private readonly int _dataStart;

    private GoldenFile(byte[] bytes)
    {
        _bytes = bytes;
        int headerLength = checked((int)BinaryPrimitives.ReadInt64LittleEndian(bytes));
        _dataStart = 8 + headerLength;
        _header = JsonDocument.Parse(bytes.AsMemory(8, headerLength)).RootElement;
    }

    /// <summary>Gets the names of the tensors.</summary>
    public IEnumerable<string> Names => _header.EnumerateObject().Select(p => p.Name).Where(n => n != "__metadata__");

    /// <summary>Reads a file, such as one that <see cref="SharedFiles.Require"/> found.</summary>
    public static GoldenFile Open(string path) => new(File.ReadAllBytes(path));

    /// <summary>The elements of a tensor in row-major order, and its shape, which is empty for a scalar.</summary>
    public (double[] Values, int[] Shape) Read(string name)
    {
        JsonElement entry = _header.GetProperty(name);
        int[] shape = [.. entry.GetProperty("shape").EnumerateArray().Select(d => d.GetInt32())];
        int first = entry.GetProperty("data_offsets")[0].GetInt32();
        int end = entry.GetProperty("data_offsets")[1].GetInt32();
        ReadOnlySpan<byte> data = _bytes.AsSpan(_dataStart + first, end - first);
        string type = entry.GetProperty("dtype").GetString()!;
        int size = type switch { "F64" or "I64" => 8, "F32" => 4, "BF16" => 2, _ => throw new NotSupportedException(type) };
        double[] values = new double[shape.Aggregate(1, (product, d) => product * d)];
        Assert.Equal(values.Length * size, data.Length);
        for (int i = 0; i < values.Length; i++)
        {
            ReadOnlySpan<byte> element = data.Slice(i * size, size);
            values[i] = type switch
            {
                "F64" => BinaryPrimitives.ReadDoubleLittleEndian(element),
                "I64" => BinaryPrimitives.ReadInt64LittleEndian(element),
                "F32" => BinaryPrimitives.ReadSingleLittleEndian(element),
                _ => BitConverter.Int32BitsToSingle(BinaryPrimitives.ReadUInt16LittleEndian(element) << 16),
            };
        }

        return (values, shape);
    }

    /// <summary>As <see cref="Read"/>, in single precision.</summary>
    public float[] ReadSingles(string name) => Array.ConvertAll(Read(name).Values, v => (float)v);
}
