namespace TinyLlama.Data.Tokenizers;

/// <summary>Reads whole tokenizer files, whose size is checked first.</summary>
internal static class TokenizerFile
{
    /// <summary>The bytes of a file.</summary>
    /// <exception cref="UserErrorException">It is not there, cannot be read or is larger than the limit.</exception>
    public static byte[] ReadBytes(string path, long limit)
    {
        try
        {
            long length = new FileInfo(path).Length;
            return length <= limit
                ? File.ReadAllBytes(path)
                : throw new UserErrorException($"{path}: {length} bytes is more than a tokenizer file of this kind may have "
                    + $"({limit}); name a tokenizer.model or tokenizer.json");
        }
        catch (Exception error) when (error is FileNotFoundException or DirectoryNotFoundException)
        {
            throw new UserErrorException($"{path}: not found; name a tokenizer.model (SentencePiece), a tokenizer.json "
                + "(Hugging Face) or a folder with one of them", error);
        }
        catch (Exception error) when (error is IOException or UnauthorizedAccessException)
        {
            throw new UserErrorException($"{path}: cannot be read: {error.Message}", error);
        }
    }
}
