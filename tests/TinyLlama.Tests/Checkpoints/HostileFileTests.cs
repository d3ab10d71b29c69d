using System.Globalization;
using System.Text;
using System.Text.Json.Nodes;
using TinyLlama.Checkpoints;
using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Model;
using TinyLlama.Tests.Common;

namespace TinyLlama.Tests.Checkpoints;

/// <summary>
/// Files of every format that a model comes in, altered at random from seeds: each is read, or refused as a mistake of the
/// user, in bounded memory. <c>TINYLLAMA_FUZZ=N</c> makes it N times as many files.
/// </summary>
public sealed class HostileFileTests : IDisposable
{
    private const int Rounds = 4000;

    // What reading may allocate on the managed heap: tables of a fixed size, and some bytes for each byte of the files.
    private const long FixedBytes = 4 << 20;
    private const long BytesPerByte = 50;

    private const string Text = "The old river's bank wasn't wide; we'll see 1234 boats, they'RE long gone.\n\n\tif (x_1 >= 20) { return 'a'; }\r\n";

    private static readonly ModelConfig s_config = new()
    {
        VocabularySize = 300,
        ContextLength = 16,
        Layers = 2,
        Heads = 2,
        KeyValueHeads = 1,
        Channels = 32,
        Hidden = 32,
    };

    private readonly TemporaryFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Theory]
    [InlineData("gguf", "x.gguf")]
    [InlineData("gguf-parts", "x-00001-of-00003.gguf")]
    [InlineData("gguf-byte-level", "x.gguf")]
    [InlineData("safetensors", "")]
    [InlineData("checkpoint", "")]
    [InlineData("byte-level", "")]
    [InlineData("pytorch", "")]
    [InlineData("llama2c", "x.bin")]
    public void Altered_files_are_read_or_refused_in_bounded_memory(string kind, string name)
    {
        Make(kind);
        string[] paths = [.. Directory.EnumerateFiles(_folder.Path, "*", SearchOption.AllDirectories).Order(StringComparer.Ordinal)];
        byte[][] files = [.. paths.Select(File.ReadAllBytes)];
        Open(_folder[name]);
        int times = int.Parse(Environment.GetEnvironmentVariable("TINYLLAMA_FUZZ") ?? "1", CultureInfo.InvariantCulture);
        int refused = 0;
        for (int round = 0; round < Rounds * times; round++)
        {
            var random = new Random(round);
            int target = random.Next(files.Length);
            byte[] altered = Mutation.Apply(files[target], files[random.Next(files.Length)], random);
            File.WriteAllBytes(paths[target], altered);
            long before = GC.GetAllocatedBytesForCurrentThread();
            try
            {
                Open(_folder[name]);
            }
            catch (UserErrorException)
            {
                refused++;
            }
            catch (Exception e)
            {
                Assert.Fail($"{kind}, round {round}, {Path.GetFileName(paths[target])} altered: {e}");
            }

            long allocated = GC.GetAllocatedBytesForCurrentThread() - before;
            long bound = FixedBytes + (BytesPerByte * files.Sum(static file => (long)file.Length));
            Assert.True(allocated <= bound, $"{kind}, round {round}, {Path.GetFileName(paths[target])} altered: {allocated} bytes allocated, {bound} are the bound");
            File.WriteAllBytes(paths[target], files[target]);
        }

        // Both ends are reached: some alterations matter, some do not.
        Assert.InRange(refused, Rounds * times / 50, Rounds * times * 49 / 50);
    }

    private static void Open(string path)
    {
        using ModelSource source = ModelSource.Open(path, static _ => { });
        _ = source.ChatTemplate;
        if (source.LoadTokenizer() is { } tokenizer)
        {
            _ = source.AddsBos;
            List<int> ids = [];
            tokenizer.EncodeWithControls(Text, ids);
            _ = tokenizer.Decode([.. ids]);
        }

        foreach (ModelTensor tensor in source.Tensors)
        {
            source.Read(new float[Math.Min(tensor.Count, 100)], tensor.Name, tensor.Count - Math.Min(tensor.Count, 100));
            source.ReadRows(new byte[source.StorageOf(tensor.Name).RowBytes(tensor.Columns)], tensor, tensor.Rows - 1);
        }
    }

    private void Make(string kind)
    {
        switch (kind)
        {
            case "gguf":
                File.WriteAllBytes(_folder["x.gguf"], new GgufBuilder().Text("tokenizer.chat_template", "{{ messages }}").Bytes());
                break;
            case "gguf-parts":
                Range[] ranges = { ..0, ..4, 4.. };
                for (int i = 0; i < ranges.Length; i++)
                {
                    File.WriteAllBytes(_folder[$"x-{i + 1:00000}-of-00003.gguf"], GgufBuilder.Part(i, 3, ranges[i]));
                }

                break;
            case "gguf-byte-level":
                MakeByteLevel();
                using (ModelSource source = ModelSource.Open(_folder.Path, Assert.Fail))
                {
                    GgufExport.Write(_folder["x.gguf"], source, GgufMix.Find("q5_k_m"), source.LoadTokenizer());
                }

                KeepOnly("x.gguf");
                break;
            case "safetensors":
                MakeFolder(SmallModel.Tokenizer(s_config.VocabularySize));
                File.Delete(_folder["tokenizer.json"]);
                File.WriteAllText(_folder["tokenizer_config.json"], """{"chat_template": [{"name": "default", "template": "three"}], "add_bos_token": true}""");
                MakeIndex("model", "safetensors");
                break;
            case "checkpoint":
                SmallModel.Save(_folder.Path, s_config, SmallModel.Tokenizer(s_config.VocabularySize));
                break;
            case "byte-level":
                MakeByteLevel();
                break;
            case "pytorch":
                MakeFolder(tokenizer: null);
                MakeTorch();
                MakeIndex("pytorch_model", "bin");
                break;
            default:
                MakeLlama2C();
                break;
        }
    }

    private void MakeFolder(BpeTokenizer? tokenizer)
    {
        string run = SmallModel.Save(_folder["run"], s_config, tokenizer);
        foreach (string file in Directory.GetFiles(TrainingCheckpoint.List(run)[^1].Path))
        {
            File.Move(file, _folder[Path.GetFileName(file)]);
        }

        Directory.Delete(run, recursive: true);
    }

    private void MakeByteLevel()
    {
        MakeFolder(tokenizer: null);
        File.WriteAllText(_folder["tokenizer.json"], ByteLevelJson.Make("llama3", Text, s_config.VocabularySize - 256 - 3));
        File.WriteAllText(_folder["tokenizer_config.json"], """{"bos_token":"<|bos|>","eos_token":"<|eos|>"}""");
    }

    // All tensors in the one file, which the index names.
    private void MakeIndex(string name, string extension)
    {
        string file = $"{name}-00001-of-00001.{extension}";
        File.Move(_folder[$"{name}.{extension}"], _folder[file]);
        IEnumerable<KeyValuePair<string, JsonNode?>> map = ModelTensors.Of(s_config).Select(tensor => KeyValuePair.Create<string, JsonNode?>(tensor.Name, file));
        File.WriteAllText(_folder[$"{name}.{extension}.index.json"], new JsonObject { ["weight_map"] = new JsonObject(map) }.ToJsonString());
    }

    private void MakeTorch()
    {
        TorchArchive archive = new TorchArchive().Dictionary().Begin();
        foreach (ModelTensor tensor in ModelTensors.Of(s_config))
        {
            byte[] data = new byte[tensor.Count * 2];
            long[] shape = tensor.IsVector ? [tensor.Columns] : [tensor.Rows, tensor.Columns];
            archive.Text(tensor.Name).Tensor("BFloat16Storage", data, 2, shape);
        }

        File.WriteAllBytes(_folder["pytorch_model.bin"], archive.End().Metadata().Bytes());
        KeepOnly("pytorch_model.bin", "config.json");
    }

    private void MakeLlama2C()
    {
        using (var model = new BinaryWriter(File.Create(_folder["x.bin"])))
        {
            (int channels, int hidden, int layers, int vocabulary, int context) = (32, 32, 1, 262, 16);
            Array.ForEach([channels, hidden, layers, 2, 2, vocabulary, context], model.Write);
            int floats = (vocabulary * channels) + (layers * ((2 * channels) + (4 * channels * channels) + (3 * channels * hidden))) + channels + (context * channels / 2);
            model.Write(new byte[floats * sizeof(float)]);
        }

        using var tokenizer = new BinaryWriter(File.Create(_folder["tokenizer.bin"]));
        string[] pieces = ["<unk>", "<s>", "</s>", .. Enumerable.Range(0, 256).Select(value => $"<0x{value:X2}>"), " ", "a", " a"];
        tokenizer.Write(6);
        foreach (string piece in pieces)
        {
            tokenizer.Write(-1f);
            tokenizer.Write(Encoding.UTF8.GetByteCount(piece));
            tokenizer.Write(Encoding.UTF8.GetBytes(piece));
        }
    }

    private void KeepOnly(params string[] names)
    {
        foreach (string file in Directory.GetFiles(_folder.Path).Where(file => !names.Contains(Path.GetFileName(file))))
        {
            File.Delete(file);
        }
    }
}
