using System.Diagnostics.CodeAnalysis;
using System.Text.Json;
using System.Text.Json.Serialization;

namespace TinyLlama.Data.Shards;

/// <summary>The side of a corpus that a document is on.</summary>
public enum Split
{
    /// <summary>What a model learns from.</summary>
    Train,

    /// <summary>What a model is measured on and never sees in training.</summary>
    Validation,
}

/// <summary>A file of a folder of token shards, other than a shard.</summary>
/// <param name="File">Its name; it lies beside the manifest.</param>
/// <param name="Bytes">Its length in bytes.</param>
/// <param name="Sha256">SHA-256 of its bytes in lower-case hexadecimal.</param>
public sealed record FileEntry(string File, long Bytes, string Sha256);

/// <summary>One token file.</summary>
/// <param name="File">Its name; it lies beside the manifest.</param>
/// <param name="Tokens">Number of tokens in it.</param>
/// <param name="Documents">Number of documents in it; no document continues in the next shard.</param>
/// <param name="Bytes">Its length in bytes.</param>
/// <param name="Sha256">SHA-256 of its bytes in lower-case hexadecimal.</param>
public sealed record ShardEntry(string File, long Tokens, long Documents, long Bytes, string Sha256);

/// <summary>One side of a corpus: the concatenation of its shards.</summary>
/// <param name="Documents">Number of documents.</param>
/// <param name="Tokens">Number of tokens, with BOS and EOS.</param>
/// <param name="TextBytes">Bytes of UTF-8 text that the tokens stand for; bits per byte are counted against them.</param>
/// <param name="Shards">The token files in order.</param>
public sealed record SplitEntry(long Documents, long Tokens, long TextBytes, IReadOnlyList<ShardEntry> Shards)
{
    /// <summary>Gets a side without documents.</summary>
    public static SplitEntry Empty { get; } = new(0, 0, 0, []);

    /// <summary>The concatenation of two runs of shards.</summary>
    public static SplitEntry operator +(SplitEntry first, SplitEntry second) =>
        new(first.Documents + second.Documents, first.Tokens + second.Tokens, first.TextBytes + second.TextBytes, [.. first.Shards, .. second.Shards]);
}

/// <summary>What became of the records that are in no shard.</summary>
/// <param name="Bad">Records that could not be read; they are in the quarantine file.</param>
/// <param name="Empty">Documents without text.</param>
/// <param name="Duplicates">Documents that equal another one, where these were taken out.</param>
public sealed record LeftOut(long Bad, long Empty, long Duplicates);

/// <summary>What a folder of token shards holds: the file <c>manifest.json</c>, which is written last.</summary>
/// <param name="Format">Always <see cref="FormatName"/>.</param>
/// <param name="Version">Always <see cref="FormatVersion"/>.</param>
/// <param name="TokenizerSha256">The hash of the tokenizer, as the tokenizer itself states it.</param>
/// <param name="VocabularySize">Number of ids (V); every token is less.</param>
/// <param name="BytesPerToken">2 where V ≤ 65,536, else 4.</param>
/// <param name="Bos">The id before each document, or null where none was added.</param>
/// <param name="Eos">The id after each document, or null where none was added.</param>
/// <param name="Settings">What else decided the bytes: seed, share of the validation split, field and so on.</param>
/// <param name="LeftOut">Records that are in no shard.</param>
/// <param name="Train">What a model learns from.</param>
/// <param name="Validation">What a model is measured on.</param>
/// <param name="Files">The other files: names of the sources, the tokenizer's files, the quarantine.</param>
public sealed record Manifest(
    string Format,
    int Version,
    string TokenizerSha256,
    int VocabularySize,
    int BytesPerToken,
    int? Bos,
    int? Eos,
    IReadOnlyDictionary<string, string> Settings,
    LeftOut LeftOut,
    SplitEntry Train,
    SplitEntry Validation,
    IReadOnlyList<FileEntry> Files)
{
    /// <summary>The name of the file.</summary>
    public const string FileName = "manifest.json";

    /// <summary>What <see cref="Format"/> says.</summary>
    public const string FormatName = "tinyllama-token-shards";

    /// <summary>What <see cref="Version"/> says.</summary>
    public const int FormatVersion = 1;

    /// <summary>No manifest is larger, in bytes: a claim beyond it is not read.</summary>
    private const long MaximumBytes = 64 << 20;

    /// <summary>Gets one side of the corpus.</summary>
    /// <param name="split">Which side.</param>
    public SplitEntry this[Split split] => split == Split.Train ? Train : Validation;

    /// <summary>Gets every shard, those of the training split first.</summary>
    [JsonIgnore]
    public IEnumerable<ShardEntry> Shards => Train.Shards.Concat(Validation.Shards);

    /// <summary>Reads and checks the manifest of a folder.</summary>
    /// <param name="folder">The folder of token shards.</param>
    /// <exception cref="UserErrorException">There is none, or it is damaged or of another version.</exception>
    public static Manifest Read(string folder)
    {
        string path = Path.Combine(folder, FileName);
        if (!File.Exists(path))
        {
            string advice = Directory.Exists(Path.Combine(folder, DataPreparation.UnfinishedFolder))
                ? "its preparation has not finished: run the same `tinyllama data prepare` again"
                : "write it with `tinyllama data prepare`";
            throw new UserErrorException($"{folder} holds no token shards ({FileName} is not there); {advice}");
        }

        long bytes = new FileInfo(path).Length;
        if (bytes > MaximumBytes)
        {
            throw new UserErrorException($"{path} has {bytes} bytes, a manifest has at most {MaximumBytes}");
        }

        try
        {
            Manifest manifest = JsonSerializer.Deserialize(File.ReadAllBytes(path), ManifestJson.Default.Manifest)
                ?? throw new JsonException("it is null");
            manifest.Check();
            return manifest;
        }
        catch (JsonException e)
        {
            throw new UserErrorException($"{path} is damaged: {e.Message.ReplaceLineEndings(" ")} Prepare the data again", e);
        }
    }

    /// <summary>Writes the manifest, whole or not at all: from then on the folder is one of token shards.</summary>
    /// <param name="folder">The folder of the shards.</param>
    public void Write(string folder) =>
        WholeFile.Write(Path.Combine(folder, FileName), JsonSerializer.SerializeToUtf8Bytes(this, ManifestJson.Default.Manifest));

    private static void Require([DoesNotReturnIf(false)] bool condition, string what)
    {
        if (!condition)
        {
            throw new JsonException(what + ".");
        }
    }

    private static bool IsPlainName(string name) =>
        name.Length is > 0 and <= 255 && name[0] != '.' && name.AsSpan().IndexOfAny('/', '\\', '\0') < 0;

    private void Check()
    {
        Require(Format == FormatName, $"the format is '{Format}', not '{FormatName}'");
        Require(Version == FormatVersion, $"the version is {Version}, this program reads {FormatVersion}");
        Require(VocabularySize > 0, $"the vocabulary has {VocabularySize} ids");
        Require(BytesPerToken == ShardFile.BytesPerToken(VocabularySize), $"{BytesPerToken} bytes per token do not fit {VocabularySize} ids");
        Require((Bos ?? 0) >= 0 && (Bos ?? 0) < VocabularySize, $"BOS {Bos} is outside the vocabulary");
        Require((Eos ?? 0) >= 0 && (Eos ?? 0) < VocabularySize, $"EOS {Eos} is outside the vocabulary");
        HashSet<string> names = new(StringComparer.Ordinal);
        foreach (SplitEntry split in new[] { Train, Validation })
        {
            // Int128: sums of hostile counts must not wrap into a plausible total.
            Int128 tokens = 0;
            Int128 documents = 0;
            Require(split.TextBytes >= 0, "a split has a negative number of bytes");
            foreach (ShardEntry shard in split.Shards)
            {
                Require(shard is not null, "a shard is null");
                Require(shard.Tokens >= 0 && shard.Documents >= 0, $"{shard.File} has negative counts");
                Require(shard.Bytes == ShardFile.ByteCount(shard.Tokens, shard.Documents, BytesPerToken), $"the counts of {shard.File} do not make {shard.Bytes} bytes");
                Require(IsPlainName(shard.File) && names.Add(shard.File), $"'{shard.File}' is not a name for a shard");
                tokens += shard.Tokens;
                documents += shard.Documents;
            }

            Require(tokens == split.Tokens && documents == split.Documents, "the counts of a split are not the sums of its shards");
        }

        foreach (FileEntry file in Files)
        {
            Require(file is not null, "a file is null");
            Require(file.Bytes >= 0 && IsPlainName(file.File) && names.Add(file.File), $"'{file.File}' is not a name for a file");
        }
    }
}

/// <summary>How manifests, lists of sources and states of a preparation are written.</summary>
[JsonSourceGenerationOptions(
    PropertyNamingPolicy = JsonKnownNamingPolicy.SnakeCaseLower,
    RespectNullableAnnotations = true,
    RespectRequiredConstructorParameters = true,
    WriteIndented = true,
    NewLine = "\n")]
[JsonSerializable(typeof(Manifest))]
[JsonSerializable(typeof(SourceEntry[]))]
[JsonSerializable(typeof(PreparationState))]
[JsonSerializable(typeof(Dictionary<string, string>))]
internal sealed partial class ManifestJson : JsonSerializerContext;
