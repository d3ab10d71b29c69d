using System.Globalization;
using TinyLlama.Checkpoints;
using TinyLlama.Compute.Cpu;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Model;

namespace TinyLlama.Server.Tests;

/// <summary>A Hugging Face folder with a small model of random weights, which says anything but ends.</summary>
internal static class TestModel
{
    public const string Name = "random";

    public const int ContextLength = 512;

    private static readonly Lazy<string> s_folder = new(Write);

    /// <summary>Gets the folder; it is there until the process ends.</summary>
    public static string Folder => s_folder.Value;

    public static BpeTokenizer Tokenizer => BpeTokenizerOf(Folder);

    private static BpeTokenizer BpeTokenizerOf(string folder) => TinyLlama.Data.Tokenizers.Tokenizer.Load(folder);

    private static string Write()
    {
        string root = Directory.CreateTempSubdirectory("tinyllama-test-").FullName;
        AppDomain.CurrentDomain.ProcessExit += (_, _) => Directory.Delete(root, recursive: true);
        string folder = Directory.CreateDirectory(Path.Combine(root, Name)).FullName;
        var tokenizer = new BpeTokenizer(BpeTrainer.Train(
            ["the user asks and the assistant answers: what is the weather like today in the city where you live"],
            new BpeTrainingOptions { VocabularySize = 320 }));
        tokenizer.Save(folder);
        var config = new ModelConfig
        {
            VocabularySize = tokenizer.VocabularySize,
            ContextLength = ContextLength,
            Layers = 2,
            Heads = 4,
            KeyValueHeads = 2,
            Channels = 32,
            Hidden = 64,
        };
        using CpuBackend backend = CpuBackend.Create(threads: 1);
        using LlamaModel model = LlamaModel.Allocate(config, backend, trains: false);
        var random = new Random(11);
        foreach (Parameter parameter in model.Parameters)
        {
            Span<float> values = parameter.Values.HostSpan<float>();
            for (int i = 0; i < values.Length; i++)
            {
                values[i] = (float)((parameter.IsVector ? 1 : 0) + ((random.NextDouble() - 0.5) * 0.8));
            }

            if (parameter.Name == "lm_head.weight")
            {
                // The rows of <unk>, <s> and </s>: hidden states are of either sign, logits of zero rows are seldom the largest.
                values[..(3 * config.Channels)].Clear();
            }
        }

        Safetensors.Write(
            Path.Combine(folder, "model.safetensors"),
            backend,
            [.. model.Parameters.Select(static parameter => new NamedTensor(parameter.Name, parameter.Values, parameter.IsVector))]);
        File.WriteAllText(
            Path.Combine(folder, "config.json"),
            string.Create(CultureInfo.InvariantCulture, $$"""
            {
              "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
              "vocab_size": {{config.VocabularySize}}, "max_position_embeddings": {{config.ContextLength}},
              "num_hidden_layers": {{config.Layers}}, "num_attention_heads": {{config.Heads}}, "num_key_value_heads": {{config.KeyValueHeads}},
              "hidden_size": {{config.Channels}}, "intermediate_size": {{config.Hidden}}, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
              "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": false
            }
            """));
        return folder;
    }
}
