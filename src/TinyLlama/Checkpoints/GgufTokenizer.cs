using System.Globalization;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Checkpoints;

/// <summary>
/// The tokenizer in the metadata of a GGUF file: SentencePiece BPE, which GGUF names <c>llama</c>, or byte-level BPE, which it
/// names <c>gpt2</c>.
/// </summary>
internal static class GgufTokenizer
{
    // Below every piece that a text can have.
    private const float SurplusScore = -1000;

    private const string KindKey = "tokenizer.ggml.model";
    private const string SplitKey = "tokenizer.ggml.pre";
    private const string SentencePiece = "llama";
    private const string ByteLevel = "gpt2";

    private static readonly (string Name, WordSplit Split)[] s_splits =
        [("gpt-2", WordSplit.Gpt2), ("smollm", WordSplit.SingleDigits), ("llama-bpe", WordSplit.Llama3), ("llama3", WordSplit.Llama3)];

    /// <summary>Whether a text begins with BOS; where a file does not say, as llama.cpp has it.</summary>
    public static bool AddsBos(GgufFile file) => file.Value(
        "tokenizer.ggml.add_bos_token",
        absent: file.Value(KindKey, SentencePiece) != ByteLevel || SplitOf(file) == WordSplit.Llama3);

    /// <summary>Reads the tokenizer; null where the file has none.</summary>
    /// <exception cref="UserErrorException">It is damaged or of another kind.</exception>
    public static BpeTokenizer? Read(GgufFile file)
    {
        string kind = file.Value(KindKey, "no_vocab");
        BpeModel? model = kind switch
        {
            "no_vocab" or "none" => null,
            SentencePiece => ReadSentencePiece(file),
            ByteLevel => ReadByteLevel(file),
            _ => throw new UserErrorException(
                $"{file.Path}: its tokenizer is of the kind '{kind}', only '{SentencePiece}' (SentencePiece BPE) and '{ByteLevel}' (byte-level BPE) are supported"),
        };
        return model is null ? null : new BpeTokenizer(model, file.Path);
    }

    private static BpeModel ReadSentencePiece(GgufFile file) => new()
    {
        Pieces = ReadPieces(file, file.Value<double[]>("tokenizer.ggml.scores")),
        ByteFallback = true,
        DummyPrefix = file.Value("tokenizer.ggml.add_space_prefix", absent: true) ? DummyPrefix.Always : DummyPrefix.None,
        SymbolsSplitText = true,
        RemoveExtraWhitespace = file.Value("tokenizer.ggml.remove_extra_whitespaces", absent: false),
        BosPiece = TextOf(file, "tokenizer.ggml.bos_token_id", absent: 1)!,
        EosPiece = TextOf(file, "tokenizer.ggml.eos_token_id", absent: 2)!,
        AddsBos = AddsBos(file),
    };

    private static BpeModel ReadByteLevel(GgufFile file)
    {
        WordSplit split = SplitOf(file);
        Piece[] pieces = ReadPieces(file, scores: null);
        return new BpeModel
        {
            Pieces = pieces,
            Merges = ReadMerges(file, pieces),
            DummyPrefix = DummyPrefix.None,
            SymbolsSplitText = true,
            EscapeWhitespace = false,
            WordSplit = split,
            WordsComeFirst = split == WordSplit.Llama3,
            BosPiece = TextOf(file, "tokenizer.ggml.bos_token_id", absent: null) ?? "",
            EosPiece = TextOf(file, "tokenizer.ggml.eos_token_id", absent: null) ?? "",
            AddsBos = AddsBos(file),
        };
    }

    private static WordSplit SplitOf(GgufFile file)
    {
        string name = file.Value(SplitKey, "default");
        return s_splits.FirstOrDefault(split => split.Name == name).Split is not WordSplit.None and var known
            ? known
            : throw new UserErrorException(
                $"{file.Path}: '{SplitKey}' is '{name}', only {string.Join(", ", s_splits.Select(static split => $"'{split.Name}'"))} are supported");
    }

    private static Piece[] ReadPieces(GgufFile file, double[]? scores)
    {
        string[] texts = file.Value<string[]>("tokenizer.ggml.tokens");
        long[] kinds = file.Value<long[]>("tokenizer.ggml.token_type");
        if ((scores is not null && scores.Length != texts.Length) || kinds.Length != texts.Length)
        {
            throw new UserErrorException($"{file.Path}: {texts.Length} tokens with {scores?.Length.ToString(CultureInfo.InvariantCulture) ?? "no"} scores and {kinds.Length} types: damaged");
        }

        var pieces = new Piece[texts.Length];
        for (int id = 0; id < pieces.Length; id++)
        {
            // Unused ids, such as fill a table up to a round number of rows, are in no text, which is what control means here.
            long number = kinds[id] == (long)PieceKind.Unused ? (long)PieceKind.Control : kinds[id];
            pieces[id] = texts[id].Length > 0 && number is >= (long)PieceKind.Normal and <= (long)PieceKind.Byte
                ? new Piece(texts[id], (float)(scores?[id] ?? 0), (PieceKind)number)
                : throw new UserErrorException($"{file.Path}: token {id} has no text or the unknown type {kinds[id]}: damaged");
        }

        return pieces;
    }

    private static Merge[] ReadMerges(GgufFile file, Piece[] pieces)
    {
        var ids = new Dictionary<string, int>(pieces.Length, StringComparer.Ordinal);
        for (int id = 0; id < pieces.Length; id++)
        {
            _ = ids.TryAdd(pieces[id].Text, id);
        }

        string[] texts = file.Value<string[]>("tokenizer.ggml.merges");
        var merges = new Merge[texts.Length];
        for (int i = 0; i < merges.Length; i++)
        {
            string[] parts = texts[i].Split(' ');
            merges[i] = parts.Length == 2 && ids.TryGetValue(parts[0], out int left) && ids.TryGetValue(parts[1], out int right)
                ? new Merge(left, right)
                : throw new UserErrorException($"{file.Path}: merge {i} is '{texts[i]}', not two tokens of the vocabulary: damaged");
        }

        return merges;
    }

    private static string? TextOf(GgufFile file, string key, long? absent)
    {
        if (absent is null && !file.Has(key))
        {
            return null;
        }

        string[] texts = file.Value<string[]>("tokenizer.ggml.tokens");
        long id = file.Value(key, absent ?? 0);
        return id >= 0 && id < texts.Length
            ? texts[id]
            : throw new UserErrorException($"{file.Path}: '{key}' is {id}, the tokenizer has {texts.Length} tokens");
    }

    /// <summary>Adds the tokenizer and the chat template of a model.</summary>
    /// <exception cref="UserErrorException">GGUF cannot express the tokenizer.</exception>
    public static void Write(GgufWriter writer, BpeTokenizer? tokenizer, ModelSource source)
    {
        if (tokenizer is null)
        {
            writer.Add(KindKey, "no_vocab");
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
        bool isByteLevel = model.WordSplit != WordSplit.None;
        writer.Add(KindKey, isByteLevel ? ByteLevel : SentencePiece);
        writer.Add(SplitKey, isByteLevel ? s_splits.First(split => split.Split == model.WordSplit).Name : "default");
        writer.Add("tokenizer.ggml.tokens", pieces.Select(static piece => piece.Text));
        writer.Add("tokenizer.ggml.token_type", pieces.Select(static piece => (int)piece.Kind));
        if (isByteLevel)
        {
            writer.Add("tokenizer.ggml.merges", model.Merges!.Select(merge => $"{pieces[merge.Left].Text} {pieces[merge.Right].Text}"));
        }
        else
        {
            writer.Add("tokenizer.ggml.scores", pieces.Select(static piece => piece.Score));
        }

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
        return model.WordSplit != WordSplit.None
                ? model.WordsComeFirst != (model.WordSplit == WordSplit.Llama3) ? "words that are pieces do not come as its kind has it" : null
            : model.Merges is not null ? "its merges have an order that scores of pieces do not express"
            : !model.ByteFallback ? "it has no byte pieces"
            : !model.EscapeWhitespace ? "its pieces have real spaces"
            : model.RemoveExtraWhitespace || !model.CharacterMap.IsEmpty ? "it normalizes text"
            : model.DummyPrefix == DummyPrefix.UnlessSpace ? "it puts a space only before a text that begins with none"
            : !model.SymbolsSplitText && model.Pieces.Any(static piece => piece.Kind == PieceKind.UserDefined)
                ? "its user-defined symbols do not split the text"
            : null;
    }
}
