using System.CommandLine;
using System.Globalization;
using System.Text.Json.Nodes;
using TinyLlama.Checkpoints;
using TinyLlama.Cli;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Inference;
using TinyLlama.Model;
using TinyLlama.Tests.Common;

namespace TinyLlama.Tests.Checkpoints;

/// <summary>Models to GGUF files and back.</summary>
public sealed class GgufExportTests : IDisposable
{
    // Layers enough for every rule of a mix, rows long enough for every type.
    private static readonly ModelConfig s_config = new()
    {
        VocabularySize = 400,
        ContextLength = 64,
        Layers = 11,
        Heads = 16,
        KeyValueHeads = 4,
        Channels = 256,
        Hidden = 256,
        RopeTheta = 5000,
        RopeFactor = 2,
    };

    private readonly TemporaryFolder _folder = new();

    public static TheoryData<string> Mixes => [.. GgufMix.All.Select(mix => mix.Name)];

    public void Dispose() => _folder.Dispose();

    [Theory]
    [MemberData(nameof(Mixes))]
    public void A_model_comes_back_with_its_shape_its_tokenizer_and_its_weights(string type)
    {
        BpeTokenizer tokenizer = SmallModel.Tokenizer(400);
        string run = SmallModel.Save(_folder["run"], s_config with { Layers = 2 }, tokenizer);
        Assert.Equal(0, Run(run, "--out", _folder["x.gguf"], "--type", type));
        using ModelSource original = ModelSource.Open(run, Assert.Fail);
        using ModelSource exported = ModelSource.Open(_folder["x.gguf"], Assert.Fail);
        Assert.Equal(original.Config, exported.Config);
        Assert.Equal(tokenizer.Hash, exported.LoadTokenizer()!.Hash);
        Assert.Equal(original.AddsBos, exported.AddsBos);
        double share = type switch { "f32" => 0, "f16" => 1e-3, "bf16" => 1e-2, "q8_0" => 0.01, "q6_k" => 0.03, "q5_k_m" => 0.06, _ => 0.12 };
        foreach (ModelTensor tensor in original.Tensors)
        {
            (float[] expected, float[] actual) = (Read(original, tensor), Read(exported, tensor));
            double error = Math.Sqrt(expected.Zip(actual, (a, b) => ((double)a - b) * (a - b)).Sum() / expected.Sum(a => (double)a * a));
            Assert.InRange(error, tensor.IsVector ? 0 : share / 10, tensor.IsVector ? 0 : share);
        }

        Assert.Empty(Directory.GetFiles(_folder.Path, "*.tmp"));
    }

    [Theory]
    [InlineData("f32")]
    [InlineData("q8_0")]
    [InlineData("q4_0")]
    public void The_tensors_of_an_exported_golden_are_the_goldens_byte_for_byte(string type)
    {
        // The goldens keep Q4_0 also for the head, where the mix takes another type.
        Assert.Equal(0, Run(SharedFiles.Require("goldens/gguf/tiny4-f32.gguf"), "--out", _folder["x.gguf"], "--type", type));
        using GgufFile expected = GgufFile.Open(SharedFiles.Require($"goldens/gguf/tiny4-{type}.gguf"));
        using GgufFile actual = GgufFile.Open(_folder["x.gguf"]);
        foreach (GgufEntry entry in expected.Entries.Where(entry => type != "q4_0" || entry.Name != "output.weight"))
        {
            GgufEntry other = actual.Entries.Single(candidate => candidate.Name == entry.Name);
            Assert.Equal((entry.Type, entry.ByteCount), (other.Type, other.ByteCount));
            Assert.True(expected.Bytes(entry, 0, (int)entry.ByteCount).SequenceEqual(actual.Bytes(other, 0, (int)other.ByteCount)), entry.Name);
        }
    }

    [Theory]
    [InlineData("q4_0", 11, 256, true)]
    [InlineData("q8_0", 2, 256, false)]
    [InlineData("q4_k_s", 17, 256, true)]
    [InlineData("q4_k_m", 11, 256, false)]
    [InlineData("q5_k_m", 17, 256, false)]
    [InlineData("q6_k", 2, 256, false)]
    [InlineData("q4_k_m", 11, 160, false)]
    [InlineData("q4_k_s", 11, 80, false)]
    [InlineData("q5_k_m", 11, 160, true)]
    [InlineData("q6_k", 2, 160, true)]
    public void Each_tensor_has_the_type_that_llama_cpp_chooses(string type, int layers, int hidden, bool tied)
    {
        LlamaCppLibrary library = LlamaCppLibrary.Load();
        ModelConfig config = s_config with { Layers = layers, Hidden = hidden, TiedEmbeddings = tied };
        string run = SmallModel.Save(_folder["run"], config, SmallModel.Tokenizer(400));
        Run(run, "--out", _folder["f32.gguf"]);
        Run(run, "--out", _folder["ours.gguf"], "--type", type);
        library.Quantize(_folder["f32.gguf"], _folder["theirs.gguf"], GgufMix.Find(type).FileType);
        Assert.Equal(Types("theirs.gguf"), Types("ours.gguf"));
    }

    [Fact]
    public void Rows_that_no_block_divides_fall_back_and_it_is_said()
    {
        ModelConfig config = s_config with { Layers = 1, Hidden = 80 };
        string run = SmallModel.Save(_folder["run"], config, tokenizer: null);
        using ModelSource source = ModelSource.Open(run, Assert.Fail);
        GgufExported exported = GgufExport.Write(_folder["x.gguf"], source, GgufMix.Find("q4_k_s"), tokenizer: null);
        Assert.Equal(["rows of 80 elements are no multiple of 256: stored in F16 instead of Q4_K (tensors: 1)"], exported.Notes);
        Assert.Equal(new FileInfo(_folder["x.gguf"]).Length, exported.ByteCount);
        Assert.InRange(exported.BitsPerWeight, 5, 7);
    }

    [Fact]
    public void To_quantize_what_is_quantized_is_done_with_a_word()
    {
        string run = SmallModel.Save(_folder["run"], s_config with { Layers = 1 }, tokenizer: null);
        Assert.Equal(0, Run(run, "--out", _folder["q8.gguf"], "--type", "q8_0"));
        using ModelSource source = ModelSource.Open(_folder["q8.gguf"], Assert.Fail);
        Assert.Empty(GgufExport.Write(_folder["same.gguf"], source, GgufMix.Find("q8_0"), tokenizer: null).Notes);
        Assert.Contains("is quantized already", GgufExport.Write(_folder["q4.gguf"], source, GgufMix.Find("q4_0"), tokenizer: null).Notes[0], StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("x.gguf")]
    [InlineData("folder")]
    public void A_file_that_is_not_all_there_is_said_to_be_cut_off(string name)
    {
        string run = SmallModel.Save(_folder["run"], s_config with { Layers = 1 }, tokenizer: null);
        Assert.Equal(0, Run(run, "--out", _folder[name]));
        string file = File.Exists(_folder[name]) ? _folder[name] : Path.Combine(_folder[name], "model.safetensors");
        using (var stream = new FileStream(file, FileMode.Open))
        {
            stream.SetLength(stream.Length * 2 / 3);
        }

        string message = Assert.Throws<UserErrorException>(() => ModelSource.Open(_folder[name], Assert.Fail)).Message;
        Assert.StartsWith($"{file}: tensor '", message, StringComparison.Ordinal);
        Assert.EndsWith("cut off or damaged", message, StringComparison.Ordinal);
    }

    [Fact]
    public void Ids_beyond_the_tokenizer_and_the_chat_template_are_kept()
    {
        BpeTokenizer tokenizer = SmallModel.Tokenizer(300);
        string run = SmallModel.Save(_folder["run"], s_config with { Layers = 1 }, tokenizer);
        Assert.Equal(0, Run(run, "--out", _folder["hf"]));
        string settings = Path.Combine(_folder["hf"], "tokenizer_config.json");
        JsonObject keys = JsonNode.Parse(File.ReadAllText(settings))!.AsObject();
        keys["chat_template"] = new JsonArray(
            new JsonObject { ["name"] = "tools", ["template"] = "a" }, new JsonObject { ["name"] = "default", ["template"] = "{{ messages }}" });
        keys["add_bos_token"] = false;
        File.WriteAllText(settings, keys.ToJsonString());

        Assert.Equal(0, Run(_folder["hf"], "--out", _folder["x.gguf"], "--type", "q8_0"));
        using ModelSource exported = ModelSource.Open(_folder["x.gguf"], Assert.Fail);
        Assert.Equal("{{ messages }}", exported.ChatTemplate);
        Assert.False(exported.AddsBos);
        BpeTokenizer read = exported.LoadTokenizer()!;
        Assert.Equal(400, read.VocabularySize);
        (List<int> expected, List<int> actual) = ([], []);
        tokenizer.Encode("the old river [PAD399]", expected);
        read.Encode("the old river [PAD399]", actual);
        Assert.Equal(expected, actual);
        using GgufFile file = GgufFile.Open(_folder["x.gguf"]);
        Assert.Equal(Enumerable.Repeat((long)PieceKind.Unused, 100), file.Value<long[]>("tokenizer.ggml.token_type")[300..]);
        File.WriteAllText(Path.Combine(_folder["hf"], "chat_template.jinja"), "{{ 1 }}");
        using ModelSource folder = ModelSource.Open(_folder["hf"], Assert.Fail);
        Assert.Equal("{{ 1 }}", folder.ChatTemplate);
    }

    [Fact]
    public void A_file_that_is_there_stays_unless_forced()
    {
        string run = SmallModel.Save(_folder["run"], s_config with { Layers = 1 }, tokenizer: null);
        File.WriteAllText(_folder["x.gguf"], "mine");
        string message = Assert.Throws<UserErrorException>(() => Run(run, "--out", _folder["x.gguf"])).Message;
        Assert.Contains("is there already", message, StringComparison.Ordinal);
        Assert.Equal("mine", File.ReadAllText(_folder["x.gguf"]));
        Directory.CreateDirectory(_folder["folder"]);
        Assert.Throws<UserErrorException>(() => Run(run, "--out", _folder["folder"], "--format", "gguf"));
        message = Assert.Throws<UserErrorException>(() => Run(run, "--out", _folder["x.bin"], "--format", "gguf")).Message;
        Assert.Contains($"name it {_folder["x.gguf"]}", message, StringComparison.Ordinal);
        Assert.False(File.Exists(_folder["x.bin"]));
        Assert.Equal(0, Run(run, "--out", _folder["x.gguf"], "--force", "--json"));
        message = Assert.Throws<UserErrorException>(() => LanguageModel.Load(_folder["x.gguf"])).Message;
        Assert.Contains("has no tokenizer; export it again", message, StringComparison.Ordinal);
    }

    [Fact]
    public void A_quantized_type_needs_a_file_of_blocks()
    {
        string run = SmallModel.Save(_folder["run"], s_config with { Layers = 1 }, tokenizer: null);
        string message = Assert.Throws<UserErrorException>(() => Run(run, "--out", _folder["out"], "--type", "q4_0")).Message;
        Assert.Contains("need --format gguf", message, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData(float.NaN, "q4_k_m")]
    [InlineData(float.PositiveInfinity, "q8_0")]
    [InlineData(7e4f, "f16")]
    [InlineData(-7e4f, "q6_k")]
    public void A_weight_beyond_its_type_is_refused_and_nothing_is_left(float weight, string type)
    {
        string run = SmallModel.Save(_folder["run"], s_config with { Layers = 1 }, tokenizer: null, model =>
            model.Backend.Write(model.Model.Parameters[2].Values.Elements(300, 1), [weight]));
        string message = Assert.Throws<UserErrorException>(() => Run(run, "--out", _folder["x.gguf"], "--type", type)).Message;
        Assert.Contains("tensor 'model.layers.0.self_attn.q_proj.weight': a weight of", message, StringComparison.Ordinal);
        Assert.Single(Directory.GetFileSystemEntries(_folder.Path));
    }

    [Fact]
    public void A_tokenizer_that_the_file_cannot_express_is_refused()
    {
        BpeModel model = SmallModel.Tokenizer(300).Model;
        var tokenizer = new BpeTokenizer(model with { RemoveExtraWhitespace = true });
        using ModelSource source = ModelSource.Open(SmallModel.Save(_folder["run"], s_config with { Layers = 1 }, tokenizer: null), Assert.Fail);
        string message = Assert.Throws<UserErrorException>(
            () => GgufExport.Write(_folder["x.gguf"], source, GgufMix.Find("f16"), tokenizer)).Message;
        Assert.Contains("cannot be written to a GGUF file: it normalizes text", message, StringComparison.Ordinal);
        Assert.Single(Directory.GetFileSystemEntries(_folder.Path));
    }

    [Fact]
    public void A_full_disk_leaves_nothing()
    {
        using SmallDisk disk = SmallDisk.Mount(_folder["disk"], kilobytes: 256);
        string run = SmallModel.Save(_folder["run"], s_config with { Layers = 1 }, tokenizer: null);
        Assert.Throws<IOException>(() => Run(run, "--out", Path.Combine(disk.Path, "x.gguf")));
        Assert.Empty(Directory.GetFileSystemEntries(disk.Path));
    }

    [Fact]
    public void Memory_does_not_grow_with_the_model()
    {
        long Allocated(int layers)
        {
            string run = SmallModel.Save(_folder[layers.ToString(CultureInfo.InvariantCulture)], s_config with { Layers = layers, Hidden = 4096 }, tokenizer: null);
            using ModelSource source = ModelSource.Open(run, Assert.Fail);
            long before = GC.GetAllocatedBytesForCurrentThread();
            GgufExport.Write(run + ".gguf", source, GgufMix.Find("q8_0"), tokenizer: null);
            return GC.GetAllocatedBytesForCurrentThread() - before;
        }

        Allocated(1);
        long small = Allocated(2);
        Assert.InRange(Allocated(8), 0, small + (1 << 20));
    }

    private static int Run(params string[] arguments)
    {
        var configuration = new InvocationConfiguration { EnableDefaultExceptionHandler = false, Output = TextWriter.Null, Error = TextWriter.Null };
        return ExportCommand.Create().Parse(arguments).Invoke(configuration);
    }

    private static float[] Read(ModelSource source, ModelTensor tensor)
    {
        float[] values = new float[tensor.Count];
        source.Read(values, tensor.Name, 0);
        return values;
    }

    private string[] Types(string name)
    {
        using GgufFile file = GgufFile.Open(_folder[name]);
        return [.. file.Entries.Select(entry => $"{entry.Name} {entry.Type}").Order(StringComparer.Ordinal)];
    }
}
