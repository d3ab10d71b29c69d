using System.Buffers;
using System.Numerics;
using System.Runtime.InteropServices;
using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Checkpoints;

/// <summary>
/// A model with a LoRA adapter added to its weights as they are read: W + s · B · A, where A is (R, I), B is (O, R), R is the
/// LoRA rank and s is α / R, or α / √R where the adapter says so.
/// </summary>
/// <remarks>
/// Hu et al. 2021; Kalajdzievski 2023 for the root. The folder is one of PEFT: <c>adapter_config.json</c> and
/// <c>adapter_model.safetensors</c>. Sums are formed in fp32; the result has the type of the model's weight.
/// </remarks>
internal sealed class AdaptedModel : ModelSource
{
    private const string ConfigName = "adapter_config.json";
    private const string WeightsName = "adapter_model.safetensors";
    private const string Prefix = "base_model.model.";
    private const string SuffixA = ".lora_A.weight";
    private const string SuffixB = ".lora_B.weight";
    private const int MaximumRank = 1 << 12;

    private readonly ModelSource _model;
    private readonly Dictionary<string, Factors> _factors;
    private readonly float _scale;
    private readonly int _rank;

    private AdaptedModel(ModelSource model, Dictionary<string, Factors> factors, float scale, int rank)
        : base(model.Path, model.Config) => (_model, _factors, _scale, _rank) = (model, factors, scale, rank);

    /// <inheritdoc/>
    public override string? TokenizerPath => _model.TokenizerPath;

    /// <inheritdoc/>
    public override DType StoredType => _model.StoredType;

    /// <inheritdoc/>
    public override bool AddsBos => _model.AddsBos;

    /// <inheritdoc/>
    public override string? ChatTemplate => _model.ChatTemplate;

    /// <summary>Reads an adapter and checks that it is one of this model.</summary>
    /// <param name="model">The model; disposed of with the result.</param>
    /// <param name="folder">The adapter's folder.</param>
    /// <exception cref="UserErrorException">Something is missing, damaged, of another model or not supported, or the weights are quantized.</exception>
    public static AdaptedModel Open(ModelSource model, string folder)
    {
        string configPath = System.IO.Path.Combine(folder, ConfigName);
        if (!File.Exists(configPath))
        {
            throw new UserErrorException($"{folder}: has no {ConfigName}; name a folder in which PEFT saved a LoRA adapter");
        }

        (float scale, int rank) = ReadConfig(JsonKeys.Read(configPath));
        string weights = System.IO.Path.Combine(folder, WeightsName);
        if (!File.Exists(weights))
        {
            throw new UserErrorException($"{folder}: has no {WeightsName}; save the adapter as safetensors");
        }

        using SafetensorsFile file = SafetensorsFile.Open(weights);
        return new AdaptedModel(model, ReadFactors(file, model, rank), scale, rank);
    }

    /// <inheritdoc/>
    public override BpeTokenizer? LoadTokenizer() => _model.LoadTokenizer();

    /// <inheritdoc/>
    public override DType StorageOf(string name) => _model.StorageOf(name);

    /// <inheritdoc/>
    public override void ReadRows(Span<byte> destination, ModelTensor tensor, int firstRow)
    {
        if (_factors.ContainsKey(tensor.Name))
        {
            base.ReadRows(destination, tensor, firstRow);
        }
        else
        {
            _model.ReadRows(destination, tensor, firstRow);
        }
    }

    /// <inheritdoc/>
    public override void Read(Span<float> destination, string name, long first)
    {
        _model.Read(destination, name, first);
        if (!_factors.TryGetValue(name, out Factors factors))
        {
            return;
        }

        int columns = factors.A.Length / _rank;
        float[] rented = ArrayPool<float>.Shared.Rent(columns);
        while (!destination.IsEmpty)
        {
            (long row, long column) = Math.DivRem(first, columns);
            int count = (int)Math.Min(columns - column, destination.Length);
            Span<float> product = rented.AsSpan(0, count);
            product.Clear();
            for (int r = 0; r < _rank; r++)
            {
                AddScaled(product, factors.A.AsSpan((r * columns) + (int)column, count), factors.B[(row * _rank) + r]);
            }

            AddScaled(destination, product, _scale);
            destination = destination[count..];
            first += count;
        }

        ArrayPool<float>.Shared.Return(rented);
    }

    /// <inheritdoc/>
    internal override void DropPages() => _model.DropPages();

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (disposing)
        {
            _model.Dispose();
        }
    }

    // sum += factor · source, as far as the source goes.
    private static void AddScaled(Span<float> sum, ReadOnlySpan<float> source, float factor)
    {
        Span<Vector<float>> sums = MemoryMarshal.Cast<float, Vector<float>>(sum[..source.Length]);
        ReadOnlySpan<Vector<float>> sources = MemoryMarshal.Cast<float, Vector<float>>(source);
        for (int i = 0; i < sums.Length; i++)
        {
            sums[i] += sources[i] * factor;
        }

        for (int i = sums.Length * Vector<float>.Count; i < source.Length; i++)
        {
            sum[i] += source[i] * factor;
        }
    }

    // What changes more than the weights' sums is refused by its key.
    private static (float Scale, int Rank) ReadConfig(JsonKeys keys)
    {
        if (keys.Text("peft_type") is var type && type != "LORA")
        {
            throw keys.Error("peft_type", $"is '{type}'; only 'LORA' is supported");
        }

        if (keys.Text("bias") is { } bias && bias != "none")
        {
            throw keys.Error("bias", $"is '{bias}'; only 'none' is supported");
        }

        foreach (string key in (string[])["use_dora", "fan_in_fan_out", "lora_bias"])
        {
            if (keys.Boolean(key, absent: false))
            {
                throw keys.Error(key, "is true; only false is supported");
            }
        }

        foreach (string key in (string[])["rank_pattern", "alpha_pattern"])
        {
            if (keys.Object(key) is { Names.Count: > 0 })
            {
                throw keys.Error(key, "is not empty; only one rank and one alpha for all weights are supported");
            }
        }

        if (keys.Texts("modules_to_save") is { Count: > 0 })
        {
            throw keys.Error("modules_to_save", "is not empty; only weights that LoRA adapts are supported");
        }

        if (keys.Has("layer_replication"))
        {
            throw keys.Error("layer_replication", "is not supported; only null or its absence is");
        }

        if (keys.IsText("init_lora_weights") && keys.Text("init_lora_weights") is { } init && init is not ("gaussian" or "orthogonal" or "eva"))
        {
            throw keys.Error("init_lora_weights", $"is '{init}', which may change the model's own weights; let PEFT convert the adapter to a plain one");
        }

        int rank = (int)keys.Integer("r", 1, MaximumRank);
        float alpha = keys.Number("lora_alpha", float.MinValue, float.MaxValue);
        return (keys.Boolean("use_rslora", absent: false) ? alpha / MathF.Sqrt(rank) : alpha / rank, rank);
    }

    private static Dictionary<string, Factors> ReadFactors(SafetensorsFile file, ModelSource model, int rank)
    {
        Dictionary<string, ModelTensor> tensors = model.Tensors
            .Where(static tensor => !tensor.IsVector && tensor.Name != ModelTensors.Embedding)
            .ToDictionary(static tensor => tensor.Name, StringComparer.Ordinal);
        var factors = new Dictionary<string, Factors>(StringComparer.Ordinal);
        foreach (SafetensorsEntry entry in file.Entries)
        {
            string? module = Module(entry.Name);
            string name = module + ".weight";
            if (module is null || !tensors.TryGetValue(name, out ModelTensor tensor))
            {
                throw new UserErrorException($"{file.Path}: tensor '{entry.Name}' adapts nothing that the model multiplies by; the adapter is of another model or kind");
            }

            if (model.StorageOf(name).IsQuantized())
            {
                throw new UserErrorException(
                    $"{model.Path}: its weights are quantized ({model.StorageOf(name)}); an adapter is added to f32, f16 or bf16: apply it to the model that was quantized");
            }

            factors[name] = new Factors(
                Read(file, Prefix + module + SuffixA, rank, tensor.Columns), Read(file, Prefix + module + SuffixB, tensor.Rows, rank));
        }

        return factors.Count > 0 ? factors : throw new UserErrorException($"{file.Path}: adapts no weight");
    }

    private static string? Module(string name) =>
        !name.StartsWith(Prefix, StringComparison.Ordinal) ? null
        : name.EndsWith(SuffixA, StringComparison.Ordinal) ? name[Prefix.Length..^SuffixA.Length]
        : name.EndsWith(SuffixB, StringComparison.Ordinal) ? name[Prefix.Length..^SuffixB.Length]
        : null;

    private static float[] Read(SafetensorsFile file, string name, int rows, int columns)
    {
        SafetensorsFile.RequireShape(file.Path, name, file.Entry(name).Shape, rows, columns);
        float[] values = new float[checked(rows * columns)];
        file.Read(values, name);
        return values;
    }

    /// <summary>The factors of a weight's change.</summary>
    /// <param name="A">(R, I), row after row.</param>
    /// <param name="B">(O, R), row after row.</param>
    private readonly record struct Factors(float[] A, float[] B);
}
