using System.Text.Json.Nodes;
using TinyLlama.Checkpoints;
using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Model;
using TinyLlama.Tests.Common;

namespace TinyLlama.Tests.Checkpoints;

public sealed class HuggingFaceConfigTests : IDisposable
{
    private readonly TemporaryFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Fact]
    public void The_golden_config_says_what_its_read_me_says()
    {
        ModelConfig config = HuggingFaceConfig.Read(SharedFiles.Require("goldens/llama-tiny/config.json"));
        var expected = new ModelConfig
        {
            VocabularySize = 96,
            ContextLength = 64,
            Layers = 2,
            Heads = 4,
            KeyValueHeads = 2,
            Channels = 64,
            Hidden = 176,
            NormEpsilon = 1e-5f,
            RopeTheta = 10_000,
        };
        Assert.Equal(expected, config);
    }

    [Fact]
    public void A_config_as_TinyLlama_published_it_is_read()
    {
        // No rope_theta, no head_dim, a null rope_scaling.
        const string Text = """
            {"architectures":["LlamaForCausalLM"],"bos_token_id":1,"eos_token_id":2,"hidden_act":"silu","hidden_size":2048,
            "initializer_range":0.02,"intermediate_size":5632,"max_position_embeddings":2048,"model_type":"llama",
            "num_attention_heads":32,"num_hidden_layers":22,"num_key_value_heads":4,"pretraining_tp":1,"rms_norm_eps":1e-05,
            "rope_scaling":null,"tie_word_embeddings":false,"torch_dtype":"float32","transformers_version":"4.31.0.dev0",
            "use_cache":true,"vocab_size":32000}
            """;
        File.WriteAllText(_folder["config.json"], Text);
        ModelConfig config = HuggingFaceConfig.Read(_folder["config.json"]);
        Assert.Equal((2048, 5632, 22, 32, 4, 32000), (config.Channels, config.Hidden, config.Layers, config.Heads, config.KeyValueHeads, config.VocabularySize));
        Assert.Equal(10_000, config.RopeTheta);
        Assert.Equal(1_100_048_384, ModelTensors.Of(config).Sum(static tensor => tensor.Count));
    }

    [Theory]
    [InlineData(1e-5f, 10_000f, 1f, false)]
    [InlineData(1e-6f, 500_000f, 4f, true)]
    [InlineData(1.1754944e-38f, 0.1f, 1.0000001f, true)]
    public void What_is_written_is_read_back(float epsilon, float theta, float factor, bool tied)
    {
        var config = new ModelConfig
        {
            VocabularySize = 101,
            ContextLength = 77,
            Layers = 3,
            Heads = 6,
            KeyValueHeads = 3,
            Channels = 24,
            Hidden = 40,
            NormEpsilon = epsilon,
            RopeTheta = theta,
            RopeFactor = factor,
            TiedEmbeddings = tied,
        };
        File.WriteAllText(_folder["config.json"], HuggingFaceConfig.Write(config, DType.BF16, bos: 1, eos: null));
        Assert.Equal(config, HuggingFaceConfig.Read(_folder["config.json"]));
    }

    [Fact]
    public void The_scaling_of_Llama_3_is_read_and_written()
    {
        const string Scaling = """{"factor":32.0,"high_freq_factor":4.0,"low_freq_factor":1.0,"original_max_position_embeddings":8192,"rope_type":"llama3"}""";
        JsonNode keys = JsonNode.Parse(HuggingFaceConfig.Write(Tiny(), DType.F32, 1, 2))!;
        keys["rope_scaling"] = JsonNode.Parse(Scaling);
        File.WriteAllText(_folder["config.json"], keys.ToJsonString());
        ModelConfig config = HuggingFaceConfig.Read(_folder["config.json"]);
        var expected = new RopeScaling { Factor = 32, LowFrequencyFactor = 1, HighFrequencyFactor = 4, OriginalContextLength = 8192 };
        Assert.Equal((expected, 1), (config.RopeScaling, config.RopeFactor));
        File.WriteAllText(_folder["config.json"], HuggingFaceConfig.Write(config, DType.F32, 1, 2));
        Assert.Equal(config, HuggingFaceConfig.Read(_folder["config.json"]));

        keys["rope_scaling"]!.AsObject().Remove("low_freq_factor");
        File.WriteAllText(_folder["config.json"], keys.ToJsonString());
        string message = Assert.Throws<UserErrorException>(() => HuggingFaceConfig.Read(_folder["config.json"])).Message;
        Assert.Contains("'rope_scaling.low_freq_factor' is missing", message, StringComparison.Ordinal);
    }

    [Fact]
    public void Numbers_that_others_take_for_real_have_a_point_or_an_exponent()
    {
        ModelConfig config = Tiny() with { RopeFactor = 2 };
        string text = HuggingFaceConfig.Write(config, DType.F32, 1, 2);
        Assert.Contains("\"factor\": 2.0", text, StringComparison.Ordinal);
        Assert.Contains("\"rope_theta\": 10000.0", text, StringComparison.Ordinal);
        Assert.Contains("\"torch_dtype\": \"float32\"", text, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("attention_bias", "true")]
    [InlineData("mlp_bias", "true")]
    [InlineData("rope_interleaved", "true")]
    [InlineData("hidden_act", "\"gelu\"")]
    [InlineData("pretraining_tp", "2")]
    [InlineData("partial_rotary_factor", "0.5")]
    [InlineData("head_dim", "32")]
    [InlineData("model_type", "\"mistral\"")]
    [InlineData("architectures", "[\"LlamaForSequenceClassification\"]")]
    [InlineData("architectures", "[\"LlamaForCausalLM\", \"Other\"]")]
    [InlineData("quantization_config", "{\"bits\":4}")]
    [InlineData("sliding_window", "4096")]
    [InlineData("rope_scaling", "{\"type\":\"dynamic\",\"factor\":2.0}", "rope_scaling.type")]
    [InlineData("rope_scaling", "{\"rope_type\":\"yarn\",\"factor\":8.0}", "rope_scaling.rope_type")]
    [InlineData("rope_scaling", "{\"rope_type\":\"linear\",\"type\":\"yarn\",\"factor\":8.0}", "rope_scaling.type")]
    [InlineData("rope_scaling", "{\"type\":\"linear\"}", "rope_scaling.factor")]
    [InlineData("rope_scaling", "{\"type\":\"linear\",\"factor\":0.5}", "rope_scaling.factor")]
    [InlineData("rope_scaling", "2", "rope_scaling")]
    [InlineData("rope_parameters", "{\"rope_type\":\"yarn\"}", "rope_parameters.rope_type")]
    [InlineData("vocab_size", "0")]
    [InlineData("vocab_size", "1e30")]
    [InlineData("vocab_size", "\"96\"")]
    [InlineData("hidden_size", "-64")]
    [InlineData("hidden_size", "64.5")]
    [InlineData("num_hidden_layers", "4294967298")]
    [InlineData("rms_norm_eps", "2")]
    [InlineData("rms_norm_eps", "\"x\"")]
    [InlineData("rope_theta", "1e39")]
    [InlineData("tie_word_embeddings", "1")]
    public void What_is_not_supported_is_refused_by_name(string key, string value, string? named = null)
    {
        string message = RefusalOf(key, value);
        Assert.StartsWith(_folder["config.json"], message, StringComparison.Ordinal);
        Assert.Contains($"'{named ?? key}'", message, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("num_attention_heads", "5", "channels 64 is not a multiple of heads 5")]
    [InlineData("num_attention_heads", "64", "is odd")]
    [InlineData("num_key_value_heads", "3", "heads 4 is not a multiple of key_value_heads 3")]
    [InlineData("num_hidden_layers", "1000000", "layers")]
    [InlineData("vocab_size", "2000000000", "vocabulary")]
    [InlineData("intermediate_size", "2147483647", "hidden is")]
    [InlineData("hidden_size", "262144", "elements is larger", "vocab_size", "16777216")]
    [InlineData("rope_theta", "0", "rope_theta is 0")]
    [InlineData("rms_norm_eps", "0", "norm_epsilon is 0")]
    public void An_impossible_shape_is_refused(string key, string value, string said, string? otherKey = null, string? otherValue = null)
    {
        string message = RefusalOf(key, value, otherKey, otherValue);
        Assert.Contains(said, message, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("hidden_size")]
    [InlineData("intermediate_size")]
    [InlineData("num_hidden_layers")]
    [InlineData("num_attention_heads")]
    [InlineData("vocab_size")]
    [InlineData("max_position_embeddings")]
    [InlineData("rms_norm_eps")]
    public void A_missing_key_is_named(string key) =>
        Assert.Contains($"'{key}' is missing", RefusalOf(key, null), StringComparison.Ordinal);

    [Theory]
    [InlineData("rope_scaling", "{\"type\":\"linear\",\"factor\":4}", 4)]
    [InlineData("rope_scaling", "{\"rope_type\":\"linear\",\"factor\":4.0}", 4)]
    [InlineData("rope_scaling", "{\"rope_type\":\"default\"}", 1)]
    [InlineData("rope_scaling", "null", 1)]
    [InlineData("rope_parameters", "{\"rope_type\":\"linear\",\"factor\":2.0,\"rope_theta\":5000.0}", 2)]
    [InlineData("head_dim", "16", 1)]
    [InlineData("attention_bias", "false", 1)]
    public void What_is_supported_is_read(string key, string value, float factor)
    {
        JsonObject keys = Keys();
        keys[key] = JsonNode.Parse(value);
        if (key == "rope_parameters")
        {
            keys.Remove("rope_theta");
        }

        File.WriteAllText(_folder["config.json"], keys.ToJsonString());
        ModelConfig config = HuggingFaceConfig.Read(_folder["config.json"]);
        Assert.Equal(factor, config.RopeFactor);
        Assert.Equal(key == "rope_parameters" ? 5000 : 10_000, config.RopeTheta);
    }

    [Theory]
    [InlineData("")]
    [InlineData("[]")]
    [InlineData("{")]
    [InlineData("{\"model_type\":\"llama\",\"model_type\":\"llama\"}")]
    [InlineData("{\"model_type\":\"\\ud800\"}")]
    public void What_is_no_JSON_object_is_refused(string text)
    {
        File.WriteAllText(_folder["config.json"], text);
        string message = Assert.Throws<UserErrorException>(() => HuggingFaceConfig.Read(_folder["config.json"])).Message;
        Assert.StartsWith(_folder["config.json"], message, StringComparison.Ordinal);
    }

    [Fact]
    public void A_config_cut_at_any_byte_is_refused()
    {
        string whole = Keys().ToJsonString();
        for (int length = 0; length < whole.Length; length++)
        {
            File.WriteAllText(_folder["config.json"], whole[..length]);
            Assert.Throws<UserErrorException>(() => HuggingFaceConfig.Read(_folder["config.json"]));
        }
    }

    [Fact]
    public void Flipped_bits_of_a_config_are_refused_or_harmless()
    {
        byte[] whole = System.Text.Encoding.UTF8.GetBytes(Keys().ToJsonString());
        var random = new Random(1);
        for (int i = 0; i < 1000; i++)
        {
            byte[] damaged = [.. whole];
            damaged[random.Next(whole.Length)] ^= (byte)(1 << random.Next(8));
            File.WriteAllBytes(_folder["config.json"], damaged);
            try
            {
                Assert.Empty(HuggingFaceConfig.Read(_folder["config.json"]).Problems());
            }
            catch (UserErrorException)
            {
                // The damage was seen.
            }
        }
    }

    private static ModelConfig Tiny() => new()
    {
        VocabularySize = 96,
        ContextLength = 64,
        Layers = 2,
        Heads = 4,
        KeyValueHeads = 2,
        Channels = 64,
        Hidden = 176,
    };

    private static JsonObject Keys() => JsonNode.Parse(HuggingFaceConfig.Write(Tiny(), DType.F32, 1, 2))!.AsObject();

    private string RefusalOf(string key, string? value, string? otherKey = null, string? otherValue = null)
    {
        JsonObject keys = Keys();
        if (key != "head_dim")
        {
            // A shape that differs would be refused for the width of its heads first.
            keys.Remove("head_dim");
        }

        keys.Remove(key);
        if (value is not null)
        {
            keys[key] = JsonNode.Parse(value);
        }

        if (otherKey is not null)
        {
            keys[otherKey] = JsonNode.Parse(otherValue!);
        }

        File.WriteAllText(_folder["config.json"], keys.ToJsonString());
        return Assert.Throws<UserErrorException>(() => HuggingFaceConfig.Read(_folder["config.json"])).Message;
    }
}
