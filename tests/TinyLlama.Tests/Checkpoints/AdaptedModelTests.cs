using System.Runtime.InteropServices;
using System.Text.Json.Nodes;
using TinyLlama.Checkpoints;
using TinyLlama.Cli;
using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Model;

namespace TinyLlama.Tests.Checkpoints;

public sealed class AdaptedModelTests : IDisposable
{
    private const int Rank = 3;
    private const string Query = "model.layers.1.self_attn.q_proj";
    private const string Down = "model.layers.0.mlp.down_proj";

    private static readonly ModelConfig s_config = new()
    {
        VocabularySize = 320,
        ContextLength = 64,
        Layers = 2,
        Heads = 2,
        KeyValueHeads = 1,
        Channels = 64,
        Hidden = 37,
    };

    private readonly TemporaryFolder _folder = new();
    private readonly string _run;

    public AdaptedModelTests()
    {
        _run = SmallModel.Save(_folder["run"], s_config, SmallModel.Tokenizer(320));
        Directory.CreateDirectory(Adapter);
    }

    private string Adapter => _folder["adapter"];

    public void Dispose() => _folder.Dispose();

    [Theory]
    [InlineData("", 8.0 / Rank)]
    [InlineData("use_rslora", 4.618802153517006)]
    public void The_product_of_the_factors_is_added_to_the_weight(string root, double scale)
    {
        WriteConfig(config => config["use_rslora"] = root.Length > 0);
        Dictionary<string, float[]> factors = WriteFactors();
        using ModelSource plain = ModelSource.Open(_run, Fail);
        using ModelSource adapted = ModelSource.Open(_run, Adapter, Fail);
        Assert.NotEqual(plain.Hash(), adapted.Hash());
        foreach (ModelTensor tensor in plain.Tensors)
        {
            double[] expected = Array.ConvertAll(Read(plain, tensor), value => (double)value);
            string module = tensor.Name[..^".weight".Length];
            if (factors.TryGetValue($"base_model.model.{module}.lora_A.weight", out float[]? a))
            {
                float[] b = factors[$"base_model.model.{module}.lora_B.weight"];
                for (int i = 0; i < expected.Length; i++)
                {
                    (int row, int column) = Math.DivRem(i, tensor.Columns);
                    expected[i] += scale * Enumerable.Range(0, Rank).Sum(r => (double)b[(row * Rank) + r] * a[(r * tensor.Columns) + column]);
                }
            }

            float[] actual = Read(adapted, tensor);
            for (int i = 0; i < expected.Length; i++)
            {
                Assert.True(Math.Abs(expected[i] - actual[i]) <= 1e-5, $"{tensor.Name}[{i}]: {expected[i]}, {actual[i]}");
            }
        }
    }

    [Fact]
    public void A_weight_read_in_pieces_or_as_rows_is_the_same()
    {
        WriteConfig();
        WriteFactors();
        using ModelSource adapted = ModelSource.Open(_run, Adapter, Fail);
        ModelTensor tensor = adapted.Tensors.Single(t => t.Name == Down + ".weight");
        float[] whole = Read(adapted, tensor);
        float[] pieces = new float[whole.Length];
        for (int first = 0; first < pieces.Length; first += 50)
        {
            adapted.Read(pieces.AsSpan(first, Math.Min(50, pieces.Length - first)), tensor.Name, first);
        }

        Assert.Equal(whole, pieces);
        float[] rows = new float[10 * tensor.Columns];
        adapted.ReadRows(MemoryMarshal.AsBytes(rows.AsSpan()), tensor, 20);
        Assert.Equal(whole[(20 * tensor.Columns)..(30 * tensor.Columns)], rows);
    }

    [Fact]
    public async Task Generate_takes_an_adapter_and_keeps_to_what_it_says()
    {
        WriteConfig();
        WriteFactors();
        string[] arguments = ["generate", _run, "-p", "a", "--temperature", "0", "--max-tokens", "20"];
        (_, string plain, _) = await RunAsync(arguments);
        (int code, string output, _) = await RunAsync([.. arguments, "--lora", Adapter]);
        Assert.Equal(0, code);
        Assert.NotEqual(plain, output);
        WriteConfig(config => config["lora_alpha"] = 0);
        Assert.Equal(plain, (await RunAsync([.. arguments, "--lora", Adapter])).Output);
        (code, output, string error) = await RunAsync([.. arguments, "--lora", _folder.Path]);
        Assert.Equal((2, ""), (code, output));
        Assert.EndsWith("has no adapter_config.json; name a folder in which PEFT saved a LoRA adapter\n", error, StringComparison.Ordinal);
        Assert.Single(error.TrimEnd('\n').Split('\n'));
    }

    [Theory]
    [InlineData("peft_type", "\"IA3\"", "'peft_type' is 'IA3'; only 'LORA'")]
    [InlineData("peft_type", "null", "'peft_type' is ''; only 'LORA'")]
    [InlineData("bias", "\"all\"", "'bias' is 'all'; only 'none'")]
    [InlineData("use_dora", "true", "'use_dora' is true; only false")]
    [InlineData("fan_in_fan_out", "true", "'fan_in_fan_out' is true; only false")]
    [InlineData("rank_pattern", """{"q_proj":4}""", "'rank_pattern' is not empty; only one rank")]
    [InlineData("alpha_pattern", """{"q_proj":4}""", "'alpha_pattern' is not empty; only one rank")]
    [InlineData("modules_to_save", """["lm_head"]""", "'modules_to_save' is not empty; only weights")]
    [InlineData("layer_replication", "[[0,2]]", "'layer_replication' is not supported")]
    [InlineData("init_lora_weights", "\"pissa\"", "'init_lora_weights' is 'pissa', which may change")]
    [InlineData("r", "0", "'r' is 0, a whole number from 1")]
    [InlineData("r", "4", "lora_A.weight' has the shape [3, ")]
    [InlineData("lora_alpha", "1e999", "'lora_alpha' is 1e999, a number")]
    [InlineData("lora_alpha", "null", "'lora_alpha' is missing")]
    public void A_config_that_asks_for_more_is_refused_by_its_key(string key, string value, string problem)
    {
        WriteConfig(config => config[key] = JsonNode.Parse(value));
        WriteFactors();
        Assert.Contains(problem, Refusal(), StringComparison.Ordinal);
    }

    [Fact]
    public void Factors_that_do_not_fit_the_model_are_refused_by_name()
    {
        WriteConfig();
        Assert.Contains("has no adapter_model.safetensors", Refusal(), StringComparison.Ordinal);
        Write(("base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight", Rank, 64));
        Assert.Contains("layers.2.self_attn.q_proj.lora_A.weight' adapts nothing", Refusal(), StringComparison.Ordinal);
        Write(("base_model.model.model.embed_tokens.lora_A.weight", Rank, 64));
        Assert.Contains("embed_tokens.lora_A.weight' adapts nothing", Refusal(), StringComparison.Ordinal);
        Write(("base_model.model.model.norm.lora_A.weight", Rank, 64));
        Assert.Contains("norm.lora_A.weight' adapts nothing", Refusal(), StringComparison.Ordinal);
        Write(($"base_model.model.{Query}.weight", 64, 64));
        Assert.Contains("q_proj.weight' adapts nothing", Refusal(), StringComparison.Ordinal);
        Write(($"base_model.model.{Query}.lora_A.weight", Rank, 64));
        Assert.Contains($"has no tensor 'base_model.model.{Query}.lora_B.weight'", Refusal(), StringComparison.Ordinal);
        Write(($"base_model.model.{Query}.lora_B.weight", 64, Rank));
        Assert.Contains($"has no tensor 'base_model.model.{Query}.lora_A.weight'", Refusal(), StringComparison.Ordinal);
        Write(($"base_model.model.{Query}.lora_A.weight", Rank, 64), ($"base_model.model.{Query}.lora_B.weight", Rank, 64));
        Assert.Contains("lora_B.weight' has the shape [3, 64], [64, 3] is needed", Refusal(), StringComparison.Ordinal);
        Write();
        Assert.Contains("adapts no weight", Refusal(), StringComparison.Ordinal);
        File.WriteAllBytes(Path.Combine(Adapter, "adapter_model.safetensors"), [255, 255, 255, 255, 255, 255, 255, 255, 1]);
        Assert.Contains("not a safetensors file", Refusal(), StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("adapter_config.json")]
    [InlineData("adapter_model.safetensors")]
    public void A_damaged_file_is_refused_or_read_as_another(string name)
    {
        WriteConfig();
        WriteFactors();
        string path = Path.Combine(Adapter, name);
        byte[] sound = File.ReadAllBytes(path);
        var random = new Random(2);
        int refused = 0;
        for (int round = 0; round < 300; round++)
        {
            byte[] damaged = round % 3 == 0 ? sound[..random.Next(sound.Length)] : [.. sound];
            for (int change = random.Next(4); change > 0 && damaged.Length > 0; change--)
            {
                damaged[random.Next(Math.Min(damaged.Length, 900))] = (byte)random.Next(256);
            }

            File.WriteAllBytes(path, damaged);
            try
            {
                ModelSource.Open(_run, Adapter, Fail).Dispose();
            }
            catch (UserErrorException e)
            {
                Assert.DoesNotContain('\n', e.Message);
                refused++;
            }
        }

        Assert.InRange(refused, 150, 300);
    }

    [Fact]
    public void A_quantized_model_takes_no_adapter()
    {
        WriteConfig();
        WriteFactors();
        using (ModelSource source = ModelSource.Open(_run, Fail))
        {
            GgufExport.Write(_folder["q8.gguf"], source, GgufMix.Find("q8_0"), tokenizer: null);
        }

        string error = Assert.Throws<UserErrorException>(() => ModelSource.Open(_folder["q8.gguf"], Adapter, Fail)).Message;
        Assert.Equal(
            $"{_folder["q8.gguf"]}: its weights are quantized (Q8_0); an adapter is added to f32, f16 or bf16: apply it to the model that was quantized", error);
    }

    private static void Fail(string warning) => Assert.Fail(warning);

    private static float[] Read(ModelSource source, ModelTensor tensor)
    {
        float[] values = new float[tensor.Count];
        source.Read(values, tensor.Name, 0);
        return values;
    }

    private static async Task<(int Code, string Output, string Error)> RunAsync(params string[] arguments)
    {
        using StringWriter output = new() { NewLine = "\n" };
        using StringWriter error = new() { NewLine = "\n" };
        int code = await CommandLine.RunAsync(Program.CreateRoot(), arguments, output, error, CancellationToken.None);
        return (code, output.ToString(), error.ToString());
    }

    private string Refusal() => Assert.Throws<UserErrorException>(() => ModelSource.Open(_run, Adapter, Fail)).Message;

    // What PEFT writes, as far as it matters.
    private void WriteConfig(Action<JsonObject>? change = null)
    {
        var config = new JsonObject
        {
            ["alpha_pattern"] = new JsonObject(),
            ["bias"] = "none",
            ["fan_in_fan_out"] = false,
            ["init_lora_weights"] = true,
            ["layer_replication"] = null,
            ["lora_alpha"] = 8,
            ["modules_to_save"] = null,
            ["peft_type"] = "LORA",
            ["r"] = Rank,
            ["rank_pattern"] = new JsonObject(),
            ["target_modules"] = new JsonArray("q_proj", "down_proj", "lm_head"),
            ["use_dora"] = false,
        };
        change?.Invoke(config);
        File.WriteAllText(Path.Combine(Adapter, "adapter_config.json"), config.ToJsonString());
    }

    private Dictionary<string, float[]> WriteFactors() => Write(
        ($"base_model.model.{Query}.lora_A.weight", Rank, 64),
        ($"base_model.model.{Query}.lora_B.weight", 64, Rank),
        ($"base_model.model.{Down}.lora_A.weight", Rank, 37),
        ($"base_model.model.{Down}.lora_B.weight", 64, Rank),
        ("base_model.model.lm_head.lora_A.weight", Rank, 64),
        ("base_model.model.lm_head.lora_B.weight", 320, Rank));

    private Dictionary<string, float[]> Write(params (string Name, int Rows, int Columns)[] tensors)
    {
        var random = new Random(1);
        Dictionary<string, float[]> values = tensors.ToDictionary(
            tensor => tensor.Name, tensor => Enumerable.Range(0, tensor.Rows * tensor.Columns).Select(_ => (float)random.NextDouble() - 0.5f).ToArray());
        using FileStream stream = File.Create(Path.Combine(Adapter, "adapter_model.safetensors"));
        Safetensors.Write(
            stream,
            [.. tensors.Select(tensor => new StoredTensor(tensor.Name, [tensor.Rows, tensor.Columns], DType.F32, (first, bytes) =>
                MemoryMarshal.AsBytes(values[tensor.Name].AsSpan((int)first, bytes.Length / sizeof(float))).CopyTo(bytes)))],
            metadata: null);
        return values;
    }
}
