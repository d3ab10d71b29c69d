using System.CommandLine;
using System.Globalization;
using System.Runtime.InteropServices;
using TinyLlama.Checkpoints;
using TinyLlama.Cli;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Inference;
using TinyLlama.Model;
using TinyLlama.Tests.Common;

namespace TinyLlama.Tests.Checkpoints;

/// <summary>Models to files of llama2.c and back.</summary>
public sealed class Llama2CExportTests : IDisposable
{
    private static readonly ModelConfig s_config = new()
    {
        VocabularySize = 400,
        ContextLength = 64,
        Layers = 2,
        Heads = 4,
        KeyValueHeads = 2,
        Channels = 32,
        Hidden = 48,
    };

    private readonly TemporaryFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Fact]
    public void The_files_of_llama2c_come_back_byte_for_byte_through_a_run()
    {
        string stories = SharedFiles.Require("oracles/stories260K/stories260K.bin");
        Assert.Equal(0, Run(ImportCommand.Create(), stories, "--out", _folder["run"]));
        Assert.Equal(0, Export(_folder["run"], "--out", _folder["out"], "--format", "llama2c"));
        Assert.Equal(["model.bin", "tokenizer.bin"], Names("out"));
        string tokenizer = SharedFiles.Require("oracles/stories260K/tok512.bin");
        Assert.Equal(File.ReadAllBytes(tokenizer), File.ReadAllBytes(Path.Combine(_folder["out"], "tokenizer.bin")));

        // The head is tied: the tables of cosines and sines (512 positions, 4 pairs) end the file. Theirs are PyTorch's.
        const int tables = 2 * 512 * 4 * sizeof(float);
        byte[] expected = File.ReadAllBytes(stories);
        byte[] actual = File.ReadAllBytes(Path.Combine(_folder["out"], "model.bin"));
        Assert.Equal(expected.Length, actual.Length);
        Assert.True(expected.AsSpan()[..^tables].SequenceEqual(actual.AsSpan()[..^tables]));
        foreach ((float theirs, float ours) in Singles(expected, tables).Zip(Singles(actual, tables)))
        {
            Assert.Equal(theirs, ours, 3e-5f);
        }

        using LanguageModel model = LanguageModel.Load(_folder["out"]);
        Assert.Equal(
            File.ReadAllText(SharedFiles.Require("oracles/stories260K/expected_stdout_200.txt")),
            model.Generate("", new() { Temperature = 0, MaxTokens = 200 }).ToString());
    }

    [Theory]
    [InlineData(true, 400)]
    [InlineData(false, 400)]
    [InlineData(false, 300)]
    public void A_model_comes_back_with_its_shape_its_weights_and_its_tokenizer(bool tied, int vocabulary)
    {
        BpeTokenizer tokenizer = SmallModel.Tokenizer(vocabulary);
        string run = SmallModel.Save(_folder["run"], s_config with { TiedEmbeddings = tied }, tokenizer);
        Assert.Equal(0, Export(run, "--out", _folder["x.bin"], "--json"));
        using ModelSource original = ModelSource.Open(run, Assert.Fail);
        using ModelSource exported = ModelSource.Open(_folder["x.bin"], Assert.Fail);
        Assert.Equal(original.Config, exported.Config);
        foreach (ModelTensor tensor in original.Tensors)
        {
            Assert.Equal(Read(original, tensor), Read(exported, tensor));
        }

        Assert.Equal(_folder["tokenizer.bin"], exported.TokenizerPath);
        BpeTokenizer read = exported.LoadTokenizer()!;
        Assert.Equal(400, read.VocabularySize);
        (List<int> expected, List<int> actual) = ([], []);
        tokenizer.Encode("the old river, naïve\n [PAD399]", expected);
        read.Encode("the old river, naïve\n [PAD399]", actual);
        Assert.Equal(expected, actual);
        Assert.Equal(tokenizer.Model.Pieces, read.Model.Pieces.Take(vocabulary));
    }

    [Theory]
    [InlineData("rope_theta is 5000")]
    [InlineData("rms_norm_eps is 1E-06")]
    [InlineData("rotary embedding is scaled")]
    public void A_model_that_run_c_would_compute_otherwise_is_refused(string said)
    {
        ModelConfig config = said[..4] switch
        {
            "rope" => s_config with { RopeTheta = 5000 },
            "rms_" => s_config with { NormEpsilon = 1e-6f },
            _ => s_config with { RopeFactor = 2 },
        };
        string run = SmallModel.Save(_folder["run"], config, tokenizer: null);
        string message = Assert.Throws<UserErrorException>(() => Export(run, "--out", _folder["x.bin"])).Message;
        Assert.Contains(said, message, StringComparison.Ordinal);
        Assert.Single(Directory.GetFileSystemEntries(_folder.Path));
    }

    [Fact]
    public void Only_single_precision_is_written()
    {
        string run = SmallModel.Save(_folder["run"], s_config, tokenizer: null);
        string message = Assert.Throws<UserErrorException>(() => Export(run, "--out", _folder["x.bin"], "--type", "q8_0")).Message;
        Assert.Contains("hold f32", message, StringComparison.Ordinal);
        Assert.Equal(0, Export(run, "--out", _folder["x.bin"], "--type", "f32"));
        message = Assert.Throws<UserErrorException>(() => LanguageModel.Load(_folder["x.bin"])).Message;
        Assert.Contains("has no tokenizer; put its tokenizer.bin", message, StringComparison.Ordinal);
    }

    [Fact]
    public void Files_that_are_there_stay_unless_forced()
    {
        string run = SmallModel.Save(_folder["run"], s_config, SmallModel.Tokenizer(400));
        Directory.CreateDirectory(_folder["out"]);
        string tokenizer = Path.Combine(_folder["out"], "tokenizer.bin");
        File.WriteAllText(tokenizer, "mine");
        string message = Assert.Throws<UserErrorException>(() => Export(run, "--out", _folder["out"], "--format", "llama2c")).Message;
        Assert.Contains("tokenizer.bin: is there already", message, StringComparison.Ordinal);
        Assert.Throws<UserErrorException>(() => Export(run, "--out", tokenizer, "--force"));
        Assert.Equal(["tokenizer.bin"], Names("out"));
        Assert.Equal(0, Export(run, "--out", _folder["out"], "--format", "llama2c", "--force"));
        Assert.Equal(["model.bin", "tokenizer.bin"], Names("out"));
        Assert.Equal(400, Tokenizer.Load(tokenizer).VocabularySize);
    }

    [Fact]
    public void A_full_disk_leaves_nothing()
    {
        using SmallDisk disk = SmallDisk.Mount(_folder["disk"], kilobytes: 64);
        string run = SmallModel.Save(_folder["run"], s_config, SmallModel.Tokenizer(400));
        Assert.Throws<IOException>(() => Export(run, "--out", Path.Combine(disk.Path, "x.bin")));
        Assert.Empty(Directory.GetFileSystemEntries(disk.Path));
    }

    [Fact]
    public void Memory_does_not_grow_with_the_model()
    {
        long Allocated(int layers)
        {
            string name = _folder[layers.ToString(CultureInfo.InvariantCulture)];
            string run = SmallModel.Save(name, s_config with { Layers = layers, Channels = 256, Hidden = 4096 }, tokenizer: null);
            using ModelSource source = ModelSource.Open(run, Assert.Fail);
            long before = GC.GetAllocatedBytesForCurrentThread();
            Llama2CExport.Write(name + ".bin", source, tokenizer: null);
            return GC.GetAllocatedBytesForCurrentThread() - before;
        }

        Allocated(1);
        long small = Allocated(2);
        Assert.InRange(Allocated(8), 0, small + (1 << 20));
    }

    private static int Export(params string[] arguments) => Run(ExportCommand.Create(), arguments);

    private static int Run(Command command, params string[] arguments)
    {
        var configuration = new InvocationConfiguration { EnableDefaultExceptionHandler = false, Output = TextWriter.Null, Error = TextWriter.Null };
        return command.Parse(arguments).Invoke(configuration);
    }

    private static float[] Read(ModelSource source, ModelTensor tensor)
    {
        float[] values = new float[tensor.Count];
        source.Read(values, tensor.Name, 0);
        return values;
    }

    private static float[] Singles(byte[] file, int lastBytes) => MemoryMarshal.Cast<byte, float>(file.AsSpan()[^lastBytes..]).ToArray();

    private string[] Names(string folder) =>
        [.. Directory.GetFileSystemEntries(_folder[folder]).Select(static path => Path.GetFileName(path)!).Order(StringComparer.Ordinal)];
}
