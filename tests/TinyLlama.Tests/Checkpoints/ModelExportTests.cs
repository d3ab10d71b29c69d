using System.CommandLine;
using System.Text.Json.Nodes;
using TinyLlama.Checkpoints;
using TinyLlama.Cli;
using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Tests.Common;

namespace TinyLlama.Tests.Checkpoints;

/// <summary>Models of other programs to checkpoints and back, through the verbs and the library.</summary>
public sealed class ModelExportTests : IDisposable
{
    private static readonly string[] s_files =
    [
        "config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json",
    ];

    private readonly TemporaryFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Fact]
    public void A_llama2c_model_goes_to_a_run_and_to_a_Hugging_Face_folder_bit_for_bit()
    {
        string stories = SharedFiles.Require("oracles/stories260K/stories260K.bin");
        Assert.Equal(0, Run(ImportCommand.Create(), stories, "--out", _folder["run"]));
        Assert.Equal(0, Run(ExportCommand.Create(), _folder["run"], "--out", _folder["out"]));
        Assert.Equal(s_files, Names("out"));
        Assert.Empty(TrainingCheckpoint.Verify(Path.Combine(_folder["run"], "checkpoints", "step-00000000")));

        using ModelSource original = ModelSource.Open(stories, Assert.Fail);
        using ModelSource exported = ModelSource.Open(_folder["out"], Assert.Fail);
        Assert.Equal(original.Config, exported.Config);
        foreach (ModelTensor tensor in original.Tensors)
        {
            Assert.Equal(Read(original, tensor), Read(exported, tensor));
        }

        JsonNode config = JsonNode.Parse(File.ReadAllText(Path.Combine(_folder["out"], "config.json")))!;
        Assert.Equal(1, config["bos_token_id"]!.GetValue<int>());
        Assert.Equal(2, config["eos_token_id"]!.GetValue<int>());
        Assert.Equal("float32", config["torch_dtype"]!.GetValue<string>());
        Assert.True(config["tie_word_embeddings"]!.GetValue<bool>());
        Assert.Equal(Tokenizer.Load(original.TokenizerPath!).Hash, Tokenizer.Load(_folder["out"]).Hash);
    }

    [Theory]
    [InlineData("bf16", "bfloat16", DType.BF16)]
    [InlineData("f16", "float16", DType.F16)]
    public void The_weights_are_stored_in_the_type_that_was_asked_for(string name, string torchName, DType type)
    {
        string stories = SharedFiles.Require("oracles/stories260K/stories260K.bin");
        Assert.Equal(0, Run(ExportCommand.Create(), stories, "--out", _folder["out"], "--dtype", name));
        JsonNode config = JsonNode.Parse(File.ReadAllText(Path.Combine(_folder["out"], "config.json")))!;
        Assert.Equal(torchName, config["torch_dtype"]!.GetValue<string>());
        using SafetensorsFile file = SafetensorsFile.Open(Path.Combine(_folder["out"], "model.safetensors"));
        Assert.All(file.Entries, entry => Assert.Equal(type, entry.ElementType));
        Assert.Equal("pt", file.Metadata["format"]);

        using ModelSource original = ModelSource.Open(stories, Assert.Fail);
        using ModelSource exported = ModelSource.Open(_folder["out"], Assert.Fail);
        float step = type == DType.BF16 ? 1f / 256 : 1f / 2048;
        foreach (ModelTensor tensor in original.Tensors)
        {
            foreach ((float exact, float rounded) in Read(original, tensor).Zip(Read(exported, tensor)))
            {
                Assert.Equal(exact, rounded, Math.Max(Math.Abs(exact) * step, 6e-8f));
            }
        }
    }

    [Fact]
    public void The_golden_model_has_no_tokenizer_and_is_exported_without()
    {
        string golden = Path.GetDirectoryName(SharedFiles.Require("goldens/llama-tiny/config.json"))!;
        Assert.Equal(0, Run(ExportCommand.Create(), golden, "--out", _folder["out"]));
        Assert.Equal(["config.json", "generation_config.json", "model.safetensors"], Names("out"));
    }

    [Fact]
    public void A_tokenizer_with_more_ids_than_the_model_is_refused()
    {
        string golden = Path.GetDirectoryName(SharedFiles.Require("goldens/llama-tiny/config.json"))!;
        string tokenizer = SharedFiles.Require("oracles/stories260K/tok512.bin");
        string message = Assert.Throws<UserErrorException>(
            () => Run(ExportCommand.Create(), golden, "--out", _folder["out"], "--tokenizer", tokenizer)).Message;
        Assert.Contains("512 ids, the model has 96", message, StringComparison.Ordinal);
        Assert.False(Directory.Exists(_folder["out"]));
    }

    [Fact]
    public void A_folder_that_is_not_empty_is_left_alone_unless_forced()
    {
        string golden = Path.GetDirectoryName(SharedFiles.Require("goldens/llama-tiny/config.json"))!;
        Directory.CreateDirectory(_folder["out"]);
        Assert.Equal(0, Run(ExportCommand.Create(), golden, "--out", _folder["out"]));
        File.WriteAllText(Path.Combine(_folder["out"], "notes.txt"), "mine");
        File.WriteAllText(Path.Combine(_folder["out"], "config.json"), "{}");
        string message = Assert.Throws<UserErrorException>(() => Run(ExportCommand.Create(), golden, "--out", _folder["out"])).Message;
        Assert.Contains("not empty", message, StringComparison.Ordinal);
        Assert.Throws<UserErrorException>(() => Run(ImportCommand.Create(), golden, "--out", _folder["out"]));

        Assert.Equal(0, Run(ExportCommand.Create(), golden, "--out", _folder["out"], "--force"));
        Assert.Equal("mine", File.ReadAllText(Path.Combine(_folder["out"], "notes.txt")));
        ModelSource.Open(_folder["out"], Assert.Fail).Dispose();
        Assert.Single(Directory.GetDirectories(_folder.Path));
    }

    [Fact]
    public void A_full_disk_leaves_no_half_of_a_folder()
    {
        using SmallDisk disk = SmallDisk.Mount(_folder["disk"], kilobytes: 256);
        string golden = Path.GetDirectoryName(SharedFiles.Require("goldens/llama-tiny/config.json"))!;
        Assert.Throws<IOException>(() => Run(ExportCommand.Create(), golden, "--out", Path.Combine(disk.Path, "out")));
        Assert.Empty(Directory.GetFileSystemEntries(disk.Path));
    }

    [Fact]
    public void Tokenizer_files_of_the_model_are_taken_as_they_are()
    {
        string stories = SharedFiles.Require("oracles/stories260K/stories260K.bin");
        Run(ExportCommand.Create(), stories, "--out", _folder["first"]);
        string config = Path.Combine(_folder["first"], "tokenizer_config.json");
        JsonObject keys = JsonNode.Parse(File.ReadAllText(config))!.AsObject();
        keys["chat_template"] = "{{ messages }}";
        File.WriteAllText(config, keys.ToJsonString());
        File.Delete(Path.Combine(_folder["first"], "tokenizer.json"));
        Run(ExportCommand.Create(), _folder["first"], "--out", _folder["second"]);
        Assert.Equal(s_files, Names("second"));
        Assert.Equal(File.ReadAllText(config), File.ReadAllText(Path.Combine(_folder["second"], "tokenizer_config.json")));
    }

    private static int Run(Command command, params string[] arguments)
    {
        var configuration = new InvocationConfiguration
        {
            EnableDefaultExceptionHandler = false,
            Output = TextWriter.Null,
            Error = TextWriter.Null,
        };
        return command.Parse(arguments).Invoke(configuration);
    }

    private static float[] Read(ModelSource source, ModelTensor tensor)
    {
        float[] values = new float[tensor.Count];
        source.Read(values, tensor.Name, 0);
        return values;
    }

    private string[] Names(string folder) =>
        [.. Directory.GetFileSystemEntries(_folder[folder]).Select(static path => Path.GetFileName(path)!).Order(StringComparer.Ordinal)];
}
