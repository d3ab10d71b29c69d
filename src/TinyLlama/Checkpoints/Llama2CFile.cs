using System.Runtime.InteropServices;
using TinyLlama.Compute;
using TinyLlama.Compute.Native;
using TinyLlama.Data;
using TinyLlama.Model;

namespace TinyLlama.Checkpoints;

/// <summary>
/// A model of llama2.c, version 0 of its format: seven int32 (channels, hidden, layers, heads, key/value heads, vocabulary,
/// context length; a negative vocabulary means that a head of its own follows), then fp32 tensors without names.
/// </summary>
/// <remarks>
/// llama2.c rotates the pairs (2i, 2i + 1) of a head, we rotate (i, i + D/2): the rows of q and k, head by head, come in
/// that order here, which leaves every product of a query and a key as it was.
/// </remarks>
internal sealed class Llama2CFile : ModelSource
{
    /// <summary>Cosines and sines of the rotary embedding, (T, D/2) each, follow this tensor.</summary>
    public const string BeforeTables = ModelTensors.Norm;

    private const int HeaderBytes = 7 * sizeof(int);

    // "ak42": the versions 1 and 2 begin with it, where version 0 has the channels.
    private const int LaterVersions = 0x616B3432;

    private static readonly string[] s_inLayers =
    [
        "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj",
    ];

    private readonly MappedFile _file;
    private readonly Dictionary<string, long> _offsets;

    private Llama2CFile(MappedFile file, ModelConfig config, Dictionary<string, long> offsets)
        : base(file.Path, config) => (_file, _offsets) = (file, offsets);

    /// <inheritdoc/>
    public override string? TokenizerPath
    {
        get
        {
            string folder = System.IO.Path.GetDirectoryName(Path) ?? "";
            string[] names = ["tokenizer.bin", $"tok{Config.VocabularySize}.bin"];
            return names.Select(name => System.IO.Path.Combine(folder, name)).FirstOrDefault(File.Exists);
        }
    }

    /// <inheritdoc/>
    public override string TokenizerAdvice => "put its tokenizer.bin beside the weights";

    /// <inheritdoc/>
    public override DType StoredType => DType.F32;

    /// <summary>Opens a file and checks that its size is the one that its header implies.</summary>
    /// <exception cref="UserErrorException">It cannot be read, or is none of llama2.c's version 0.</exception>
    public static Llama2CFile OpenFile(string path)
    {
        MappedFile? file = null;
        try
        {
            file = MappedFile.Open(path);
            ModelConfig config = ReadHeader(file);
            (Dictionary<string, long> offsets, long end) = Arrange(config);
            if (file.Length != end)
            {
                throw new UserErrorException(
                    $"{path}: {file.Length} bytes, its header implies {end}: cut off, damaged, or not a file of llama2.c's version 0");
            }

            return new Llama2CFile(file, config, offsets);
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

    /// <summary>The tensors in the order of the file.</summary>
    public static IEnumerable<ModelTensor> Order(ModelConfig config)
    {
        Dictionary<string, ModelTensor> tensors = ModelTensors.Of(config).ToDictionary(static tensor => tensor.Name, StringComparer.Ordinal);
        IEnumerable<string> inLayers = s_inLayers.SelectMany(name => Enumerable.Range(0, config.Layers).Select(layer => ModelTensors.InLayer(layer, name)));
        string[] head = config.TiedEmbeddings ? [] : [ModelTensors.Head];
        string[] names = [ModelTensors.Embedding, .. inLayers, ModelTensors.Norm, .. head];
        return names.Select(name => tensors[name]);
    }

    /// <inheritdoc/>
    public override void Read(Span<float> destination, string name, long first)
    {
        long offset = _offsets[name];
        if (!ModelTensors.IsInterleaved(name))
        {
            Singles(offset, first, destination.Length).CopyTo(destination);
            return;
        }

        while (!destination.IsEmpty)
        {
            (long row, long column) = Math.DivRem(first, Config.Channels);
            int count = (int)Math.Min(Config.Channels - column, destination.Length);
            Singles(offset, (ModelTensors.InterleavedRow(row, Config.HeadDim) * Config.Channels) + column, count).CopyTo(destination);
            destination = destination[count..];
            first += count;
        }
    }

    /// <inheritdoc/>
    internal override void DropPages() => _file.DropPages();

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (disposing)
        {
            _file.Dispose();
        }
    }

    private static ModelConfig ReadHeader(MappedFile file)
    {
        if (file.Length < HeaderBytes)
        {
            throw new UserErrorException($"{file.Path}: {file.Length} bytes are too few for a file of llama2.c");
        }

        ReadOnlySpan<int> header = MemoryMarshal.Cast<byte, int>(file.Bytes(0, HeaderBytes));
        if (header[0] == LaterVersions)
        {
            throw new UserErrorException(
                $"{file.Path}: version {header[1]} of llama2.c's format is not supported; export it with --version 0");
        }

        var config = new ModelConfig
        {
            Channels = header[0],
            Hidden = header[1],
            Layers = header[2],
            Heads = header[3],
            KeyValueHeads = header[4],
            VocabularySize = header[5] == int.MinValue ? 0 : Math.Abs(header[5]),
            ContextLength = header[6],
            NormEpsilon = 1e-5f,
            RopeTheta = 10_000,
            TiedEmbeddings = header[5] > 0,
        };
        return config.Problems().FirstOrDefault() is { } problem
            ? throw new UserErrorException($"{file.Path}: not a file of llama2.c: {problem}")
            : config;
    }

    private static (Dictionary<string, long> Offsets, long End) Arrange(ModelConfig config)
    {
        var offsets = new Dictionary<string, long>(StringComparer.Ordinal);
        long next = HeaderBytes;
        foreach (ModelTensor tensor in Order(config))
        {
            offsets.Add(tensor.Name, next);
            long tables = tensor.Name == BeforeTables ? (long)config.ContextLength * config.HeadDim : 0;
            next = checked(next + ((tensor.Count + tables) * sizeof(float)));
        }

        return (offsets, next);
    }

    private ReadOnlySpan<float> Singles(long offset, long first, int count) =>
        MemoryMarshal.Cast<byte, float>(_file.Bytes(offset + (first * sizeof(float)), checked(count * sizeof(float))));
}
