using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Model;

namespace TinyLlama.Checkpoints;

/// <summary>A Llama in one GGUF file, with its tokenizer. Quantized tensors are read as singles.</summary>
internal sealed class GgufModel : ModelSource
{
    private readonly GgufFile _file;
    private readonly Dictionary<string, GgufEntry> _entries;

    private GgufModel(GgufFile file, ModelConfig config, Dictionary<string, GgufEntry> entries)
        : base(file.Path, config) => (_file, _entries) = (file, entries);

    /// <inheritdoc/>
    public override string? TokenizerPath => null;

    /// <inheritdoc/>
    public override DType StoredType => _entries[ModelTensors.Embedding].Type is var type && type.IsQuantized() ? DType.F32 : type;

    /// <inheritdoc/>
    public override bool AddsBos => _file.Value("tokenizer.ggml.add_bos_token", absent: true);

    /// <inheritdoc/>
    public override string? ChatTemplate => _file.Value<string?>("tokenizer.chat_template", absent: null);

    /// <summary>Opens a file and checks that it holds the tensors of its metadata, and no others.</summary>
    /// <exception cref="UserErrorException">Something is missing, damaged, unexpected or not supported.</exception>
    public static GgufModel OpenFile(string path)
    {
        GgufFile file = GgufFile.Open(path);
        try
        {
            Dictionary<string, GgufEntry> stored = file.Entries.ToDictionary(static entry => entry.Name, StringComparer.Ordinal);
            ModelConfig config = ReadConfig(file, stored);
            return new GgufModel(file, config, Match(file, config, stored));
        }
        catch
        {
            file.Dispose();
            throw;
        }
    }

    /// <inheritdoc/>
    public override BpeTokenizer? LoadTokenizer() => GgufTokenizer.Read(_file);

    /// <inheritdoc/>
    public override void Read(Span<float> destination, string name, long first)
    {
        GgufEntry entry = _entries[name];
        long columns = entry.Shape[^1];
        bool interleaved = GgufNames.IsInterleaved(name);
        while (!destination.IsEmpty)
        {
            (long row, long column) = Math.DivRem(first, columns);
            int count = (int)Math.Min(columns - column, destination.Length);
            long storedRow = interleaved ? ModelTensors.InterleavedRow(row, Config.HeadDim) : row;
            ReadRange(entry, (storedRow * columns) + column, destination[..count]);
            destination = destination[count..];
            first += count;
        }
    }

    /// <inheritdoc/>
    public override DType StorageOf(string name) => _entries[name].Type;

    /// <inheritdoc/>
    public override void ReadRows(Span<byte> destination, ModelTensor tensor, int firstRow)
    {
        GgufEntry entry = _entries[tensor.Name];
        int rowBytes = checked((int)entry.Type.RowBytes(tensor.Columns));
        if (!GgufNames.IsInterleaved(tensor.Name))
        {
            _file.Bytes(entry, (long)firstRow * rowBytes, destination.Length).CopyTo(destination);
            return;
        }

        for (int row = firstRow; !destination.IsEmpty; row++)
        {
            _file.Bytes(entry, ModelTensors.InterleavedRow(row, Config.HeadDim) * rowBytes, rowBytes).CopyTo(destination);
            destination = destination[rowBytes..];
        }
    }

    /// <inheritdoc/>
    protected override void DropPages() => _file.DropPages();

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (disposing)
        {
            _file.Dispose();
        }
    }

    private static ModelConfig ReadConfig(GgufFile file, Dictionary<string, GgufEntry> stored)
    {
        string architecture = file.Value<string>("general.architecture");
        if (architecture != "llama")
        {
            throw new UserErrorException($"{file.Path}: is a model of the architecture '{architecture}'; only 'llama' is supported");
        }

        if (file.Value("split.count", 1L) != 1)
        {
            throw new UserErrorException($"{file.Path}: is one of several files of a model, which is not supported; merge them with llama-gguf-split --merge");
        }

        if (!stored.TryGetValue("token_embd.weight", out GgufEntry? embedding))
        {
            throw new UserErrorException($"{file.Path}: has no tensor 'token_embd.weight'");
        }

        int heads = Count(file, "llama.attention.head_count");
        var config = new ModelConfig
        {
            VocabularySize = (int)Math.Min(embedding.Shape[0], int.MaxValue),
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
            ? config
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

    // The stored tensors by the names that they have here.
    private static Dictionary<string, GgufEntry> Match(GgufFile file, ModelConfig config, Dictionary<string, GgufEntry> stored)
    {
        var entries = new Dictionary<string, GgufEntry>(StringComparer.Ordinal);
        foreach (ModelTensor tensor in ModelTensors.Of(config))
        {
            string name = GgufNames.Of(tensor.Name);
            if (!stored.Remove(name, out GgufEntry? entry))
            {
                throw new UserErrorException($"{file.Path}: has no tensor '{name}'");
            }

            SafetensorsFile.RequireShape(file.Path, name, entry.Shape, tensor.Rows, tensor.Columns);
            entries.Add(tensor.Name, entry);
        }

        // Factors of single frequencies: what llama3 scaling is stored as.
        return stored.ContainsKey("rope_freqs.weight")
            ? throw new UserErrorException($"{file.Path}: scales its rotary embedding as Llama 3.1 (tensor 'rope_freqs.weight'), which is not supported")
            : stored.Keys.Order(StringComparer.Ordinal).FirstOrDefault() is { } unknown
            ? throw new UserErrorException($"{file.Path}: tensor '{unknown}' is unknown; a Llama of this metadata has no such tensor")
            : entries;
    }

    private void ReadRange(GgufEntry entry, long first, Span<float> destination)
    {
        DType type = entry.Type;
        if (!type.IsQuantized())
        {
            ElementCodec.Decode(_file.Bytes(entry, first * type.ByteCount(), destination.Length * type.ByteCount()), type, destination);
            return;
        }

        Span<float> values = stackalloc float[QuantizedBlocks.MaximumElements];
        while (!destination.IsEmpty)
        {
            (long block, long skipped) = Math.DivRem(first, type.BlockElements());
            int count = (int)Math.Min(type.BlockElements() - skipped, destination.Length);
            QuantizedBlocks.Decode(type, _file.Bytes(entry, block * type.BlockBytes(), type.BlockBytes()), values);
            values.Slice((int)skipped, count).CopyTo(destination);
            destination = destination[count..];
            first += count;
        }
    }
}
