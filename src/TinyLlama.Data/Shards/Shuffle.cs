namespace TinyLlama.Data.Shards;

/// <summary>
/// The second pass of a rank: sorts the buckets that all ranks gathered and writes some of the shards. A shard is a range of
/// keys, so whoever writes it needs to know nothing of the others.
/// </summary>
internal sealed class Shuffle : IDisposable
{
    /// <summary>Documents that a shard has at most, about, so that the index of an open shard stays small in memory.</summary>
    private const long DocumentsPerShard = 1L << 22;

    private readonly string _folder;
    private readonly string[] _rankFolders;
    private readonly PreparationState[] _gathered;
    private readonly int[] _ranksOfFiles;
    private readonly DocumentEncoder _encoder;
    private readonly PreparationOptions _options;
    private readonly Action<PreparationProgress> _progress;
    private readonly int _bucketsPerSplit;
    private readonly int _trainShards;
    private readonly int _shards;
    private ShardWriter? _open;

    /// <summary>Prepares to write shards.</summary>
    /// <param name="folder">Where the shards go.</param>
    /// <param name="rankFolders">Where each rank's buckets are.</param>
    /// <param name="gathered">Each rank's state behind the first pass.</param>
    /// <param name="ranksOfFiles">The rank that read each source file.</param>
    /// <param name="encoder">What made the entries.</param>
    /// <param name="options">How.</param>
    /// <param name="progress">Told how far it is.</param>
    public Shuffle(
        string folder, string[] rankFolders, PreparationState[] gathered, int[] ranksOfFiles, DocumentEncoder encoder, PreparationOptions options, Action<PreparationProgress> progress)
    {
        (_folder, _rankFolders, _gathered, _ranksOfFiles) = (folder, rankFolders, gathered, ranksOfFiles);
        (_encoder, _options, _progress) = (encoder, options, progress);
        _bucketsPerSplit = gathered[0].BucketBytes.Length / 2;
        _trainShards = CountShards(Split.Train);
        _shards = _trainShards + CountShards(Split.Validation);
    }

    /// <summary>Writes the shards of a rank: the ranks divide them, those of the training split first, into equal runs.</summary>
    /// <returns>The rank's state, with all of its shards or, when stopped, some of them; it is written down.</returns>
    /// <exception cref="UserErrorException">A bucket is damaged.</exception>
    public PreparationState Run(int rank, CancellationToken stop)
    {
        PreparationState state = _gathered[rank];
        int first = (int)((long)_shards * rank / _gathered.Length);
        int end = (int)((long)_shards * (rank + 1) / _gathered.Length);
        int next = Math.Max(first, state.NextShard);
        long total = BucketsOf(first, end).Sum(BytesOf);
        long done = total - BucketsOf(next, end).Sum(BytesOf);
        long duplicates = state.Duplicates;
        long textBytes = 0;
        byte[] tokens = [];
        int current = -1;
        foreach (int b in BucketsOf(next, end))
        {
            using SortedBucket bucket = new(_rankFolders, b, [.. _gathered.Select(g => g.BucketBytes[b])], _ranksOfFiles, _encoder.Key);
            for (int i = 0; i < bucket.Entries.Count; i++)
            {
                if (stop.IsCancellationRequested)
                {
                    return state;
                }

                BucketEntry entry = bucket.Entries[i].Entry;
                int shard = ShardOf(bucket.Entries[i].Key, b);
                if (shard < next || shard >= end)
                {
                    continue;
                }

                if (shard != current)
                {
                    EndShard();
                    current = shard;
                    _open = new ShardWriter(Path.Combine(_folder, NameOf(shard)), _encoder.BytesPerToken);
                }

                if (_options.Deduplicate && i > 0 && bucket.Entries[i - 1].Entry.Hash == entry.Hash)
                {
                    duplicates++;
                    continue;
                }

                if (tokens.Length < entry.TokenBytes)
                {
                    tokens = new byte[Math.Max(entry.TokenBytes, 1 << 16)];
                }

                bucket.ReadTokens(i, tokens.AsSpan(0, entry.TokenBytes));
                _open!.Add(tokens.AsSpan(0, entry.TokenBytes), entry.File, entry.Line);
                textBytes += entry.TextBytes;
            }

            done += BytesOf(b);
            _progress(new PreparationProgress("shuffle", done, total, state.Train.Documents + state.Validation.Documents + (_open?.Documents ?? 0)));
        }

        EndShard();
        state = state with { Shuffled = true };
        state.Write(_rankFolders[rank]);
        return state;

        void EndShard()
        {
            if (_open is null)
            {
                return;
            }

            Split split = current < _trainShards ? Split.Train : Split.Validation;
            ShardEntry shard = _open.Complete();
            SplitEntry written = state[split] + new SplitEntry(shard.Documents, shard.Tokens, textBytes, [shard]);
            state = split == Split.Train ? state with { Train = written } : state with { Validation = written };
            state = state with { NextShard = current + 1, Duplicates = duplicates };
            state.Write(_rankFolders[rank]);
            _open = null;
            textBytes = 0;
        }
    }

    /// <inheritdoc/>
    public void Dispose() => _open?.Dispose();

    private int CountShards(Split split)
    {
        long documents = _gathered.Sum(g => g.Documents[(int)split]);
        long bytes = Enumerable.Range((int)split * _bucketsPerSplit, _bucketsPerSplit).Sum(BytesOf);
        long tokens = (bytes - (documents * BucketEntry.HeaderBytes)) / _encoder.BytesPerToken;
        return checked((int)Math.Max(Ceiling(tokens, _options.TokensPerShard), Ceiling(documents, DocumentsPerShard)));
    }

    private long BytesOf(int bucket) => _gathered.Sum(g => g.BucketBytes[bucket]);

    /// <summary>The buckets that have documents of a run of shards.</summary>
    private IEnumerable<int> BucketsOf(int firstShard, int endShard)
    {
        foreach ((int before, int count, int firstBucket) in new[] { (0, _trainShards, 0), (_trainShards, _shards - _trainShards, _bucketsPerSplit) })
        {
            long first = Math.Clamp(firstShard - before, 0, count);
            long end = Math.Clamp(endShard - before, 0, count);
            if (first < end)
            {
                for (long b = first * _bucketsPerSplit / count; b < Ceiling(end * _bucketsPerSplit, count); b++)
                {
                    yield return firstBucket + (int)b;
                }
            }
        }
    }

    private int ShardOf(ulong key, int bucket) => bucket < _bucketsPerSplit
        ? BucketEntry.Part(key, _trainShards)
        : _trainShards + BucketEntry.Part(key, _shards - _trainShards);

    private string NameOf(int shard) => shard < _trainShards ? $"train-{shard:D5}.tokens" : $"validation-{shard - _trainShards:D5}.tokens";

    private static long Ceiling(long a, long b) => (a + b - 1) / b;
}
