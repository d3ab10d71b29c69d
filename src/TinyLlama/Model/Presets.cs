namespace TinyLlama.Model;

/// <summary>A model shape with a name.</summary>
/// <param name="Name">What a recipe calls it.</param>
/// <param name="Description">What it is for, a few words.</param>
/// <param name="Config">The shape.</param>
public sealed record ModelPreset(string Name, string Description, ModelConfig Config);

/// <summary>
/// The shapes that a recipe may name: TinyLlama's own three, and small ones of their proportions (a hidden width of
/// 2.75 times the channels, several query heads to a key/value head, an untied head).
/// </summary>
public static class Presets
{
    /// <summary>Gets all presets, the smallest first.</summary>
    public static IReadOnlyList<ModelPreset> All { get; } =
    [
        new("smoke", "seconds on any machine: for tests of the whole pipeline", new ModelConfig
        {
            VocabularySize = 512,
            ContextLength = 64,
            Layers = 2,
            Heads = 4,
            KeyValueHeads = 2,
            Channels = 64,
            Hidden = 176,
        }),
        new("quickstart", "minutes on two cores", new ModelConfig
        {
            VocabularySize = 8192,
            ContextLength = 256,
            Layers = 3,
            Heads = 8,
            KeyValueHeads = 2,
            Channels = 256,
            Hidden = 704,
        }),
        new("tinyllama-16m", "hours on two cores", new ModelConfig
        {
            VocabularySize = 8192,
            ContextLength = 512,
            Layers = 6,
            Heads = 6,
            KeyValueHeads = 2,
            Channels = 384,
            Hidden = 1056,
        }),
        new("tinyllama-39m", "a night on a desktop computer", new ModelConfig
        {
            VocabularySize = 16384,
            ContextLength = 1024,
            Layers = 8,
            Heads = 8,
            KeyValueHeads = 2,
            Channels = 512,
            Hidden = 1408,
        }),
        new("tinyllama-120m", "TinyLlama's small sibling, with one key/value head", new ModelConfig
        {
            VocabularySize = 32000,
            ContextLength = 2048,
            Layers = 12,
            Heads = 12,
            KeyValueHeads = 1,
            Channels = 768,
            Hidden = 2048,
        }),
        new("tinyllama-1.1b", "TinyLlama", new ModelConfig
        {
            VocabularySize = 32000,
            ContextLength = 2048,
            Layers = 22,
            Heads = 32,
            KeyValueHeads = 4,
            Channels = 2048,
            Hidden = 5632,
        }),
        new("tinyllama-1.1b-code-8k", "TinyLlama for code: four times the context by interpolated positions", new ModelConfig
        {
            VocabularySize = 32000,
            ContextLength = 8192,
            Layers = 22,
            Heads = 32,
            KeyValueHeads = 4,
            Channels = 2048,
            Hidden = 5632,
            RopeFactor = 4,
        }),
    ];

    /// <summary>The preset of that name, or null.</summary>
    public static ModelPreset? Find(string name) => All.FirstOrDefault(preset => preset.Name == name);
}
