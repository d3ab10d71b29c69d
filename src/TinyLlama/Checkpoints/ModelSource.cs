using System.Buffers;
using System.Security.Cryptography;
using System.Text;
using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Model;

namespace TinyLlama.Checkpoints;

/// <summary>
/// A model in files, whatever their format: its shape is known and its tensors are all there, in the right shapes, once it
/// is open; nothing of their size has been allocated.
/// </summary>
public abstract class ModelSource : IDisposable
{
    // Bytes that are copied at once: they stay in a cache until they are packed.
    private const int PieceBytes = 1 << 20;
    private const int MappedPieceBytes = 1 << 26;

    private BpeTokenizer? _tokenizer;

    private protected ModelSource(string path, ModelConfig config)
    {
        (Path, Config) = (path, config);
        Tensors = ModelTensors.Of(config);
    }

    /// <summary>Gets the file or folder that holds the weights.</summary>
    public string Path { get; }

    /// <summary>Gets the shape.</summary>
    public ModelConfig Config { get; }

    /// <summary>Gets the tensors, in the order of <see cref="LlamaModel.Parameters"/>.</summary>
    public IReadOnlyList<ModelTensor> Tensors { get; }

    /// <summary>Gets the size of all tensors as they are stored, in bytes.</summary>
    public long WeightBytes => Tensors.Sum(tensor => tensor.Rows * StorageOf(tensor.Name).RowBytes(tensor.Columns));

    /// <summary>Gets the file or folder of the tokenizer that came beside the model, or null where none did.</summary>
    public abstract string? TokenizerPath { get; }

    /// <summary>Gets what to do where no tokenizer came with the model: the end of an error's sentence.</summary>
    public virtual string TokenizerAdvice => "put its tokenizer.model or tokenizer.json beside the weights";

    /// <summary>Gets what the weights are stored in; F32 also where the file has F64.</summary>
    public abstract DType StoredType { get; }

    /// <summary>
    /// Gets a value indicating whether a text begins with BOS: by <c>tokenizer_config.json</c>, else by the tokenizer; Llama's
    /// add it unless they say otherwise.
    /// </summary>
    public virtual bool AddsBos
    {
        get
        {
            string settings = System.IO.Path.Combine(TokenizerFolder, "tokenizer_config.json");
            bool byTokenizer = LoadTokenizer()?.Model.AddsBos ?? true;
            return File.Exists(settings) ? JsonKeys.Read(settings).Boolean("add_bos_token", absent: byTokenizer) : byTokenizer;
        }
    }

    /// <summary>
    /// Gets the Jinja template of the conversations that the model was taught, from <c>chat_template.jinja</c> or
    /// <c>tokenizer_config.json</c>, or null where the files have none.
    /// </summary>
    /// <exception cref="UserErrorException">A file is damaged.</exception>
    public virtual string? ChatTemplate
    {
        get
        {
            string file = System.IO.Path.Combine(TokenizerFolder, "chat_template.jinja");
            if (File.Exists(file))
            {
                return ReadText(file);
            }

            string settings = System.IO.Path.Combine(TokenizerFolder, "tokenizer_config.json");
            if (!File.Exists(settings))
            {
                return null;
            }

            const string Key = "chat_template";
            JsonKeys keys = JsonKeys.Read(settings);
            return keys.Objects(Key) is { } named
                ? named.FirstOrDefault(template => template.Text("name") == "default")?.Text("template")
                : keys.Text(Key);
        }
    }

    private string TokenizerFolder => Directory.Exists(TokenizerPath)
        ? TokenizerPath
        : System.IO.Path.GetDirectoryName(System.IO.Path.GetFullPath(TokenizerPath ?? Path))!;

    /// <summary>Opens a model.</summary>
    /// <param name="path">
    /// A run (its newest checkpoint counts), a checkpoint, a Hugging Face folder, a <c>.gguf</c> file, a PyTorch file with
    /// <c>config.json</c> beside it, or a <c>.bin</c> file of llama2.c.
    /// </param>
    /// <param name="warn">Is told, in one line, which newer checkpoint of a run is damaged.</param>
    /// <exception cref="UserErrorException">Nothing of that kind is there, or it is damaged or of another kind of model.</exception>
    public static ModelSource Open(string path, Action<string> warn)
    {
        if (File.Exists(path))
        {
            return System.IO.Path.GetExtension(path) switch
            {
                ".pt" or ".pth" => HuggingFaceFolder.OpenTorchFile(path),
                ".bin" => PyTorchFile.IsOne(path) ? HuggingFaceFolder.OpenTorchFile(path) : Llama2CFile.OpenFile(path),
                ".gguf" => GgufModel.OpenFile(path),
                _ => throw new UserErrorException($"{path}: {WhyNoModel(path)}"),
            };
        }

        if (!Directory.Exists(path))
        {
            throw new UserErrorException($"{path}: not found; name a run, a checkpoint, a Hugging Face folder, a .gguf file or a .bin file of llama2.c");
        }

        if (Directory.Exists(System.IO.Path.Combine(path, TrainingCheckpoint.FolderName)))
        {
            TrainingCheckpoint newest = TrainingCheckpoint.FindNewest(path, warn)
                ?? throw new UserErrorException($"{path}: this run has no checkpoint yet, or none that is whole");
            return HuggingFaceFolder.OpenFolder(newest.Path);
        }

        string weights = System.IO.Path.Combine(path, Llama2CExport.ModelName);
        return File.Exists(weights) && !File.Exists(System.IO.Path.Combine(path, HuggingFaceConfig.FileName))
            ? Llama2CFile.OpenFile(weights)
            : HuggingFaceFolder.OpenFolder(path);
    }

    /// <summary>Opens a model and adds a LoRA adapter to its weights.</summary>
    /// <param name="path">The model.</param>
    /// <param name="adapter">A folder in which PEFT saved the adapter.</param>
    /// <param name="warn">As of <see cref="Open(string, Action{string})"/>.</param>
    /// <exception cref="UserErrorException">The model or the adapter cannot be read, they do not belong together, or the weights are quantized.</exception>
    public static ModelSource Open(string path, string adapter, Action<string> warn)
    {
        ModelSource model = Open(path, warn);
        try
        {
            return AdaptedModel.Open(model, adapter);
        }
        catch
        {
            model.Dispose();
            throw;
        }
    }

    /// <summary>Reads the tokenizer that came with the model; null where none did.</summary>
    /// <exception cref="UserErrorException">It is damaged or of a kind that is not supported.</exception>
    public virtual BpeTokenizer? LoadTokenizer() => _tokenizer ??= TokenizerPath is { } path ? Tokenizer.Load(path) : null;

    /// <summary>Copies every tensor to the parameters of a model of the same shape, converting to their types.</summary>
    /// <param name="backend">The device of the parameters.</param>
    /// <param name="parameters">Those of <see cref="LlamaModel.Parameters"/>. Packed forms are the caller's to refresh.</param>
    /// <exception cref="UserErrorException">The model has another shape; the message names the tensor and both shapes.</exception>
    public void CopyTo(Backend backend, IReadOnlyList<Parameter> parameters)
    {
        Require([.. parameters.Select(static parameter => new ModelTensor(parameter.Name, parameter.Rows, parameter.Columns))]);
        CopySomeTo(backend, parameters);
    }

    /// <summary>Refuses a model that has not exactly these tensors.</summary>
    /// <param name="needed">Those of the whole model that is to be filled.</param>
    /// <exception cref="UserErrorException">The model has another shape; the message names the tensor and both shapes.</exception>
    public void Require(IReadOnlyList<ModelTensor> needed)
    {
        Dictionary<string, ModelTensor> tensors = Tensors.ToDictionary(static tensor => tensor.Name, StringComparer.Ordinal);
        foreach (ModelTensor wanted in needed)
        {
            if (!tensors.TryGetValue(wanted.Name, out ModelTensor tensor))
            {
                throw new UserErrorException($"{Path}: has no tensor '{wanted.Name}', which the model needs");
            }

            if ((tensor.Rows, tensor.Columns) != (wanted.Rows, wanted.Columns))
            {
                throw new UserErrorException(
                    $"{Path}: tensor '{tensor.Name}' has the shape [{tensor.Rows}, {tensor.Columns}], "
                    + $"[{wanted.Rows}, {wanted.Columns}] is needed");
            }
        }

        if (needed.Count != tensors.Count)
        {
            string surplus = tensors.Keys.Except(needed.Select(static wanted => wanted.Name), StringComparer.Ordinal).First();
            throw new UserErrorException($"{Path}: has a tensor '{surplus}', for which the model has no place");
        }
    }

    /// <summary>Copies the tensors of some parameters, after <see cref="Require"/> of all.</summary>
    public void CopySomeTo(Backend backend, IReadOnlyList<Parameter> parameters)
    {
        foreach (Parameter parameter in parameters)
        {
            CopyValues(backend, parameter);
            CopyRows(backend, parameter);
            DropPages();
        }
    }

    /// <summary>Reads elements of a tensor as singles.</summary>
    /// <param name="destination">What is filled.</param>
    /// <param name="name">One of <see cref="Tensors"/>.</param>
    /// <param name="first">The first element, in row-major order.</param>
    public abstract void Read(Span<float> destination, string name, long first);

    /// <summary>What a tensor is stored in; F32 also where the file has F64.</summary>
    /// <param name="name">One of <see cref="Tensors"/>.</param>
    public virtual DType StorageOf(string name) => StoredType;

    /// <summary>What a tensor is stored in, and where its rows lie if the file is mapped: as long as this source is open.</summary>
    /// <param name="name">One of <see cref="Tensors"/>.</param>
    public FrozenStorage FrozenStorageOf(string name) => new(StorageOf(name), MappedTensor(name));

    /// <summary>Reads whole rows of a tensor as they are stored.</summary>
    /// <param name="destination">What is filled: bytes of the type that <see cref="StorageOf"/> says.</param>
    /// <param name="tensor">One of <see cref="Tensors"/>.</param>
    /// <param name="firstRow">The first row.</param>
    public virtual void ReadRows(Span<byte> destination, ModelTensor tensor, int firstRow)
    {
        DType type = StorageOf(tensor.Name);
        if (MappedRows(tensor, firstRow, checked((int)(destination.Length / type.RowBytes(tensor.Columns)))) is { IsEmpty: false } mapped)
        {
            mapped.CopyTo(destination);
            return;
        }

        float[] values = ArrayPool<float>.Shared.Rent(destination.Length / type.ByteCount());
        Span<float> used = values.AsSpan(0, destination.Length / type.ByteCount());
        Read(used, tensor.Name, (long)firstRow * tensor.Columns);
        ElementCodec.Encode(used, type, destination);
        ArrayPool<float>.Shared.Return(values);
    }

    /// <summary>SHA-256 of the shape and of all tensors as they are stored, in lower-case hexadecimal: tells models apart, whatever their files are called.</summary>
    public string Hash()
    {
        using var hash = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);
        hash.AppendData(Encoding.UTF8.GetBytes(Config.ToString()));
        foreach (ModelTensor tensor in Tensors)
        {
            hash.AppendData(Encoding.UTF8.GetBytes($"{tensor.Name} {StorageOf(tensor.Name)}"));
            ReadPieces(tensor, StorageOf(tensor.Name), (_, rows) => hash.AppendData(rows));
            DropPages();
        }

        return Convert.ToHexStringLower(hash.GetHashAndReset());
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        Dispose(disposing: true);
        GC.SuppressFinalize(this);
    }

    /// <summary>
    /// A view of whole rows where they lie in a mapped file one after another as <see cref="ReadRows"/> would give them;
    /// empty where they do not. Not to be used after the end of this source.
    /// </summary>
    /// <param name="tensor">One of <see cref="Tensors"/>.</param>
    /// <param name="firstRow">The first row.</param>
    /// <param name="count">The number of rows.</param>
    internal virtual ReadOnlySpan<byte> MappedRows(ModelTensor tensor, int firstRow, int count) => default;

    /// <summary>All rows of a tensor where a mapped file has them, in whatever order <see cref="StoredRows"/> can tell; none where it has not.</summary>
    /// <param name="name">One of <see cref="Tensors"/>.</param>
    internal virtual StoredRows MappedTensor(string name) => default;

    /// <summary>Drops what has been read of the files from memory.</summary>
    internal abstract void DropPages();

    /// <summary>Closes the files.</summary>
    protected abstract void Dispose(bool disposing);

    private void CopyValues(Backend backend, Parameter parameter)
    {
        Tensor values = parameter.Values;
        if (values.IsEmpty)
        {
            return;
        }

        var tensor = new ModelTensor(parameter.Name, parameter.Rows, parameter.Columns);
        if (values.Type == StorageOf(parameter.Name))
        {
            ReadPieces(tensor, values.Type, (row, rows) =>
                DeviceElements.WriteBytes(backend, values.RowRange(row, (int)(rows.Length / values.Type.RowBytes(values.Columns))), rows));
            return;
        }

        float[] piece = ArrayPool<float>.Shared.Rent(SafetensorsFile.PieceElements);
        for (long first = 0; first < values.Count;)
        {
            int count = (int)Math.Min(piece.Length, values.Count - first);
            Read(piece.AsSpan(0, count), parameter.Name, first);
            DeviceElements.Write(backend, values.Elements(first, count), piece.AsSpan(0, count));
            first += count;
        }

        ArrayPool<float>.Shared.Return(piece);
    }

    private void CopyRows(Backend backend, Parameter parameter)
    {
        if (parameter.Frozen.Weight is not { IsInPlace: false } weight)
        {
            return;
        }

        var tensor = new ModelTensor(parameter.Name, parameter.Rows, parameter.Columns);
        ReadPieces(tensor, weight.Type, (row, rows) => backend.WriteRows(weight, parameter.Frozen.First + row, rows));
    }

    // Whole rows, as many as are packed together or a multiple of that, in their order: where they are mapped, large pieces
    // without a copy, so that the threads of a device share the reading; else through a buffer.
    private void ReadPieces(ModelTensor tensor, DType type, Action<int, ReadOnlySpan<byte>> use)
    {
        int rowBytes = checked((int)type.RowBytes(tensor.Columns));
        int Whole(int bytes) => Math.Max(1, bytes / rowBytes / Backend.PackedRows) * Backend.PackedRows;
        byte[]? buffer = null;
        for (int row = 0; row < tensor.Rows;)
        {
            int count = Math.Min(Whole(MappedPieceBytes), tensor.Rows - row);
            ReadOnlySpan<byte> rows = MappedRows(tensor, row, count);
            if (rows.IsEmpty)
            {
                count = Math.Min(Whole(PieceBytes), tensor.Rows - row);
                buffer ??= ArrayPool<byte>.Shared.Rent(checked(count * rowBytes));
                Span<byte> read = buffer.AsSpan(0, count * rowBytes);
                ReadRows(read, tensor, row);
                rows = read;
            }

            use(row, rows);
            row += count;
        }

        if (buffer is not null)
        {
            ArrayPool<byte>.Shared.Return(buffer);
        }
    }

    private static string ReadText(string file)
    {
        try
        {
            return File.ReadAllText(file);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new UserErrorException($"{file}: cannot be read: {e.Message}", e);
        }
    }

    private static string WhyNoModel(string path) => System.IO.Path.GetExtension(path) switch
    {
        ".safetensors" => $"name its folder, where {HuggingFaceConfig.FileName} says what model it is",
        _ => "not a model; name a run, a checkpoint, a Hugging Face folder, a .gguf file or a .bin file of llama2.c",
    };
}
