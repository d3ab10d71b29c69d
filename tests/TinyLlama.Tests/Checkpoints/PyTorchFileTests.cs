using System.Diagnostics;
using System.Runtime.InteropServices;
using System.Text.Json.Nodes;
using TinyLlama.Checkpoints;
using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Model;
using TinyLlama.Tests.Common;

namespace TinyLlama.Tests.Checkpoints;

/// <summary>Files of torch.save: made here, made by PyTorch, damaged and hostile.</summary>
public sealed class PyTorchFileTests : IDisposable
{
    private static readonly ModelConfig s_tiny = new()
    {
        VocabularySize = 11,
        ContextLength = 8,
        Layers = 1,
        Heads = 2,
        KeyValueHeads = 1,
        Channels = 8,
        Hidden = 6,
    };

    private readonly TemporaryFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Theory]
    [InlineData("test.pt", "test", new long[] { 2, 4 })]
    [InlineData("test_with_key.pt", "test", new long[] { 2, 4 })]
    [InlineData("fortran_tensor_3d.pth", "tensor_fortran", new long[] { 2, 3, 4 })]
    public void Files_of_others_are_read(string name, string tensor, long[] shape)
    {
        using PyTorchFile file = PyTorchFile.Open(SharedFiles.Require($"oracles/torch-pickle/{name}"));
        var entry = (PyTorchEntry)Assert.Single(file.Entries);
        Assert.Equal((tensor, "I64", 8), (entry.Name, entry.Type, entry.ElementBytes));
        Assert.Equal(shape, entry.Shape);
        Assert.Equal(name != "fortran_tensor_3d.pth", entry.IsContiguous);
        long[] values = new long[entry.Count];
        file.ReadBytes(MemoryMarshal.AsBytes(values.AsSpan()), entry, 0);
        Assert.Equal(Enumerable.Range(1, values.Length).Select(static value => (long)value), values);
    }

    [Theory]
    [InlineData(DType.F32)]
    [InlineData(DType.BF16)]
    [InlineData(DType.F16)]
    [InlineData(DType.F64)]
    public void A_model_is_read_in_every_type(DType type)
    {
        WriteConfig();
        File.WriteAllBytes(_folder["pytorch_model.bin"], StateDict(type, ModelTensors.Of(s_tiny)).Metadata().Bytes());
        AssertModel(_folder.Path, type == DType.F64 ? DType.F32 : type);
        AssertModel(_folder["pytorch_model.bin"], type == DType.F64 ? DType.F32 : type);
    }

    [Fact]
    public void A_model_that_lit_gpt_converted_is_read()
    {
        WriteConfig();
        File.WriteAllBytes(_folder["pytorch_model.bin"], StateDict(DType.F32, ModelTensors.Of(s_tiny), isOfLitGpt: true).Bytes());
        AssertModel(_folder.Path, DType.F32);
    }

    [Fact]
    public void A_model_in_several_files_is_read()
    {
        WriteConfig();
        ModelTensor[] all = [.. ModelTensors.Of(s_tiny)];
        var map = new JsonObject();
        foreach ((string name, ModelTensor[] tensors) in new[] { ("pytorch_model-00001-of-00002.bin", all[..5]), ("pytorch_model-00002-of-00002.bin", all[5..]) })
        {
            File.WriteAllBytes(_folder[name], StateDict(DType.F32, tensors).Bytes());
            foreach (ModelTensor tensor in tensors)
            {
                map[tensor.Name] = name;
            }
        }

        File.WriteAllText(_folder["pytorch_model.bin.index.json"], new JsonObject { ["weight_map"] = map }.ToJsonString());
        AssertModel(_folder.Path, DType.F32);
    }

    [Fact]
    public void Tensors_may_share_a_storage_lie_across_it_and_be_nested()
    {
        float[] values = [.. Enumerable.Range(0, 24).Select(static value => (float)value)];
        TorchArchive archive = new TorchArchive().Emit((byte)'}').Begin().Text("step").Number(1L << 40).Text("model").Dictionary().Begin();
        archive.Text("whole").Tensor("FloatStorage", TorchArchive.Encode(values, DType.F32), 4, [2, 3, 4]);
        archive.Text("part").Tensor("FloatStorage", [], 4, [2, 2], [12, 1], offset: 5, storage: "0", count: 24);
        archive.Text("transposed").Tensor("FloatStorage", [], 4, [4, 3], [1, 4], offset: 12, storage: "0", count: 24);
        File.WriteAllBytes(_folder["x.pt"], archive.End().End().Bytes());
        using PyTorchFile file = PyTorchFile.Open(_folder["x.pt"]);
        Assert.Equal(["whole", "part", "transposed"], file.Entries.Select(static entry => entry.Name));
        Assert.Equal(values, Read(file, "whole"));
        Assert.Equal([5, 6, 17, 18], Read(file, "part"));
        Assert.Equal([12, 16, 20, 13, 17, 21, 14, 18, 22, 15, 19, 23], Read(file, "transposed"));
        float[] middle = new float[5];
        file.Read(middle, "transposed", 4);
        Assert.Equal([17, 21, 14, 18, 22], middle);
    }

    [Fact]
    public void The_64_bit_directory_of_large_files_is_read()
    {
        WriteConfig();
        byte[] bytes = TorchArchive.With64BitDirectory(StateDict(DType.F32, ModelTensors.Of(s_tiny)).Bytes());
        File.WriteAllBytes(_folder["pytorch_model.bin"], bytes);
        AssertModel(_folder.Path, DType.F32);
        bytes[^(22 + 20 + 8)] ^= 1;
        Assert.Contains("zip directory is damaged", AssertRefused(bytes), StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("global", "its pickle, at byte 2, names os.system")]
    [InlineData("protocol", "is of protocol 6; 2 to 5")]
    [InlineData("stacked", "names os.system")]
    [InlineData("operation", "at byte 2, has the operation 0x69")]
    [InlineData("call", "calls torch.FloatStorage with other arguments")]
    [InlineData("recall", "recalls value 7")]
    [InlineData("text", "goes on beyond the end")]
    [InlineData("mark", "up to a mark that is not there")]
    [InlineData("empty", "takes a value that is not there")]
    [InlineData("value", "holds no dictionary of tensors")]
    [InlineData("no-tensors", "has no tensors, and none under 'model'")]
    [InlineData("other", "'b' in its dictionary of tensors is none")]
    [InlineData("twice", "has the tensor 'a' twice")]
    [InlineData("storage", "the storage of 'a' is missing or not of 24 elements")]
    [InlineData("length", "the storage of 'a' is missing or not of 25 elements")]
    [InlineData("offset", "'a' does not lie in its storage")]
    [InlineData("strides", "'a' does not lie in its storage")]
    [InlineData("shared", "'a' does not lie in its storage")]
    [InlineData("overflow", "'a' does not lie in its storage")]
    [InlineData("negative", "'a' does not lie in its storage")]
    [InlineData("compressed", "is compressed or encrypted")]
    [InlineData("byte-order", "not little-endian")]
    [InlineData("two", "with 2 files data.pkl")]
    [InlineData("old", "before 1.6")]
    [InlineData("nothing", "not a PyTorch file")]
    public void What_is_wrong_is_named(string wrong, string message)
    {
        byte[] data = new byte[96];
        byte[] bytes = wrong switch
        {
            "global" => new TorchArchive().Name("os", "system").Text("true").Emit(0x85).Emit((byte)'R').Bytes(),
            "protocol" => new TorchArchive().Emit(0x80, 6).Bytes(),
            "stacked" => new TorchArchive { IsOfLitGpt = true }.Name("os", "system").Text("true").Emit(0x85).Emit((byte)'R').Bytes(),
            "operation" => new TorchArchive().Emit((byte)'i').Bytes(),
            "call" => new TorchArchive().Name("torch", "FloatStorage").Emit(")R"u8).Bytes(),
            "recall" => new TorchArchive().Emit((byte)'h', 7).Bytes(),
            "text" => new TorchArchive().Emit((byte)'X', 255, 255, 255, 255).Bytes(),
            "mark" => new TorchArchive().Emit((byte)'t').Bytes(),
            "empty" => new TorchArchive().Number(1).Begin().Emit((byte)'q', 0).Bytes(),
            "value" => new TorchArchive().Number(1).Bytes(),
            "no-tensors" => new TorchArchive().Dictionary().Begin().Text("model").Number(1).End().Bytes(),
            "other" => new TorchArchive().Dictionary().Begin().Text("a").Tensor("FloatStorage", data, 4, [24]).Text("b").Number(1).End().Bytes(),
            "twice" => new TorchArchive().Dictionary().Begin().Text("a").Tensor("FloatStorage", data, 4, [24]).Text("a").Tensor("FloatStorage", data, 4, [24]).End().Bytes(),
            "storage" => One(shape: [24], storage: "5", count: 24),
            "length" => One(shape: [24], count: 25),
            "offset" => One(shape: [24], offset: 1),
            "strides" => One(shape: [4, 5], strides: [6, 2]),
            "shared" => One(shape: [5, 5], strides: [0, 1]),
            "overflow" => One(shape: [1L << 62, 1L << 62, 2], strides: [1L << 62, 4, 1]),
            "negative" => One(shape: [4], strides: [-1], offset: 3),
            "compressed" => new TorchArchive { Compresses = true }.Dictionary().Bytes(),
            "byte-order" => new TorchArchive().Dictionary().File("byteorder", [.. "big"u8]).Bytes(),
            "two" => new TorchArchive().Dictionary().File("x/data.pkl", [1]).Bytes(),
            "old" => [0x80, 0x02, 0x8A, 0x0A],
            _ => [],
        };
        Assert.Contains(message, AssertRefused(bytes), StringComparison.Ordinal);

        byte[] One(long[] shape, long[]? strides = null, long offset = 0, string? storage = null, long? count = null) =>
            new TorchArchive().Dictionary().Begin().Text("a").Tensor("FloatStorage", data, 4, shape, strides, offset, storage, count).End().Bytes();
    }

    [Fact]
    public void A_file_cut_off_anywhere_is_refused_in_one_line()
    {
        byte[] whole = StateDict(DType.F32, ModelTensors.Of(s_tiny)).Metadata().Bytes();
        for (int length = 0; length < whole.Length; length += length < 500 || length > whole.Length - 500 ? 1 : 97)
        {
            AssertRefused(whole[..length]);
        }
    }

    [Theory]
    [InlineData(2)]
    [InlineData(4)]
    [InlineData(5)]
    public void What_PyTorch_itself_saves_is_read(int protocol)
    {
        const string Python = "/usr/bin/python3";
        const string Script = """
            import sys, torch, collections
            torch.manual_seed(1)
            layer = torch.nn.Linear(5, 3)
            state = layer.state_dict()
            state["transposed"] = torch.arange(6.).reshape(2, 3).t()
            state["part"] = torch.arange(10).to(torch.bfloat16)[3:7]
            state["half"] = torch.arange(40000).to(torch.float16)
            state["scalar"] = torch.tensor(2.5, dtype=torch.float64)
            for i in range(300):
                state["many.%d" % i] = torch.tensor([float(i)])
            torch.save(state, sys.argv[1], pickle_protocol=int(sys.argv[2]))
            for key in state:
                print(key, " ".join(repr(x) for x in state[key].to(torch.float32).flatten().tolist()[:50]))
            """;
        Assert.SkipUnless(File.Exists(Python), $"needs {Python} with PyTorch");
        var start = new ProcessStartInfo(Python, ["-c", Script, _folder["x.pt"], $"{protocol}"]) { RedirectStandardOutput = true, RedirectStandardError = true, UseShellExecute = false };
        using Process process = Process.Start(start)!;
        string[] lines = process.StandardOutput.ReadToEnd().Split('\n', StringSplitOptions.RemoveEmptyEntries);
        string errors = process.StandardError.ReadToEnd();
        process.WaitForExit();
        Assert.SkipWhen(errors.Contains("No module named 'torch'", StringComparison.Ordinal), $"needs {Python} with PyTorch");
        Assert.True(process.ExitCode == 0, errors);
        using PyTorchFile file = PyTorchFile.Open(_folder["x.pt"]);
        Assert.Equal(lines.Select(static line => line.Split(' ')[0]), file.Entries.Select(static entry => entry.Name));
        foreach (string[] words in lines.Select(static line => line.Split(' ')))
        {
            Assert.Equal(
                words[1..].Select(static word => (float)double.Parse(word, System.Globalization.CultureInfo.InvariantCulture)),
                Read(file, words[0]).Take(50));
        }
    }

    private static float Value(int tensor, int element) => ((tensor * 5) + element) % 32;

    private static TorchArchive StateDict(DType type, IReadOnlyList<ModelTensor> tensors, bool isOfLitGpt = false)
    {
        TorchArchive archive = new TorchArchive { IsOfLitGpt = isOfLitGpt }.Dictionary().Begin();
        foreach (ModelTensor tensor in tensors)
        {
            int id = ModelTensors.Of(s_tiny).ToList().IndexOf(tensor);
            byte[] data = TorchArchive.Encode(Enumerable.Range(0, (int)tensor.Count).Select(element => Value(id, element)), type);
            long[] shape = tensor.IsVector ? [tensor.Columns] : [tensor.Rows, tensor.Columns];
            archive.Text(tensor.Name).Tensor(TorchArchive.StorageName(type), data, type.ByteCount(), shape);
        }

        return archive.End();
    }

    private static float[] Read(PyTorchFile file, string name)
    {
        float[] values = new float[file.Entries.Single(entry => entry.Name == name).Count];
        file.Read(values, name, 0);
        return values;
    }

    private static void AssertModel(string path, DType type)
    {
        using ModelSource source = ModelSource.Open(path, Assert.Fail);
        Assert.Equal(s_tiny, source.Config);
        Assert.Equal(type, source.StoredType);
        foreach ((ModelTensor tensor, int id) in source.Tensors.Select(static (tensor, id) => (tensor, id)))
        {
            float[] values = new float[tensor.Count];
            source.Read(values, tensor.Name, 0);
            Assert.Equal(Enumerable.Range(0, values.Length).Select(element => Value(id, element)), values);
        }
    }

    private void WriteConfig() => File.WriteAllText(_folder["config.json"], HuggingFaceConfig.Write(s_tiny, DType.F32, 1, 2));

    private string AssertRefused(byte[] bytes)
    {
        string path = _folder["x.pt"];
        File.WriteAllBytes(path, bytes);
        string message = Assert.Throws<UserErrorException>(() => PyTorchFile.Open(path).Dispose()).Message;
        Assert.StartsWith(path + ": ", message, StringComparison.Ordinal);
        Assert.DoesNotContain('\n', message);
        return message;
    }
}
