using System.Security.Cryptography;
using System.Text;
using TinyLlama.Data.Documents;
using TinyLlama.Data.Shards;

namespace TinyLlama.Data.Tests.Shards;

public sealed class DataPreparationTests
{
    /// <summary>Small enough that a few thousand documents go through many batches, states, buckets and shards.</summary>
    private static readonly PreparationOptions s_options = new()
    {
        Seed = 7,
        ValidationShare = 0.1,
        Threads = 2,
        TokensPerShard = 1000,
        JournalBytes = 4000,
        BatchCharacters = 1500,
        BucketBytes = 5000,
    };

    private static readonly CharacterTokenizer s_tokenizer = new();

    [Fact]
    public void Every_document_is_there_once_with_its_origin_between_BOS_and_EOS()
    {
        using TemporaryFolder text = new();
        using TemporaryFolder shards = new();
        string[] expected = WriteCorpus(text, documents: 400);
        Manifest manifest = DataPreparation.Run(shards.Path, Source(text), s_tokenizer, s_options);
        List<(Split Split, string Text, string Origin)> documents = Documents(shards.Path);
        Assert.Equal(expected.Order(StringComparer.Ordinal), documents.Select(d => d.Text).Order(StringComparer.Ordinal));
        Assert.NotEqual(expected, documents.Select(d => d.Text));
        Assert.All(documents, d => Assert.Equal(d.Text, Line(text, d.Origin)));
        Assert.Equal(expected.Sum(Encoding.UTF8.GetByteCount), manifest.Train.TextBytes + manifest.Validation.TextBytes);
        Assert.Equal(expected.Length, manifest.Train.Documents + manifest.Validation.Documents);
        Assert.InRange(manifest.Validation.Documents, 20, 60);
        Assert.True(manifest.Train.Shards.Count > 3 && manifest.Validation.Shards.Count > 1);
        Assert.Empty(TokenShards.Verify(shards.Path));
        Assert.False(Directory.Exists(shards[DataPreparation.UnfinishedFolder]));
    }

    [Fact]
    public void The_bytes_do_not_depend_on_threads_batches_buckets_or_states()
    {
        using TemporaryFolder text = new();
        WriteCorpus(text, documents: 400);
        string expected = Prepared(text, s_options with { Threads = 1 });
        Assert.Equal(expected, Prepared(text, s_options with { Threads = 2 }));
        Assert.Equal(expected, Prepared(text, s_options with { Threads = 3, BatchCharacters = 100 }));
        Assert.Equal(expected, Prepared(text, s_options with { Threads = 5, BucketBytes = 1 << 20, JournalBytes = 1 }));
        Assert.NotEqual(expected, Prepared(text, s_options with { Seed = 8 }));
    }

    /// <summary>
    /// The state of the disk at each moment that progress is reported, as a process that is killed then leaves it, is
    /// continued from a copy.
    /// </summary>
    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void Continuing_from_any_moment_gives_the_same_bytes(bool deduplicate)
    {
        using TemporaryFolder text = new();
        WriteCorpus(text, documents: 150, withBad: true);
        PreparationOptions options = s_options with { Deduplicate = deduplicate, MaximumBadShare = 0.5 };
        string expected = Prepared(text, options);

        using TemporaryFolder shards = new();
        using TemporaryFolder copies = new();
        int moments = 0;
        HashSet<string> stages = [];
        DataPreparation.Run(shards.Path, Source(text), s_tokenizer, options, progress =>
        {
            string copy = copies[$"{moments++:D3}"];
            Copy(shards.Path, copy);
            if (progress.Stage == "encode")
            {
                // Whatever was written since the last state was written down is there, in part.
                foreach (string file in Directory.GetFiles(copy, "*", SearchOption.AllDirectories).Where(f => Path.GetFileName(f) is "quarantine.jsonl" || Path.GetFileName(f).StartsWith("bucket-", StringComparison.Ordinal)))
                {
                    File.AppendAllText(file, new string('?', 5000));
                }
            }

            stages.Add(progress.Stage);
        });
        Assert.Equal(["encode", "shuffle"], stages);
        Assert.InRange(moments, 10, 200);
        foreach (string copy in Directory.GetDirectories(copies.Path))
        {
            DataPreparation.Run(copy, Source(text), s_tokenizer, options with { Threads = 1 });
            Assert.Equal(expected, Fingerprint(copy));
        }
    }

    [Fact]
    public void A_stop_is_continued_without_reading_again_what_was_done()
    {
        using TemporaryFolder text = new();
        using TemporaryFolder shards = new();
        WriteCorpus(text, documents: 400);
        PreparationOptions options = s_options with { JournalBytes = long.MaxValue };
        string expected = Prepared(text, options);
        for (int stopAt = 1; ; stopAt++)
        {
            using CancellationTokenSource stop = new();
            long first = 0;
            int reports = 0;
            try
            {
                DataPreparation.Run(
                    shards.Path,
                    Source(text),
                    s_tokenizer,
                    options,
                    progress =>
                    {
                        first = reports == 0 ? progress.Documents : first;
                        if (++reports == 3 * stopAt)
                        {
                            stop.Cancel();
                        }
                    },
                    stop: stop.Token);
                Assert.True(stopAt > 2);
                break;
            }
            catch (OperationCanceledException)
            {
                Assert.True(stopAt == 1 || first > 40, $"after {stopAt} stops the first report had {first} documents");
            }
        }

        Assert.Equal(expected, Fingerprint(shards.Path));
    }

    [Fact]
    public void Running_again_finds_the_folder_finished_and_other_settings_are_refused_by_name()
    {
        using TemporaryFolder text = new();
        using TemporaryFolder shards = new();
        WriteCorpus(text, documents: 50);
        DataPreparation.Run(shards.Path, Source(text), s_tokenizer, s_options);
        string before = Fingerprint(shards.Path);
        DataPreparation.Run(shards.Path, Source(text), s_tokenizer, s_options with { Threads = 1 }, _ => Assert.Fail("nothing is to be done"));
        Assert.Equal(before, Fingerprint(shards.Path));

        void Refuses(string message, PreparationOptions options, TextFileOptions? files = null, CharacterTokenizer? tokenizer = null) => Assert.Contains(
            message,
            Assert.Throws<UserErrorException>(() => DataPreparation.Run(shards.Path, Source(text, files), tokenizer ?? s_tokenizer, options)).Message,
            StringComparison.Ordinal);

        Refuses("seed 7, now it is 8", s_options with { Seed = 8 });
        Refuses("bos 0, now it is none", s_options with { AddBos = false });
        Refuses("deduplicate false", s_options with { Deduplicate = true });
        Refuses("validation_share 0.1, now it is 0.2", s_options with { ValidationShare = 0.2 });
        Refuses("field text, now it is content", s_options, new TextFileOptions { Field = "content", Lines = true });
        Refuses("vocabulary_size 65538, now it is 70000", s_options, tokenizer: new CharacterTokenizer(70_000));
        File.AppendAllText(text["b.txt"], "more");
        Refuses("b.txt has", s_options);
    }

    [Fact]
    public void An_unfinished_folder_is_not_continued_with_other_settings_or_other_text()
    {
        using TemporaryFolder text = new();
        using TemporaryFolder shards = new();
        WriteCorpus(text, documents: 100);
        Assert.Throws<TimeoutException>(() => DataPreparation.Run(shards.Path, Source(text), s_tokenizer, s_options, _ => throw new TimeoutException()));
        Assert.Contains("its preparation has not finished", Assert.Throws<UserErrorException>(() => TokenShards.Open(shards.Path)).Message, StringComparison.Ordinal);
        Assert.Contains("seed 7, now it is 8", Error(text, shards, s_options with { Seed = 8 }), StringComparison.Ordinal);
        File.WriteAllText(text["c.txt"], "more");
        Assert.Contains("c.txt", Error(text, shards, s_options), StringComparison.Ordinal);
        File.Delete(text["c.txt"]);
        File.SetLastWriteTimeUtc(text["b.txt"], DateTime.UtcNow.AddHours(1));
        Assert.Contains("b.txt was changed since", Error(text, shards, s_options), StringComparison.Ordinal);
    }

    [Fact]
    public void A_document_stays_on_its_side_whatever_is_around_it()
    {
        using TemporaryFolder text = new();
        using TemporaryFolder shards = new();
        using TemporaryFolder other = new();
        string[] documents = WriteCorpus(text, documents: 300);
        DataPreparation.Run(shards.Path, Source(text), s_tokenizer, s_options);
        HashSet<string> validation = [.. Documents(shards.Path).Where(d => d.Split == Split.Validation).Select(d => d.Text)];

        using TemporaryFolder reordered = new();
        File.WriteAllLines(reordered["x.txt"], documents[..200].Reverse().Append("something new"));
        DataPreparation.Run(other.Path, Source(reordered), s_tokenizer, s_options with { Seed = 99 });
        Assert.All(
            Documents(other.Path).Where(d => d.Text != "something new"),
            d => Assert.Equal(validation.Contains(d.Text) ? Split.Validation : Split.Train, d.Split));
    }

    [Fact]
    public void Of_equal_documents_one_is_kept_where_that_is_asked_for()
    {
        using TemporaryFolder text = new();
        using TemporaryFolder shards = new();
        string[] lines = [.. Enumerable.Range(0, 300).Select(i => $"document {i % 100}")];
        File.WriteAllLines(text["a.txt"], lines);
        File.WriteAllLines(text["b.txt"], lines[1..]);
        Manifest manifest = DataPreparation.Run(shards.Path, Source(text), s_tokenizer, s_options with { Deduplicate = true });
        List<(Split Split, string Text, string Origin)> documents = Documents(shards.Path);
        Assert.Equal(lines[..100].Order(StringComparer.Ordinal), documents.Select(d => d.Text).Order(StringComparer.Ordinal));
        Assert.Equal(499, manifest.LeftOut.Duplicates);

        // The first of them, though the second file has it on an earlier line.
        Assert.Equal(Enumerable.Range(1, 100).Select(line => $"a.txt:{line}").Order(StringComparer.Ordinal), documents.Select(d => d.Origin).Order(StringComparer.Ordinal));

        using TemporaryFolder all = new();
        Assert.Equal(599, DataPreparation.Run(all.Path, Source(text), s_tokenizer, s_options).Train.Documents + Documents(all.Path).Count(d => d.Split == Split.Validation));
        // Equal documents do not follow each other.
        string[] order = [.. Documents(all.Path).Select(d => d.Text)];
        Assert.InRange(order.Zip(order.Skip(1)).Count(pair => pair.First == pair.Second), 0, 15);
    }

    [Fact]
    public void Bad_records_are_quarantined_with_file_and_line_and_too_many_are_an_error()
    {
        using TemporaryFolder text = new();
        using TemporaryFolder shards = new();
        List<string> lines = [.. Enumerable.Range(0, 99).Select(i => $"{{\"text\":\"document {i}\"}}")];
        lines.Insert(41, "{\"text\": oops}");
        lines.Add("{\"text\": \"\"}");
        File.WriteAllLines(text["a.jsonl"], lines);
        Manifest manifest = DataPreparation.Run(shards.Path, Source(text), s_tokenizer, s_options);
        Assert.Equal(new LeftOut(1, 1, 0), manifest.LeftOut);
        Assert.Equal("{\"file\":\"a.jsonl\",\"line\":42,\"reason\":\"it is not JSON: byte 9\",\"record\":\"{\\u0022text\\u0022: oops}\"}\n", File.ReadAllText(shards["quarantine.jsonl"]));

        using TemporaryFolder strict = new();
        string message = Error(text, strict, s_options with { MaximumBadShare = 0.005 });
        Assert.Contains("1 of 101 records are bad", message, StringComparison.Ordinal);
        Assert.Contains($"{text["a.jsonl"]}:42: it is not JSON", message, StringComparison.Ordinal);
        Assert.False(File.Exists(strict["manifest.json"]));

        // With more allowed it goes on from there.
        DataPreparation.Run(strict.Path, Source(text), s_tokenizer, s_options);
        Assert.Equal(Fingerprint(shards.Path), Fingerprint(strict.Path));
    }

    [Fact]
    public void A_wrong_field_is_reported_before_all_is_read()
    {
        using TemporaryFolder text = new();
        using TemporaryFolder shards = new();
        File.WriteAllLines(text["a.jsonl"], Enumerable.Repeat("{\"content\":\"x\"}", 40_000));
        string message = Error(text, shards, s_options);
        Assert.Contains("it has no field 'text'", message, StringComparison.Ordinal);
        Assert.DoesNotContain("40000", message, StringComparison.Ordinal);
    }

    [Fact]
    public void No_documents_and_nothing_to_train_on_are_errors()
    {
        using TemporaryFolder text = new();
        File.WriteAllText(text["a.txt"], "\n\n");
        using TemporaryFolder empty = new();
        Assert.Contains("no document in 1 files", Error(text, empty, s_options), StringComparison.Ordinal);

        File.WriteAllText(text["a.txt"], "one document");
        using TemporaryFolder one = new();
        Assert.Contains("nothing is left to train on", Error(text, one, s_options with { ValidationShare = 0.999999 }), StringComparison.Ordinal);
        using TemporaryFolder other = new();
        Manifest manifest = DataPreparation.Run(other.Path, Source(text), s_tokenizer, s_options with { ValidationShare = 0 });
        Assert.Equal((1, 14, 0), (manifest.Train.Documents, manifest.Train.Tokens, manifest.Validation.Documents));
    }

    [Fact]
    public void Two_preparations_of_a_folder_do_not_meet()
    {
        using TemporaryFolder text = new();
        using TemporaryFolder shards = new();
        WriteCorpus(text, documents: 50);
        string? message = null;
        DataPreparation.Run(shards.Path, Source(text), s_tokenizer, s_options, _ => message ??= Error(text, shards, s_options));
        Assert.Contains("another process", message, StringComparison.Ordinal);
    }

    [Fact]
    public void The_files_of_the_tokenizer_lie_beside_the_shards()
    {
        using TemporaryFolder text = new();
        using TemporaryFolder shards = new();
        WriteCorpus(text, documents: 50);
        File.WriteAllText(text["tokenizer.model"], "pieces");
        Manifest manifest = DataPreparation.Run(shards.Path, Source(text), s_tokenizer, s_options with { TokenizerFiles = [text["tokenizer.model"]] });
        Assert.Contains(manifest.Files, f => f.File == "tokenizer.model" && f.Bytes == 6);
        Assert.Equal("pieces", File.ReadAllText(shards["tokenizer.model"]));
    }

    [Theory]
    [InlineData(1, new[] { 0, 0, 0, 0, 0, 0 })]
    [InlineData(2, new[] { 0, 0, 0, 1, 1, 1 })]
    [InlineData(4, new[] { 0, 0, 1, 2, 3, 3 })]
    [InlineData(100, new[] { 5, 15, 30, 70, 99, 99 })]
    public void Ranks_read_runs_of_files_of_about_as_much_text(int ranks, int[] expected)
    {
        // 10, 10, 20, 60, 0 and 0 per cent of the text, since packed text is a quarter of what it holds.
        SourceFile[] files = [.. new[] { ("a.txt", 40), ("b.jsonl.gz", 10), ("c.txt.zst", 20), ("d.txt", 240), ("e.txt", 0), ("f.txt", 0) }.Select(f => new SourceFile(f.Item1, f.Item1, f.Item2))];
        Assert.Equal(expected, DataPreparation.Divide(files, ranks));
        Assert.Equal(new int[6], DataPreparation.Divide([.. files.Select(f => f with { Bytes = 0 })], ranks));
    }

    private static TextFiles Source(TemporaryFolder text, TextFileOptions? options = null) => TextFiles.Find([text.Path], options ?? new TextFileOptions { Lines = true });

    private static string Error(TemporaryFolder text, TemporaryFolder shards, PreparationOptions options) =>
        Assert.Throws<UserErrorException>(() => DataPreparation.Run(shards.Path, Source(text), s_tokenizer, options)).Message;

    /// <summary>Documents in two files of lines, in several sizes, some of them equal.</summary>
    private static string[] WriteCorpus(TemporaryFolder text, int documents, bool withBad = false)
    {
        Random random = new(5);
        string[] lines = [.. Enumerable.Range(0, documents).Select(i => $"{(i % 10 == 3 ? "again" : $"é{i}")} {new string('x', i % 10 == 3 ? 4 : random.Next(80))}")];
        File.WriteAllLines(text["a.txt"], lines[..(documents / 3)]);
        File.WriteAllLines(text["b.txt"], lines[(documents / 3)..]);
        if (withBad)
        {
            File.WriteAllBytes(text["a-bad.txt"], [0xFF, (byte)'\n', 0xFE, (byte)'\n']);
            File.WriteAllLines(text["c.jsonl"], ["{}", "{\"text\":\"last\"}", "x"]);
        }

        return lines;
    }

    private static string Line(TemporaryFolder text, string origin)
    {
        string[] parts = origin.Split(':');
        return File.ReadAllLines(text[parts[0]])[int.Parse(parts[1]) - 1];
    }

    private static string Prepared(TemporaryFolder text, PreparationOptions options)
    {
        using TemporaryFolder shards = new();
        DataPreparation.Run(shards.Path, Source(text), s_tokenizer, options);
        return Fingerprint(shards.Path);
    }

    /// <summary>Names and hashes of all files.</summary>
    private static string Fingerprint(string folder) => string.Join('\n', Directory
        .GetFiles(folder, "*", SearchOption.AllDirectories)
        .Order(StringComparer.Ordinal)
        .Select(f => $"{Path.GetRelativePath(folder, f)} {Convert.ToHexString(SHA256.HashData(File.ReadAllBytes(f)))}"));

    private static void Copy(string from, string to)
    {
        Directory.CreateDirectory(to);
        foreach (string file in Directory.GetFiles(from, "*", SearchOption.AllDirectories).Where(f => Path.GetFileName(f) != "lock"))
        {
            string copy = Path.Combine(to, Path.GetRelativePath(from, file));
            Directory.CreateDirectory(Path.GetDirectoryName(copy)!);
            using FileStream source = new(file, FileMode.Open, FileAccess.Read, FileShare.ReadWrite);
            using FileStream target = new(copy, FileMode.Create);
            source.CopyTo(target);
        }
    }

    /// <summary>The documents of a folder as they are in the shards, which is between BOS and EOS each.</summary>
    private static List<(Split Split, string Text, string Origin)> Documents(string folder)
    {
        using TokenShards shards = TokenShards.Open(folder);
        List<(Split Split, string Text, string Origin)> documents = [];
        foreach (Split split in new[] { Split.Train, Split.Validation })
        {
            int[] tokens = new int[shards.TokenCount(split)];
            shards.ReadTokens(split, 0, tokens);
            IReadOnlyList<DocumentOrigin> origins = shards.Documents(split, 0, tokens.Length);
            int[] starts = new int[tokens.Length];
            Assert.Equal(origins.Count, shards.ReadDocumentStarts(split, 0, tokens.Length, starts));
            for (int d = 0; d < origins.Count; d++)
            {
                int end = d + 1 < origins.Count ? (int)origins[d + 1].FirstToken : tokens.Length;
                int[] document = tokens[starts[d]..end];
                Assert.Equal((0, 1), (document[0], document[^1]));
                documents.Add((split, s_tokenizer.Decode(document), origins[d].ToString()));
            }
        }

        return documents;
    }
}
