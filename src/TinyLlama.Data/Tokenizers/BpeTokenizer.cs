using System.Buffers;
using System.Buffers.Binary;
using System.Collections.Concurrent;
using System.Security.Cryptography;
using System.Text;
using TinyLlama.Data.Shards;

namespace TinyLlama.Data.Tokenizers;

/// <summary>
/// Byte-pair encoding with the ids of SentencePiece (models of <c>tokenizer.model</c>) or of Hugging Face's tokenizers (models
/// of <c>tokenizer.json</c> in the form of Llama, or byte-level). Safe for several threads at once.
/// </summary>
public sealed class BpeTokenizer : ITokenizer
{
    private static readonly SymbolMatcher s_none = new([]);

    private readonly BpeTables _tables;
    private readonly BpeNormalizer? _normalizer;
    private readonly SymbolMatcher _symbols;
    private readonly SymbolMatcher _controls;
    private readonly SymbolMatcher _markers;
    private readonly byte[][] _bytes;
    private readonly bool[] _startsWithSpace;
    private readonly Dictionary<string, int>? _words;
    private readonly ConcurrentBag<BpeEncoder> _encoders = [];
    private readonly ConcurrentBag<BpeEncoder> _plainEncoders = [];

    /// <summary>Makes a tokenizer of a model.</summary>
    /// <param name="model">What decides the ids.</param>
    /// <param name="source">The name of its file, for error messages.</param>
    /// <exception cref="UserErrorException">The model contradicts itself or asks for what is not implemented.</exception>
    public BpeTokenizer(BpeModel model, string source = "the model")
    {
        ArgumentNullException.ThrowIfNull(model);
        Model = model;
        _tables = new BpeTables(model, source);
        _symbols = new SymbolMatcher(Symbols(PieceKind.UserDefined, escaped: true));
        _controls = new SymbolMatcher(Symbols(PieceKind.Control, escaped: false)
            .Concat(model.SymbolsSplitText ? Symbols(PieceKind.UserDefined, escaped: true) : []));
        _markers = new SymbolMatcher(Symbols(PieceKind.Control, escaped: false).Concat(Symbols(PieceKind.UserDefined, escaped: true)));
        if (model.RemoveExtraWhitespace || !model.CharacterMap.IsEmpty)
        {
            CharacterMap? map = model.CharacterMap.IsEmpty ? null : new CharacterMap(model.CharacterMap.Span, source);
            var written = new SymbolMatcher(Symbols(PieceKind.UserDefined, escaped: false));
            _normalizer = new BpeNormalizer(model, map, written);
        }

        Bos = model.FindControl(model.BosPiece);
        Eos = model.FindControl(model.EosPiece);
        _bytes = new byte[model.Pieces.Count][];
        _startsWithSpace = new bool[model.Pieces.Count];
        bool dropsSpace = model.DummyPrefix != DummyPrefix.None || model.RemoveExtraWhitespace;
        for (int id = 0; id < _bytes.Length; id++)
        {
            Piece piece = model.Pieces[id];
            _bytes[id] = piece.Kind switch
            {
                PieceKind.Control => [],
                PieceKind.Byte => [(byte)BpeModel.ByteOf(piece.Text)],
                PieceKind.Unknown => Encoding.UTF8.GetBytes(model.UnknownSurface),
                PieceKind.Normal when model.WordSplit != WordSplit.None => ByteLetters.Bytes(piece.Text) ?? Encoding.UTF8.GetBytes(piece.Text),
                _ => Encoding.UTF8.GetBytes(model.WordSplit != WordSplit.None ? piece.Text : piece.Text.Replace(BpeModel.Space, ' ')),
            };
            _startsWithSpace[id] = dropsSpace && piece.Kind is PieceKind.Normal or PieceKind.UserDefined
                && piece.Text[0] == BpeModel.Space;
        }

        if (model.WordsComeFirst)
        {
            _words = model.Pieces.Select(static (piece, id) => (piece, id)).Where(static pair => pair.piece.Kind == PieceKind.Normal)
                .ToDictionary(static pair => pair.piece.Text, static pair => pair.id, StringComparer.Ordinal);
        }

        Hash = ComputeHash();
    }

    /// <summary>Gets the model.</summary>
    public BpeModel Model { get; }

    /// <inheritdoc/>
    public int VocabularySize => _tables.VocabularySize;

    /// <inheritdoc/>
    public int? Bos { get; }

    /// <inheritdoc/>
    public int? Eos { get; }

    /// <inheritdoc/>
    public string Hash { get; }

    internal BpeTables Tables => _tables;

    /// <inheritdoc/>
    public void Encode(ReadOnlySpan<char> text, List<int> tokens)
    {
        ArgumentNullException.ThrowIfNull(tokens);
        byte[] utf8 = ArrayPool<byte>.Shared.Rent(Encoding.UTF8.GetByteCount(text));
        int count = Encoding.UTF8.GetBytes(text, utf8);
        EncodeUtf8(utf8.AsSpan(0, count), tokens);
        ArrayPool<byte>.Shared.Return(utf8);
    }

    /// <summary>
    /// Appends the ids of a text given as UTF-8, without BOS or EOS. Bytes that are no UTF-8 become byte tokens, so that
    /// they come back when the tokens are decoded; a model that normalizes characters, or one without byte tokens, gives
    /// U+FFFD or the unknown token instead.
    /// </summary>
    /// <param name="utf8">Any text; control symbols in it are text.</param>
    /// <param name="tokens">Where ids are appended.</param>
    public void EncodeUtf8(ReadOnlySpan<byte> utf8, List<int> tokens)
    {
        ArgumentNullException.ThrowIfNull(tokens);
        if (Model.SymbolsSplitText && _symbols.Any)
        {
            EncodeAround(_symbols, utf8, [], tokens);
        }
        else
        {
            EncodeSection(utf8, tokens);
        }
    }

    /// <summary>
    /// Appends the ids of a text in which control symbols are written out, such as <c>&lt;/s&gt;</c> in a chat template; what
    /// stands between two of them is encoded as a text of its own. Never for text that a stranger wrote.
    /// </summary>
    /// <param name="text">The text, with control symbols.</param>
    /// <param name="tokens">Where ids are appended.</param>
    public void EncodeWithControls(string text, List<int> tokens)
    {
        ArgumentNullException.ThrowIfNull(tokens);
        EncodeAround(_controls, Encoding.UTF8.GetBytes(text), [], tokens);
    }

    /// <summary>
    /// As <see cref="EncodeWithControls(string, List{int})"/>, for a text that a stranger wrote parts of: there, neither control
    /// nor user-defined symbols are found.
    /// </summary>
    /// <param name="text">The text.</param>
    /// <param name="isForeign">Of each character whether a stranger wrote it.</param>
    /// <param name="tokens">Where ids are appended.</param>
    public void EncodeWithControls(string text, ReadOnlySpan<bool> isForeign, List<int> tokens)
    {
        ArgumentNullException.ThrowIfNull(tokens);
        ArgumentOutOfRangeException.ThrowIfNotEqual(isForeign.Length, text.Length);
        byte[] utf8 = Encoding.UTF8.GetBytes(text);
        bool[] isForeignByte = new bool[utf8.Length];
        (int character, int first) = (0, 0);
        foreach (Rune rune in text.EnumerateRunes())
        {
            isForeignByte.AsSpan(first, rune.Utf8SequenceLength).Fill(isForeign[character]);
            character += rune.Utf16SequenceLength;
            first += rune.Utf8SequenceLength;
        }

        EncodeAround(_markers, utf8, isForeignByte, tokens);
    }

    /// <summary>Whether a token is a control symbol: it stands for no text.</summary>
    /// <exception cref="ArgumentOutOfRangeException">The id is outside the vocabulary.</exception>
    public bool IsControl(int token)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual((uint)token, (uint)_bytes.Length, nameof(token));
        return Model.Pieces[token].Kind == PieceKind.Control;
    }

    /// <inheritdoc/>
    public string Decode(ReadOnlySpan<int> tokens)
    {
        long byteCount = 0;
        foreach (int token in tokens)
        {
            byteCount += TokenBytes(token).Length;
        }

        byte[] bytes = new byte[checked((int)byteCount)];
        int count = 0;
        bool atStart = true;
        foreach (int token in tokens)
        {
            ReadOnlySpan<byte> piece = (atStart ? FirstTokenBytes(token) : _bytes[token]).Span;
            piece.CopyTo(bytes.AsSpan(count));
            count += piece.Length;
            atStart &= _bytes[token].Length == 0;
        }

        return Encoding.UTF8.GetString(bytes, 0, count);
    }

    /// <inheritdoc/>
    public ReadOnlyMemory<byte> TokenBytes(int token)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual((uint)token, (uint)_bytes.Length, nameof(token));
        return _bytes[token];
    }

    /// <inheritdoc/>
    public ReadOnlyMemory<byte> FirstTokenBytes(int token)
    {
        ReadOnlyMemory<byte> bytes = TokenBytes(token);
        return _startsWithSpace[token] ? bytes[1..] : bytes;
    }

    /// <summary>
    /// Writes <c>tokenizer.model</c>, and <c>tokenizer.json</c>, <c>tokenizer_config.json</c> and <c>special_tokens_map.json</c> as
    /// Hugging Face's LlamaTokenizer reads them.
    /// </summary>
    /// <param name="folder">Where to; it is made if it is not there.</param>
    /// <returns>A line for each of the two forms that cannot express this model and was left out; it says why.</returns>
    /// <exception cref="UserErrorException">Neither form can express the model, or a file cannot be written.</exception>
    public IReadOnlyList<string> Save(string folder)
    {
        ArgumentNullException.ThrowIfNull(folder);
        var files = new List<(string Name, byte[] Content)>();
        var leftOut = new List<string>();
        if (SentencePieceModel.WhyNotWritable(Model) is { } noModel)
        {
            leftOut.Add($"tokenizer.model is left out: {noModel}");
        }
        else
        {
            files.Add(("tokenizer.model", SentencePieceModel.Write(Model)));
        }

        if (HuggingFaceTokenizer.WhyNotWritable(this) is { } noJson)
        {
            leftOut.Add($"tokenizer.json is left out: {noJson}");
        }
        else
        {
            files.Add(("tokenizer.json", HuggingFaceTokenizer.Write(this)));
        }

        if (leftOut.Count == 2)
        {
            throw new UserErrorException($"{folder}: the tokenizer cannot be written: {string.Join("; ", leftOut)}");
        }

        files.Add(("tokenizer_config.json", HuggingFaceTokenizer.WriteConfig(this)));
        files.Add(("special_tokens_map.json", HuggingFaceTokenizer.WriteSpecialTokens(this)));
        try
        {
            Directory.CreateDirectory(folder);
            WholeFile.WriteAll(folder, files);
        }
        catch (Exception error) when (error is IOException or UnauthorizedAccessException)
        {
            throw new UserErrorException($"{folder}: cannot be written: {error.Message}", error);
        }

        return leftOut;
    }

    /// <summary>Encodes one text with an encoder of its own and returns how many entries its priority queue took.</summary>
    internal long CountQueued(string text)
    {
        var encoder = new BpeEncoder(_tables, _symbols);
        byte[] buffer = new byte[Encoding.UTF8.GetByteCount(text) + StretchCache.KeyBytes];
        encoder.Encode(buffer, Encoding.UTF8.GetBytes(text, buffer), []);
        return encoder.QueuedCount;
    }

    // No symbol is found where a byte is foreign; where none is, isForeign may be empty.
    private void EncodeAround(SymbolMatcher symbols, ReadOnlySpan<byte> text, ReadOnlySpan<bool> isForeign, List<int> tokens)
    {
        int start = 0;
        for (int position = 0; position < text.Length;)
        {
            int matched = symbols.Match(text[position..], out int id);
            if (matched == 0 || (!isForeign.IsEmpty && isForeign.Slice(position, matched).Contains(true)))
            {
                position++;
                continue;
            }

            EncodeSection(text[start..position], tokens, !isForeign.IsEmpty);
            tokens.Add(id);
            position += matched;
            start = position;
        }

        EncodeSection(text[start..], tokens, !isForeign.IsEmpty);
    }

    // Plain: user-defined symbols are not found.
    private void EncodeSection(ReadOnlySpan<byte> utf8, List<int> tokens, bool plain = false)
    {
        if (utf8.IsEmpty)
        {
            return;
        }

        bool isByteLevel = Model.WordSplit != WordSplit.None;
        plain |= isByteLevel;
        ConcurrentBag<BpeEncoder> encoders = plain ? _plainEncoders : _encoders;
        BpeEncoder encoder = encoders.TryTake(out BpeEncoder? kept) ? kept : new BpeEncoder(_tables, plain ? s_none : _symbols);
        if (isByteLevel)
        {
            EncodeWords(encoder, utf8, tokens);
        }
        else
        {
            EncodeText(encoder, utf8, tokens);
        }

        if (encoder.IsWorthKeeping)
        {
            encoders.Add(encoder);
        }
    }

    private void EncodeText(BpeEncoder encoder, ReadOnlySpan<byte> utf8, List<int> tokens)
    {
        int before = tokens.Count;
        byte[] buffer = Normalize(utf8, out int length);
        encoder.Encode(buffer, length, tokens);
        ArrayPool<byte>.Shared.Return(buffer);
        if (_tables.ByteIds is null)
        {
            FuseUnknown(tokens, before);
        }
    }

    private void EncodeWords(BpeEncoder encoder, ReadOnlySpan<byte> utf8, List<int> tokens)
    {
        // The letter of a byte has at most two bytes.
        byte[] buffer = ArrayPool<byte>.Shared.Rent((2 * utf8.Length) + StretchCache.KeyBytes);
        while (!utf8.IsEmpty)
        {
            ReadOnlySpan<byte> word = utf8[..WordSplitter.Next(Model.WordSplit, utf8)];
            if (FindWord(word) is { } id)
            {
                tokens.Add(id);
            }
            else
            {
                encoder.Encode(buffer, ByteLetters.WriteUtf8(word, buffer), tokens);
            }

            utf8 = utf8[word.Length..];
        }

        ArrayPool<byte>.Shared.Return(buffer);
    }

    private int? FindWord(ReadOnlySpan<byte> word)
    {
        if (_words is null || word.Length > BpeTables.MaximumPieceCharacters)
        {
            return null;
        }

        Span<char> letters = stackalloc char[word.Length];
        for (int i = 0; i < word.Length; i++)
        {
            letters[i] = ByteLetters.Of(word[i]);
        }

        return _words.GetAlternateLookup<ReadOnlySpan<char>>().TryGetValue(letters, out int id) ? id : null;
    }

    /// <summary>The normalized text in a rented buffer with the room after it that the encoder asks for.</summary>
    private byte[] Normalize(ReadOnlySpan<byte> utf8, out int length)
    {
        byte[] buffer;
        if (_normalizer is not null)
        {
            var normalized = new ArrayBufferWriter<byte>(utf8.Length + 16);
            _normalizer.Normalize(utf8, normalized);
            length = normalized.WrittenCount;
            buffer = ArrayPool<byte>.Shared.Rent(length + StretchCache.KeyBytes);
            normalized.WrittenSpan.CopyTo(buffer);
        }
        else
        {
            int prefix = Model.DummyPrefix switch
            {
                DummyPrefix.None => 0,
                DummyPrefix.UnlessSpace => utf8[0] == ' ' || utf8.StartsWith("\u2581"u8) ? 0 : 1,
                _ => 1,
            };
            length = prefix + utf8.Length;
            buffer = ArrayPool<byte>.Shared.Rent(length + StretchCache.KeyBytes);
            buffer[0] = (byte)' ';
            utf8.CopyTo(buffer.AsSpan(prefix));
        }

        if (Model.EscapeWhitespace)
        {
            length = ShortenSpaces(buffer.AsSpan(0, length));
        }

        if (Model.RemoveExtraWhitespace)
        {
            length = buffer.AsSpan(0, length).TrimEnd((byte)' ').Length;
        }

        return buffer;
    }

    /// <summary>Replaces U+2581, which means a space, by the one byte that the tables know; returns the new length.</summary>
    private static int ShortenSpaces(Span<byte> text)
    {
        ReadOnlySpan<byte> space = "\u2581"u8;
        int read = text.IndexOf(space);
        if (read < 0)
        {
            return text.Length;
        }

        int written = read;
        while (read < text.Length)
        {
            bool isSpace = text[read..].StartsWith(space);
            text[written++] = isSpace ? (byte)' ' : text[read];
            read += isSpace ? space.Length : 1;
        }

        return written;
    }

    /// <summary>Leaves one unknown token of each run of them.</summary>
    private void FuseUnknown(List<int> tokens, int from)
    {
        int kept = from;
        for (int i = from; i < tokens.Count; i++)
        {
            if (i == from || tokens[i] != _tables.UnknownId || tokens[i - 1] != _tables.UnknownId)
            {
                tokens[kept++] = tokens[i];
            }
        }

        tokens.RemoveRange(kept, tokens.Count - kept);
    }

    private IEnumerable<(byte[] Text, int Id)> Symbols(PieceKind kind, bool escaped)
    {
        for (int id = 0; id < Model.Pieces.Count; id++)
        {
            if (Model.Pieces[id].Kind == kind)
            {
                string text = Model.Pieces[id].Text;
                yield return (Encoding.UTF8.GetBytes(escaped ? BpeTables.Unescape(Model, text) : text), id);
            }
        }
    }

    /// <summary>
    /// The digest of everything that decides ids, in a form that does not depend on the file: two files of the same
    /// vocabulary give the same digest whether their merges are written as scores or as a list.
    /// </summary>
    private string ComputeHash()
    {
        using var sha = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);
        byte[] number = new byte[4];
        void Number(int value)
        {
            BinaryPrimitives.WriteInt32LittleEndian(number, value);
            sha.AppendData(number);
        }

        void Bytes(ReadOnlySpan<byte> value)
        {
            Number(value.Length);
            sha.AppendData(value);
        }

        bool symbolsSplitText = Model.SymbolsSplitText && _symbols.Any;
        Number(Model.ByteFallback ? 1 : 0);
        Number((int)Model.DummyPrefix);
        Number((symbolsSplitText ? 1 : 0) | (Model.RemoveExtraWhitespace ? 2 : 0) | (Model.EscapeWhitespace ? 4 : 0));
        Bytes(Model.CharacterMap.Span);
        Bytes(Encoding.UTF8.GetBytes(Model.UnknownSurface));
        Number(Bos ?? -1);
        Number(Eos ?? -1);
        Number(Model.Pieces.Count);
        foreach (Piece piece in Model.Pieces)
        {
            Number((int)piece.Kind);
            Bytes(Encoding.UTF8.GetBytes(piece.Text));
        }

        foreach ((int rank, int left, int right, int result) in _tables.MergeList)
        {
            Number(rank);
            Number(left);
            Number(right);
            Number(result);
        }

        if (Model.WordSplit != WordSplit.None)
        {
            Number((int)Model.WordSplit);
            Number(Model.WordsComeFirst ? 1 : 0);
        }

        return Convert.ToHexStringLower(sha.GetHashAndReset());
    }
}
