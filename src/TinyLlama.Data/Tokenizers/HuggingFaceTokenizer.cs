using System.Text.Encodings.Web;
using System.Text.Json;

namespace TinyLlama.Data.Tokenizers;

/// <summary>
/// Reads and writes Hugging Face's <c>tokenizer.json</c>: a BPE model over text in which U+2581 stands for a space, as Llama 2
/// has, or the byte-level BPE of GPT-2, SmolLM and Llama 3. Everything else that would change ids is refused by name.
/// </summary>
public static class HuggingFaceTokenizer
{
    private const int MaximumFileBytes = 256 << 20;
    private const string SpaceText = "\u2581";

    private static readonly JsonWriterOptions s_format =
        new() { Indented = true, Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping };

    /// <summary>
    /// Reads a file. A <c>tokenizer_config.json</c> beside it, if there is one, says which pieces begin and end a document.
    /// </summary>
    /// <exception cref="UserErrorException">It is damaged, or asks for something that is not implemented.</exception>
    public static BpeModel Read(string path)
    {
        ArgumentNullException.ThrowIfNull(path);
        BpeModel model = Read(TokenizerFile.ReadBytes(path, MaximumFileBytes), path);
        string config = Path.Combine(Path.GetDirectoryName(path) ?? "", "tokenizer_config.json");
        return File.Exists(config)
            ? Parse(TokenizerFile.ReadBytes(config, MaximumFileBytes), config, root => WithNames(model, root))
            : model;
    }

    /// <summary>Reads the content of a file.</summary>
    /// <param name="content">The bytes of the file.</param>
    /// <param name="source">The file's name, for error messages.</param>
    /// <exception cref="UserErrorException">It is damaged, or asks for something that is not implemented.</exception>
    public static BpeModel Read(ReadOnlyMemory<byte> content, string source)
    {
        return Parse(content, source, root => new JsonTokenizerReader(source).Read(root));
    }

    /// <summary>The content of a file with which Hugging Face's tokenizers give the same ids.</summary>
    /// <exception cref="UserErrorException">No tokenizer.json gives the same ids.</exception>
    public static byte[] Write(BpeTokenizer tokenizer)
    {
        ArgumentNullException.ThrowIfNull(tokenizer);
        if (WhyNotWritable(tokenizer) is { } reason)
        {
            throw new UserErrorException($"this tokenizer cannot be written as tokenizer.json: {reason}");
        }

        BpeModel model = tokenizer.Model;
        return ToJson(json =>
        {
            json.WriteString("version", "1.0");
            json.WriteNull("truncation");
            json.WriteNull("padding");
            WriteAddedTokens(json, model);
            if (model.WordSplit == WordSplit.None)
            {
                WriteSpaces(json, model);
            }
            else
            {
                WriteWords(json, model.WordSplit);
            }

            WriteTemplate(json, tokenizer);
            WriteDecoder(json, model);
            WriteModel(json, tokenizer);
        });
    }

    /// <summary>The content of <c>tokenizer_config.json</c>, as Hugging Face's LlamaTokenizer reads it.</summary>
    public static byte[] WriteConfig(BpeTokenizer tokenizer)
    {
        ArgumentNullException.ThrowIfNull(tokenizer);
        return ToJson(json =>
        {
            json.WriteBoolean("add_bos_token", tokenizer.Bos is not null && tokenizer.Model.AddsBos);
            json.WriteBoolean("add_eos_token", false);
            WriteNames(json, tokenizer);
            json.WriteBoolean("clean_up_tokenization_spaces", false);
            if (tokenizer.Model.WordSplit != WordSplit.None)
            {
                json.WriteString("tokenizer_class", "PreTrainedTokenizerFast");
                return;
            }

            json.WriteBoolean("legacy", true);
            json.WriteString("tokenizer_class", "LlamaTokenizer");
        });
    }

    /// <summary>The content of <c>special_tokens_map.json</c>.</summary>
    public static byte[] WriteSpecialTokens(BpeTokenizer tokenizer)
    {
        ArgumentNullException.ThrowIfNull(tokenizer);
        return ToJson(json => WriteNames(json, tokenizer));
    }

    /// <summary>Why no tokenizer.json gives the same ids, or null where one does.</summary>
    internal static string? WhyNotWritable(BpeTokenizer tokenizer)
    {
        BpeModel model = tokenizer.Model;
        return model.RemoveExtraWhitespace || !model.CharacterMap.IsEmpty
                ? $"it normalizes text ({(model.NormalizerName.Length > 0 ? model.NormalizerName : "a table of its own")}"
                    + $"{(model.RemoveExtraWhitespace ? ", extra spaces removed" : "")})"
            : !model.EscapeWhitespace && model.WordSplit == WordSplit.None ? "its pieces have real spaces"
            : tokenizer.Tables.HasHiddenCharacters ? "it merges characters that have no piece of their own"
            : !model.SymbolsSplitText && model.Pieces.Any(piece => piece.Kind == PieceKind.UserDefined)
                ? "its user-defined symbols do not split the text, those of tokenizer.json do"
            : HasTies(tokenizer) ? "it has pieces of equal score, whose merges have no order that a list can express"
            : null;
    }

    /// <summary>Whether different pieces share a rank, so that the place in the text decides, and that changes ids.</summary>
    private static bool HasTies(BpeTokenizer tokenizer)
    {
        List<(int Rank, int Left, int Right, int Result)> merges = tokenizer.Tables.MergeList;
        IReadOnlyList<Piece> pieces = tokenizer.Model.Pieces;
        bool spacesTie = false;
        for (int i = 1; i < merges.Count; i++)
        {
            if (merges[i].Rank == merges[i - 1].Rank && merges[i].Result != merges[i - 1].Result)
            {
                if (!IsSpaces(pieces[merges[i].Result]) || !IsSpaces(pieces[merges[i - 1].Result]))
                {
                    return true;
                }

                spacesTie = true;
            }
        }

        return spacesTie && SpacesDiffer(tokenizer);
    }

    /// <summary>
    /// Whether runs of spaces, which Llama 2 has at one rank, come out otherwise when their merges have an order. The pieces
    /// of a long run repeat, so that a few lengths of the longest piece tell.
    /// </summary>
    private static bool SpacesDiffer(BpeTokenizer tokenizer)
    {
        int longest = tokenizer.Model.Pieces.Max(piece => IsSpaces(piece) ? piece.Text.Length : 0);
        BpeModel listed = tokenizer.Model with
        {
            Merges = [.. tokenizer.Tables.MergeList.Select(merge => new Merge(merge.Left, merge.Right))],
        };
        var ordered = new BpeTokenizer(listed);
        List<int> expected = [];
        List<int> found = [];
        for (int length = 1; length <= 4 * longest; length++)
        {
            expected.Clear();
            found.Clear();
            tokenizer.Encode(new string(' ', length), expected);
            ordered.Encode(new string(' ', length), found);
            if (!expected.SequenceEqual(found))
            {
                return true;
            }
        }

        return false;
    }

    private static bool IsSpaces(Piece piece) => piece.Text.All(character => character == BpeModel.Space);

    private static T Parse<T>(ReadOnlyMemory<byte> content, string source, Func<JsonElement, T> read)
    {
        try
        {
            using JsonDocument document = JsonDocument.Parse(content);
            return read(document.RootElement);
        }
        catch (JsonException error)
        {
            throw new UserErrorException($"{source}: is no JSON: line {error.LineNumber + 1}, byte {error.BytePositionInLine}: "
                + "the file is damaged or of another kind", error);
        }
        catch (InvalidOperationException error)
        {
            // Text with unpaired surrogate escapes has no UTF-16 form.
            throw new UserErrorException($"{source}: has text that is not Unicode: {error.Message}", error);
        }
    }

    private static BpeModel WithNames(BpeModel model, JsonElement config)
    {
        string Name(string key, string otherwise)
        {
            if (config.ValueKind != JsonValueKind.Object || !config.TryGetProperty(key, out JsonElement value))
            {
                return otherwise;
            }

            if (value.ValueKind == JsonValueKind.Object && value.TryGetProperty("content", out JsonElement content))
            {
                value = content;
            }

            return value.ValueKind == JsonValueKind.String ? value.GetString()! : otherwise;
        }

        return model with
        {
            BosPiece = Name("bos_token", model.BosPiece),
            EosPiece = Name("eos_token", model.EosPiece),
            PadPiece = Name("pad_token", model.PadPiece),
        };
    }

    private static byte[] ToJson(Action<Utf8JsonWriter> write)
    {
        using var stream = new MemoryStream();
        using (var json = new Utf8JsonWriter(stream, s_format))
        {
            json.WriteStartObject();
            write(json);
            json.WriteEndObject();
        }

        stream.WriteByte((byte)'\n');
        return stream.ToArray();
    }

    private static void WriteNames(Utf8JsonWriter json, BpeTokenizer tokenizer)
    {
        BpeModel model = tokenizer.Model;
        void Name(string key, int? id)
        {
            if (id is { } found)
            {
                json.WriteString(key, model.Pieces[found].Text);
            }
        }

        Name("bos_token", tokenizer.Bos);
        Name("eos_token", tokenizer.Eos);
        Name("pad_token", model.FindControl(model.PadPiece));
        Name("unk_token", tokenizer.Tables.UnknownId < 0 ? null : tokenizer.Tables.UnknownId);
    }

    private static void WriteAddedTokens(Utf8JsonWriter json, BpeModel model)
    {
        json.WriteStartArray("added_tokens");
        for (int id = 0; id < model.Pieces.Count; id++)
        {
            if (model.Pieces[id].Kind is PieceKind.Normal or PieceKind.Byte)
            {
                continue;
            }

            json.WriteStartObject();
            json.WriteNumber("id", id);
            json.WriteString("content", model.Pieces[id].Text);
            json.WriteBoolean("single_word", false);
            json.WriteBoolean("lstrip", false);
            json.WriteBoolean("rstrip", false);
            json.WriteBoolean("normalized", false);
            json.WriteBoolean("special", model.Pieces[id].Kind != PieceKind.UserDefined);
            json.WriteEndObject();
        }

        json.WriteEndArray();
    }

    private static void WriteSpaces(Utf8JsonWriter json, BpeModel model)
    {
        if (model.DummyPrefix == DummyPrefix.UnlessSpace)
        {
            json.WriteNull("normalizer");
            json.WriteStartObject("pre_tokenizer");
            json.WriteString("type", "Metaspace");
            json.WriteString("replacement", SpaceText);
            json.WriteString("prepend_scheme", "always");
            json.WriteBoolean("split", false);
            json.WriteEndObject();
            return;
        }

        json.WriteStartObject("normalizer");
        json.WriteString("type", "Sequence");
        json.WriteStartArray("normalizers");
        if (model.DummyPrefix == DummyPrefix.Always)
        {
            json.WriteStartObject();
            json.WriteString("type", "Prepend");
            json.WriteString("prepend", SpaceText);
            json.WriteEndObject();
        }

        WriteReplace(json, " ", SpaceText);
        json.WriteEndArray();
        json.WriteEndObject();
        json.WriteNull("pre_tokenizer");
    }

    private static void WriteWords(Utf8JsonWriter json, WordSplit split)
    {
        json.WriteNull("normalizer");
        json.WriteStartObject("pre_tokenizer");
        json.WriteString("type", "Sequence");
        json.WriteStartArray("pretokenizers");
        if (split == WordSplit.SingleDigits)
        {
            json.WriteStartObject();
            json.WriteString("type", "Digits");
            json.WriteBoolean("individual_digits", true);
            json.WriteEndObject();
        }

        if (split == WordSplit.Llama3)
        {
            json.WriteStartObject();
            json.WriteString("type", "Split");
            json.WriteStartObject("pattern");
            json.WriteString("Regex", WordSplitter.Llama3Pattern);
            json.WriteEndObject();
            json.WriteString("behavior", "Isolated");
            json.WriteBoolean("invert", false);
            json.WriteEndObject();
        }

        json.WriteStartObject();
        WriteByteLevel(json, useRegex: split != WordSplit.Llama3);
        json.WriteEndObject();
        json.WriteEndArray();
        json.WriteEndObject();
    }

    private static void WriteByteLevel(Utf8JsonWriter json, bool useRegex)
    {
        json.WriteString("type", "ByteLevel");
        json.WriteBoolean("add_prefix_space", false);
        json.WriteBoolean("trim_offsets", true);
        json.WriteBoolean("use_regex", useRegex);
    }

    private static void WriteReplace(Utf8JsonWriter json, string pattern, string content)
    {
        json.WriteStartObject();
        json.WriteString("type", "Replace");
        json.WriteStartObject("pattern");
        json.WriteString("String", pattern);
        json.WriteEndObject();
        json.WriteString("content", content);
        json.WriteEndObject();
    }

    private static void WriteTemplate(Utf8JsonWriter json, BpeTokenizer tokenizer)
    {
        if (tokenizer.Bos is not { } bos || !tokenizer.Model.AddsBos)
        {
            json.WriteNull("post_processor");
            return;
        }

        string text = tokenizer.Model.Pieces[bos].Text;
        void Sequence(string name, params ReadOnlySpan<(string Kind, string Id, int Type)> parts)
        {
            json.WriteStartArray(name);
            foreach ((string kind, string id, int type) in parts)
            {
                json.WriteStartObject();
                json.WriteStartObject(kind);
                json.WriteString("id", id);
                json.WriteNumber("type_id", type);
                json.WriteEndObject();
                json.WriteEndObject();
            }

            json.WriteEndArray();
        }

        json.WriteStartObject("post_processor");
        json.WriteString("type", "TemplateProcessing");
        Sequence("single", ("SpecialToken", text, 0), ("Sequence", "A", 0));
        Sequence(
            "pair", ("SpecialToken", text, 0), ("Sequence", "A", 0), ("SpecialToken", text, 1), ("Sequence", "B", 1));
        json.WriteStartObject("special_tokens");
        json.WriteStartObject(text);
        json.WriteString("id", text);
        json.WriteStartArray("ids");
        json.WriteNumberValue(bos);
        json.WriteEndArray();
        json.WriteStartArray("tokens");
        json.WriteStringValue(text);
        json.WriteEndArray();
        json.WriteEndObject();
        json.WriteEndObject();
        json.WriteEndObject();
    }

    private static void WriteDecoder(Utf8JsonWriter json, BpeModel model)
    {
        json.WriteStartObject("decoder");
        if (model.WordSplit != WordSplit.None)
        {
            WriteByteLevel(json, useRegex: true);
            json.WriteEndObject();
            return;
        }

        json.WriteString("type", "Sequence");
        json.WriteStartArray("decoders");
        WriteReplace(json, SpaceText, " ");
        foreach (string type in (ReadOnlySpan<string>)["ByteFallback", "Fuse"])
        {
            json.WriteStartObject();
            json.WriteString("type", type);
            json.WriteEndObject();
        }

        if (model.DummyPrefix != DummyPrefix.None)
        {
            json.WriteStartObject();
            json.WriteString("type", "Strip");
            json.WriteString("content", " ");
            json.WriteNumber("start", 1);
            json.WriteNumber("stop", 0);
            json.WriteEndObject();
        }

        json.WriteEndArray();
        json.WriteEndObject();
    }

    private static void WriteModel(Utf8JsonWriter json, BpeTokenizer tokenizer)
    {
        BpeModel model = tokenizer.Model;
        json.WriteStartObject("model");
        json.WriteString("type", "BPE");
        json.WriteNull("dropout");
        if (tokenizer.Tables.UnknownId >= 0)
        {
            json.WriteString("unk_token", model.Pieces[tokenizer.Tables.UnknownId].Text);
        }
        else
        {
            json.WriteNull("unk_token");
        }

        json.WriteNull("continuing_subword_prefix");
        json.WriteNull("end_of_word_suffix");
        json.WriteBoolean("fuse_unk", model.WordSplit == WordSplit.None);
        json.WriteBoolean("byte_fallback", model.ByteFallback);
        json.WriteBoolean("ignore_merges", model.WordsComeFirst);
        json.WriteStartObject("vocab");
        for (int id = 0; id < model.Pieces.Count; id++)
        {
            json.WriteNumber(model.Pieces[id].Text, id);
        }

        json.WriteEndObject();
        json.WriteStartArray("merges");
        foreach ((_, int left, int right, _) in tokenizer.Tables.MergeList)
        {
            json.WriteStringValue($"{model.Pieces[left].Text} {model.Pieces[right].Text}");
        }

        json.WriteEndArray();
        json.WriteEndObject();
    }
}
