using System.Globalization;
using System.Security.Cryptography;
using System.Text.Json;
using TinyLlama.Data.Documents;
using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Data.Shards;

/// <summary>
/// From documents to a folder of token shards, in two passes: documents are encoded in parallel into buckets by a hash of
/// seed and text, then each bucket is sorted by that hash and appended to the shards.
/// </summary>
/// <remarks>
/// The order of the documents is the order of their hashes. So the bytes depend on documents, tokenizer and options only:
/// not on the number of threads or ranks, nor on where a preparation was interrupted and continued. Memory is bounded by a
/// bucket's index and the documents being encoded, disk by twice the tokens. Each rank reads some of the files and writes
/// some of the shards; between the passes documents change hands through the files of the buckets, which all ranks see.
/// </remarks>
public sealed class DataPreparation
{
    /// <summary>The folder inside the destination that holds what an unfinished preparation continues from.</summary>
    internal const string UnfinishedFolder = "unfinished";

    private const string SettingsFile = "settings.json";
    private const int BucketsPerSplit = 256;

    private readonly string _folder;
    private readonly string _unfinished;
    private readonly IDocumentSource _source;
    private readonly ITokenizer _tokenizer;
    private readonly PreparationOptions _options;
    private readonly Action<PreparationProgress> _progress;
    private readonly IPreparationRanks _ranks;
    private readonly CancellationToken _stop;
    private readonly string[] _rankFolders;
    private readonly int[] _ranksOfFiles;
    private readonly int _bucketsPerSplit;
    private readonly DocumentEncoder _encoder;
    private FileStream? _lock;

    private DataPreparation(
        string folder,
        IDocumentSource source,
        ITokenizer tokenizer,
        PreparationOptions options,
        Action<PreparationProgress>? progress,
        IPreparationRanks ranks,
        CancellationToken stop)
    {
        (_folder, _unfinished) = (folder, Path.Combine(folder, UnfinishedFolder));
        (_source, _tokenizer, _options, _progress, _ranks, _stop) = (source, tokenizer, options, progress ?? (_ => { }), ranks, stop);
        _rankFolders = [.. Enumerable.Range(0, ranks.Size).Select(rank => Path.Combine(_unfinished, rank.ToString("D5", CultureInfo.InvariantCulture)))];
        _ranksOfFiles = Divide(source.Files, ranks.Size);

        // The bytes that come out do not depend on the number of buckets.
        _bucketsPerSplit = (int)Math.Min((source.Files.Sum(TextBytes) / options.BucketBytes) + 1, BucketsPerSplit);
        _encoder = new DocumentEncoder(tokenizer, options, _bucketsPerSplit);
    }

    /// <summary>
    /// Prepares a folder, or goes on with one that was left unfinished, or, where it is finished already with the same
    /// settings, returns what it holds.
    /// </summary>
    /// <param name="folder">Where the shards go; created where it is missing.</param>
    /// <param name="source">The documents.</param>
    /// <param name="tokenizer">What encodes them.</param>
    /// <param name="options">How.</param>
    /// <param name="progress">Told how far this rank is, by one thread at a time.</param>
    /// <param name="ranks">The ranks that prepare the folder together; all call this with the same arguments. Null for one process.</param>
    /// <param name="stop">Stops it, on all ranks, so that the next call goes on from there.</param>
    /// <exception cref="UserErrorException">
    /// The folder was begun with other settings; there are no documents, too many bad ones, or none to train on; or a file
    /// cannot be read. One rank may be alone in throwing it: the others must be ended then.
    /// </exception>
    /// <exception cref="OperationCanceledException">It was stopped, on this rank or another one.</exception>
    public static Manifest Run(
        string folder,
        IDocumentSource source,
        ITokenizer tokenizer,
        PreparationOptions options,
        Action<PreparationProgress>? progress = null,
        IPreparationRanks? ranks = null,
        CancellationToken stop = default)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(options.Threads, 1);
        ArgumentOutOfRangeException.ThrowIfLessThan(options.TokensPerShard, 1);
        if (options.ValidationShare is not (>= 0 and < 1))
        {
            throw new UserErrorException($"the share of the validation split is {options.ValidationShare}, it must be at least 0 and less than 1");
        }

        if (source.Files.Count == 0)
        {
            throw new UserErrorException("there is no file to prepare");
        }

        return new DataPreparation(folder, source, tokenizer, options, progress, ranks ?? new SingleRank(), stop).Run();
    }

    /// <summary>
    /// Which rank reads which file: a run of neighbours each, so that their quarantines, one after the other, are in the order of
    /// the source. A file is the rank's in whose share of all text its middle is.
    /// </summary>
    internal static int[] Divide(IReadOnlyList<SourceFile> files, int ranks)
    {
        Int128 total = files.Sum(TextBytes);
        Int128 before = 0;
        int[] owners = new int[files.Count];
        for (int i = 0; i < owners.Length; i++)
        {
            long bytes = TextBytes(files[i]);
            owners[i] = total == 0 ? 0 : (int)Int128.Min(((2 * before) + bytes) * ranks / (2 * total), ranks - 1);
            before += bytes;
        }

        return owners;
    }

    /// <summary>The text in a file, about: compressed text is taken to be a quarter.</summary>
    private static long TextBytes(SourceFile file) =>
        file.Bytes * (file.Name.EndsWith(".gz", StringComparison.OrdinalIgnoreCase) || file.Name.EndsWith(".zst", StringComparison.OrdinalIgnoreCase) ? 4 : 1);

    private Manifest Run()
    {
        try
        {
            byte[][] given = _ranks.Run(_ => SHA256.HashData([.. Json(Settings(everything: true)), .. Json(Sources())]), _stop);
            bool isFinished = OnFirst(() => Begin(given));
            if (!isFinished)
            {
                PreparationState[] states = OnAll(Gather, state => state.Gathered);
                OnFirst(() => Check(states));
                states = OnAll(stop => ShuffleOwn(states, stop), state => state.Shuffled);
                OnFirst(() => Finish(states));
            }

            return Manifest.Read(_folder);
        }
        finally
        {
            _lock?.Dispose();
        }
    }

    /// <summary>Does something on the first rank, while the others wait for what it returns.</summary>
    private bool OnFirst(Func<bool> part) => _ranks.Run(_ => _ranks.Rank == 0 && part() ? [1] : [], _stop)[0].Length > 0;

    private PreparationState[] OnAll(Func<CancellationToken, PreparationState> part, Func<PreparationState, bool> isDone)
    {
        PreparationState[] states = [.. _ranks.Run(stop => part(stop).ToJson(), _stop).Select(PreparationState.Parse)];
        return states.All(isDone) ? states : throw new OperationCanceledException(_stop);
    }

    /// <summary>Ranks that divide different files between them would lose some and take others twice.</summary>
    private static void RequireAgreement(byte[][] given)
    {
        int other = Array.FindIndex(given, own => !own.AsSpan().SequenceEqual(given[0]));
        if (other > 0)
        {
            throw new UserErrorException($"rank {other} was given other text, another tokenizer or other options than rank 0; start all ranks with one command, where all see the same files");
        }
    }

    /// <param name="given">A hash of what each rank was given to prepare.</param>
    /// <returns>Whether the folder is finished already.</returns>
    private bool Begin(byte[][] given)
    {
        RequireAgreement(given);
        string manifest = Path.Combine(_folder, Manifest.FileName);
        if (File.Exists(manifest))
        {
            Manifest finished = Manifest.Read(_folder);
            RequireSame(DescribeManifest(finished), Settings(everything: true), manifest);
            TokenShards.Open(_folder).Dispose();
            RemoveUnfinished();
            return true;
        }

        Directory.CreateDirectory(_unfinished);
        _lock = Lock();
        Dictionary<string, string> wanted = Settings(everything: true);
        wanted["ranks"] = _ranks.Size.ToString(CultureInfo.InvariantCulture);
        string settings = Path.Combine(_unfinished, SettingsFile);
        if (File.Exists(settings))
        {
            Dictionary<string, string> found = ReadSettings(settings);
            if (found.GetValueOrDefault("ranks") is string ranks && ranks != wanted["ranks"])
            {
                throw new UserErrorException($"{_folder} was begun with {ranks} ranks, now there are {_ranks.Size}; go on with {ranks}, or delete {_unfinished} to begin again");
            }

            RequireSame(found, wanted, settings);
        }
        else
        {
            // What no settings are known of is of no use.
            Array.ForEach(Directory.GetDirectories(_unfinished), left => Directory.Delete(left, recursive: true));
            WholeFile.Write(Path.Combine(_folder, TokenShards.SourcesFile), Json(Sources()));
            WholeFile.Write(settings, Json(wanted));
        }

        return false;
    }

    private Dictionary<string, string> ReadSettings(string path)
    {
        try
        {
            return JsonSerializer.Deserialize(File.ReadAllBytes(path), ManifestJson.Default.DictionaryStringString) ?? throw new JsonException("it is null");
        }
        catch (JsonException e)
        {
            throw new UserErrorException($"{path} is damaged ({e.Message.ReplaceLineEndings(" ")}); delete {_unfinished} to begin again", e);
        }
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

    private SourceEntry[] Sources() => [.. _source.Files.Select(f => new SourceEntry(f.Name, f.Bytes))];

    private static byte[] Json(SourceEntry[] sources) => JsonSerializer.SerializeToUtf8Bytes(sources, ManifestJson.Default.SourceEntryArray);

    private static byte[] Json(Dictionary<string, string> settings) => JsonSerializer.SerializeToUtf8Bytes(settings, ManifestJson.Default.DictionaryStringString);

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
            Describe(described, _tokenizer.Hash, _tokenizer.VocabularySize, _encoder.Bos, _encoder.Eos);
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
    private void RequireSame(Dictionary<string, string> found, Dictionary<string, string> wanted, string path)
    {
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

    private PreparationState Gather(CancellationToken stop)
    {
        int first = _ranksOfFiles.Count(rank => rank < _ranks.Rank);
        int end = _ranksOfFiles.Count(rank => rank <= _ranks.Rank);
        string folder = _rankFolders[_ranks.Rank];
        Directory.CreateDirectory(folder);
        PreparationState state = PreparationState.Read(folder, 2 * _bucketsPerSplit) ?? PreparationState.Start(first, 2 * _bucketsPerSplit);
        return new Gathering(folder, _source, first..end, _encoder, _options, _progress).Run(state, stop);
    }

    /// <summary>Joins the quarantines of the ranks, and asks whether what was gathered will do.</summary>
    private bool Check(PreparationState[] states)
    {
        string quarantine = Path.Combine(_folder, Gathering.QuarantineFile);
        using (FileStream all = File.Create(quarantine))
        {
            foreach (string folder in _rankFolders)
            {
                using FileStream part = File.OpenRead(Path.Combine(folder, Gathering.QuarantineFile));
                part.CopyTo(all);
            }

            all.Flush(flushToDisk: true);
        }

        long bad = states.Sum(state => state.Bad);
        long empty = states.Sum(state => state.Empty);
        long documents = states.Sum(state => state.Documents.Sum());
        long records = bad + empty + documents;
        if (bad > _options.MaximumBadShare * records)
        {
            string? first = states.Select(state => state.FirstBad).FirstOrDefault(found => found is not null);
            throw Gathering.TooManyBad(bad, records, _options.MaximumBadShare, first, quarantine);
        }

        if (documents == 0)
        {
            throw new UserErrorException($"no document in {_source.Files.Count} files, the first is {_source.Files[0].Path}: {empty} records are without text");
        }

        if (states.Sum(state => state.Documents[(int)Split.Train]) == 0)
        {
            throw new UserErrorException($"all {documents} documents fall into the validation split, nothing is left to train on; set its share to 0, or give more documents");
        }

        return true;
    }

    private PreparationState ShuffleOwn(PreparationState[] states, CancellationToken stop)
    {
        using Shuffle shuffle = new(_folder, _rankFolders, states, _ranksOfFiles, _encoder, _options, _progress);
        return shuffle.Run(_ranks.Rank, stop);
    }

    private bool Finish(PreparationState[] states)
    {
        List<string> files = [TokenShards.SourcesFile];
        long bad = states.Sum(state => state.Bad);
        if (bad > 0)
        {
            files.Add(Gathering.QuarantineFile);
        }
        else
        {
            File.Delete(Path.Combine(_folder, Gathering.QuarantineFile));
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
            _encoder.BytesPerToken,
            _encoder.Bos,
            _encoder.Eos,
            Settings(everything: false),
            new LeftOut(bad, states.Sum(state => state.Empty), states.Sum(state => state.Duplicates)),
            states.Aggregate(SplitEntry.Empty, (all, state) => all + state.Train),
            states.Aggregate(SplitEntry.Empty, (all, state) => all + state.Validation),
            [.. files.Select(f => new FileEntry(f, new FileInfo(Path.Combine(_folder, f)).Length, WholeFile.Sha256(Path.Combine(_folder, f))))]);
        manifest.Write(_folder);
        _lock!.Dispose();
        RemoveUnfinished();
        return true;
    }

    private void RemoveUnfinished()
    {
        if (Directory.Exists(_unfinished))
        {
            Directory.Delete(_unfinished, recursive: true);
        }
    }
}
