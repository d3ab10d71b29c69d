using System.Globalization;
using System.Text.Json.Nodes;
using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Model;

namespace TinyLlama.Checkpoints;

/// <summary>
/// Reads and writes <c>config.json</c> of Hugging Face's Llama. What such a file may ask for and this Llama does not do is
/// refused by name, never ignored.
/// </summary>
public static class HuggingFaceConfig
{
    /// <summary>The file's name.</summary>
    public const string FileName = "config.json";

    /// <summary>The name of the file with the defaults of generation.</summary>
    public const string GenerationFileName = "generation_config.json";

    private const int Most = int.MaxValue;

    /// <summary>Reads a file.</summary>
    /// <exception cref="UserErrorException">A key is missing or out of range, or asks for another model than a Llama.</exception>
    public static ModelConfig Read(string path)
    {
        JsonKeys keys = JsonKeys.Read(path);
        RequireLlama(keys);
        JsonKeys? rope = keys.Object("rope_parameters") ?? keys.Object("rope_scaling");
        int heads = (int)keys.Integer("num_attention_heads", 1, Most);
        var config = new ModelConfig
        {
            VocabularySize = (int)keys.Integer("vocab_size", 1, Most),
            ContextLength = (int)keys.Integer("max_position_embeddings", 1, Most),
            Layers = (int)keys.Integer("num_hidden_layers", 1, Most),
            Heads = heads,
            KeyValueHeads = (int)keys.Integer("num_key_value_heads", 1, Most, absent: heads),
            Channels = (int)keys.Integer("hidden_size", 1, Most),
            Hidden = (int)keys.Integer("intermediate_size", 1, Most),
            NormEpsilon = keys.Number("rms_norm_eps", 0, 1),
            RopeTheta = (keys.Has("rope_theta") ? keys : rope ?? keys).Number("rope_theta", 0, float.MaxValue, absent: 10_000),
            RopeFactor = RopeType(rope) == "linear" ? rope!.Number("factor", 1, float.MaxValue) : 1,
            RopeScaling = RopeType(rope) == "llama3" ? ReadScaling(rope!) : null,
            TiedEmbeddings = keys.Boolean("tie_word_embeddings", absent: false),
        };
        if (config.Problems().FirstOrDefault() is { } problem)
        {
            throw new UserErrorException($"{path}: {problem}");
        }

        if (keys.Has("head_dim") && keys.Integer("head_dim", 1, Most) is var headDim && headDim != config.HeadDim)
        {
            throw keys.Error(
                "head_dim", $"is {headDim}; only hidden_size / num_attention_heads = {config.HeadDim} is supported");
        }

        return config;
    }

    /// <summary>The text of <c>config.json</c>.</summary>
    /// <param name="config">The shape.</param>
    /// <param name="type">What the weights are stored in.</param>
    /// <param name="bos">The token that begins a document, or null.</param>
    /// <param name="eos">The token that ends a document, or null.</param>
    public static string Write(ModelConfig config, DType type, int? bos, int? eos)
    {
        var keys = new JsonObject
        {
            ["architectures"] = new JsonArray("LlamaForCausalLM"),
            ["attention_bias"] = false,
            ["attention_dropout"] = Real(0),
            ["bos_token_id"] = bos,
            ["eos_token_id"] = eos,
            ["head_dim"] = config.HeadDim,
            ["hidden_act"] = "silu",
            ["hidden_size"] = config.Channels,
            ["initializer_range"] = Real(0.02f),
            ["intermediate_size"] = config.Hidden,
            ["max_position_embeddings"] = config.ContextLength,
            ["mlp_bias"] = false,
            ["model_type"] = "llama",
            ["num_attention_heads"] = config.Heads,
            ["num_hidden_layers"] = config.Layers,
            ["num_key_value_heads"] = config.KeyValueHeads,
            ["pretraining_tp"] = 1,
            ["rms_norm_eps"] = Real(config.NormEpsilon),
            ["rope_scaling"] = Scaling(config),
            ["rope_theta"] = Real(config.RopeTheta),
            ["tie_word_embeddings"] = config.TiedEmbeddings,
            ["torch_dtype"] = TypeName(type),
            ["use_cache"] = true,
            ["vocab_size"] = config.VocabularySize,
        };
        return keys.ToJsonString(JsonText.Indented) + "\n";
    }

    /// <summary>The text of <c>generation_config.json</c>: which tokens begin and end a text.</summary>
    /// <param name="bos">The token that begins a document, or null.</param>
    /// <param name="eos">The token that ends a document, or null.</param>
    public static string WriteGeneration(int? bos, int? eos)
    {
        var keys = new JsonObject { ["_from_model_config"] = true };
        if (bos is not null)
        {
            keys["bos_token_id"] = bos;
        }

        if (eos is not null)
        {
            keys["eos_token_id"] = eos;
        }

        return keys.ToJsonString(JsonText.Indented) + "\n";
    }

    private static void RequireLlama(JsonKeys keys)
    {
        if (keys.Text("model_type") is var type && type is not (null or "llama"))
        {
            throw keys.Error("model_type", $"is '{type}'; only 'llama' is supported");
        }

        IReadOnlyList<string>? architectures = keys.Texts("architectures");
        if (architectures is not (null or [] or ["LlamaForCausalLM"]))
        {
            throw keys.Error("architectures", $"is '{string.Join("', '", architectures)}'; only 'LlamaForCausalLM' is supported");
        }

        if (type is null && architectures is not ["LlamaForCausalLM"])
        {
            throw keys.Error("model_type", "is missing, and so is what else would say that this is a Llama");
        }

        RequireText(keys, "hidden_act", "silu");
        RequireFalse(keys, "attention_bias");
        RequireFalse(keys, "mlp_bias");
        RequireFalse(keys, "rope_interleaved");
        RequireNumber(keys, "pretraining_tp", 1);
        RequireNumber(keys, "partial_rotary_factor", 1);
        foreach (string key in (string[])["quantization_config", "sliding_window", "num_local_experts"])
        {
            if (keys.Has(key))
            {
                throw keys.Error(key, "asks for what is not supported; only null or its absence is");
            }
        }
    }

    private static string RopeType(JsonKeys? rope)
    {
        if (rope is null)
        {
            return "default";
        }

        string type = rope.Text("rope_type") ?? rope.Text("type") ?? "default";
        if (rope.Text("type") is { } old && old != type)
        {
            throw rope.Error("type", $"is '{old}', but rope_type is '{type}'");
        }

        return type is "default" or "linear" or "llama3"
            ? type
            : throw rope.Error(rope.Has("rope_type") ? "rope_type" : "type", $"is '{type}'; only 'linear' and 'llama3' are supported");
    }

    private static RopeScaling ReadScaling(JsonKeys rope) => new()
    {
        Factor = rope.Number("factor", 1, float.MaxValue),
        LowFrequencyFactor = rope.Number("low_freq_factor", 0, float.MaxValue),
        HighFrequencyFactor = rope.Number("high_freq_factor", 0, float.MaxValue),
        OriginalContextLength = (int)rope.Integer("original_max_position_embeddings", 1, Most),
    };

    private static JsonObject? Scaling(ModelConfig config) =>
        config.RopeScaling is { } scaling
            ? new JsonObject
            {
                ["rope_type"] = "llama3",
                ["factor"] = Real(scaling.Factor),
                ["low_freq_factor"] = Real(scaling.LowFrequencyFactor),
                ["high_freq_factor"] = Real(scaling.HighFrequencyFactor),
                ["original_max_position_embeddings"] = scaling.OriginalContextLength,
            }
        : config.RopeFactor != 1 ? new JsonObject { ["type"] = "linear", ["rope_type"] = "linear", ["factor"] = Real(config.RopeFactor) }
        : null;

    private static void RequireText(JsonKeys keys, string key, string only)
    {
        if (keys.Text(key) is { } text && text != only)
        {
            throw keys.Error(key, $"is '{text}'; only '{only}' is supported");
        }
    }

    private static void RequireFalse(JsonKeys keys, string key)
    {
        if (keys.Boolean(key, absent: false))
        {
            throw keys.Error(key, "is true; only false is supported");
        }
    }

    private static void RequireNumber(JsonKeys keys, string key, float only)
    {
        if (keys.Number(key, float.MinValue, float.MaxValue, absent: only) is var number && number != only)
        {
            throw keys.Error(key, $"is {number}; only {only} is supported");
        }
    }

    private static string TypeName(DType type) => type switch
    {
        DType.F32 => "float32",
        DType.BF16 => "bfloat16",
        DType.F16 => "float16",
        _ => throw new ArgumentOutOfRangeException(nameof(type), type, "not a type of weights"),
    };

    // With a point or an exponent: readers that check types take a bare 2 for an integer and refuse it.
    private static JsonNode Real(float value)
    {
        string text = value.ToString("R", CultureInfo.InvariantCulture);
        return JsonNode.Parse(text.AsSpan().IndexOfAny('.', 'E') < 0 ? text + ".0" : text)!;
    }
}
