namespace TinyLlama.Data.Tokenizers;

/// <summary>
/// Reads and writes SentencePiece's <c>tokenizer.model</c>: the message ModelProto of sentencepiece_model.proto, in which
/// 1 = pieces {1 text, 2 score, 3 kind}, 2 = trainer_spec, 3 = normalizer_spec, 5 = denormalizer_spec.
/// </summary>
public static class SentencePieceModel
{
    private const int MaximumFileBytes = 256 << 20;
    private const int MaximumPieces = 1 << 24;

    /// <summary>Reads a file.</summary>
    /// <exception cref="UserErrorException">It is damaged, or asks for something that is not implemented.</exception>
    public static BpeModel Read(string path)
    {
        ArgumentNullException.ThrowIfNull(path);
        return Read(TokenizerFile.ReadBytes(path, MaximumFileBytes), path);
    }

    /// <summary>Reads the content of a file.</summary>
    /// <param name="content">The bytes of the file.</param>
    /// <param name="source">The file's name, for error messages.</param>
    /// <exception cref="UserErrorException">It is damaged, or asks for something that is not implemented.</exception>
    public static BpeModel Read(ReadOnlySpan<byte> content, string source)
    {
        var pieces = new List<Piece>();
        var trainer = new TrainerSpec();
        var model = new BpeModel { Pieces = pieces, RemoveExtraWhitespace = true, NormalizerName = "" };
        var reader = new ProtobufReader(content, 0, source);
        while (reader.Next())
        {
            switch (reader.Field)
            {
                case 1:
                    if (pieces.Count == MaximumPieces)
                    {
                        throw reader.Damaged($"more than {MaximumPieces} pieces");
                    }

                    pieces.Add(ReadPiece(reader.Message(), pieces.Count));
                    break;
                case 2:
                    ReadTrainerSpec(reader.Message(), trainer);
                    break;
                case 3:
                    model = ReadNormalizerSpec(reader.Message(), model);
                    break;
                case 5:
                    RequireNoDenormalizer(reader.Message(), source);
                    break;
                default:
                    reader.Skip();
                    break;
            }
        }

        if (pieces.Count == 0)
        {
            throw new UserErrorException($"{source}: has no pieces; this is not a SentencePiece model, or it is damaged");
        }

        string? kind = trainer.ModelType switch { 1 => "unigram", 2 => null, 3 => "word", 4 => "char", var n => $"type {n}" };
        if (kind is not null)
        {
            throw new UserErrorException($"{source}: is a SentencePiece {kind} model; only BPE models are supported "
                + "(spm_train --model_type=bpe, or tinyllama tokenizer train)");
        }

        if (trainer.WhitespaceAsSuffix)
        {
            throw new UserErrorException($"{source}: was trained with treat_whitespace_as_suffix, which is not supported");
        }

        return model with
        {
            ByteFallback = trainer.ByteFallback,
            CharacterCoverage = trainer.CharacterCoverage,
            UnknownSurface = trainer.UnknownSurface,
            BosPiece = trainer.BosPiece,
            EosPiece = trainer.EosPiece,
            PadPiece = trainer.PadPiece,
        };
    }

    /// <summary>The content of a file that SentencePiece loads, and with which it gives the same ids.</summary>
    /// <exception cref="UserErrorException">The model is of a kind that SentencePiece does not have.</exception>
    public static byte[] Write(BpeModel model)
    {
        ArgumentNullException.ThrowIfNull(model);
        if (WhyNotWritable(model) is { } reason)
        {
            throw new UserErrorException($"this tokenizer cannot be written as tokenizer.model: {reason}");
        }

        var file = new ProtobufWriter();
        int unknown = -1;
        for (int id = 0; id < model.Pieces.Count; id++)
        {
            var piece = new ProtobufWriter();
            piece.Text(1, model.Pieces[id].Text);
            piece.Float(2, model.Pieces[id].Score);
            if (model.Pieces[id].Kind != PieceKind.Normal)
            {
                piece.Varint(3, (int)model.Pieces[id].Kind);
            }

            file.Message(1, piece);
            unknown = model.Pieces[id].Kind == PieceKind.Unknown ? id : unknown;
        }

        var trainer = new ProtobufWriter();
        trainer.Varint(3, 2);
        trainer.Varint(4, model.Pieces.Count);
        trainer.Float(10, model.CharacterCoverage);
        trainer.Bool(35, model.ByteFallback);
        trainer.Varint(40, unknown);
        trainer.Varint(41, model.FindControl(model.BosPiece) ?? -1);
        trainer.Varint(42, model.FindControl(model.EosPiece) ?? -1);
        trainer.Varint(43, model.FindControl(model.PadPiece) ?? -1);
        trainer.Text(44, model.UnknownSurface);
        trainer.Text(45, unknown < 0 ? "<unk>" : model.Pieces[unknown].Text);
        trainer.Text(46, model.BosPiece);
        trainer.Text(47, model.EosPiece);
        trainer.Text(48, model.PadPiece);
        file.Message(2, trainer);

        var normalizer = new ProtobufWriter();
        normalizer.Text(1, model.NormalizerName);
        normalizer.Bytes(2, model.CharacterMap.Span);
        normalizer.Bool(3, model.DummyPrefix == DummyPrefix.Always);
        normalizer.Bool(4, model.RemoveExtraWhitespace);
        normalizer.Bool(5, model.EscapeWhitespace);
        file.Message(3, normalizer);
        return file.ToArray();
    }

    /// <summary>Why a model has no exact equal among SentencePiece's files, or null where it has.</summary>
    internal static string? WhyNotWritable(BpeModel model)
    {
        return model.Merges is not null ? "its merges do not follow from an order of the pieces"
            : model.DummyPrefix == DummyPrefix.UnlessSpace ? "it puts a space only before text that does not begin with one"
            : model.SymbolsSplitText && model.Pieces.Any(piece => piece.Kind == PieceKind.UserDefined)
                ? "its added tokens split the text, those of SentencePiece do not"
            : null;
    }

    private static Piece ReadPiece(ProtobufReader reader, int id)
    {
        string? text = null;
        float score = 0;
        long kind = (long)PieceKind.Normal;
        while (reader.Next())
        {
            switch (reader.Field)
            {
                case 1:
                    text = reader.Text();
                    break;
                case 2:
                    score = reader.Float();
                    break;
                case 3:
                    kind = reader.Varint();
                    break;
                default:
                    reader.Skip();
                    break;
            }
        }

        if (string.IsNullOrEmpty(text) || kind is < 1 or > 6)
        {
            throw reader.Damaged(kind is < 1 or > 6 ? $"piece {id} is of unknown kind {kind}" : $"piece {id} has no text");
        }

        return new Piece(text, score, (PieceKind)kind);
    }

    private static void ReadTrainerSpec(ProtobufReader reader, TrainerSpec spec)
    {
        while (reader.Next())
        {
            switch (reader.Field)
            {
                case 3:
                    spec.ModelType = reader.Varint();
                    break;
                case 10:
                    spec.CharacterCoverage = reader.Float();
                    break;
                case 24:
                    spec.WhitespaceAsSuffix = reader.Bool();
                    break;
                case 35:
                    spec.ByteFallback = reader.Bool();
                    break;
                case 44:
                    spec.UnknownSurface = reader.Text();
                    break;
                case 46:
                    spec.BosPiece = reader.Text();
                    break;
                case 47:
                    spec.EosPiece = reader.Text();
                    break;
                case 48:
                    spec.PadPiece = reader.Text();
                    break;
                default:
                    reader.Skip();
                    break;
            }
        }
    }

    private static BpeModel ReadNormalizerSpec(ProtobufReader reader, BpeModel model)
    {
        while (reader.Next())
        {
            switch (reader.Field)
            {
                case 1:
                    model = model with { NormalizerName = reader.Text() };
                    break;
                case 2:
                    model = model with { CharacterMap = reader.Bytes().ToArray() };
                    break;
                case 3:
                    model = model with { DummyPrefix = reader.Bool() ? DummyPrefix.Always : DummyPrefix.None };
                    break;
                case 4:
                    model = model with { RemoveExtraWhitespace = reader.Bool() };
                    break;
                case 5:
                    model = model with { EscapeWhitespace = reader.Bool() };
                    break;
                default:
                    reader.Skip();
                    break;
            }
        }

        return model;
    }

    private static void RequireNoDenormalizer(ProtobufReader reader, string source)
    {
        while (reader.Next())
        {
            if (reader.Field == 2 && reader.Bytes().Length > 0)
            {
                throw new UserErrorException($"{source}: has a denormalizer (rules that change decoded text), "
                    + "which is not supported");
            }
            else if (reader.Field != 2)
            {
                reader.Skip();
            }
        }
    }

    /// <summary>The fields of trainer_spec that change what a model does, with sentencepiece_model.proto's defaults.</summary>
    private sealed class TrainerSpec
    {
        public long ModelType { get; set; } = 1;

        public bool ByteFallback { get; set; }

        public bool WhitespaceAsSuffix { get; set; }

        public float CharacterCoverage { get; set; } = 0.9995f;

        public string UnknownSurface { get; set; } = " \u2047 ";

        public string BosPiece { get; set; } = "<s>";

        public string EosPiece { get; set; } = "</s>";

        public string PadPiece { get; set; } = "<pad>";
    }
}
