namespace TinyLlama.Data.Tokenizers;

/// <summary>Reads and writes Hugging Face's <c>tokenizer.json</c> in the form of Llama.</summary>
public static class HuggingFaceTokenizer
{
    /// <summary>Reads a file.</summary>
    /// <exception cref="UserErrorException">It is damaged, or asks for something that is not implemented.</exception>
    public static BpeModel Read(string path) => throw new UserErrorException($"{path}: tokenizer.json cannot be read yet");
}
