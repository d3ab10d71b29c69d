using System.Text.Json;
using System.Text.Json.Serialization;

namespace TinyLlama.Data.Shards;

/// <summary>How documents become shards.</summary>
public sealed record PreparationOptions
{
    /// <summary>Gets what chooses the order of the documents. The sides of the corpus do not depend on it.</summary>
    public ulong Seed { get; init; }

    /// <summary>Gets the share of documents that go to the validation split, 0 … less than 1.</summary>
    public double ValidationShare { get; init; } = 0.01;

    /// <summary>Gets a value indicating whether BOS goes before each document.</summary>
    public bool AddBos { get; init; } = true;

    /// <summary>Gets a value indicating whether EOS goes after each document.</summary>
    public bool AddEos { get; init; } = true;

    /// <summary>Gets a value indicating whether of documents with the same text only one is kept.</summary>
    public bool Deduplicate { get; init; }

    /// <summary>Gets the share of bad records above which the preparation ends with an error, 0 … 1.</summary>
    public double MaximumBadShare { get; init; } = 0.01;

    /// <summary>Gets the number of documents encoded at once. The bytes written do not depend on it.</summary>
    public int Threads { get; init; } = Environment.ProcessorCount;

    /// <summary>Gets the files of the tokenizer, which are copied beside the shards.</summary>
    public IReadOnlyList<string> TokenizerFiles { get; init; } = [];

    /// <summary>Gets the tokens that a shard has on average, at most; 2^27 are 256 MiB of 16-bit tokens.</summary>
    public long TokensPerShard { get; init; } = 1L << 27;

    /// <summary>Gets the bytes of text after which the state is written down, to continue from.</summary>
    internal long JournalBytes { get; init; } = 64 << 20;

    /// <summary>Gets the characters of text that a thread encodes at once.</summary>
    internal int BatchCharacters { get; init; } = 1 << 18;

    /// <summary>Gets the bytes of text that one bucket of the shuffle is meant to hold.</summary>
    internal long BucketBytes { get; init; } = 32 << 20;
}

/// <summary>How far a preparation is.</summary>
/// <param name="Stage">What is being done: <c>encode</c>, then <c>shuffle</c>.</param>
/// <param name="Done">Bytes done in this stage: of the source files, then of the tokens.</param>
/// <param name="Total">Bytes to do in this stage.</param>
/// <param name="Documents">Documents so far.</param>
public readonly record struct PreparationProgress(string Stage, long Done, long Total, long Documents);

/// <summary>What a rank's part of an unfinished preparation continues from: everything before it is on the disk.</summary>
/// <param name="File">The source file that comes next.</param>
/// <param name="Record">How many of its records are done.</param>
/// <param name="Gathered">Whether all documents of the rank's files are in its buckets.</param>
/// <param name="BucketBytes">The length of each bucket; what is behind it is not counted.</param>
/// <param name="Documents">Documents in the buckets of each split.</param>
/// <param name="QuarantineBytes">The length of the quarantine.</param>
/// <param name="Bad">Bad records so far.</param>
/// <param name="Empty">Documents without text so far.</param>
/// <param name="FirstBad">Where the first bad record is, and why it is bad.</param>
/// <param name="NextShard">The shards before this one are finished, as far as the rank writes them.</param>
/// <param name="Shuffled">Whether all of the rank's shards are finished.</param>
/// <param name="Duplicates">Duplicates left out of the finished shards.</param>
/// <param name="Train">The finished shards of the training split.</param>
/// <param name="Validation">The finished shards of the validation split.</param>
internal sealed record PreparationState(
    int File,
    long Record,
    bool Gathered,
    long[] BucketBytes,
    long[] Documents,
    long QuarantineBytes,
    long Bad,
    long Empty,
    string? FirstBad,
    int NextShard,
    bool Shuffled,
    long Duplicates,
    SplitEntry Train,
    SplitEntry Validation)
{
    private const string FileName = "state.json";

    /// <summary>Gets the finished shards of a split.</summary>
    public SplitEntry this[Split split] => split == Split.Train ? Train : Validation;

    /// <summary>The beginning.</summary>
    /// <param name="firstFile">The first file of the rank.</param>
    /// <param name="buckets">Number of buckets of both splits.</param>
    public static PreparationState Start(int firstFile, int buckets) =>
        new(firstFile, 0, false, new long[buckets], [0, 0], 0, 0, 0, null, 0, false, 0, SplitEntry.Empty, SplitEntry.Empty);

    /// <summary>Reads the state of a rank.</summary>
    /// <param name="folder">Where it is.</param>
    /// <param name="buckets">Number of buckets of both splits.</param>
    /// <returns>Null where nothing is written down.</returns>
    /// <exception cref="UserErrorException">It is damaged.</exception>
    public static PreparationState? Read(string folder, int buckets)
    {
        string path = Path.Combine(folder, FileName);
        if (!System.IO.File.Exists(path))
        {
            return null;
        }

        try
        {
            PreparationState state = Parse(System.IO.File.ReadAllBytes(path));
            return state is { File: >= 0, Record: >= 0, NextShard: >= 0, QuarantineBytes: >= 0, Documents.Length: 2 } && state.BucketBytes.Length == buckets ? state : throw new JsonException("its numbers do not fit");
        }
        catch (JsonException e)
        {
            throw new UserErrorException($"{path} is damaged ({e.Message.ReplaceLineEndings(" ")}); delete {folder} to begin again", e);
        }
    }

    /// <summary>Reads what <see cref="ToJson"/> wrote.</summary>
    public static PreparationState Parse(byte[] json) =>
        JsonSerializer.Deserialize(json, ManifestJson.Default.PreparationState) ?? throw new JsonException("it is null");

    /// <summary>Writes the state as JSON.</summary>
    public byte[] ToJson() => JsonSerializer.SerializeToUtf8Bytes(this, ManifestJson.Default.PreparationState);

    /// <summary>Puts the state in the place of the one before.</summary>
    public void Write(string folder) => WholeFile.Write(Path.Combine(folder, FileName), ToJson());
}

/// <summary>A line of the quarantine.</summary>
/// <param name="File">The source file.</param>
/// <param name="Line">Its line, from 1; 0 where the whole file is meant.</param>
/// <param name="Reason">Why the record is bad.</param>
/// <param name="Record">Its beginning, with U+FFFD for what is not UTF-8.</param>
internal sealed record QuarantineEntry(string File, long Line, string Reason, string Record);

/// <summary>JSON on one line.</summary>
[JsonSourceGenerationOptions(PropertyNamingPolicy = JsonKnownNamingPolicy.SnakeCaseLower)]
[JsonSerializable(typeof(QuarantineEntry))]
internal sealed partial class QuarantineJson : JsonSerializerContext;
