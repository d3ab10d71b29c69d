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

    // The ends of the tensors' names, in the order of the file: of each kind those of all layers together.
    private static readonly string[] s_kinds =
    [
        ModelTensors.Embedding, ".input_layernorm.weight", ".q_proj.weight", ".k_proj.weight", ".v_proj.weight", ".o_proj.weight",
        ".post_attention_layernorm.weight", ".gate_proj.weight", ".down_proj.weight", ".up_proj.weight", ModelTensors.Norm, ModelTensors.Head,
    ];

    private readonly MappedFile _file;
    private readonly Dictionary<string, long> _offsets = new(StringComparer.Ordinal);

    private Llama2CFile(MappedFile file, ModelConfig config)
        : base(file.Path, config)
    {
        _file = file;
        long next = HeaderBytes;
        foreach (ModelTensor tensor in Order(Tensors))
        {
            _offsets.Add(tensor.Name, next);
            next += (tensor.Count + (tensor.Name == BeforeTables ? TableElements(config) : 0)) * sizeof(float);
        }
    }

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
            long end = HeaderBytes + ((config.ParameterCount + TableElements(config)) * sizeof(float));
            if (file.Length != end)
            {
                throw new UserErrorException(
                    $"{path}: {file.Length} bytes, its header implies {end}: cut off, damaged, or not a file of llama2.c's version 0");
            }

            return new Llama2CFile(file, config);
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

    /// <summary>The tensors of a model in the order of the file.</summary>
    /// <param name="tensors">As <see cref="ModelSource.Tensors"/> has them: the order of layers is kept.</param>
    public static IEnumerable<ModelTensor> Order(IEnumerable<ModelTensor> tensors) => tensors.OrderBy(static tensor => KindOf(tensor.Name));

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

    private static long TableElements(ModelConfig config) => (long)config.ContextLength * config.HeadDim;

    private static int KindOf(string name)
    {
        int kind = 0;
        while (!name.EndsWith(s_kinds[kind], StringComparison.Ordinal))
        {
            kind++;
        }

        return kind;
    }

    private ReadOnlySpan<float> Singles(long offset, long first, int count) =>
        MemoryMarshal.Cast<byte, float>(_file.Bytes(offset + (first * sizeof(float)), checked(count * sizeof(float))));
}
