using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Model;

namespace TinyLlama.Checkpoints;

/// <summary>
/// A Llama as Hugging Face keeps it: <c>config.json</c>, and safetensors or PyTorch files, one or several with an index. A
/// checkpoint is one too.
/// </summary>
internal sealed class HuggingFaceFolder : ModelSource
{
    private const string TorchName = "pytorch_model.bin";
    private const string IndexSuffix = ".index.json";
    private const int NamedFaults = 3;

    // What some programs store beside the parameters: computed from the config, never learned.
    private const string RotaryTable = ".self_attn.rotary_emb.inv_freq";

    private readonly Dictionary<string, Place> _places;

    private HuggingFaceFolder(string path, ModelConfig config, Dictionary<string, Place> places)
        : base(path, config) => _places = places;

    /// <inheritdoc/>
    public override string? TokenizerPath =>
        File.Exists(System.IO.Path.Combine(Path, "tokenizer.model")) || File.Exists(System.IO.Path.Combine(Path, "tokenizer.json"))
            ? Path
            : null;

    /// <inheritdoc/>
    public override DType StoredType => StorageOf(ModelTensors.Embedding);

    /// <summary>Opens a folder and checks that it holds the tensors of its config, and no others.</summary>
    /// <exception cref="UserErrorException">Something is missing, damaged, unexpected or not supported.</exception>
    public static HuggingFaceFolder OpenFolder(string path) => Open(path, FindFiles);

    /// <summary>Opens a PyTorch file with the config beside it.</summary>
    /// <exception cref="UserErrorException">As of <see cref="OpenFolder"/>.</exception>
    public static HuggingFaceFolder OpenTorchFile(string path)
    {
        string folder = System.IO.Path.GetDirectoryName(System.IO.Path.GetFullPath(path))!;
        return File.Exists(System.IO.Path.Combine(folder, HuggingFaceConfig.FileName))
            ? Open(folder, _ => Places(PyTorchFile.Open(path)))
            : throw new UserErrorException($"{path}: needs {HuggingFaceConfig.FileName} beside it, which says what model it is");
    }

    /// <inheritdoc/>
    public override DType StorageOf(string name) => _places[name].Entry.ElementType is { } type and not DType.F64 ? type : DType.F32;

    /// <inheritdoc/>
    public override void Read(Span<float> destination, string name, long first) => _places[name].File.Read(destination, name, first);

    /// <inheritdoc/>
    internal override ReadOnlySpan<byte> MappedRows(ModelTensor tensor, int firstRow, int count)
    {
        (ITensorFile file, TensorEntry entry) = _places[tensor.Name];
        DType type = StorageOf(tensor.Name);
        long rowBytes = type.RowBytes(tensor.Columns);
        return entry.ElementType == type ? file.MappedBytes(tensor.Name, firstRow * rowBytes, checked((int)(count * rowBytes))) : default;
    }

    /// <inheritdoc/>
    internal override StoredRows MappedTensor(string name)
    {
        (ITensorFile file, TensorEntry entry) = _places[name];
        return entry.ElementType == StorageOf(name) && file.MappedAddress(name) is var address and not 0
            ? new StoredRows(address, checked((int)entry.Shape[0]))
            : default;
    }

    /// <inheritdoc/>
    internal override void DropPages()
    {
        foreach (ITensorFile file in Files(_places))
        {
            file.DropPages();
        }
    }

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (disposing)
        {
            Close(_places);
        }
    }

    private static HuggingFaceFolder Open(string path, Func<string, Dictionary<string, Place>> open)
    {
        string configPath = System.IO.Path.Combine(path, HuggingFaceConfig.FileName);
        if (!File.Exists(configPath))
        {
            throw new UserErrorException(
                $"{path}: has no {HuggingFaceConfig.FileName}; name a run, a checkpoint, a Hugging Face folder, a .gguf file or a .bin file of llama2.c");
        }

        ModelConfig config = HuggingFaceConfig.Read(configPath);
        Dictionary<string, Place> places = open(path);
        try
        {
            RequireTensors(path, config, places);
            return new HuggingFaceFolder(path, config, places);
        }
        catch
        {
            Close(places);
            throw;
        }
    }

    private static Dictionary<string, Place> FindFiles(string path)
    {
        (string Name, Func<string, ITensorFile> Open)[] kinds = [(TrainingCheckpoint.ModelName, SafetensorsFile.Open), (TorchName, PyTorchFile.Open)];
        foreach ((string name, Func<string, ITensorFile> open) in kinds)
        {
            string file = System.IO.Path.Combine(path, name);
            if (File.Exists(file))
            {
                return Places(open(file));
            }

            if (File.Exists(file + IndexSuffix))
            {
                return OpenShards(path, JsonKeys.Read(file + IndexSuffix), System.IO.Path.GetExtension(name), open);
            }
        }

        throw new UserErrorException(
            $"{path}: has neither {string.Join(" nor ", kinds.Select(static kind => $"{kind.Name} nor {kind.Name}{IndexSuffix}"))}");
    }

    private static Dictionary<string, Place> Places(ITensorFile file) =>
        file.Entries.ToDictionary(static entry => entry.Name, entry => new Place(file, entry), StringComparer.Ordinal);

    private static Dictionary<string, Place> OpenShards(string path, JsonKeys index, string extension, Func<string, ITensorFile> open)
    {
        JsonKeys map = index.Object("weight_map") ?? throw index.Error("weight_map", "is missing");
        var shards = new Dictionary<string, Dictionary<string, Place>>(StringComparer.Ordinal);
        var places = new Dictionary<string, Place>(StringComparer.Ordinal);
        try
        {
            foreach (string tensor in map.Names)
            {
                string name = map.Text(tensor) ?? throw map.Error(tensor, "is null");
                if (!shards.TryGetValue(name, out Dictionary<string, Place>? shard))
                {
                    // An index must not lead out of its folder.
                    if (!name.EndsWith(extension, StringComparison.Ordinal) || name.IndexOfAny(['/', '\\', ':', '\0']) >= 0)
                    {
                        throw map.Error(tensor, $"is '{name}', not the name of a {extension} file in this folder");
                    }

                    shard = Places(open(System.IO.Path.Combine(path, name)));
                    shards.Add(name, shard);
                }

                places.Add(tensor, shard.TryGetValue(tensor, out Place place)
                    ? place
                    : throw map.Error(tensor, $"is to be in {name}, which has no such tensor"));
            }

            return places;
        }
        catch
        {
            foreach (Dictionary<string, Place> shard in shards.Values)
            {
                Close(shard);
            }

            throw;
        }
    }

    private static void RequireTensors(string path, ModelConfig config, Dictionary<string, Place> places)
    {
        IReadOnlyList<ModelTensor> needed = ModelTensors.Of(config);
        string[] missing = [.. needed.Select(static tensor => tensor.Name).Where(name => !places.ContainsKey(name))];
        if (missing.Length > 0)
        {
            string hint = missing is [ModelTensors.Head]
                ? $"; if the head is the embedding table, {HuggingFaceConfig.FileName} must say tie_word_embeddings: true"
                : "";
            throw new UserErrorException($"{path}: {Listed(missing)} missing{hint}");
        }

        HashSet<string> known = [.. needed.Select(static tensor => tensor.Name)];
        if (config.TiedEmbeddings)
        {
            // Some programs write the tied table under both names.
            known.Add(ModelTensors.Head);
        }

        string[] unexpected =
            [.. places.Keys.Where(name => !known.Contains(name) && !name.EndsWith(RotaryTable, StringComparison.Ordinal))];
        if (unexpected.Length > 0)
        {
            throw new UserErrorException($"{path}: {Listed(unexpected)} unknown; a Llama of this {HuggingFaceConfig.FileName} has no such tensor");
        }

        foreach (ModelTensor tensor in needed)
        {
            (ITensorFile file, TensorEntry entry) = places[tensor.Name];
            if (entry.ElementType is not { } type || !ElementCodec.IsFloatingPoint(type))
            {
                throw new UserErrorException($"{file.Path}: tensor '{tensor.Name}' is {entry.Type}, not F32, BF16, F16 or F64");
            }

            // Tables padded to a round number of rows are common: the rows beyond the vocabulary have no token.
            bool padded = tensor.Name is ModelTensors.Embedding or ModelTensors.Head
                && entry.Shape.Count == 2 && entry.Shape[0] > tensor.Rows;
            IReadOnlyList<long> shape = padded ? [tensor.Rows, entry.Shape[1]] : entry.Shape;
            SafetensorsFile.RequireShape(file.Path, tensor.Name, shape, tensor.Rows, tensor.Columns);
        }
    }

    private static string Listed(string[] names)
    {
        string shown = string.Join("', '", names.Order(StringComparer.Ordinal).Take(NamedFaults));
        string more = names.Length > NamedFaults ? $" and {names.Length - NamedFaults} more" : "";
        return names.Length == 1 ? $"tensor '{shown}' is" : $"tensors '{shown}'{more} are";
    }

    private static IEnumerable<ITensorFile> Files(Dictionary<string, Place> places) => places.Values.Select(static place => place.File).Distinct();

    private static void Close(Dictionary<string, Place> places)
    {
        foreach (ITensorFile file in Files(places))
        {
            file.Dispose();
        }
    }

    private readonly record struct Place(ITensorFile File, TensorEntry Entry);
}
