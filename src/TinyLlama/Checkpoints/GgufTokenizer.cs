using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Checkpoints;

/// <summary>The tokenizer in the metadata of a GGUF file: SentencePiece BPE, which GGUF names <c>llama</c>.</summary>
internal static class GgufTokenizer
{
    /// <summary>Reads the tokenizer; null where the file has none.</summary>
    /// <exception cref="UserErrorException">It is damaged or of another kind.</exception>
    public static BpeTokenizer? Read(GgufFile file)
    {
        string kind = file.Value("tokenizer.ggml.model", "no_vocab");
        if (kind is "no_vocab" or "none")
        {
            return null;
        }

        if (kind != "llama")
        {
            throw new UserErrorException(
                $"{file.Path}: its tokenizer is of the kind '{kind}', only 'llama' (SentencePiece BPE) is supported");
        }

        string[] texts = file.Value<string[]>("tokenizer.ggml.tokens");
        double[] scores = file.Value<double[]>("tokenizer.ggml.scores");
        long[] kinds = file.Value<long[]>("tokenizer.ggml.token_type");
        if (scores.Length != texts.Length || kinds.Length != texts.Length)
        {
            throw new UserErrorException($"{file.Path}: {texts.Length} tokens with {scores.Length} scores and {kinds.Length} types: damaged");
        }

        var pieces = new Piece[texts.Length];
        for (int id = 0; id < pieces.Length; id++)
        {
            pieces[id] = texts[id].Length > 0 && kinds[id] is >= (long)PieceKind.Normal and <= (long)PieceKind.Byte
                ? new Piece(texts[id], (float)scores[id], (PieceKind)kinds[id])
                : throw new UserErrorException($"{file.Path}: token {id} has no text or the unknown type {kinds[id]}: damaged");
        }

        var model = new BpeModel
        {
            Pieces = pieces,
            ByteFallback = true,
            DummyPrefix = file.Value("tokenizer.ggml.add_space_prefix", absent: true) ? DummyPrefix.Always : DummyPrefix.None,
            RemoveExtraWhitespace = file.Value("tokenizer.ggml.remove_extra_whitespaces", absent: false),
            BosPiece = TextOf("tokenizer.ggml.bos_token_id", absent: 1),
            EosPiece = TextOf("tokenizer.ggml.eos_token_id", absent: 2),
        };
        return new BpeTokenizer(model, file.Path);

        string TextOf(string key, long absent)
        {
            long id = file.Value(key, absent);
            return id >= 0 && id < texts.Length
                ? texts[id]
                : throw new UserErrorException($"{file.Path}: '{key}' is {id}, the tokenizer has {texts.Length} tokens");
        }
    }
}
