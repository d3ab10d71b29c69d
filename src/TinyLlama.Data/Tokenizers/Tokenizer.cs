namespace TinyLlama.Data.Tokenizers;

/// <summary>Opens tokenizers from files.</summary>
public static class Tokenizer
{
    /// <summary>The files that belong to a tokenizer, wherever one lies: those that hold it, then those that say how it is used.</summary>
    public static readonly IReadOnlyList<string> FileNames =
        ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"];

    /// <summary>Opens a tokenizer.</summary>
    /// <param name="path">
    /// A <c>tokenizer.model</c> of SentencePiece, a <c>tokenizer.json</c> of Hugging Face, or a folder with either; where a
    /// folder has both, tokenizer.model counts. Also a <c>.bin</c> of llama2.c.
    /// </param>
    /// <exception cref="UserErrorException">Nothing is there, or it cannot be read or is of another kind.</exception>
    public static BpeTokenizer Load(string path)
    {
        ArgumentException.ThrowIfNullOrEmpty(path);
        string file = path;
        if (Directory.Exists(path))
        {
            string model = Path.Combine(path, "tokenizer.model");
            string json = Path.Combine(path, "tokenizer.json");
            file = File.Exists(model) ? model
                : File.Exists(json) ? json
                : throw new UserErrorException($"{path}: has neither tokenizer.model (SentencePiece) nor tokenizer.json "
                    + "(Hugging Face); name the file, or a folder with one of them");
        }

        return new BpeTokenizer(Read(file), file);
    }

    private static BpeModel Read(string path)
    {
        return Path.GetExtension(path).ToUpperInvariant() switch
        {
            ".JSON" => HuggingFaceTokenizer.Read(path),
            ".BIN" => Llama2CTokenizer.Read(path),
            _ => SentencePieceModel.Read(path),
        };
    }
}
