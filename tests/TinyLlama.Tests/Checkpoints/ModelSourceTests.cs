using System.Runtime.InteropServices;
using System.Text;
using System.Text.Json.Nodes;
using TinyLlama.Checkpoints;
using TinyLlama.Compute;
using TinyLlama.Compute.Cpu;
using TinyLlama.Data;
using TinyLlama.Model;
using TinyLlama.Tests.Common;
using TinyLlama.Tests.Model;

namespace TinyLlama.Tests.Checkpoints;

public sealed class ModelSourceTests : IDisposable
{
    private static readonly ModelConfig s_tiny = new()
    {
        VocabularySize = 11,
        ContextLength = 8,
        Layers = 2,
        Heads = 4,
        KeyValueHeads = 2,
        Channels = 16,
        Hidden = 6,
    };

    private readonly CpuBackend _backend = CpuBackend.Create(threads: 1);
    private readonly TemporaryFolder _folder = new();

    public void Dispose()
    {
        _backend.Dispose();
        _folder.Dispose();
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void Names_and_shapes_are_those_of_the_model(bool tied)
    {
        using LlamaModel model = LlamaModel.Allocate(s_tiny with { TiedEmbeddings = tied }, _backend, trains: false);
        Assert.Equal(
            model.Parameters.Select(static parameter => (parameter.Name, parameter.Values.Rows, parameter.Values.Columns, parameter.IsVector)),
            ModelTensors.Of(model.Config).Select(static tensor => (tensor.Name, tensor.Rows, tensor.Columns, tensor.IsVector)));
    }

    [Fact]
    public void The_golden_model_is_loaded_bit_for_bit()
    {
        string folder = Path.GetDirectoryName(SharedFiles.Require("goldens/llama-tiny/config.json"))!;
        using ModelSource source = ModelSource.Open(folder, Fail);
        using LlamaModel model = LlamaModel.Allocate(source.Config, _backend, trains: false);
        source.CopyTo(_backend, model.Parameters);
        GoldenFile golden = GoldenFile.Open(Path.Combine(folder, "model.safetensors"));
        Assert.Equal(golden.Names.Order(StringComparer.Ordinal), model.Parameters.Select(static p => p.Name).Order(StringComparer.Ordinal));
        foreach (Parameter parameter in model.Parameters)
        {
            Assert.Equal(golden.ReadSingles(parameter.Name), parameter.Values.HostSpan<float>().ToArray());
        }
    }

    [Fact]
    public void The_chat_template_is_that_of_the_files()
    {
        using LlamaModel model = Random(s_tiny);
        WriteSharded(model, DType.F32);
        File.WriteAllText(_folder["tokenizer.model"], "");
        string? Template()
        {
            using ModelSource source = ModelSource.Open(_folder.Path, Fail);
            return source.ChatTemplate;
        }

        Assert.Null(Template());
        File.WriteAllText(_folder["tokenizer_config.json"], """{"chat_template": "one"}""");
        Assert.Equal("one", Template());
        File.WriteAllText(
            _folder["tokenizer_config.json"],
            """{"chat_template": [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]}""");
        Assert.Equal("three", Template());
        File.WriteAllText(_folder["chat_template.jinja"], "four\n");
        Assert.Equal("four\n", Template());
        File.Delete(_folder["chat_template.jinja"]);
        File.WriteAllText(_folder["tokenizer_config.json"], """{"chat_template": 5}""");
        Assert.Contains("'chat_template' is 5", Assert.Throws<UserErrorException>(Template).Message, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData(DType.F32)]
    [InlineData(DType.BF16)]
    [InlineData(DType.F16)]
    public void A_model_in_any_type_and_several_files_is_loaded(DType type)
    {
        using LlamaModel model = Random(s_tiny);
        WriteSharded(model, type);
        using ModelSource source = ModelSource.Open(_folder.Path, Fail);
        Assert.Equal(model.Config, source.Config);
        using LlamaModel loaded = LlamaModel.Allocate(source.Config, _backend, trains: false);
        source.CopyTo(_backend, loaded.Parameters);
        foreach ((Parameter expected, Parameter actual) in model.Parameters.Zip(loaded.Parameters))
        {
            float[] rounded = [.. expected.Values.HostSpan<float>().ToArray().Select(value => Round(value, type))];
            Assert.Equal(rounded, actual.Values.HostSpan<float>().ToArray());
        }
    }

    [Fact]
    public void A_folder_of_mixed_types_keeps_each_tensor_in_its_own()
    {
        using LlamaModel model = Random(s_tiny);
        WriteSharded(model, DType.F16, DType.BF16);
        using ModelSource source = ModelSource.Open(_folder.Path, Fail);
        string[] half = [.. Named(model)[..7].Select(static tensor => tensor.Name)];
        foreach (ModelTensor tensor in source.Tensors)
        {
            DType type = half.Contains(tensor.Name) ? DType.F16 : DType.BF16;
            Assert.Equal(type, source.StorageOf(tensor.Name));
            byte[] expected = new byte[2 * tensor.Rows * tensor.Columns];
            ElementCodec.Encode(model.Parameters.Single(p => p.Name == tensor.Name).Values.HostSpan<float>(), type, expected);
            byte[] rows = new byte[expected.Length];
            source.ReadRows(rows, tensor, 0);
            Assert.Equal(expected, rows);
        }

        using LlamaModel frozen = LlamaModel.AllocateFrozen(source.Config, _backend, source.FrozenStorageOf);
        source.CopyTo(_backend, frozen.Parameters);
        byte[] table = new byte[2 * s_tiny.VocabularySize * s_tiny.Channels];
        source.ReadRows(table, source.Tensors.Single(static tensor => tensor.Name == LlamaModel.EmbeddingName), 0);
        Assert.Equal(table, MemoryMarshal.AsBytes(frozen.Parameters[0].Values.HostSpan<ushort>()).ToArray());
    }

    [Fact]
    public void Weights_of_16_bits_that_stay_in_safetensors_give_the_logits_of_a_copy()
    {
        ModelConfig config = s_tiny with { VocabularySize = 32, Channels = 128, Hidden = 96 };
        using LlamaModel model = Random(config);
        WriteSharded(model, DType.F16, DType.BF16);
        using ModelSource source = ModelSource.Open(_folder.Path, Fail);
        using var inPlace = new ModelRun(config, 3, Keep.Nothing, CpuPath.Vector512, storage: source.FrozenStorageOf);
        using var copied = new ModelRun(config, 3, Keep.Nothing, CpuPath.Vector512, storage: name => new FrozenStorage(source.StorageOf(name)));
        Assert.All(inPlace.Model.Parameters, static parameter => Assert.True(parameter.IsVector || parameter.IsInPlace));
        foreach (ModelRun run in (ModelRun[])[inPlace, copied])
        {
            source.CopyTo(run.Backend, run.Model.Parameters);
            run.Forward([1, 5, 30]);
        }

        Assert.Equal(copied.Logits(), inPlace.Logits());
    }

    [Theory]
    [InlineData("shard missing")]
    [InlineData("shard damaged")]
    [InlineData("tensor in the wrong shard")]
    [InlineData("index leads outside")]
    [InlineData("index is no object")]
    [InlineData("index cut off")]
    [InlineData("index incomplete")]
    public void A_damaged_sharded_model_is_refused(string damage)
    {
        using LlamaModel model = Random(s_tiny);
        WriteSharded(model, DType.F32);
        string index = _folder["model.safetensors.index.json"];
        JsonObject map = JsonNode.Parse(File.ReadAllText(index))!.AsObject();
        JsonObject weights = map["weight_map"]!.AsObject();
        string shard = _folder["model-00002-of-00002.safetensors"];
        switch (damage)
        {
            case "shard missing":
                File.Delete(shard);
                break;
            case "shard damaged":
                File.WriteAllBytes(shard, File.ReadAllBytes(shard)[..^1]);
                break;
            case "tensor in the wrong shard":
                weights["model.norm.weight"] = "model-00001-of-00002.safetensors";
                break;
            case "index leads outside":
                weights["model.norm.weight"] = "../model-00002-of-00002.safetensors";
                break;
            case "index is no object":
                map["weight_map"] = 1;
                break;
            case "index incomplete":
                weights.Remove("model.norm.weight");
                break;
            default:
                break;
        }

        string text = map.ToJsonString();
        File.WriteAllText(index, damage == "index cut off" ? text[..^3] : text);
        Assert.Throws<UserErrorException>(() => ModelSource.Open(_folder.Path, Fail));
    }

    [Fact]
    public void Missing_and_unexpected_tensors_are_named()
    {
        using LlamaModel model = Random(s_tiny);
        NamedTensor[] all = Named(model);
        Write(model.Config, [.. all.Where(static tensor => !tensor.Name.Contains("layers.1", StringComparison.Ordinal))]);
        Assert.Contains("tensors 'model.layers.1.input_layernorm.weight'", Refusal(), StringComparison.Ordinal);
        Assert.Contains("and 6 more are missing", Refusal(), StringComparison.Ordinal);

        Write(model.Config, [.. all, new("model.layers.0.self_attn.q_proj.bias", all[0].Data, false)]);
        Assert.Contains("'model.layers.0.self_attn.q_proj.bias' is unknown", Refusal(), StringComparison.Ordinal);

        Write(model.Config with { Hidden = 8 }, all);
        Assert.Contains("gate_proj.weight' has the shape [6, 16], [8, 16] is needed", Refusal(), StringComparison.Ordinal);

        Write(model.Config, [.. all.Where(static tensor => tensor.Name != "lm_head.weight")]);
        Assert.Contains("tie_word_embeddings", Refusal(), StringComparison.Ordinal);
    }

    [Fact]
    public void Tables_of_rotations_a_second_name_of_a_tied_head_and_padded_rows_are_tolerated()
    {
        using LlamaModel model = Random(s_tiny with { TiedEmbeddings = true });
        NamedTensor[] all = Named(model);
        NamedTensor norm = all[^1];
        Write(model.Config, [.. all, all[0] with { Name = "lm_head.weight" }, norm with { Name = "model.layers.0.self_attn.rotary_emb.inv_freq" }]);
        ModelSource.Open(_folder.Path, Fail).Dispose();

        Write(model.Config with { VocabularySize = 9 }, all);
        using (ModelSource padded = ModelSource.Open(_folder.Path, Fail))
        {
            Assert.Equal(model.Parameters[0].Values.RowRange(0, 9).HostSpan<float>().ToArray(), Read(padded, ModelTensors.Embedding));
        }

        Write(model.Config with { VocabularySize = 12 }, all);
        Assert.Contains("embed_tokens", Refusal(), StringComparison.Ordinal);
    }

    [Fact]
    public void A_model_of_another_shape_is_not_loaded_into()
    {
        using LlamaModel model = Random(s_tiny);
        Write(model.Config, Named(model));
        using ModelSource source = ModelSource.Open(_folder.Path, Fail);
        using LlamaModel wider = LlamaModel.Allocate(s_tiny with { Hidden = 8 }, _backend, trains: false);
        Assert.Contains("[6, 16], [8, 16] is needed", Assert.Throws<UserErrorException>(() => source.CopyTo(_backend, wider.Parameters)).Message, StringComparison.Ordinal);
        using LlamaModel deeper = LlamaModel.Allocate(s_tiny with { Layers = 3 }, _backend, trains: false);
        Assert.Contains("layers.2", Assert.Throws<UserErrorException>(() => source.CopyTo(_backend, deeper.Parameters)).Message, StringComparison.Ordinal);
        using LlamaModel tied = LlamaModel.Allocate(s_tiny with { TiedEmbeddings = true }, _backend, trains: false);
        Assert.Contains("lm_head", Assert.Throws<UserErrorException>(() => source.CopyTo(_backend, tied.Parameters)).Message, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("missing", "not found")]
    [InlineData("model.safetensors", "name its folder")]
    [InlineData("model.gguf", "GGUF")]
    [InlineData("model.pth", "needs config.json beside it")]
    [InlineData("notes.txt", "not a model")]
    [InlineData("pytorch_model.bin", "needs config.json beside it")]
    [InlineData("folder-without-config", "config.json")]
    [InlineData("folder-with-pickle", "pytorch_model.bin: has no directory at its end")]
    [InlineData("folder-without-weights", "model.safetensors")]
    [InlineData("run-without-checkpoint", "no checkpoint yet")]
    public void What_is_no_model_is_refused_with_advice(string name, string said)
    {
        string path = _folder[name];
        if (name.StartsWith("folder-", StringComparison.Ordinal) || name.StartsWith("run-", StringComparison.Ordinal))
        {
            Directory.CreateDirectory(path);
            if (name is "folder-with-pickle" or "folder-without-weights")
            {
                File.WriteAllText(Path.Combine(path, "config.json"), HuggingFaceConfig.Write(s_tiny, DType.F32, 1, 2));
            }

            if (name == "folder-with-pickle")
            {
                File.WriteAllText(Path.Combine(path, "pytorch_model.bin"), "PK");
            }
            else if (name == "run-without-checkpoint")
            {
                Directory.CreateDirectory(Path.Combine(path, "checkpoints"));
            }
        }
        else if (name != "missing")
        {
            File.WriteAllBytes(path, [.. "PK\u0003\u0004"u8, .. new byte[100]]);
        }

        string message = Assert.Throws<UserErrorException>(() => ModelSource.Open(path, Fail)).Message;
        Assert.StartsWith(path, message, StringComparison.Ordinal);
        Assert.Contains(said, message, StringComparison.Ordinal);
    }

    [Fact]
    public void A_run_opens_as_its_newest_checkpoint()
    {
        using LlamaModel model = Random(s_tiny);
        foreach (long step in new[] { 1, 2 })
        {
            model.Parameters[0].Values.HostSpan<float>()[0] = step;
            TrainingCheckpoint.Save(_folder.Path, step, writer =>
            {
                writer.WriteTensors(TrainingCheckpoint.ModelName, _backend, Named(model));
                writer.WriteText(HuggingFaceConfig.FileName, HuggingFaceConfig.Write(model.Config, DType.F32, 1, 2));
            });
        }

        float[] first = new float[1];
        using (ModelSource source = ModelSource.Open(_folder.Path, Fail))
        {
            source.Read(first, ModelTensors.Embedding, 0);
            Assert.Equal(2, first[0]);
        }

        File.Delete(Path.Combine(_folder.Path, "checkpoints", "step-00000002", "config.json"));
        var warnings = new List<string>();
        using ModelSource older = ModelSource.Open(_folder.Path, warnings.Add);
        older.Read(first, ModelTensors.Embedding, 0);
        Assert.Equal(1, first[0]);
        Assert.Contains("step-00000002", Assert.Single(warnings), StringComparison.Ordinal);
    }

    [Fact]
    public void A_run_without_a_whole_checkpoint_says_so()
    {
        SmallModel.Save(_folder["run"], s_tiny, tokenizer: null);
        File.Delete(Path.Combine(_folder["run"], "checkpoints", "step-00000000", "config.json"));
        var warnings = new List<string>();
        string message = Assert.Throws<UserErrorException>(() => ModelSource.Open(_folder["run"], warnings.Add)).Message;
        Assert.Contains("none that is whole", message, StringComparison.Ordinal);
        Assert.EndsWith("passed over", Assert.Single(warnings), StringComparison.Ordinal);
    }

    [Fact]
    public void The_llama2c_model_has_the_shape_and_the_tensors_of_its_file()
    {
        string path = SharedFiles.Require("oracles/stories260K/stories260K.bin");
        using ModelSource source = ModelSource.Open(path, Fail);
        Assert.Equal((64, 172, 5, 8, 4, 512, 512, true), (
            source.Config.Channels, source.Config.Hidden, source.Config.Layers, source.Config.Heads, source.Config.KeyValueHeads,
            source.Config.VocabularySize, source.Config.ContextLength, source.Config.TiedEmbeddings));
        Assert.Equal(Path.Combine(Path.GetDirectoryName(path)!, "tok512.bin"), source.TokenizerPath);

        ReadOnlySpan<float> file = MemoryMarshal.Cast<byte, float>(File.ReadAllBytes(path).AsSpan(28));
        Assert.Equal(file[..(512 * 64)].ToArray(), Read(source, "model.embed_tokens.weight"));
        int wq = (512 * 64) + (5 * 64);
        int wk = wq + (5 * 64 * 64);
        int wv = wk + (5 * 32 * 64);
        Assert.Equal(file.Slice(wv + (3 * 32 * 64), 32 * 64).ToArray(), Read(source, "model.layers.3.self_attn.v_proj.weight"));
        Assert.Equal(file.Slice(wv + (5 * 32 * 64) + (5 * 64 * 64), 64).ToArray(), Read(source, "model.layers.0.post_attention_layernorm.weight"));

        // Rows 0, 1, 2, … of a head (8 wide) are 0, 2, 4, 6, 1, 3, 5, 7 of the file.
        float[] keys = Read(source, "model.layers.2.self_attn.k_proj.weight");
        int[] order = [0, 2, 4, 6, 1, 3, 5, 7];
        for (int row = 0; row < 32; row++)
        {
            int stored = wk + (((2 * 32) + (row / 8 * 8) + order[row % 8]) * 64);
            Assert.Equal(file.Slice(stored, 64).ToArray(), keys.AsSpan(row * 64, 64).ToArray());
        }

        // Reading may begin and end anywhere.
        float[] some = new float[200];
        source.Read(some, "model.layers.2.self_attn.k_proj.weight", 100);
        Assert.Equal(keys.AsSpan(100, 200).ToArray(), some);
    }

    [Fact]
    public void A_llama2c_model_with_a_head_of_its_own_is_read()
    {
        byte[] bytes = Llama2C([4, 6, 1, 2, 1, -5, 3]);
        File.WriteAllBytes(_folder["m.bin"], bytes);
        using ModelSource source = ModelSource.Open(_folder["m.bin"], Fail);
        Assert.False(source.Config.TiedEmbeddings);
        Assert.Equal(5, source.Config.VocabularySize);
        Assert.Null(source.TokenizerPath);
        Assert.Equal(MemoryMarshal.Cast<byte, float>(bytes.AsSpan())[^20..].ToArray(), Read(source, "lm_head.weight"));
    }

    [Theory]
    [InlineData(0, 0)]
    [InlineData(0, -4)]
    [InlineData(0, int.MaxValue)]
    [InlineData(0, 6)]
    [InlineData(1, int.MinValue)]
    [InlineData(2, int.MaxValue)]
    [InlineData(3, 0)]
    [InlineData(3, 3)]
    [InlineData(3, 4)]
    [InlineData(4, 0)]
    [InlineData(4, 3)]
    [InlineData(5, int.MinValue)]
    [InlineData(5, 4)]
    [InlineData(6, -1)]
    [InlineData(6, int.MaxValue)]
    [InlineData(0, 0x616B3432)]
    public void A_llama2c_header_that_lies_is_refused_without_an_allocation_of_what_it_claims(int field, int value)
    {
        byte[] bytes = Llama2C([4, 6, 1, 2, 1, -5, 3]);
        BitConverter.TryWriteBytes(bytes.AsSpan(4 * field), value);
        RequireRefusal(bytes);
    }

    [Fact]
    public void A_llama2c_file_cut_at_any_byte_is_refused()
    {
        byte[] bytes = Llama2C([4, 6, 1, 2, 1, 5, 3]);
        for (int length = 0; length < bytes.Length; length++)
        {
            RequireRefusal(bytes[..length]);
        }
    }

    [Fact]
    public void Any_flipped_bit_of_a_llama2c_header_is_refused_or_harmless()
    {
        byte[] whole = Llama2C([4, 6, 1, 2, 1, 5, 3]);
        for (int bit = 0; bit < 28 * 8; bit++)
        {
            byte[] damaged = [.. whole];
            damaged[bit / 8] ^= (byte)(1 << (bit % 8));
            File.WriteAllBytes(_folder["flipped.bin"], damaged);
            try
            {
                using ModelSource source = ModelSource.Open(_folder["flipped.bin"], Fail);
                Assert.All(source.Tensors, tensor => Read(source, tensor.Name));
            }
            catch (UserErrorException)
            {
                // The damage was seen.
            }
        }
    }

    private static void Fail(string warning) => Assert.Fail(warning);

    private static float[] Read(ModelSource source, string name)
    {
        float[] values = new float[source.Tensors.Single(tensor => tensor.Name == name).Count];
        source.Read(values, name, 0);
        return values;
    }

    private static float Round(float value, DType type) => type switch
    {
        DType.F16 => (float)(Half)value,
        DType.BF16 => BitConverter.UInt32BitsToSingle(
            (BitConverter.SingleToUInt32Bits(value) + 0x7FFF + ((BitConverter.SingleToUInt32Bits(value) >> 16) & 1)) & 0xFFFF0000),
        _ => value,
    };

    private static byte[] Llama2C(int[] header)
    {
        int vocabulary = Math.Abs(header[5]);
        int headDim = header[0] / header[3];
        int layer = (2 * header[0]) + (2 * header[0] * header[0]) + (2 * headDim * header[4] * header[0]) + (3 * header[0] * header[1]);
        int tables = (vocabulary * header[0] * (header[5] < 0 ? 2 : 1)) + header[0] + (header[6] * headDim);
        byte[] bytes = new byte[28 + (4 * ((layer * header[2]) + tables))];
        MemoryMarshal.AsBytes<int>(header).CopyTo(bytes);
        Span<float> values = MemoryMarshal.Cast<byte, float>(bytes.AsSpan(28));
        for (int i = 0; i < values.Length; i++)
        {
            values[i] = i;
        }

        return bytes;
    }

    private static NamedTensor[] Named(LlamaModel model) =>
        [.. model.Parameters.Select(static parameter => new NamedTensor(parameter.Name, parameter.Values, parameter.IsVector))];

    private void RequireRefusal(byte[] bytes)
    {
        File.WriteAllBytes(_folder["bad.bin"], bytes);
        long before = GC.GetAllocatedBytesForCurrentThread();
        string message = Assert.Throws<UserErrorException>(() => ModelSource.Open(_folder["bad.bin"], Fail)).Message;
        Assert.True(GC.GetAllocatedBytesForCurrentThread() - before < 100_000);
        Assert.StartsWith(_folder["bad.bin"], message, StringComparison.Ordinal);
    }

    private LlamaModel Random(ModelConfig config)
    {
        LlamaModel model = LlamaModel.Allocate(config, _backend, trains: false);
        var random = new Random(1);
        foreach (Parameter parameter in model.Parameters)
        {
            foreach (ref float value in parameter.Values.HostSpan<float>())
            {
                value = (random.NextSingle() * 2) - 1;
            }
        }

        return model;
    }

    private string Refusal() => Assert.Throws<UserErrorException>(() => ModelSource.Open(_folder.Path, Fail)).Message;

    private void Write(ModelConfig config, NamedTensor[] tensors)
    {
        File.WriteAllText(_folder["config.json"], HuggingFaceConfig.Write(config, DType.F32, 1, 2));
        Safetensors.Write(_folder["model.safetensors"], _backend, tensors);
    }

    // Two files, each in a type of its own, or both in the one.
    private void WriteSharded(LlamaModel model, params DType[] types)
    {
        NamedTensor[] all = Named(model);
        NamedTensor[][] shards = [all[..7], all[7..]];
        var map = new JsonObject();
        for (int s = 0; s < shards.Length; s++)
        {
            string name = $"model-{s + 1:D5}-of-{shards.Length:D5}.safetensors";
            Safetensors.Write(_folder[name], _backend, shards[s], storeAs: types[s % types.Length]);
            foreach (NamedTensor tensor in shards[s])
            {
                map[tensor.Name] = name;
            }
        }

        var index = new JsonObject { ["metadata"] = new JsonObject { ["total_size"] = 0 }, ["weight_map"] = map };
        File.WriteAllText(_folder["model.safetensors.index.json"], index.ToJsonString(), Encoding.UTF8); // With a byte-order mark, as some editors write it.
        File.WriteAllText(_folder["config.json"], HuggingFaceConfig.Write(model.Config, types[0], 1, 2));
    }
}
