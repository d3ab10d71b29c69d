using System.Text.Json;
using TinyLlama.Checkpoints;
using TinyLlama.Data.Documents;
using TinyLlama.Data.Shards;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Inference;
using TinyLlama.Model;
using TinyLlama.Tests.Cli;
using TinyLlama.Tests.Common;
using TinyLlama.Tests.Model;
using TinyLlama.Training;

namespace TinyLlama.Tests.Checkpoints;

/// <summary>A model that is trained here, exported, in llama.cpp itself: the same tokens, the same greedy continuation.</summary>
public sealed class LlamaCppTests : IDisposable
{
    private const int NewTokens = 24;

    private static readonly string s_document = new SeededText(9).Document();

    // The first is the one that is continued.
    private static readonly string[] s_texts =
    [
        s_document[..(s_document.IndexOf('.', StringComparison.Ordinal) + 1)],
        " A  bird\tsees\n\nthe boats. ", "Ünïcode \u65e5\u672c \U0001F999", "The", "", "x<s></s>y\u2581z",
    ];

    private readonly TemporaryFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Fact]
    public void A_trained_model_gives_the_same_tokens_and_the_same_greedy_continuation()
    {
        string package = NodePackages.Require("node-llama-cpp");
        string run = Train();
        using (ModelSource source = ModelSource.Open(run, Assert.Fail))
        {
            foreach (GgufMix mix in GgufMix.All)
            {
                GgufExport.Write(File(mix), source, mix, source.LoadTokenizer());
            }
        }

        JsonElement[] answers = Ask(package);
        Assert.Equal(GgufMix.All.Count, answers.Length);
        using LanguageModel model = LanguageModel.Load(run);
        var tokenizer = (BpeTokenizer)model.Tokenizer;
        int[] greedy = Greedy(model);
        for (int i = 0; i < answers.Length; i++)
        {
            Assert.Equal(s_texts.Select(text => Encode(tokenizer, text)), answers[i].GetProperty("tokens").EnumerateArray().Select(Ids));
            Assert.Equal(model.Tokenizer.Bos, answers[i].GetProperty("bos").GetInt32());
            Assert.Equal(model.Tokenizer.Eos, answers[i].GetProperty("eos").GetInt32());
            Assert.True(answers[i].GetProperty("addsBos").GetBoolean());
            Assert.Equal(greedy, Ids(answers[i].GetProperty("greedy")));
            using LanguageModel exported = LanguageModel.Load(File(GgufMix.All[i]));
            Assert.Equal(greedy, Greedy(exported));
        }
    }

    [Theory]
    [InlineData("plain")]
    [InlineData("linear")]
    [InlineData("llama3")]
    public void The_probabilities_of_the_next_token_are_the_same_whatever_the_rotary_scaling(string scaling)
    {
        string package = NodePackages.Require("node-llama-cpp");
        var plain = new ModelConfig
        {
            VocabularySize = 350,
            ContextLength = 128,
            Layers = 2,
            Heads = 4,
            KeyValueHeads = 2,
            Channels = 128,
            Hidden = 128,
        };
        ModelConfig config = scaling switch
        {
            "linear" => plain with { RopeFactor = 3 },
            "llama3" => plain with
            {
                RopeScaling = new() { Factor = 8, LowFrequencyFactor = 1, HighFrequencyFactor = 4, OriginalContextLength = 64 },
            },
            _ => plain,
        };
        BpeTokenizer tokenizer = SmallModel.Tokenizer(350);
        using (ModelSource source = ModelSource.Open(SmallModel.Save(_folder["run"], config, tokenizer), Assert.Fail))
        {
            GgufExport.Write(File(GgufMix.Find("f32")), source, GgufMix.Find("f32"), tokenizer);
        }

        int[] prompt = [tokenizer.Bos!.Value, .. Encode(tokenizer, s_document).Take(99)];
        JsonElement answer = Assert.Single(Run(package, $$"""
            const model = await llama.loadModel({ modelPath: '{{File(GgufMix.Find("f32"))}}', gpuLayers: 0 });
            const context = await model.createContext({
                contextSize: 128, threads: 2, experimentalKvCacheKeyType: 'F32', experimentalKvCacheValueType: 'F32', flashAttention: false });
            const options = { temperature: 1, topK: 0, topP: 1, minP: 0, yieldEogToken: true };
            const next = context.getSequence().evaluateWithMetadata({{JsonSerializer.Serialize(prompt)}}, { probabilities: true }, options);
            console.log(JSON.stringify([...(await next.next()).value.probabilities.entries()]));
            """));

        using ModelSource exported = ModelSource.Open(File(GgufMix.Find("f32")), Assert.Fail);
        Assert.Equal(config, exported.Config);
        using var run = new ModelRun(config, prompt.Length, Keep.Nothing);
        exported.CopyTo(run.Backend, run.Model.Parameters);
        run.Model.Pack();
        run.Forward(prompt);
        double[] logits = [.. run.Logits()[^350..].Select(logit => (double)logit)];
        double logSum = Math.Log(logits.Sum(Math.Exp));
        Assert.Equal(350, answer.GetArrayLength());
        foreach (JsonElement pair in answer.EnumerateArray())
        {
            Assert.Equal(logits[pair[0].GetInt32()] - logSum, Math.Log(pair[1].GetDouble()), 2e-3);
        }
    }

    [Theory]
    [InlineData("gpt2", false)]
    [InlineData("smollm", false)]
    [InlineData("llama3", true)]
    public void Byte_level_tokenizers_give_the_same_tokens(string kind, bool addsBos)
    {
        string package = NodePackages.Require("node-llama-cpp");
        string[] texts = [s_document, "it's 12345 o'clock,  WE'LL see\n\n\tx_1 >= 2 \r\n", "\u65e5\u672c\u8a9e \U0001F999 \u00dcber\u00a0a\u3000b", "a[SYM] b", " 7", "   "];
        var config = new ModelConfig
        {
            VocabularySize = 256 + 60 + 3,
            ContextLength = 64,
            Layers = 1,
            Heads = 2,
            KeyValueHeads = 2,
            Channels = 64,
            Hidden = 64,
        };
        string folder = TrainingCheckpoint.List(SmallModel.Save(_folder["run"], config, tokenizer: null))[^1].Path;
        System.IO.File.WriteAllText(Path.Combine(folder, "tokenizer.json"), ByteLevelJson.Make(kind, s_document + texts[1], 60));
        System.IO.File.WriteAllText(Path.Combine(folder, "tokenizer_config.json"), """{"bos_token":"<|bos|>","eos_token":"<|eos|>"}""");
        using ModelSource source = ModelSource.Open(folder, Assert.Fail);
        BpeTokenizer tokenizer = source.LoadTokenizer()!;
        string path = File(GgufMix.Find("f16"));
        GgufExport.Write(path, source, GgufMix.Find("f16"), tokenizer);
        JsonElement answer = Assert.Single(Run(package, $$"""
            const model = await llama.loadModel({ modelPath: '{{path}}', gpuLayers: 0 });
            console.log(JSON.stringify({ tokens: {{JsonSerializer.Serialize(texts)}}.map(text => model.tokenize(text, false)),
                bos: model.tokens.bos, eos: model.tokens.eos, addsBos: model.tokens.shouldPrependBosToken }));
            """));

        Assert.Equal(texts.Select(text => Encode(tokenizer, text)), answer.GetProperty("tokens").EnumerateArray().Select(Ids));
        Assert.Equal((256 + 60, 256 + 61), (answer.GetProperty("bos").GetInt32(), answer.GetProperty("eos").GetInt32()));
        Assert.Equal(addsBos, answer.GetProperty("addsBos").GetBoolean());
        using ModelSource exported = ModelSource.Open(path, Assert.Fail);
        Assert.Equal((addsBos, addsBos), (source.AddsBos, exported.AddsBos));
        Assert.Equal(tokenizer.Hash, exported.LoadTokenizer()!.Hash);
    }

    private static int[] Greedy(LanguageModel model)
    {
        Generation generation = model.Generate(s_texts[0], new() { Temperature = 0, MaxTokens = NewTokens });
        Assert.All(generation, piece => Assert.NotNull(piece));
        return [.. generation.Tokens];
    }

    private static int[] Encode(BpeTokenizer tokenizer, string text)
    {
        List<int> tokens = [];
        tokenizer.Encode(text, tokens);
        return [.. tokens];
    }

    private static int[] Ids(JsonElement list) => [.. list.EnumerateArray().Select(id => id.GetInt32())];

    private string File(GgufMix mix) => _folder[mix.Name + ".gguf"];

    // One document, learned by heart, so that no greedy token is a close call; a row is as long as the largest block.
    private string Train()
    {
        Directory.CreateDirectory(_folder["text"]);
        string[] documents = [.. Enumerable.Repeat(s_document, 60)];
        System.IO.File.WriteAllLines(Path.Combine(_folder["text"], "all.txt"), documents);
        var tokenizer = new BpeTokenizer(BpeTrainer.Train(documents, new BpeTrainingOptions { VocabularySize = 350, CharacterCoverage = 1 }));
        DataPreparation.Run(_folder["data"], TextFiles.Find([_folder["text"]], new TextFileOptions()), tokenizer, new PreparationOptions());
        tokenizer.Save(_folder["data"]);
        Recipe recipe = RecipeFile.Parse(
            $$"""
            model: { vocabulary: 350, context: 64, layers: 2, heads: 4, key_value_heads: 2, channels: 256, hidden: 512, rope_theta: 5000, rope_factor: 2 }
            seed: 7
            data: { path: '{{_folder["data"]}}' }
            batch: { global_tokens: 512, micro_sequences: 4 }
            budget: { steps: 100 }
            optimizer: { learning_rate: 3e-3 }
            schedule: { warmup: 5 }
            """,
            "small.yaml",
            null,
            []);
        using TrainingRun training = TrainingRun.Open(recipe, _folder["run"], new Silent());
        training.Trainer.Run(CancellationToken.None);
        return _folder["run"];
    }

    // One answer for each file, from one process.
    private JsonElement[] Ask(string package) => Run(package, $$"""
        for (const path of {{JsonSerializer.Serialize(GgufMix.All.Select(File))}}) {
            const model = await llama.loadModel({ modelPath: path, gpuLayers: 0 });
            const context = await model.createContext({ contextSize: 64, threads: 2 });
            const texts = {{JsonSerializer.Serialize(s_texts)}};
            const greedy = [];
            const prompt = [model.tokens.bos, ...model.tokenize(texts[0], false)];
            for await (const token of context.getSequence().evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
                if (greedy.push(token) == {{NewTokens}} || token == model.tokens.eos) break;
            }
            console.log(JSON.stringify({ tokens: texts.map(text => model.tokenize(text, false)), greedy,
                bos: model.tokens.bos, eos: model.tokens.eos, addsBos: model.tokens.shouldPrependBosToken }));
            await model.dispose();
        }
        """);

    // Runs a script with llama.cpp at hand; each line that it writes is JSON.
    private JsonElement[] Run(string package, string body)
    {
        string[] lines = NodePackages.Run(_folder["ask.mjs"], $$"""
            import { getLlama, LlamaLogLevel } from '{{Path.Combine(package, "dist", "index.js")}}';
            const llama = await getLlama({ gpu: false, build: 'never', logLevel: LlamaLogLevel.error });
            {{body}}
            process.exit(0);
            """);
        return [.. lines.Select(line => JsonDocument.Parse(line).RootElement)];
    }

    private sealed class Silent : ITrainingObserver
    {
        public void Measured(Metrics metrics)
        {
        }

        public void Warn(string message)
        {
        }
    }
}
