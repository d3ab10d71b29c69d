using System.Text.Json;
using TinyLlama.Data.Documents;

namespace TinyLlama.Data.Shards;

/// <summary>The first pass of a rank: reads its files, encodes in parallel, and appends to its buckets in the order of the source.</summary>
/// <param name="folder">The rank's own, for its buckets, its quarantine and its state.</param>
/// <param name="source">The documents.</param>
/// <param name="files">The files of this rank.</param>
/// <param name="encoder">From documents to entries of buckets.</param>
/// <param name="options">How.</param>
/// <param name="progress">Told how far it is.</param>
internal sealed class Gathering(
    string folder, IDocumentSource source, Range files, DocumentEncoder encoder, PreparationOptions options, Action<PreparationProgress> progress)
{
    public const string QuarantineFile = "quarantine.jsonl";

    private const int QuarantinedCharacters = 1 << 16;

    /// <summary>Goes on from a state.</summary>
    /// <returns>The state behind the last file, or, when stopped, on the way there; it is written down.</returns>
    /// <exception cref="UserErrorException">A file cannot be read, or most records are bad.</exception>
    public PreparationState Run(PreparationState state, CancellationToken stop)
    {
        if (state.Gathered)
        {
            return state;
        }

        using BucketWriter buckets = new(folder, state.BucketBytes);
        using FileStream quarantine = new(Path.Combine(folder, QuarantineFile), FileMode.OpenOrCreate, FileAccess.Write, FileShare.Read);
        quarantine.SetLength(state.QuarantineBytes);
        quarantine.Position = state.QuarantineBytes;
        TaskScheduler threads = new ConcurrentExclusiveSchedulerPair(TaskScheduler.Default, options.Threads).ConcurrentScheduler;
        Queue<Task<EncodedBatch>> encoding = new();
        long bytesBefore = source.Files.Take(files.Start.Value).Sum(f => f.Bytes);
        long totalBytes = source.Files.Take(files).Sum(f => f.Bytes);
        long unsaved = 0;

        void Commit()
        {
            EncodedBatch batch = encoding.Dequeue().GetAwaiter().GetResult();
            state = Append(batch, state, buckets, quarantine);
            unsaved += batch.TextBytes;
            if (unsaved >= options.JournalBytes)
            {
                Save();
            }

            progress(new PreparationProgress("encode", Math.Clamp(source.BytesRead - bytesBefore, 0, totalBytes), totalBytes, state.Documents.Sum()));
        }

        void Save()
        {
            buckets.Flush();
            quarantine.Flush(flushToDisk: true);
            state = state with { BucketBytes = [.. buckets.Bytes], QuarantineBytes = quarantine.Position };
            state.Write(folder);
            unsaved = 0;
        }

        foreach (Batch batch in Batches(state.File, state.Record))
        {
            encoding.Enqueue(Task.Factory.StartNew(() => encoder.Encode(batch), CancellationToken.None, TaskCreationOptions.None, threads));
            if (encoding.Count > 2 * options.Threads)
            {
                Commit();
            }

            if (stop.IsCancellationRequested)
            {
                break;
            }
        }

        while (encoding.Count > 0)
        {
            Commit();
        }

        state = state with { Gathered = !stop.IsCancellationRequested };
        Save();
        return state;
    }

    /// <summary>What is said where more records are bad than allowed.</summary>
    public static UserErrorException TooManyBad(long bad, long records, double allowed, string? first, string quarantine) => new(
        $"{bad} of {records} records are bad, more than a share of {allowed}; the first: {first}; all are in {quarantine}; mend or remove them, or allow more");

    /// <summary>The records of the files in runs of about as much text as is worth a task.</summary>
    private IEnumerable<Batch> Batches(int file, long record)
    {
        List<Document> documents = [];
        long characters = 0;
        (int File, long Record) next = (file, 0);
        foreach (Document document in source.Read(file, files.End.Value))
        {
            next = document.File == next.File ? (next.File, next.Record + 1) : (document.File, 1);
            if (document.File == file && next.Record <= record)
            {
                continue;
            }

            documents.Add(document);

            // Many tiny documents cost as much as their text and more.
            characters += document.Text.Length + 32;
            if (characters >= options.BatchCharacters)
            {
                yield return new Batch(documents, next.File, next.Record);
                (documents, characters) = ([], 0);
            }
        }

        yield return new Batch(documents, next.File, next.Record);
    }

    private PreparationState Append(EncodedBatch encoded, PreparationState state, BucketWriter buckets, FileStream quarantine)
    {
        (long bad, long empty, string? firstBad) = (state.Bad, state.Empty, state.FirstBad);
        long[] documents = [.. state.Documents];
        for (int i = 0; i < encoded.Places.Count; i++)
        {
            Document document = encoded.Batch.Documents[i];
            (int bucket, int start, int length) = encoded.Places[i];
            if (document.Fault is string fault)
            {
                bad++;
                SourceFile file = source.Files[document.File];
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
                throw new UserErrorException($"{source.Files[document.File].Path} has more than {ShardFile.MaximumLine} lines; split the file");
            }
            else
            {
                buckets.Append(bucket, encoded.Bytes.Span.Slice(start, length));
                documents[bucket < buckets.Bytes.Length / 2 ? 0 : 1]++;
            }
        }

        // Where nearly all is bad, such as with a wrong field, nobody should wait for the end to learn it.
        if (bad > 10_000 && bad > documents.Sum())
        {
            throw TooManyBad(bad, bad + empty + documents.Sum(), options.MaximumBadShare, firstBad, quarantine.Name);
        }

        return state with { File = encoded.Batch.NextFile, Record = encoded.Batch.NextRecord, Documents = documents, Bad = bad, Empty = empty, FirstBad = firstBad };
    }
}
