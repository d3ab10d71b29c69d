using System.Buffers;
using System.Buffers.Binary;
using System.Text.Encodings.Web;
using System.Text.Json;
using TinyLlama.Compute;

namespace TinyLlama.Checkpoints;

/// <summary>
/// Writes safetensors: an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then
/// the raw bytes. Hugging Face names are our names, so a checkpoint <em>is</em> an export.
/// </summary>
public static class Safetensors
{
    /// <summary>Writes tensors of a device, piece by piece: never a copy of one.</summary>
    /// <param name="destination">Where the bytes go.</param>
    /// <param name="backend">The device of the tensors; null for host memory.</param>
    /// <param name="tensors">Contiguous tensors, each name once.</param>
    /// <param name="metadata">Texts under <c>__metadata__</c>; null for none.</param>
    /// <param name="storeAs">The floating-point type in the file; null for each tensor's own.</param>
    /// <exception cref="IOException">The disk is full or gone.</exception>
    public static void Write(
        Stream destination,
        Backend? backend,
        IReadOnlyList<NamedTensor> tensors,
        IReadOnlyDictionary<string, string>? metadata = null,
        DType? storeAs = null)
    {
        var stored = new StoredTensor[tensors.Count];
        for (int t = 0; t < stored.Length; t++)
        {
            Tensor data = tensors[t].Data;
            bool converts = storeAs is not null && ElementCodec.IsFloatingPoint(data.Type);
            DType type = converts ? storeAs!.Value : data.Type;
            int[] shape = tensors[t].IsVector ? [data.Columns] : [data.Rows, data.Columns];
            stored[t] = new StoredTensor(tensors[t].Name, shape, type, (first, bytes) => ReadPiece(bytes, type, backend, data, first));
        }

        Write(destination, stored, metadata);
    }

    /// <summary>Writes a file of tensors of a device; see the other overload.</summary>
    /// <exception cref="IOException">The disk is full or gone.</exception>
    public static void Write(
        string path,
        Backend backend,
        IReadOnlyList<NamedTensor> tensors,
        IReadOnlyDictionary<string, string>? metadata = null,
        DType? storeAs = null)
    {
        using var stream = new FileStream(path, FileMode.Create, FileAccess.Write, FileShare.None, bufferSize: 0);
        Write(stream, backend, tensors, metadata, storeAs);
    }

    /// <summary>Writes tensors from anywhere.</summary>
    internal static void Write(
        Stream destination, IReadOnlyList<StoredTensor> tensors, IReadOnlyDictionary<string, string>? metadata)
    {
        // Wide types first, so that every element is aligned in a mapped file whose tensors follow without gaps.
        StoredTensor[] ordered = [.. tensors.OrderByDescending(static tensor => tensor.Type.ByteCount())];
        destination.Write(Header(ordered, metadata));
        byte[] piece = new byte[SafetensorsFile.PieceElements * sizeof(double)];
        foreach (StoredTensor tensor in ordered)
        {
            int size = tensor.Type.ByteCount();
            for (long first = 0; first < tensor.Count;)
            {
                int count = (int)Math.Min(SafetensorsFile.PieceElements, tensor.Count - first);
                Span<byte> bytes = piece.AsSpan(0, count * size);
                tensor.Read(first, bytes);
                destination.Write(bytes);
                first += count;
            }
        }
    }

    private static byte[] Header(StoredTensor[] tensors, IReadOnlyDictionary<string, string>? metadata)
    {
        var buffer = new ArrayBufferWriter<byte>();
        BinaryPrimitives.WriteInt64LittleEndian(buffer.GetSpan(sizeof(long)), 0);
        buffer.Advance(sizeof(long));
        using (var json = new Utf8JsonWriter(buffer, new JsonWriterOptions { Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping }))
        {
            json.WriteStartObject();
            if (metadata is not null)
            {
                json.WriteStartObject("__metadata__");
                foreach ((string key, string text) in metadata.OrderBy(static pair => pair.Key, StringComparer.Ordinal))
                {
                    json.WriteString(key, text);
                }

                json.WriteEndObject();
            }

            var names = new HashSet<string>(StringComparer.Ordinal);
            long offset = 0;
            foreach (StoredTensor tensor in tensors)
            {
                if (!names.Add(tensor.Name))
                {
                    throw new ArgumentException($"tensor '{tensor.Name}' is given twice", nameof(tensors));
                }

                json.WriteStartObject(tensor.Name);
                json.WriteString("dtype", tensor.Type.ToString());
                json.WriteStartArray("shape");
                foreach (int dimension in tensor.Shape)
                {
                    json.WriteNumberValue(dimension);
                }

                json.WriteEndArray();
                json.WriteStartArray("data_offsets");
                json.WriteNumberValue(offset);
                offset = checked(offset + (tensor.Count * tensor.Type.ByteCount()));
                json.WriteNumberValue(offset);
                json.WriteEndArray();
                json.WriteEndObject();
            }

            json.WriteEndObject();
        }

        // Spaces, so that the data begins at a multiple of the widest element.
        while (buffer.WrittenCount % sizeof(long) != 0)
        {
            buffer.Write(" "u8);
        }

        byte[] header = buffer.WrittenSpan.ToArray();
        BinaryPrimitives.WriteInt64LittleEndian(header, header.Length - sizeof(long));
        return header;
    }

    private static void ReadPiece(Span<byte> destination, DType type, Backend? backend, Tensor source, long first)
    {
        int count = destination.Length / type.ByteCount();
        Tensor piece = source.Elements(first, count);
        if (type == source.Type)
        {
            DeviceElements.ReadBytes(destination, backend, piece);
            return;
        }

        float[] singles = ArrayPool<float>.Shared.Rent(count);
        DeviceElements.Read(singles.AsSpan(0, count), backend, piece);
        ElementCodec.Encode(singles.AsSpan(0, count), type, destination);
        ArrayPool<float>.Shared.Return(singles);
    }
}

/// <summary>A tensor to be written: what the header says of it, and where its bytes come from.</summary>
/// <param name="Name">Its name.</param>
/// <param name="Shape">One or two dimensions.</param>
/// <param name="Type">The type in the file.</param>
/// <param name="Read">Fills a span with little-endian elements, beginning with the element of the given index.</param>
internal sealed record StoredTensor(string Name, int[] Shape, DType Type, ReadElements Read)
{
    /// <summary>Gets the number of elements.</summary>
    public long Count => Shape.Aggregate(1L, static (product, dimension) => product * dimension);
}

/// <summary>Fills <paramref name="destination"/> with the elements from <paramref name="first"/> on.</summary>
internal delegate void ReadElements(long first, Span<byte> destination);
