using System.Text.Json;

namespace TinyLlama.Data.Tokenizers;

/// <summary>Makes a model of the content of a tokenizer.json; whatever it does not know is refused by name.</summary>
/// <param name="source">The file's name, for error messages.</param>
internal sealed class JsonTokenizerReader(string source)
{
    private const string SpaceText = "\u2581";
    private DummyPrefix _prefix = DummyPrefix.None;
    private bool _prefixFirstOnly;
    private bool _escapes;
    private bool _splits;
    private bool _normalizes;
    private WordSplit _words = WordSplit.None;
    private bool _singleDigits;
    private bool _patternOfLlama3;

    public BpeModel Read(JsonElement root)
    {
        JsonElement model = Object(root, "model");
        string type = Text(model, "type") ?? "BPE";
        if (type != "BPE")
        {
            throw Refused($"model.type is {type}; only BPE is supported");
        }

        ReadSpaces(root, "normalizer");
        ReadSpaces(root, "pre_tokenizer");
        RequireOneKind(root);
        RequireEmpty(model, "dropout");
        RequireEmpty(model, "continuing_subword_prefix");
        RequireEmpty(model, "end_of_word_suffix");
        bool isByteLevel = _words != WordSplit.None;
        bool wordsComeFirst = Flag(model, "ignore_merges");
        bool byteFallback = Flag(model, "byte_fallback");
        if (wordsComeFirst && !isByteLevel)
        {
            throw Refused("model.ignore_merges is true, which is supported in a byte-level BPE only");
        }

        if (isByteLevel ? byteFallback : !byteFallback && !Flag(model, "fuse_unk"))
        {
            throw Refused($"model.byte_fallback is {(byteFallback ? "true in a byte-level BPE" : "false without fuse_unk")}, which is not supported");
        }

        // No text of a byte-level BPE is unknown.
        string? unknown = isByteLevel ? null : Text(model, "unk_token");
        string? first = isByteLevel && Find(root, "post_processor", JsonValueKind.Object) is { } step ? FirstToken(step) : null;
        JsonElement vocabulary = Object(model, "vocab");
        List<JsonElement> added = Find(root, "added_tokens", JsonValueKind.Array) is { } list ? [.. list.EnumerateArray()] : [];
        string?[] texts = ReadVocabulary(vocabulary, added);
        PieceKind[] kinds = new PieceKind[texts.Length];
        for (int id = 0; id < texts.Length; id++)
        {
            kinds[id] = byteFallback && BpeModel.ByteOf(texts[id]!) >= 0 ? PieceKind.Byte : PieceKind.Normal;
        }

        ReadAddedTokens(added, kinds);
        var ids = new Dictionary<string, int>(texts.Length, StringComparer.Ordinal);
        for (int id = 0; id < texts.Length; id++)
        {
            kinds[id] = texts[id] == unknown ? PieceKind.Unknown : kinds[id];
            if (!ids.TryAdd(texts[id]!, id))
            {
                throw Refused($"the token \"{texts[id]}\" has the ids {ids[texts[id]!]} and {id}");
            }
        }

        List<Merge> merges = ReadMerges(model, ids);
        return Simplify(new BpeModel
        {
            Pieces = [.. texts.Select((text, id) => new Piece(text!, 0, kinds[id]))],
            Merges = merges,
            ByteFallback = byteFallback,
            DummyPrefix = _prefix,
            SymbolsSplitText = true,
            EscapeWhitespace = _escapes,
            WordSplit = _words,
            WordsComeFirst = wordsComeFirst,
            AddsBos = !isByteLevel || first is not null,
            BosPiece = first ?? "<s>",
        });
    }

    // Byte-level or SentencePiece's way, but not some of both.
    private void RequireOneKind(JsonElement root)
    {
        bool decodesBytes = Find(root, "decoder", JsonValueKind.Object) is { } decoder && Text(decoder, "type") == "ByteLevel";
        if (decodesBytes != (_words != WordSplit.None))
        {
            throw Refused("only one of pre_tokenizer and decoder is ByteLevel, which is not supported");
        }

        if (_words == WordSplit.None ? _singleDigits || _patternOfLlama3 : _escapes || _normalizes || _prefix != DummyPrefix.None)
        {
            throw Refused("mixes steps of byte-level BPE with those of SentencePiece, which is not supported");
        }
    }

    /// <summary>The token that a post-processor puts before a text, or null where it puts none.</summary>
    private string? FirstToken(JsonElement step)
    {
        switch (Text(step, "type"))
        {
            case "Sequence" when Find(step, "processors", JsonValueKind.Array) is { } steps:
                return steps.EnumerateArray().Select(FirstToken).FirstOrDefault(static token => token is not null);
            case "TemplateProcessing" when Find(step, "single", JsonValueKind.Array) is { } template:
                JsonElement first = template.EnumerateArray().FirstOrDefault();
                return Find(first, "SpecialToken", JsonValueKind.Object) is { } special ? Text(special, "id") : null;
            case "ByteLevel":
                return null;
            case var type:
                throw Refused($"post_processor of type {type ?? "(none)"} is not supported in a byte-level BPE");
        }
    }

    /// <summary>
    /// Expresses the merges as scores where that is exactly the same, as it is for vocabularies that come from
    /// SentencePiece, so that one vocabulary is one model whatever file it was read from.
    /// </summary>
    private BpeModel Simplify(BpeModel model)
    {
        if (!model.EscapeWhitespace)
        {
            return model;
        }

        List<(int Rank, int Left, int Right, int Result)> listed = new BpeTables(model, source).MergeList;
        float[] scores = new float[model.Pieces.Count];
        Array.Fill(scores, float.NaN);
        int next = 0;
        foreach ((_, _, _, int result) in listed)
        {
            scores[result] = float.IsNaN(scores[result]) ? -next++ : scores[result];
        }

        for (int id = 0; id < scores.Length; id++)
        {
            bool isText = model.Pieces[id].Kind is PieceKind.Normal;
            scores[id] = !isText ? 0 : float.IsNaN(scores[id]) ? -next++ : scores[id];
        }

        BpeModel scored = model with
        {
            Pieces = [.. model.Pieces.Select((piece, id) => piece with { Score = scores[id] })],
            Merges = null,
        };
        bool isSame = new BpeTables(scored, source).MergeList.Select(merge => (merge.Left, merge.Right))
            .SequenceEqual(listed.Select(merge => (merge.Left, merge.Right)));
        return isSame ? scored : model;
    }

    private void ReadSpaces(JsonElement parent, string key)
    {
        if (Find(parent, key, JsonValueKind.Object) is { } step)
        {
            ReadSpaceStep(step, key);
        }
    }

    private void ReadSpaceStep(JsonElement step, string key)
    {
        string? type = Text(step, "type");
        switch (type)
        {
            case "Sequence":
                string steps = key == "normalizer" ? "normalizers" : "pretokenizers";
                if (Find(step, steps, JsonValueKind.Array) is not { } list)
                {
                    throw Refused($"{key} is a Sequence without {steps}");
                }

                foreach (JsonElement item in list.EnumerateArray())
                {
                    ReadSpaceStep(item, key);
                }

                break;
            case "Prepend" when key == "normalizer" && Text(step, "prepend") == SpaceText:
                SetPrefix(DummyPrefix.Always);
                _normalizes = true;
                break;
            case "Replace" when key == "normalizer" && Text(step, "content") == SpaceText
                && Find(step, "pattern", JsonValueKind.Object) is { } pattern && Text(pattern, "String") == " ":
                _escapes = true;
                _normalizes = true;
                break;
            case "Metaspace" when key == "pre_tokenizer" && (Text(step, "replacement") ?? SpaceText) == SpaceText:
                ReadMetaspace(step);
                break;
            case "Digits" when key == "pre_tokenizer" && Flag(step, "individual_digits"):
                _singleDigits = true;
                break;
            case "Split" when key == "pre_tokenizer" && Text(step, "behavior") == "Isolated" && !Flag(step, "invert")
                && Find(step, "pattern", JsonValueKind.Object) is { } words && Text(words, "Regex") == WordSplitter.Llama3Pattern:
                _patternOfLlama3 = true;
                break;
            case "ByteLevel" when key == "pre_tokenizer" && !Flag(step, "add_prefix_space", otherwise: true):
                _words = (_patternOfLlama3, _singleDigits, Flag(step, "use_regex", otherwise: true)) switch
                {
                    (false, false, true) => WordSplit.Gpt2,
                    (false, true, true) => WordSplit.SingleDigits,
                    (true, false, false) => WordSplit.Llama3,
                    _ => throw Refused("pre_tokenizer cuts words in another way than GPT-2, SmolLM or Llama 3, which is not supported"),
                };
                break;
            default:
                throw Refused($"{key} of type {type ?? "(none)"} with these settings is not supported; known are Prepend and Replace, "
                    + "Metaspace, and the ByteLevel of GPT-2, SmolLM and Llama 3");
        }
    }

    private void ReadMetaspace(JsonElement step)
    {
        string scheme = Text(step, "prepend_scheme") ?? (Flag(step, "add_prefix_space", otherwise: true) ? "always" : "never");
        _escapes = true;
        _splits |= Flag(step, "split", otherwise: true);
        switch (scheme)
        {
            case "always":
                SetPrefix(DummyPrefix.UnlessSpace);
                break;
            case "first":
                SetPrefix(DummyPrefix.UnlessSpace);
                _prefixFirstOnly = true;
                break;
            case "never":
                break;
            default:
                throw Refused($"pre_tokenizer.prepend_scheme is \"{scheme}\"; first, always and never are known");
        }
    }

    private void SetPrefix(DummyPrefix prefix)
    {
        _prefix = _prefix == DummyPrefix.None ? prefix : throw Refused("the text is given two prefixes, which is not supported");
    }

    private string?[] ReadVocabulary(JsonElement vocabulary, List<JsonElement> added)
    {
        var pairs = new List<(string Text, JsonElement Id)>();
        foreach (JsonProperty entry in vocabulary.EnumerateObject())
        {
            pairs.Add((entry.Name, entry.Value));
        }

        foreach (JsonElement token in added)
        {
            string content = Text(token, "content") ?? throw Refused("an added token has no content");
            pairs.Add((content, Find(token, "id", JsonValueKind.Number) ?? throw Refused($"added token \"{content}\" has no id")));
        }

        string?[] texts = new string?[pairs.Count];
        int count = 0;
        foreach ((string text, JsonElement idElement) in pairs)
        {
            if (idElement.ValueKind != JsonValueKind.Number || !idElement.TryGetInt32(out int id) || id < 0 || id >= texts.Length)
            {
                throw Refused($"the id of \"{text}\" is {Shorten(idElement)}; ids must be 0 … V-1 without gaps");
            }

            if (texts[id] is { } other && other != text)
            {
                throw Refused($"id {id} belongs to \"{other}\" and to \"{text}\"");
            }

            texts[id] = text;
            count = Math.Max(count, id + 1);
        }

        int gap = Array.IndexOf(texts, null, 0, count);
        return gap < 0 ? texts[..count] : throw Refused($"no token has the id {gap}; ids must be 0 … V-1 without gaps");
    }

    private void ReadAddedTokens(List<JsonElement> added, PieceKind[] kinds)
    {
        foreach (JsonElement token in added)
        {
            int id = token.GetProperty("id").GetInt32();
            if (Flag(token, "special"))
            {
                kinds[id] = PieceKind.Control;
                continue;
            }

            string content = Text(token, "content")!;
            if (Flag(token, "single_word") || Flag(token, "lstrip") || Flag(token, "rstrip"))
            {
                throw Refused($"added token \"{content}\" has single_word, lstrip or rstrip, which is not supported");
            }

            if (Flag(token, "normalized") && _normalizes)
            {
                throw Refused($"added token \"{content}\" is found in normalized text, which is not supported");
            }

            if (_prefixFirstOnly)
            {
                throw Refused($"added token \"{content}\" beside prepend_scheme \"first\" is not supported");
            }

            kinds[id] = PieceKind.UserDefined;
        }
    }

    private List<Merge> ReadMerges(JsonElement model, Dictionary<string, int> ids)
    {
        var merges = new List<Merge>();
        JsonElement list = Find(model, "merges", JsonValueKind.Array) ?? throw Refused("model.merges is not a list");
        foreach (JsonElement item in list.EnumerateArray())
        {
            string[] parts = item.ValueKind switch
            {
                JsonValueKind.String => item.GetString()!.Split(' '),
                JsonValueKind.Array => [.. item.EnumerateArray()
                    .Select(part => part.ValueKind == JsonValueKind.String ? part.GetString()! : "")],
                _ => [],
            };
            if (parts.Length != 2 || !ids.TryGetValue(parts[0], out int left) || !ids.TryGetValue(parts[1], out int right))
            {
                throw Refused($"merge {merges.Count} is {Shorten(item)}, not two tokens of the vocabulary");
            }

            // A Metaspace that splits begins a new word with each space, which no merge joins to what is before it.
            if (!_splits || !parts[1].StartsWith(SpaceText, StringComparison.Ordinal))
            {
                merges.Add(new Merge(left, right));
            }
        }

        return merges;
    }

    private JsonElement Object(JsonElement parent, string key)
    {
        return Find(parent, key, JsonValueKind.Object)
            ?? throw Refused($"has no \"{key}\"; this is no tokenizer.json of Hugging Face, or it is damaged");
    }

    /// <summary>The value of a key, or null where it is absent or null; another type than the one due is refused.</summary>
    private JsonElement? Find(JsonElement parent, string key, JsonValueKind kind)
    {
        if (parent.ValueKind != JsonValueKind.Object || !parent.TryGetProperty(key, out JsonElement value)
            || value.ValueKind == JsonValueKind.Null)
        {
            return null;
        }

        return value.ValueKind == kind ? value : throw Refused($"\"{key}\" is {Shorten(value)}, where the type {kind} is due");
    }

    private string? Text(JsonElement parent, string key) => Find(parent, key, JsonValueKind.String)?.GetString();

    private bool Flag(JsonElement parent, string key, bool otherwise = false)
    {
        bool isFalse = parent.ValueKind == JsonValueKind.Object && parent.TryGetProperty(key, out JsonElement value)
            && value.ValueKind == JsonValueKind.False;
        return !isFalse && (Find(parent, key, JsonValueKind.True) is not null || otherwise);
    }

    private void RequireEmpty(JsonElement model, string key)
    {
        if (model.TryGetProperty(key, out JsonElement value) && value.ValueKind != JsonValueKind.Null
            && !(value.ValueKind == JsonValueKind.String && value.GetString()!.Length == 0)
            && !(value.ValueKind == JsonValueKind.Number && value.TryGetDouble(out double number) && number == 0))
        {
            throw Refused($"model.{key} is {Shorten(value)}, which is not supported");
        }
    }

    private static string Shorten(JsonElement value)
    {
        string text = value.GetRawText().ReplaceLineEndings(" ");
        return text.Length <= 60 ? text : text[..60] + "…";
    }

    private UserErrorException Refused(string what) => new($"{source}: {what}");
}
