using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Model;

namespace TinyLlama.Checkpoints;

/// <summary>A Llama in a GGUF file or in the parts of one, with its tokenizer.</summary>
internal sealed class GgufModel : ModelSource
{
    private readonly GgufParts _parts;
    private readonly Dictionary<string, GgufPlace> _places;

    private GgufModel(GgufParts parts, ModelConfig config, Dictionary<string, GgufPlace> places)
        : base(parts.First.Path, config) => (_parts, _places) = (parts, places);

    /// <inheritdoc/>
    public override string? TokenizerPath => null;

    /// <inheritdoc/>
    public override string TokenizerAdvice => "export it again with one (--tokenizer)";

    /// <inheritdoc/>
    public override DType StoredType => _places[ModelTensors.Embedding].Entry.Type is var type && type.IsQuantized() ? DType.F32 : type;

    /// <inheritdoc/>
    public override bool AddsBos => GgufTokenizer.AddsBos(_parts.First);

    /// <inheritdoc/>
    public override string? ChatTemplate => _parts.First.Value<string?>("tokenizer.chat_template", absent: null);

    /// <summary>Opens a file and checks that it holds the tensors of its metadata, and no others.</summary>
    /// <exception cref="UserErrorException">Something is missing, damaged, unexpected or not supported.</exception>
    public static GgufModel OpenFile(string path)
    {
        GgufParts parts = GgufParts.Open(path);
        try
        {
            Dictionary<string, GgufPlace> stored = parts.Tensors();
            ModelConfig config = ReadConfig(parts.First, stored);
            return new GgufModel(parts, config, Match(path, config, stored));
        }
        catch
        {
            parts.Dispose();
            throw;
        }
    }

    /// <inheritdoc/>
    public override BpeTokenizer? LoadTokenizer() => GgufTokenizer.Read(_parts.First);

    /// <inheritdoc/>
    public override void Read(Span<float> destination, string name, long first)
    {
        GgufPlace place = _places[name];
        long columns = place.Entry.Shape[^1];
        bool interleaved = ModelTensors.IsInterleaved(name);
        while (!destination.IsEmpty)
        {
            (long row, long column) = Math.DivRem(first, columns);
            int count = (int)Math.Min(columns - column, destination.Length);
            long storedRow = interleaved ? ModelTensors.InterleavedRow(row, Config.HeadDim) : row;
            ReadRange(place, (storedRow * columns) + column, destination[..count]);
            destination = destination[count..];
            first += count;
        }
    }

    /// <inheritdoc/>
    public override DType StorageOf(string name) => _places[name].Entry.Type;

    /// <inheritdoc/>
    public override void ReadRows(Span<byte> destination, ModelTensor tensor, int firstRow)
    {
        if (!ModelTensors.IsInterleaved(tensor.Name))
        {
            base.ReadRows(destination, tensor, firstRow);
            return;
        }

        GgufPlace place = _places[tensor.Name];
        int rowBytes = checked((int)place.Entry.Type.RowBytes(tensor.Columns));
        for (int row = firstRow; !destination.IsEmpty; row++)
        {
            place.Bytes(ModelTensors.InterleavedRow(row, Config.HeadDim) * rowBytes, rowBytes).CopyTo(destination);
            destination = destination[rowBytes..];
        }
    }

    /// <inheritdoc/>
    internal override ReadOnlySpan<byte> MappedRows(ModelTensor tensor, int firstRow, int count)
    {
        GgufPlace place = _places[tensor.Name];
        long rowBytes = place.Entry.Type.RowBytes(tensor.Columns);
        return ModelTensors.IsInterleaved(tensor.Name) ? default : place.Bytes(firstRow * rowBytes, checked((int)(count * rowBytes)));
    }

    /// <inheritdoc/>
    internal override StoredRows MappedTensor(string name)
    {
        (GgufFile file, GgufEntry entry) = _places[name];
        return new StoredRows(file.Address(entry), checked((int)entry.Shape[0]), ModelTensors.IsInterleaved(name) ? Config.HeadDim : 0);
    }

    /// <inheritdoc/>
    internal override void DropPages() => _parts.DropPages();

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (disposing)
        {
            _parts.Dispose();
        }
    }

    private static ModelConfig ReadConfig(GgufFile file, Dictionary<string, GgufPlace> stored)
    {
        string architecture = file.Value<string>("general.architecture");
        if (architecture != "llama")
        {
            throw new UserErrorException($"{file.Path}: is a model of the architecture '{architecture}'; only 'llama' is supported");
        }

        if (!stored.TryGetValue("token_embd.weight", out GgufPlace embedding))
        {
            throw new UserErrorException($"{file.Path}: has no tensor 'token_embd.weight'");
        }

        int heads = Count(file, "llama.attention.head_count");
        var config = new ModelConfig
        {
            VocabularySize = (int)Math.Min(embedding.Entry.Shape[0], int.MaxValue),
            ContextLength = Count(file, "llama.context_length"),
            Layers = Count(file, "llama.block_count"),
            Heads = heads,
            KeyValueHeads = file.Has("llama.attention.head_count_kv") ? Count(file, "llama.attention.head_count_kv") : heads,
            Channels = Count(file, "llama.embedding_length"),
            Hidden = Count(file, "llama.feed_forward_length"),
            NormEpsilon = (float)file.Value<double>("llama.attention.layer_norm_rms_epsilon"),
            RopeTheta = (float)file.Value("llama.rope.freq_base", 10_000.0),
            RopeFactor = RopeFactor(file),
            TiedEmbeddings = !stored.ContainsKey("output.weight"),
        };
        if (config.Problems().FirstOrDefault() is { } problem)
        {
            throw new UserErrorException($"{file.Path}: {problem}");
        }

        foreach (string key in (string[])["llama.rope.dimension_count", "llama.attention.key_length", "llama.attention.value_length"])
        {
            if (file.Value(key, (long)config.HeadDim) is var width && width != config.HeadDim)
            {
                throw new UserErrorException($"{file.Path}: '{key}' is {width}; only the width of a head, {config.HeadDim}, is supported");
            }
        }

        return file.Value("llama.expert_count", 0L) == 0
            ? config with { RopeScaling = ReadScaling(file.Path, config, stored) }
            : throw new UserErrorException($"{file.Path}: is a mixture of experts, which is not supported");
    }

    private static int Count(GgufFile file, string key) => (int)Math.Clamp(file.Value<long>(key), 0, int.MaxValue);

    private static float RopeFactor(GgufFile file)
    {
        const string TypeKey = "llama.rope.scaling.type";
        string type = file.Value(TypeKey, "none");
        return type switch
        {
            "none" => (float)file.Value("llama.rope.scale_linear", 1.0),
            "linear" => (float)file.Value<double>("llama.rope.scaling.factor"),
            _ => throw new UserErrorException($"{file.Path}: '{TypeKey}' is '{type}'; only 'none' and 'linear' are supported"),
        };
    }

    private static RopeScaling? ReadScaling(string path, ModelConfig config, Dictionary<string, GgufPlace> stored)
    {
        if (!stored.Remove(GgufNames.RopeDivisors, out GgufPlace place))
        {
            return null;
        }

        SafetensorsFile.RequireShape(path, GgufNames.RopeDivisors, place.Entry.Shape, 1, config.HeadDim / 2);
        float[] divisors = new float[config.HeadDim / 2];
        ReadRange(place, 0, divisors);
        return divisors.AsSpan().IndexOfAnyExcept(1) < 0 ? null
            : RopeScaling.Fit(divisors, config.RopeTheta)
                ?? throw new UserErrorException($"{path}: scales its rotary embedding (tensor '{GgufNames.RopeDivisors}') in another way than Llama 3, which is not supported");
    }

    // The stored tensors by the names that they have here.
    private static Dictionary<string, GgufPlace> Match(string path, ModelConfig config, Dictionary<string, GgufPlace> stored)
    {
        var places = new Dictionary<string, GgufPlace>(StringComparer.Ordinal);
        foreach (ModelTensor tensor in ModelTensors.Of(config))
        {
            string name = GgufNames.Of(tensor.Name);
            if (!stored.Remove(name, out GgufPlace place))
            {
                throw new UserErrorException($"{path}: has no tensor '{name}'");
            }

            SafetensorsFile.RequireShape(place.File.Path, name, place.Entry.Shape, tensor.Rows, tensor.Columns);
            places.Add(tensor.Name, place);
        }

        return stored.Keys.Order(StringComparer.Ordinal).FirstOrDefault() is { } unknown
            ? throw new UserErrorException($"{path}: tensor '{unknown}' is unknown; a Llama of this metadata has no such tensor")
            : places;
    }

    private static void ReadRange(GgufPlace place, long first, Span<float> destination)
    {
        DType type = place.Entry.Type;
        if (!type.IsQuantized())
        {
            ElementCodec.Decode(place.Bytes(first * type.ByteCount(), destination.Length * type.ByteCount()), type, destination);
            return;
        }

        Span<float> values = stackalloc float[QuantizedBlocks.MaximumElements];
        while (!destination.IsEmpty)
        {
            (long block, long skipped) = Math.DivRem(first, type.BlockElements());
            int count = (int)Math.Min(type.BlockElements() - skipped, destination.Length);
            QuantizedBlocks.Decode(type, place.Bytes(block * type.BlockBytes(), type.BlockBytes()), values);
            values.Slice((int)skipped, count).CopyTo(destination);
            destination = destination[count..];
            first += count;
        }
    }
}
