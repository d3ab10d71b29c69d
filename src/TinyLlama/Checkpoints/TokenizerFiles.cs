namespace TinyLlama.Checkpoints;

/// <summary>The files by which a folder of a model carries its tokenizer.</summary>
internal static class TokenizerFiles
{
    private static readonly string[] s_names =
        ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"];

    /// <summary>Whether a folder has a file that decides ids.</summary>
    public static bool Any(string folder) =>
        File.Exists(Path.Combine(folder, s_names[0])) || File.Exists(Path.Combine(folder, s_names[1]));
}
