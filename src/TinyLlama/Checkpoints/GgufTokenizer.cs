using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Checkpoints;

/// <summary>The tokenizer in the metadata of a GGUF file: SentencePiece BPE, which GGUF names <c>llama</c>.</summary>
internal static class GgufTokenizer
{
    // Below every piece that a text can have.
    private const float SurplusScore = -1000;

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
            // Unused ids, such as fill a table up to a round number of rows, are in no text, which is what control means here.
            long number = kinds[id] == (long)PieceKind.Unused ? (long)PieceKind.Control : kinds[id];
            pieces[id] = texts[id].Length > 0 && number is >= (long)PieceKind.Normal and <= (long)PieceKind.Byte
                ? new Piece(texts[id], (float)scores[id], (PieceKind)number)
                : throw new UserErrorException($"{file.Path}: token {id} has no text or the unknown type {kinds[id]}: damaged");
        }

        var model = new BpeModel
        {
            Pieces = pieces,
            ByteFallback = true,
            DummyPrefix = file.Value("tokenizer.ggml.add_space_prefix", absent: true) ? DummyPrefix.Always : DummyPrefix.None,
            SymbolsSplitText = true,
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

    /// <summary>Adds the tokenizer and the chat template of a model.</summary>
    /// <exception cref="UserErrorException">GGUF cannot express the tokenizer.</exception>
    public static void Write(GgufWriter writer, BpeTokenizer? tokenizer, ModelSource source)
    {
        if (tokenizer is null)
        {
            writer.Add("tokenizer.ggml.model", "no_vocab");
            return;
        }

        if (WhyNotWritable(tokenizer) is { } reason)
        {
            throw new UserErrorException($"{source.Path}: its tokenizer cannot be written to a GGUF file: {reason}");
        }

        // Rows of the embedding table without a token need one all the same.
        BpeModel model = tokenizer.Model;
        IEnumerable<int> surplus = Enumerable.Range(model.Pieces.Count, source.Config.VocabularySize - model.Pieces.Count);
        Piece[] pieces = [.. model.Pieces, .. surplus.Select(static id => new Piece($"[PAD{id}]", SurplusScore, PieceKind.Unused))];
        writer.Add("tokenizer.ggml.model", "llama");
        writer.Add("tokenizer.ggml.pre", "default");
        writer.Add("tokenizer.ggml.tokens", pieces.Select(static piece => piece.Text));
        writer.Add("tokenizer.ggml.scores", pieces.Select(static piece => piece.Score));
        writer.Add("tokenizer.ggml.token_type", pieces.Select(static piece => (int)piece.Kind));
        AddId("bos", tokenizer.Bos);
        AddId("eos", tokenizer.Eos);
        AddId("unknown", Array.FindIndex(pieces, static piece => piece.Kind == PieceKind.Unknown) is >= 0 and int unknown ? unknown : null);
        AddId("padding", model.FindControl(model.PadPiece));
        writer.Add("tokenizer.ggml.add_bos_token", source.AddsBos && tokenizer.Bos is not null);
        writer.Add("tokenizer.ggml.add_eos_token", false);
        writer.Add("tokenizer.ggml.add_space_prefix", model.DummyPrefix != DummyPrefix.None);
        if (source.ChatTemplate is { } template)
        {
            writer.Add("tokenizer.chat_template", template);
        }

        void AddId(string name, int? id)
        {
            if (id is { } known)
            {
                writer.Add($"tokenizer.ggml.{name}_token_id", known);
            }
        }
    }

    // What llama.cpp does with a text by this kind of tokenizer: spaces escaped, merges by score, bytes for the rest.
    private static string? WhyNotWritable(BpeTokenizer tokenizer)
    {
        BpeModel model = tokenizer.Model;
        return model.Merges is not null ? "its merges have an order that scores of pieces do not express"
            : !model.ByteFallback ? "it has no byte pieces"
            : !model.EscapeWhitespace ? "its pieces have real spaces"
            : model.RemoveExtraWhitespace || !model.CharacterMap.IsEmpty ? "it normalizes text"
            : model.DummyPrefix == DummyPrefix.UnlessSpace ? "it puts a space only before a text that begins with none"
            : !model.SymbolsSplitText && model.Pieces.Any(static piece => piece.Kind == PieceKind.UserDefined)
                ? "its user-defined symbols do not split the text"
            : null;
    }
}
