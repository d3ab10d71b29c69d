using System.Buffers;
using System.Buffers.Binary;
using System.Globalization;
using System.Security.Cryptography;
using System.Text;
using System.Text.Json;
using Microsoft.Win32.SafeHandles;
using TinyLlama.Data.Documents;
using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Data.Shards;

/// <summary>
/// From documents to a folder of token shards, in two passes: documents are encoded in parallel into buckets by a hash of
/// seed and text, then each bucket is sorted by that hash and appended to the shards.
/// </summary>
/// <remarks>
/// The order of the documents is the order of their hashes. So the bytes depend on documents, tokenizer and options only:
/// not on the number of threads, nor on where a preparation was interrupted and continued. Memory is bounded by a bucket's
/// index and the documents being encoded, disk by twice the tokens.
/// </remarks>
public sealed class DataPreparation
{
    /// <summary>The folder inside the destination that holds what an unfinished preparation continues from.</summary>
    internal const string UnfinishedFolder = "unfinished";

    private const string QuarantineFile = "quarantine.jsonl";
    private const string SettingsFile = "settings.json";
    private const string StateFile = "state.json";
    private const int BucketsPerSplit = 256;
    private const int QuarantinedCharacters = 1 << 16;

    private readonly string _folder;
    private readonly string _unfinished;
    private readonly IDocumentSource _source;
    private readonly ITokenizer _tokenizer;
    private readonly PreparationOptions _options;
    private readonly Action<PreparationProgress> _progress;
    private readonly CancellationToken _stop;
    private readonly int? _bos;
    private readonly int? _eos;
    private readonly int _bytesPerToken;
    private readonly int _bucketsPerSplit;

    private DataPreparation(
        string folder, IDocumentSource source, ITokenizer tokenizer, PreparationOptions options, Action<PreparationProgress>? progress, CancellationToken stop)
    {
        (_folder, _unfinished) = (folder, Path.Combine(folder, UnfinishedFolder));
        (_source, _tokenizer, _options, _progress, _stop) = (source, tokenizer, options, progress ?? (_ => { }), stop);
        _bos = options.AddBos ? tokenizer.Bos ?? throw new UserErrorException("the tokenizer has no BOS to put before documents; say that none is wanted") : null;
        _eos = options.AddEos ? tokenizer.Eos ?? throw new UserErrorException("the tokenizer has no EOS to put after documents; say that none is wanted") : null;
        _bytesPerToken = ShardFile.BytesPerToken(tokenizer.VocabularySize);

        // Compressed text is taken to be a quarter; the bytes that come out do not depend on the number of buckets.
        long text = source.Files.Sum(f => f.Bytes * (f.Name.EndsWith(".gz", StringComparison.OrdinalIgnoreCase) || f.Name.EndsWith(".zst", StringComparison.OrdinalIgnoreCase) ? 4 : 1));
        _bucketsPerSplit = (int)Math.Min((text / options.BucketBytes) + 1, BucketsPerSplit);
    }

    /// <summary>
    /// Prepares a folder, or goes on with one that was left unfinished, or, where it is finished already with the same
    /// settings, returns what it holds.
    /// </summary>
    /// <param name="folder">Where the shards go; created where it is missing.</param>
    /// <param name="source">The documents.</param>
    /// <param name="tokenizer">What encodes them.</param>
    /// <param name="options">How.</param>
    /// <param name="progress">Told how far it is, on the calling thread.</param>
    /// <param name="stop">Stops it, so that the next call goes on from there.</param>
    /// <exception cref="UserErrorException">
    /// The folder was begun with other settings; there are no documents, too many bad ones, or none to train on; or a file
    /// cannot be read.
    /// </exception>
    /// <exception cref="OperationCanceledException">It was stopped.</exception>
    public static Manifest Run(
        string folder,
        IDocumentSource source,
        ITokenizer tokenizer,
        PreparationOptions options,
        Action<PreparationProgress>? progress = null,
        CancellationToken stop = default)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(options.Threads, 1);
        if (options.ValidationShare is not (>= 0 and < 1))
        {
            throw new UserErrorException($"the share of the validation split is {options.ValidationShare}, it must be at least 0 and less than 1");
        }

        if (source.Files.Count == 0)
        {
            throw new UserErrorException("there is no file to prepare");
        }

        return new DataPreparation(folder, source, tokenizer, options, progress, stop).Run();
    }

    private Manifest Run()
    {
        if (File.Exists(Path.Combine(_folder, Manifest.FileName)))
        {
            Manifest finished = Manifest.Read(_folder);
            RequireSame(DescribeManifest(finished), Path.Combine(_folder, Manifest.FileName));
            TokenShards.Open(_folder).Dispose();
            RemoveUnfinished();
            return finished;
        }

        Directory.CreateDirectory(_unfinished);
        using FileStream only = Lock();
        PreparationState state = Begin();
        using Buckets buckets = new(_unfinished, state.BucketBytes);
        state = Gather(state, buckets);
        state = Check(state);
        state = Shuffle(state, buckets);
        Manifest manifest = Finish(state);
        only.Dispose();
        RemoveUnfinished();
        return manifest;
    }

    /// <summary>Two preparations of one folder would spoil each other; the lock is gone with the process, however it ends.</summary>
    private FileStream Lock()
    {
        try
        {
            return new FileStream(Path.Combine(_unfinished, "lock"), FileMode.OpenOrCreate, FileAccess.ReadWrite, FileShare.None);
        }
        catch (IOException e)
        {
            throw new UserErrorException($"{_folder} is being prepared by another process ({e.Message})", e);
        }
    }

    private PreparationState Begin()
    {
        string settings = Path.Combine(_unfinished, SettingsFile);
        string state = Path.Combine(_unfinished, StateFile);
        if (File.Exists(settings))
        {
            try
            {
                RequireSame(JsonSerializer.Deserialize(File.ReadAllBytes(settings), ManifestJson.Default.DictionaryStringString) ?? [], settings);
                PreparationState left = JsonSerializer.Deserialize(File.ReadAllBytes(state), ManifestJson.Default.PreparationState) ?? throw new JsonException("it is null");
                return left.BucketBytes.Length == 2 * _bucketsPerSplit && left is { File: >= 0, Record: >= 0, Bucket: >= 0, BucketEntry: >= 0, QuarantineBytes: >= 0 } ? left : throw new JsonException("its numbers do not fit");
            }
            catch (Exception e) when (e is JsonException or FileNotFoundException)
            {
                throw new UserErrorException($"{_unfinished} is damaged ({e.Message.ReplaceLineEndings(" ")}); delete it to begin again", e);
            }
        }

        PreparationState start = new(0, 0, false, new long[2 * _bucketsPerSplit], 0, 0, 0, 0, null, 0, 0, 0, new(0, 0, 0, []), new(0, 0, 0, []));
        Save(start);
        SourceEntry[] sources = [.. _source.Files.Select(f => new SourceEntry(f.Name, f.Bytes))];
        WholeFile.Write(Path.Combine(_folder, TokenShards.SourcesFile), JsonSerializer.SerializeToUtf8Bytes(sources, ManifestJson.Default.SourceEntryArray));
        WholeFile.Write(settings, JsonSerializer.SerializeToUtf8Bytes(Settings(everything: true), ManifestJson.Default.DictionaryStringString));
        return start;
    }

    private void Save(PreparationState state) =>
        WholeFile.Write(Path.Combine(_unfinished, StateFile), JsonSerializer.SerializeToUtf8Bytes(state, ManifestJson.Default.PreparationState));

    /// <summary>What decides the bytes, in the order of the names.</summary>
    /// <param name="everything">Also what the manifest has fields of its own for.</param>
    private Dictionary<string, string> Settings(bool everything)
    {
        SortedDictionary<string, string> settings = new(_source.Settings.ToDictionary(StringComparer.Ordinal), StringComparer.Ordinal)
        {
            ["seed"] = _options.Seed.ToString(CultureInfo.InvariantCulture),
            ["validation_share"] = _options.ValidationShare.ToString("R", CultureInfo.InvariantCulture),
            ["deduplicate"] = _options.Deduplicate ? "true" : "false",
            ["tokens_per_shard"] = _options.TokensPerShard.ToString(CultureInfo.InvariantCulture),
        };
        Dictionary<string, string> described = new(settings, StringComparer.Ordinal);
        if (everything)
        {
            Describe(described, _tokenizer.Hash, _tokenizer.VocabularySize, _bos, _eos);
        }

        return described;
    }

    private static Dictionary<string, string> DescribeManifest(Manifest manifest)
    {
        Dictionary<string, string> settings = new(manifest.Settings, StringComparer.Ordinal);
        Describe(settings, manifest.TokenizerSha256, manifest.VocabularySize, manifest.Bos, manifest.Eos);
        return settings;
    }

    private static void Describe(Dictionary<string, string> settings, string tokenizer, int vocabularySize, int? bos, int? eos)
    {
        settings["tokenizer"] = tokenizer;
        settings["vocabulary_size"] = vocabularySize.ToString(CultureInfo.InvariantCulture);
        settings["bos"] = bos?.ToString(CultureInfo.InvariantCulture) ?? "none";
        settings["eos"] = eos?.ToString(CultureInfo.InvariantCulture) ?? "none";
    }

    /// <summary>Refuses to go on with, or to call finished, what other settings or other files made.</summary>
    private void RequireSame(Dictionary<string, string> found, string path)
    {
        Dictionary<string, string> wanted = Settings(everything: true);
        foreach (string key in wanted.Keys.Union(found.Keys, StringComparer.Ordinal).Order(StringComparer.Ordinal))
        {
            string was = found.GetValueOrDefault(key, "none");
            string now = wanted.GetValueOrDefault(key, "none");
            if (was != now)
            {
                throw new UserErrorException($"{_folder} was prepared with {key} {was}, now it is {now}; choose another folder, or delete this one");
            }
        }

        SourceEntry?[] files = TokenShards.ReadSources(_folder);
        DateTime begun = File.GetLastWriteTimeUtc(path);
        for (int i = 0; i < Math.Max(files.Length, _source.Files.Count); i++)
        {
            SourceFile? now = i < _source.Files.Count ? _source.Files[i] : null;
            SourceEntry? was = i < files.Length ? files[i] : null;
            string? change =
                was?.File != now?.Name ? $"it has {was?.File ?? "no further file"} where the text has {now?.Name ?? "none"}"
                : was!.Bytes != now!.Bytes ? $"{now.Path} has {now.Bytes} bytes now, then it had {was.Bytes}"
                : File.GetLastWriteTimeUtc(now.Path) > begun ? $"{now.Path} was changed since"
                : null;
            if (change is not null)
            {
                throw new UserErrorException($"{_folder} was prepared from other text: {change}; choose another folder, or delete this one");
            }
        }
    }

    /// <summary>The first pass: reads, encodes in parallel, and appends to the buckets in the order of the source.</summary>
    private PreparationState Gather(PreparationState state, Buckets buckets)
    {
        if (state.Gathered)
        {
            return state;
        }

        using FileStream quarantine = new(Path.Combine(_folder, QuarantineFile), FileMode.OpenOrCreate, FileAccess.Write, FileShare.Read);
        quarantine.SetLength(state.QuarantineBytes);
        quarantine.Position = state.QuarantineBytes;
        TaskScheduler threads = new ConcurrentExclusiveSchedulerPair(TaskScheduler.Default, _options.Threads).ConcurrentScheduler;
        Queue<Task<EncodedBatch>> encoding = new();
        long totalBytes = _source.Files.Sum(f => f.Bytes);
        long unsaved = 0;

        void Commit()
        {
            EncodedBatch batch = encoding.Dequeue().GetAwaiter().GetResult();
            state = Append(batch, state, buckets, quarantine);
            unsaved += batch.TextBytes;
            if (unsaved >= _options.JournalBytes)
            {
                SaveGathered();
            }

            _progress(new PreparationProgress("encode", Math.Min(_source.BytesRead, totalBytes), totalBytes, state.Documents));
        }

        void SaveGathered()
        {
            buckets.Flush();
            quarantine.Flush(flushToDisk: true);
            state = state with { BucketBytes = [.. buckets.Bytes], QuarantineBytes = quarantine.Position };
            Save(state);
            unsaved = 0;
        }

        foreach (Batch batch in Batches(state.File, state.Record))
        {
            encoding.Enqueue(Task.Factory.StartNew(() => Encode(batch), CancellationToken.None, TaskCreationOptions.None, threads));
            if (encoding.Count > 2 * _options.Threads)
            {
                Commit();
            }

            if (_stop.IsCancellationRequested)
            {
                break;
            }
        }

        while (encoding.Count > 0)
        {
            Commit();
        }

        state = state with { Gathered = !_stop.IsCancellationRequested };
        SaveGathered();
        _stop.ThrowIfCancellationRequested();
        return state;
    }

    /// <summary>The records of the source in runs of about as much text as is worth a task.</summary>
    private IEnumerable<Batch> Batches(int file, long record)
    {
        List<Document> documents = [];
        long characters = 0;
        (int File, long Record) next = (file, 0);
        foreach (Document document in _source.Read(file))
        {
            next = document.File == next.File ? (next.File, next.Record + 1) : (document.File, 1);
            if (document.File == file && next.Record <= record)
            {
                continue;
            }

            documents.Add(document);

            // Many tiny documents cost as much as their text and more.
            characters += document.Text.Length + 32;
            if (characters >= _options.BatchCharacters)
            {
                yield return new Batch(documents, next.File, next.Record);
                (documents, characters) = ([], 0);
            }
        }

        yield return new Batch(documents, next.File, next.Record);
    }

    private EncodedBatch Encode(Batch batch)
    {
        ArrayBufferWriter<byte> bytes = new(_options.BatchCharacters);
        List<(int Bucket, int Start, int Length)> places = new(batch.Documents.Count);
        List<int> tokens = [];
        Span<byte> sha = stackalloc byte[SHA256.HashSizeInBytes];
        long textBytes = 0;
        foreach (Document document in batch.Documents)
        {
            if (document.Fault is not null || document.Text.Length == 0)
            {
                places.Add((-1, 0, 0));
                continue;
            }

            byte[] utf8 = ArrayPool<byte>.Shared.Rent(Encoding.UTF8.GetByteCount(document.Text));
            int utf8Count = Encoding.UTF8.GetBytes(document.Text, utf8);
            SHA256.HashData(utf8.AsSpan(0, utf8Count), sha);
            ArrayPool<byte>.Shared.Return(utf8);
            textBytes += utf8Count;

            tokens.Clear();
            if (_bos is int bos)
            {
                tokens.Add(bos);
            }

            _tokenizer.Encode(document.Text, tokens);
            if (_eos is int eos)
            {
                tokens.Add(eos);
            }

            if (tokens.Count == 0)
            {
                places.Add((-1, 0, 0));
                continue;
            }

            BucketEntry entry = new(BinaryPrimitives.ReadUInt128BigEndian(sha), document.File, document.Line, utf8Count, checked(tokens.Count * _bytesPerToken));
            int start = bytes.WrittenCount;
            entry.Write(bytes.GetSpan(BucketEntry.HeaderBytes));
            bytes.Advance(BucketEntry.HeaderBytes);
            ShardWriter.Pack(bytes.GetSpan(entry.TokenBytes), System.Runtime.InteropServices.CollectionsMarshal.AsSpan(tokens), _bytesPerToken);
            bytes.Advance(entry.TokenBytes);
            Split split = BucketEntry.SplitOf(entry.Hash, _options.ValidationShare);
            places.Add((Buckets.Of(Key(entry), split, _bucketsPerSplit), start, bytes.WrittenCount - start));
        }

        return new EncodedBatch(batch, places, bytes.WrittenMemory, textBytes);
    }

    private ulong Key(BucketEntry entry) => entry.Key(_options.Seed, _options.Deduplicate);

    private PreparationState Append(EncodedBatch encoded, PreparationState state, Buckets buckets, FileStream quarantine)
    {
        (long documents, long bad, long empty, string? firstBad) = (state.Documents, state.Bad, state.Empty, state.FirstBad);
        for (int i = 0; i < encoded.Places.Count; i++)
        {
            Document document = encoded.Batch.Documents[i];
            (int bucket, int start, int length) = encoded.Places[i];
            if (document.Fault is string fault)
            {
                bad++;
                SourceFile file = _source.Files[document.File];
                firstBad ??= $"{file.Path}{(document.Line == 0 ? "" : $":{document.Line}")}: {fault}";
                string text = document.Text.Length > QuarantinedCharacters ? document.Text[..QuarantinedCharacters] : document.Text;
                quarantine.Write(JsonSerializer.SerializeToUtf8Bytes(new QuarantineEntry(file.Name, document.Line, fault, text), QuarantineJson.Default.QuarantineEntry));
                quarantine.Write("\n"u8);
            }
            else if (bucket < 0)
            {
                empty++;
            }
            else if (document.Line > ShardFile.MaximumLine)
            {
                throw new UserErrorException($"{_source.Files[document.File].Path} has more than {ShardFile.MaximumLine} lines; split the file");
            }
            else
            {
                buckets.Append(bucket, encoded.Bytes.Span.Slice(start, length));
                documents++;
            }
        }

        state = state with { File = encoded.Batch.NextFile, Record = encoded.Batch.NextRecord, Documents = documents, Bad = bad, Empty = empty, FirstBad = firstBad };

        // Where nearly all is bad, such as with a wrong field, nobody should wait for the end to learn it.
        if (bad > 10_000 && bad > documents)
        {
            throw TooManyBad(state);
        }

        return state;
    }

    private UserErrorException TooManyBad(PreparationState state)
    {
        long records = state.Bad + state.Documents + state.Empty;
        return new UserErrorException(
            $"{state.Bad} of {records} records are bad, more than a share of {_options.MaximumBadShare}; the first: {state.FirstBad}; all are in {Path.Combine(_folder, QuarantineFile)}; mend or remove them, or allow more");
    }

    private PreparationState Check(PreparationState state)
    {
        long records = state.Bad + state.Documents + state.Empty;
        if (state.Bad > _options.MaximumBadShare * records)
        {
            throw TooManyBad(state);
        }

        if (state.Documents == 0)
        {
            throw new UserErrorException($"no document in {_source.Files.Count} files, the first is {_source.Files[0].Path}: {state.Empty} records are without text");
        }

        if (state.BucketBytes.AsSpan(0, _bucketsPerSplit).IndexOfAnyExcept(0L) < 0)
        {
            throw new UserErrorException($"all {state.Documents} documents fall into the validation split, nothing is left to train on; set its share to 0, or give more documents");
        }

        return state;
    }

    /// <summary>The second pass: bucket by bucket into the shards.</summary>
    private PreparationState Shuffle(PreparationState state, Buckets buckets)
    {
        using TokenShardsWriter writer = new(_folder, _bytesPerToken, _options.TokensPerShard, state.Train, state.Validation);
        long total = state.BucketBytes.Sum();
        long done = state.BucketBytes.Take(state.Bucket).Sum();
        long documents = state.Train.Documents + state.Validation.Documents;
        long duplicates = state.Duplicates;
        byte[] tokens = [];
        int firstBucket = state.Bucket;
        for (int b = firstBucket; b < 2 * _bucketsPerSplit; b++)
        {
            if (b == _bucketsPerSplit)
            {
                // A state names finished shards only, so none of the training split may be open behind its buckets.
                writer.EndShard(Split.Train);
            }

            if (buckets.Bytes[b] == 0)
            {
                continue;
            }

            Split split = b < _bucketsPerSplit ? Split.Train : Split.Validation;
            List<(BucketEntry Entry, long Offset)> entries = buckets.Sorted(b, Key);
            using SafeFileHandle file = buckets.OpenTokens(b);
            for (int i = b == firstBucket ? (int)Math.Min(state.BucketEntry, entries.Count) : 0; i < entries.Count; i++)
            {
                BucketEntry entry = entries[i].Entry;
                if (_options.Deduplicate && i > 0 && entries[i - 1].Entry.Hash == entry.Hash)
                {
                    duplicates++;
                    continue;
                }

                if (tokens.Length < entry.TokenBytes)
                {
                    tokens = new byte[Math.Max(entry.TokenBytes, 1 << 16)];
                }

                Span<byte> packed = tokens.AsSpan(0, entry.TokenBytes);
                if (WholeFile.ReadAt(file, packed, entries[i].Offset) != packed.Length)
                {
                    throw new UserErrorException($"{_unfinished} was changed while it was in use; delete it to begin again");
                }

                documents++;
                if (writer.AddPacked(split, packed, entry.File, entry.Line, entry.TextBytes))
                {
                    SaveShards(b, i + 1);
                }
            }

            done += buckets.Bytes[b];
            _progress(new PreparationProgress("shuffle", done, total, documents));
            _stop.ThrowIfCancellationRequested();
        }

        writer.Complete();
        SaveShards(2 * _bucketsPerSplit, 0);
        return state;

        void SaveShards(int bucket, long entry)
        {
            state = state with { Bucket = bucket, BucketEntry = entry, Duplicates = duplicates, Train = writer.Finished(Split.Train), Validation = writer.Finished(Split.Validation) };
            Save(state);
        }
    }

    private Manifest Finish(PreparationState state)
    {
        List<string> files = [TokenShards.SourcesFile];
        string quarantine = Path.Combine(_folder, QuarantineFile);
        if (state.Bad > 0)
        {
            files.Add(QuarantineFile);
        }
        else
        {
            File.Delete(quarantine);
        }

        foreach (string path in _options.TokenizerFiles)
        {
            string name = Path.GetFileName(path);
            File.Copy(path, Path.Combine(_folder, name), overwrite: true);
            files.Add(name);
        }

        Manifest manifest = new(
            Manifest.FormatName,
            Manifest.FormatVersion,
            _tokenizer.Hash,
            _tokenizer.VocabularySize,
            _bytesPerToken,
            _bos,
            _eos,
            Settings(everything: false),
            new LeftOut(state.Bad, state.Empty, state.Duplicates),
            state.Train,
            state.Validation,
            [.. files.Select(f => new FileEntry(f, new FileInfo(Path.Combine(_folder, f)).Length, WholeFile.Sha256(Path.Combine(_folder, f))))]);
        manifest.Write(_folder);
        return manifest;
    }

    private void RemoveUnfinished()
    {
        if (Directory.Exists(_unfinished))
        {
            Directory.Delete(_unfinished, recursive: true);
        }
    }

    /// <summary>Records to encode, and where the source goes on behind them.</summary>
    private sealed record Batch(List<Document> Documents, int NextFile, long NextRecord);

    /// <summary>The bucket entries of a batch; the bucket of a record that is in none is -1.</summary>
    private sealed record EncodedBatch(Batch Batch, List<(int Bucket, int Start, int Length)> Places, ReadOnlyMemory<byte> Bytes, long TextBytes);
}
