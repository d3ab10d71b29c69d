using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Model;

namespace TinyLlama.Checkpoints;

/// <summary>
/// A Llama as Hugging Face keeps it: <c>config.json</c> and safetensors, in one file or in several with an index. A
/// checkpoint is one too.
/// </summary>
internal sealed class HuggingFaceFolder : ModelSource
{
    private const string IndexName = "model.safetensors.index.json";
    private const int NamedFaults = 3;

    // What some programs store beside the parameters: computed from the config, never learned.
    private const string RotaryTable = ".self_attn.rotary_emb.inv_freq";

    private readonly Dictionary<string, SafetensorsFile> _fileOf;

    private HuggingFaceFolder(string path, ModelConfig config, Dictionary<string, SafetensorsFile> fileOf)
        : base(path, config) => _fileOf = fileOf;

    /// <inheritdoc/>
    public override string? TokenizerPath =>
        File.Exists(System.IO.Path.Combine(Path, "tokenizer.model")) || File.Exists(System.IO.Path.Combine(Path, "tokenizer.json"))
            ? Path
            : null;

    /// <inheritdoc/>
    public override DType StoredType =>
        _fileOf[ModelTensors.Embedding].Entry(ModelTensors.Embedding).ElementType is { } type and not DType.F64 ? type : DType.F32;

    /// <summary>Opens a folder and checks that it holds the tensors of its config, and no others.</summary>
    /// <exception cref="UserErrorException">Something is missing, damaged, unexpected or not supported.</exception>
    public static HuggingFaceFolder OpenFolder(string path)
    {
        string configPath = System.IO.Path.Combine(path, HuggingFaceConfig.FileName);
        if (!File.Exists(configPath))
        {
            throw new UserErrorException(
                $"{path}: has no {HuggingFaceConfig.FileName}; name a run, a checkpoint, a Hugging Face folder, a .gguf file or a .bin file of llama2.c");
        }

        ModelConfig config = HuggingFaceConfig.Read(configPath);
        Dictionary<string, SafetensorsFile> fileOf = OpenFiles(path);
        try
        {
            RequireTensors(path, config, fileOf);
            return new HuggingFaceFolder(path, config, fileOf);
        }
        catch
        {
            Close(fileOf);
            throw;
        }
    }

    /// <inheritdoc/>
    public override void Read(Span<float> destination, string name, long first) => _fileOf[name].Read(destination, name, first);

    /// <inheritdoc/>
    internal override void DropPages()
    {
        foreach (SafetensorsFile file in _fileOf.Values.Distinct())
        {
            file.DropPages();
        }
    }

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (disposing)
        {
            Close(_fileOf);
        }
    }

    private static Dictionary<string, SafetensorsFile> OpenFiles(string path)
    {
        string single = System.IO.Path.Combine(path, TrainingCheckpoint.ModelName);
        if (File.Exists(single))
        {
            SafetensorsFile file = SafetensorsFile.Open(single);
            return file.Entries.ToDictionary(static entry => entry.Name, _ => file, StringComparer.Ordinal);
        }

        string index = System.IO.Path.Combine(path, IndexName);
        if (File.Exists(index))
        {
            return OpenShards(path, JsonKeys.Read(index));
        }

        throw Directory.EnumerateFiles(path, "pytorch_model*.bin").Any()
            ? new UserErrorException(
                $"{path}: holds its weights in pytorch_model.bin, which is not supported; save the model as safetensors")
            : new UserErrorException($"{path}: has neither {TrainingCheckpoint.ModelName} nor {IndexName}");
    }

    private static Dictionary<string, SafetensorsFile> OpenShards(string path, JsonKeys index)
    {
        JsonKeys map = index.Object("weight_map") ?? throw index.Error("weight_map", "is missing");
        var shards = new Dictionary<string, SafetensorsFile>(StringComparer.Ordinal);
        var fileOf = new Dictionary<string, SafetensorsFile>(StringComparer.Ordinal);
        try
        {
            foreach (string tensor in map.Names)
            {
                string name = map.Text(tensor) ?? throw map.Error(tensor, "is null");
                if (!shards.TryGetValue(name, out SafetensorsFile? shard))
                {
                    // An index must not lead out of its folder.
                    if (!name.EndsWith(".safetensors", StringComparison.Ordinal) || name.IndexOfAny(['/', '\\', ':', '\0']) >= 0)
                    {
                        throw map.Error(tensor, $"is '{name}', not the name of a safetensors file in this folder");
                    }

                    shard = SafetensorsFile.Open(System.IO.Path.Combine(path, name));
                    shards.Add(name, shard);
                }

                if (!shard.Contains(tensor))
                {
                    throw map.Error(tensor, $"is to be in {name}, which has no such tensor");
                }

                fileOf.Add(tensor, shard);
            }

            return fileOf;
        }
        catch
        {
            Close(shards);
            throw;
        }
    }

    private static void RequireTensors(string path, ModelConfig config, Dictionary<string, SafetensorsFile> fileOf)
    {
        IReadOnlyList<ModelTensor> needed = ModelTensors.Of(config);
        string[] missing = [.. needed.Select(static tensor => tensor.Name).Where(name => !fileOf.ContainsKey(name))];
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
            [.. fileOf.Keys.Where(name => !known.Contains(name) && !name.EndsWith(RotaryTable, StringComparison.Ordinal))];
        if (unexpected.Length > 0)
        {
            throw new UserErrorException($"{path}: {Listed(unexpected)} unknown; a Llama of this {HuggingFaceConfig.FileName} has no such tensor");
        }

        foreach (ModelTensor tensor in needed)
        {
            SafetensorsEntry entry = fileOf[tensor.Name].Entry(tensor.Name);
            if (entry.ElementType is not { } type || !ElementCodec.IsFloatingPoint(type))
            {
                throw new UserErrorException($"{fileOf[tensor.Name].Path}: tensor '{tensor.Name}' is {entry.Type}, not F32, BF16, F16 or F64");
            }

            // Tables padded to a round number of rows are common: the rows beyond the vocabulary have no token.
            bool padded = tensor.Name is ModelTensors.Embedding or ModelTensors.Head
                && entry.Shape.Count == 2 && entry.Shape[0] > tensor.Rows;
            IReadOnlyList<long> shape = padded ? [tensor.Rows, entry.Shape[1]] : entry.Shape;
            SafetensorsFile.RequireShape(fileOf[tensor.Name].Path, tensor.Name, shape, tensor.Rows, tensor.Columns);
        }
    }

    private static string Listed(string[] names)
    {
        string shown = string.Join("', '", names.Order(StringComparer.Ordinal).Take(NamedFaults));
        string more = names.Length > NamedFaults ? $" and {names.Length - NamedFaults} more" : "";
        return names.Length == 1 ? $"tensor '{shown}' is" : $"tensors '{shown}'{more} are";
    }

    private static void Close(Dictionary<string, SafetensorsFile> files)
    {
        foreach (SafetensorsFile file in files.Values)
        {
            file.Dispose();
        }
    }
}
