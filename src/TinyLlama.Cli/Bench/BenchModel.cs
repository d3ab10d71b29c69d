using TinyLlama.Data;
using TinyLlama.Model;
using TinyLlama.Training;

namespace TinyLlama.Cli.Bench;

/// <summary>A model shape with the micro-batch that it is measured with.</summary>
/// <param name="Name">S, M, L or a preset.</param>
/// <param name="Config">The shape; its context length is that of the micro-batch.</param>
/// <param name="Sequences">Sequences of a micro-batch.</param>
/// <param name="Packed">Which packed forms of the weights are kept.</param>
/// <param name="Keep">Which activations stay for backward.</param>
internal sealed record BenchModel(
    string Name, ModelConfig Config, int Sequences, PackedForms Packed = PackedForms.Both, Keep Keep = Keep.Everything)
{
    // Tokens of a micro-batch of a preset, unless a sequence is longer.
    private const int PresetTokens = 2048;

    private const int MostTokens = 1 << 24;

    private static readonly BenchModel s_small = new("S", Shape(layers: 6, channels: 256, hidden: 704, vocabulary: 4096, context: 256), 8);

    private static readonly BenchModel s_medium = new("M", Shape(layers: 12, channels: 512, hidden: 1408, vocabulary: 32000, context: 512), 4);

    // Both packed forms of a billion weights do not fit beside master weights, gradients and moments in 20 GiB.
    private static readonly BenchModel s_large =
        new("L", Presets.Find("tinyllama-1.1b")!.Config with { ContextLength = 512 }, 1, PackedForms.Forward);

    /// <summary>Gets what recipes call <see cref="Keep"/>.</summary>
    public string Recompute => Recipe.Recomputations.First(way => way.Keep == Keep).Name;

    /// <summary>Gets N, the tokens of a micro-batch.</summary>
    public int Tokens => Sequences * Config.ContextLength;

    /// <summary>Gets the matrix products of a model: a name, outputs and inputs.</summary>
    public IReadOnlyList<(string Name, int Outputs, int Inputs)> Products =>
    [
        ("q|k|v", Config.Channels + (2 * Config.KeyValueChannels), Config.Channels),
        ("attention out", Config.Channels, Config.Channels),
        ("gate|up", 2 * Config.Hidden, Config.Channels),
        ("down", Config.Channels, Config.Hidden),
        ("head", Config.VocabularySize, Config.Channels),
    ];

    /// <summary>A model by its name.</summary>
    /// <param name="name">S, M, L or a preset.</param>
    /// <param name="sequences">Sequences of a micro-batch; null for the model's own.</param>
    /// <param name="context">Tokens of a sequence; null for the model's own.</param>
    /// <exception cref="UserErrorException">There is no such model, or a micro-batch would be too large.</exception>
    public static BenchModel Find(string name, int? sequences, int? context)
    {
        BenchModel model = name switch
        {
            "S" => s_small,
            "M" => s_medium,
            "L" => s_large,
            _ when Presets.Find(name) is { Config: ModelConfig config } =>
                new BenchModel(name, config, Math.Max(1, PresetTokens / config.ContextLength)),
            _ => throw new UserErrorException(
                $"--model {name}: no such shape; use S, M, L or one of {string.Join(", ", Presets.All.Select(preset => preset.Name))}"),
        };
        (int count, int length) = (sequences ?? model.Sequences, context ?? model.Config.ContextLength);
        return (long)count * length <= MostTokens
            ? model with { Config = model.Config with { ContextLength = length }, Sequences = count }
            : throw new UserErrorException($"--sequences {count} of --ctx {length} tokens are more than {MostTokens}; lower one of them");
    }

    /// <summary>What an operation is in this model: a product gets the name of its weight.</summary>
    public string NameOf(Operation operation)
    {
        string product = Products.FirstOrDefault(p => (p.Outputs, p.Inputs) == (operation.Outputs, operation.Inputs)).Name ?? "";
        return $"{operation.Name} {product}".TrimEnd();
    }

    private static ModelConfig Shape(int layers, int channels, int hidden, int vocabulary, int context) => new()
    {
        VocabularySize = vocabulary,
        ContextLength = context,
        Layers = layers,
        Heads = 8,
        KeyValueHeads = 2,
        Channels = channels,
        Hidden = hidden,
    };
}
