using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Inference;
using TinyLlama.Model;
using TinyLlama.Tests.Checkpoints;
using TinyLlama.Tests.Model;

namespace TinyLlama.Tests.Inference;

public sealed class PromptCacheTests : IDisposable
{
    private static readonly GenerationOptions s_greedy = new() { Temperature = 0, MaxTokens = 20 };

    private readonly TemporaryFolder _folder = new();
    private readonly string _run;
    private DType _cacheType = DType.F16;

    public PromptCacheTests() => _run = Save("run", _ => { });

    private string Cache => _folder["prompt.cache"];

    public void Dispose() => _folder.Dispose();

    [Theory]
    [InlineData(DType.F32)]
    [InlineData(DType.F16)]
    [InlineData(DType.Q8_0)]
    public void A_prompt_that_begins_alike_is_continued_as_without_the_file(DType cacheType)
    {
        _cacheType = cacheType;
        string prompt = string.Concat(Enumerable.Repeat("the cat and the dog ", 14));
        string other = prompt + "sat down on a mat. " + prompt;
        Assert.InRange(Tokens(other), 200, 490);
        string[] expected = [.. new[] { prompt, other }.Select(text => Generate(text, cache: null).Text)];

        Assert.Equal((expected[0], 0), Generate(prompt));
        byte[] file = File.ReadAllBytes(Cache);
        int known = Tokens(prompt);
        Assert.Equal((expected[0], known - 1), Generate(prompt));
        Assert.Equal(file, File.ReadAllBytes(Cache));

        // The tokens around the end of the first prompt may be cut in another way.
        (string text, int cached) = Generate(other);
        Assert.Equal(expected[1], text);
        Assert.InRange(cached, known - 3, known);
        Assert.Equal((expected[1], Tokens(other) - 1), Generate(other));
        file = File.ReadAllBytes(Cache);
        (text, cached) = Generate(prompt);
        Assert.Equal(expected[0], text);
        Assert.InRange(cached, known - 3, known - 1);
        Assert.Single(Directory.GetFiles(_folder.Path));
    }

    [Fact]
    public void Another_prompt_takes_the_files_place()
    {
        Generate("the cat");
        Assert.Equal(1, Generate("a dog").Cached);
        Assert.Equal(Tokens("a dog") - 1, Generate("a dog").Cached);
    }

    [Fact]
    public void The_file_of_other_weights_is_refused_and_stays()
    {
        Generate("the cat");
        byte[] file = File.ReadAllBytes(Cache);
        string other = Save("other", run =>
        {
            Parameter norm = run.Model.Parameters[1];
            float[] values = run.Read(norm.Values);
            values[3] = MathF.BitIncrement(values[3]);
            run.Backend.Write<float>(norm.Values, values);
        });
        using LanguageModel model = LanguageModel.Load(other, threads: 1, promptCache: Cache);
        var error = Assert.Throws<UserErrorException>(() => model.Generate("the cat", s_greedy).ToString());
        Assert.Equal($"{Cache}: is the prompt cache of another model or device; delete it, or name another file for the prompt cache", error.Message);
        Assert.Equal(file, File.ReadAllBytes(Cache));
    }

    [Fact]
    public void The_file_of_another_type_of_cache_is_refused()
    {
        Generate("the cat");
        _cacheType = DType.F32;
        Assert.Contains("of another model or device", Assert.Throws<UserErrorException>(() => Generate("the cat")).Message, StringComparison.Ordinal);
    }

    [Fact]
    public void A_file_with_any_damage_is_refused_and_stays()
    {
        Generate("the cat and the dog");
        byte[] sound = File.ReadAllBytes(Cache);
        var random = new Random(7);
        for (int round = 0; round < 60; round++)
        {
            // Places in the header, in the tokens after it, and anywhere; then ends that are cut off.
            int place = random.Next(round < 20 ? 600 : sound.Length);
            byte[] damaged = round < 50 ? [.. sound] : sound[..place];
            if (round < 50)
            {
                damaged[place] ^= (byte)(1 << random.Next(7));
            }

            File.WriteAllBytes(Cache, damaged);
            var error = Assert.Throws<UserErrorException>(() => Generate("the cat and the dog"));
            Assert.StartsWith(Cache, error.Message, StringComparison.Ordinal);
            Assert.EndsWith("; delete it, or name another file for the prompt cache", error.Message, StringComparison.Ordinal);
            Assert.DoesNotContain('\n', error.Message);
            Assert.Equal(damaged, File.ReadAllBytes(Cache));
        }

        File.Delete(Cache);
        Assert.Equal(0, Generate("the cat and the dog").Cached);
        Assert.Equal(sound, File.ReadAllBytes(Cache));
    }

    [Theory]
    [InlineData("")]
    [InlineData("absent/prompt.cache")]
    public void A_place_that_cannot_be_written_is_said_and_nothing_is_left(string name)
    {
        string cache = Path.Combine(_folder.Path, name);
        using LanguageModel model = LanguageModel.Load(_run, threads: 1, promptCache: cache);
        var error = Assert.Throws<IOException>(() => model.Generate("the cat", s_greedy).ToString());
        Assert.StartsWith($"{cache}: the prompt cache cannot be written", error.Message, StringComparison.Ordinal);
        Assert.False(Directory.Exists(_folder["absent"]));
        Assert.Empty(Directory.GetFiles(Path.GetDirectoryName(_folder.Path)!, $"{Path.GetFileName(_folder.Path)}.*"));
    }

    private string Save(string name, Action<ModelRun> change)
    {
        var config = new ModelConfig { VocabularySize = 320, ContextLength = 512, Layers = 2, Heads = 2, KeyValueHeads = 1, Channels = 32, Hidden = 40 };
        return SmallModel.Save(_folder[name], config, SmallModel.Tokenizer(320), change);
    }

    private (string Text, int Cached) Generate(string prompt) => Generate(prompt, Cache);

    // A model of its own each time, as a program would load it.
    private (string Text, int Cached) Generate(string prompt, string? cache)
    {
        using LanguageModel model = LanguageModel.Load(_run, threads: 2, promptCache: cache, cacheType: _cacheType);
        Generation generation = model.Generate(prompt, s_greedy);
        return (generation.ToString(), generation.CachedPromptTokens);
    }

    private int Tokens(string prompt)
    {
        using LanguageModel model = LanguageModel.Load(_run, threads: 1);
        return model.Generate(prompt, s_greedy).PromptTokens.Count;
    }
}
