using System.Runtime.InteropServices;
using System.Text.Json;
using TinyLlama.Checkpoints;
using TinyLlama.Compute.Cpu;
using TinyLlama.Model;
using TinyLlama.Tests.Common;
using TinyLlama.Tests.Model;

namespace TinyLlama.Tests.Checkpoints;

/// <summary>Files whose tokens and logits llama.cpp has given (goldens/gguf).</summary>
public sealed class GgufModelTests
{
    [Theory]
    [InlineData("tiny4-f32-kvf32", "tiny4-f32", 1e-4, 0, false)]
    [InlineData("tiny4-f32-kvf32", "tiny4-f32", 1e-4, 0, true)]
    [InlineData("tiny4-f32", "tiny4-f32", 0.15, 0.3, false)]
    [InlineData("tiny4-f32", "tiny4-f32", 0.15, 0.3, true)]
    [InlineData("tiny4-q8_0", "tiny4-q8_0", 0.15, 0.3, false)]
    [InlineData("tiny4-q8_0", "tiny4-q8_0", 0.15, 0.3, true)]
    [InlineData("tiny4-q4_0", "tiny4-q4_0", 0.15, 0.3, false)]
    [InlineData("tiny4-q4_0", "tiny4-q4_0", 0.15, 0.3, true)]
    [InlineData("tiny256-q4_k_m", "tiny256-q4_k_m", 0.15, 0.3, false)]
    [InlineData("tiny256-q4_k_m", "tiny256-q4_k_m", 0.15, 0.3, true)]
    [InlineData("tiny256-q6_k", "tiny256-q6_k", 0.15, 0.3, false)]
    [InlineData("tiny256-q6_k", "tiny256-q6_k", 0.15, 0.3, true)]
    public void Tokens_and_logits_are_those_of_the_program_the_format_comes_from(
        string golden, string file, double tolerance, double margin, bool frozen)
    {
        using JsonDocument json = JsonDocument.Parse(File.ReadAllText(SharedFiles.Require($"goldens/gguf/{golden}.json")));
        int[] prompt = [.. json.RootElement.GetProperty("prompt_tokens").EnumerateArray().Select(id => id.GetInt32())];
        int[] greedy = [.. json.RootElement.GetProperty("greedy").EnumerateArray().Select(id => id.GetInt32())];
        byte[] bytes = File.ReadAllBytes(SharedFiles.Require($"goldens/gguf/{golden}.logits.f32"));
        ReadOnlySpan<float> expected = MemoryMarshal.Cast<byte, float>(bytes);
        using ModelSource source = ModelSource.Open(SharedFiles.Require($"goldens/gguf/{file}.gguf"), Assert.Fail);

        List<int> ids = [source.LoadTokenizer()!.Bos!.Value];
        source.LoadTokenizer()!.Encode(json.RootElement.GetProperty("prompt").GetString(), ids);
        Assert.True(source.AddsBos);
        Assert.Equal(prompt, ids);

        int[] sequence = [.. prompt, .. greedy];
        using var run = new ModelRun(source.Config, sequence.Length, Keep.Nothing, storage: frozen ? source.FrozenStorageOf : null);
        source.CopyTo(run.Backend, run.Model.Parameters);
        run.Model.Pack();
        run.Forward(sequence);
        float[] actual = run.Logits();
        Assert.Equal(expected.Length, actual.Length);
        int vocabulary = source.Config.VocabularySize;
        for (int row = 0; row < sequence.Length; row++)
        {
            float[] wanted = expected.Slice(row * vocabulary, vocabulary).ToArray();
            float[] given = actual[(row * vocabulary)..((row + 1) * vocabulary)];
            double error = wanted.Zip(given, (a, b) => Math.Abs((double)a - b)).Max();
            Assert.True(error <= tolerance, $"row {row}: a logit is {error:E2} off");
            float[] sorted = [.. wanted.OrderDescending()];
            if (sorted[0] - sorted[1] > margin)
            {
                Assert.Equal(Array.IndexOf(wanted, sorted[0]), Array.IndexOf(given, given.Max()));
            }
        }
    }

    // Half a head of 16 rows is too little for 16 lanes, 44 tokens do not fill them evenly, nor 48 the panels of 16 bits.
    [Theory]
    [InlineData("q8_0", CpuPath.Vector512, 64, 48, true)]
    [InlineData("q8_0", CpuPath.Vector256, 64, 48, true)]
    [InlineData("q8_0", CpuPath.Vector512, 16, 48, false)]
    [InlineData("q8_0", CpuPath.Vector512, 64, 44, false)]
    [InlineData("q8_0", CpuPath.Vector128, 16, 44, true)]
    [InlineData("bf16", CpuPath.Vector512, 64, 48, false)]
    [InlineData("bf16", CpuPath.Vector256, 64, 48, true)]
    [InlineData("f16", CpuPath.Vector256, 64, 48, true)]
    public void Weights_that_stay_in_the_file_give_the_logits_of_a_copy(string type, CpuPath path, int headDim, int vocabulary, bool allStay)
    {
        using var folder = new TemporaryFolder();
        var config = new ModelConfig
        {
            VocabularySize = vocabulary,
            ContextLength = 64,
            Layers = 2,
            Heads = 128 / headDim,
            KeyValueHeads = 1,
            Channels = 128,
            Hidden = 96,
        };
        using (ModelSource run = ModelSource.Open(SmallModel.Save(folder["run"], config, tokenizer: null), Assert.Fail))
        {
            GgufExport.Write(folder["model.gguf"], run, GgufMix.Find(type), tokenizer: null);
        }

        using ModelSource source = ModelSource.Open(folder["model.gguf"], Assert.Fail);
        using var inPlace = new ModelRun(config, 9, Keep.Nothing, path, storage: source.FrozenStorageOf);
        using var copied = new ModelRun(config, 9, Keep.Nothing, path, storage: name => new FrozenStorage(source.StorageOf(name)));
        Assert.Equal(allStay, inPlace.Model.Parameters.All(static parameter => parameter.IsVector || parameter.IsInPlace));
        Assert.Contains(inPlace.Model.Parameters, static parameter => parameter.IsInPlace);
        Assert.DoesNotContain(copied.Model.Parameters, static parameter => parameter.IsInPlace);
        Assert.Equal(inPlace.Model.ByteCount, copied.Model.ByteCount, 64 * 1024.0);
        foreach (ModelRun run in (ModelRun[])[inPlace, copied])
        {
            source.CopyTo(run.Backend, run.Model.Parameters);
            run.Forward([1, 5, 30, 7, 7], [2], [9, 11, 43]);
        }

        Assert.Equal(copied.Logits(), inPlace.Logits());
        bool packs = inPlace.Model.Parameters.Any(static parameter => parameter.Frozen.Weight is { AwaitsPacking: true });
        Assert.True(packs);
        for (int i = 0; packs; i++)
        {
            inPlace.Model.PackSome();
            packs = inPlace.Model.Parameters.Any(static parameter => parameter.Frozen.Weight is { AwaitsPacking: true });
            Assert.Equal(i < 3, packs);
            inPlace.Forward([1, 5, 30, 7, 7], [2], [9, 11, 43]);
            Assert.Equal(copied.Logits(), inPlace.Logits());
        }
    }
}
