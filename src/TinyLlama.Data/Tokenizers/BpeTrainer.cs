using System.Collections.Concurrent;
using System.Text;

namespace TinyLlama.Data.Tokenizers;

/// <summary>What a trained vocabulary looks like, and what may be used to make it.</summary>
public sealed record BpeTrainingOptions
{
    /// <summary>Gets the number of ids (V): 3 control and unknown pieces, 256 bytes, merged pieces, characters.</summary>
    public required int VocabularySize { get; init; }

    /// <summary>Gets a value indicating whether a text with too few pairs to merge gives a smaller vocabulary, and is no error.</summary>
    public bool AllowsFewer { get; init; }

    /// <summary>Gets the share of all characters of the text that get pieces of their own; the rarest become bytes.</summary>
    public double CharacterCoverage { get; init; } = 0.99995;

    /// <summary>Gets the most characters that a piece may have.</summary>
    public int MaximumPieceCharacters { get; init; } = 16;

    /// <summary>Gets the number of threads that count words; it changes no result.</summary>
    public int Threads { get; init; } = Environment.ProcessorCount;
}

/// <summary>How far a training is.</summary>
/// <param name="Characters">The characters read so far.</param>
/// <param name="Pieces">The merged pieces found so far.</param>
/// <param name="TotalPieces">The merged pieces to be found, or 0 while the text is still being read.</param>
public readonly record struct BpeTrainingProgress(long Characters, int Pieces, int TotalPieces);

/// <summary>
/// Trains byte-pair encodings with byte fallback as SentencePiece does with Llama 2's settings: identity normalization, a
/// space before the text, digits alone, runs of spaces as pieces that merge last. Pieces do not cross from letters to
/// punctuation, nor over a space, and control characters (the line feed is one) stay byte tokens.
/// </summary>
/// <remarks>
/// Of all pairs of neighbours the one that occurs most often merges next; of equally many the shorter, then the first in
/// the order of its bytes. Counts are exact, so the result depends on the text alone.
/// </remarks>
public static class BpeTrainer
{
    private const int PartCharacters = 1 << 20;
    private const int FixedPieces = 3 + 256;
    private const int ReportEvery = 64;

    /// <summary>Trains a model.</summary>
    /// <param name="documents">The text, read once.</param>
    /// <param name="options">What is wanted.</param>
    /// <param name="progress">Is told now and then how far the training is.</param>
    /// <param name="cancellation">Stops the training.</param>
    /// <exception cref="UserErrorException">The text is empty, or does not fit the size of the vocabulary.</exception>
    public static BpeModel Train(
        IEnumerable<string> documents,
        BpeTrainingOptions options,
        IProgress<BpeTrainingProgress>? progress = null,
        CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(documents);
        ArgumentNullException.ThrowIfNull(options);
        if (!(options.CharacterCoverage is > 0 and <= 1))
        {
            throw new UserErrorException($"character coverage {options.CharacterCoverage} is not above 0 and at most 1");
        }

        ArgumentOutOfRangeException.ThrowIfLessThan(options.MaximumPieceCharacters, 1);
        ArgumentOutOfRangeException.ThrowIfLessThan(options.Threads, 1);
        ChunkCounter chunks = Count(documents, options.Threads, progress, cancellation, out long characters);
        List<(Rune Character, long Count)> alphabet = Alphabet(chunks, options.CharacterCoverage);
        int wanted = options.VocabularySize - FixedPieces - alphabet.Count;
        if (wanted < 0)
        {
            throw new UserErrorException($"a vocabulary of {options.VocabularySize} is too small for this text: 3 special pieces + 256 bytes + "
                + $"{alphabet.Count} characters = {FixedPieces + alphabet.Count}; raise the size or lower the character coverage");
        }

        if (chunks.TextBytes + (2L * chunks.Count) > Array.MaxLength)
        {
            throw TooMuch();
        }

        var merger = new PairMerger(chunks, alphabet, options.MaximumPieceCharacters);
        var merged = new List<string>();
        while (merged.Count < wanted)
        {
            if (merged.Count % ReportEvery == 0)
            {
                cancellation.ThrowIfCancellationRequested();
                progress?.Report(new BpeTrainingProgress(characters, merged.Count, wanted));
            }

            string? piece = merger.Next();
            if (piece is null && options.AllowsFewer)
            {
                break;
            }

            merged.Add(piece?.Replace(' ', BpeModel.Space) ?? throw new UserErrorException(
                $"this text gives a vocabulary of at most {FixedPieces + alphabet.Count + merged.Count}, not of {options.VocabularySize}; ask for that "
                + "or less, or give more text"));
        }

        progress?.Report(new BpeTrainingProgress(characters, wanted, wanted));
        return new BpeModel
        {
            Pieces = Pieces(merged, alphabet),
            ByteFallback = true,
            CharacterCoverage = (float)options.CharacterCoverage,
        };
    }

    private static List<Piece> Pieces(List<string> merged, List<(Rune Character, long Count)> alphabet)
    {
        int size = FixedPieces + merged.Count + alphabet.Count;
        List<Piece> pieces =
        [
            new Piece("<unk>", 0, PieceKind.Unknown),
            new Piece("<s>", 0, PieceKind.Control),
            new Piece("</s>", 0, PieceKind.Control),
        ];
        for (int value = 0; value < 256; value++)
        {
            pieces.Add(new Piece($"<0x{value:X2}>", 0, PieceKind.Byte));
        }

        foreach (string text in merged.Concat(alphabet.Select(c => c.Character.ToString().Replace(' ', BpeModel.Space))))
        {
            // Runs of spaces merge after everything else: the last space of an indentation belongs to the word after it.
            int order = pieces.Count - FixedPieces;
            bool isSpaces = text.All(character => character == BpeModel.Space);
            pieces.Add(new Piece(text, isSpaces ? -order - size : -order, PieceKind.Normal));
        }

        return pieces;
    }

    /// <summary>The characters that get pieces, the most frequent first, the space always among them.</summary>
    private static List<(Rune Character, long Count)> Alphabet(ChunkCounter chunks, double coverage)
    {
        var counts = new Dictionary<Rune, long>();
        long total = 0;
        for (int i = 0; i < chunks.Count; i++)
        {
            ReadOnlySpan<byte> text = chunks.Text(i);
            while (!text.IsEmpty)
            {
                Rune.DecodeFromUtf8(text, out Rune rune, out int length);
                counts[rune] = counts.GetValueOrDefault(rune) + chunks.Occurrences(i);
                total += chunks.Occurrences(i);
                text = text[length..];
            }
        }

        if (total == 0)
        {
            throw new UserErrorException("there is no text to train a tokenizer on");
        }

        var alphabet = new List<(Rune Character, long Count)>();
        long covered = 0;
        foreach ((Rune rune, long count) in counts.OrderByDescending(c => c.Value).ThenBy(c => c.Key.Value))
        {
            if (covered < coverage * total || rune.Value == ' ')
            {
                alphabet.Add((rune, count));
                covered += count;
            }
        }

        return alphabet;
    }

    private static ChunkCounter Count(
        IEnumerable<string> documents,
        int threads,
        IProgress<BpeTrainingProgress>? progress,
        CancellationToken cancellation,
        out long characters)
    {
        var counters = new ChunkCounter[threads];
        var errors = new ConcurrentQueue<Exception>();
        using var parts = new BlockingCollection<List<(ReadOnlyMemory<char> Text, bool StartsDocument)>>(2 * threads);
        var workers = new Thread[threads];
        for (int t = 0; t < threads; t++)
        {
            ChunkCounter counter = counters[t] = new ChunkCounter();
            workers[t] = new Thread(() => Work(parts, counter, errors)) { IsBackground = true, Name = $"count words {t}" };
            workers[t].Start();
        }

        characters = 0;
        try
        {
            foreach (List<(ReadOnlyMemory<char> Text, bool StartsDocument)> batch in Batches(documents))
            {
                cancellation.ThrowIfCancellationRequested();
                parts.Add(batch, CancellationToken.None);
                characters += batch.Sum(part => (long)part.Text.Length);
                progress?.Report(new BpeTrainingProgress(characters, 0, 0));
            }
        }
        finally
        {
            parts.CompleteAdding();
            foreach (Thread worker in workers)
            {
                worker.Join();
            }
        }

        if (errors.TryDequeue(out Exception? error))
        {
            throw error is OverflowException ? TooMuch(error) : error;
        }

        for (int t = 1; t < threads; t++)
        {
            counters[0].Add(counters[t]);
        }

        return counters[0];
    }

    private static UserErrorException TooMuch(Exception? cause = null) =>
        new("the text has more than 2 GiB of different words; train on a sample of it", cause);

    private static void Work(
        BlockingCollection<List<(ReadOnlyMemory<char> Text, bool StartsDocument)>> parts,
        ChunkCounter counter,
        ConcurrentQueue<Exception> errors)
    {
        foreach (List<(ReadOnlyMemory<char> Text, bool StartsDocument)> batch in parts.GetConsumingEnumerable())
        {
            try
            {
                foreach ((ReadOnlyMemory<char> text, bool startsDocument) in batch)
                {
                    counter.Add(text.Span, startsDocument);
                }
            }
            catch (Exception error) when (error is OutOfMemoryException or OverflowException)
            {
                errors.Enqueue(error);
            }
        }
    }

    /// <summary>Divides the text into portions of about a million characters; long documents are cut after line feeds.</summary>
    private static IEnumerable<List<(ReadOnlyMemory<char> Text, bool StartsDocument)>> Batches(IEnumerable<string> documents)
    {
        var batch = new List<(ReadOnlyMemory<char> Text, bool StartsDocument)>();
        int count = 0;
        foreach (string document in documents)
        {
            for (int start = 0; start < document.Length;)
            {
                int end = document.Length;
                if (end - start > PartCharacters)
                {
                    int line = document.IndexOf('\n', start + PartCharacters);
                    end = line < 0 ? end : line + 1;
                }

                batch.Add((document.AsMemory(start, end - start), start == 0));
                count += end - start;
                start = end;
                if (count >= PartCharacters)
                {
                    yield return batch;
                    batch = [];
                    count = 0;
                }
            }
        }

        if (count > 0)
        {
            yield return batch;
        }
    }
}
