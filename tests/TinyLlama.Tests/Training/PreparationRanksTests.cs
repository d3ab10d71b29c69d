using System.IO.Compression;
using System.Security.Cryptography;
using TinyLlama.Compute.Collectives;
using TinyLlama.Data;
using TinyLlama.Data.Documents;
using TinyLlama.Data.Shards;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Tests.Checkpoints;
using TinyLlama.Training;

namespace TinyLlama.Tests.Training;

/// <summary>Folders of token shards that ranks prepare together: those of one process, byte for byte.</summary>
public sealed class PreparationRanksTests : IDisposable
{
    /// <summary>Small enough that some hundred documents go through many batches, states, buckets and shards.</summary>
    private static readonly PreparationOptions s_options = new()
    {
        Seed = 7,
        ValidationShare = 0.1,
        MaximumBadShare = 0.5,
        Threads = 1,
        TokensPerShard = 700,
        JournalBytes = 1500,
        BatchCharacters = 700,
        BucketBytes = 3000,
    };

    private readonly TemporaryFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Theory]
    [InlineData(1, true)]
    [InlineData(2, true)]
    [InlineData(2, false)]
    [InlineData(3, true)]
    [InlineData(4, false)]
    [InlineData(11, true)]
    public void The_bytes_do_not_depend_on_the_number_of_ranks(int ranks, bool deduplicate)
    {
        WriteCorpus();
        PreparationOptions options = s_options with { Deduplicate = deduplicate };
        Manifest manifest = Prepare("one", options);
        Assert.True(manifest.Train.Shards.Count > 5 && manifest.Validation.Shards.Count > 1);
        Assert.Equal((4, 1), (manifest.LeftOut.Bad, manifest.LeftOut.Empty));
        Assert.Equal(deduplicate, manifest.LeftOut.Duplicates > 20);

        Manifest[] manifests = OnThreads.Run(ranks, world => Prepare("many", options, world));
        Assert.Equal(Fingerprint("one"), Fingerprint("many"));
        Assert.All(manifests, m => Assert.Equal(manifest.Train.Tokens, m.Train.Tokens));

        // Once more: all ranks find it finished.
        OnThreads.Run(ranks, world => Prepare("many", options, world));
        Assert.Equal(Fingerprint("one"), Fingerprint("many"));
    }

    [Theory]
    [InlineData(1)]
    [InlineData(300)]
    public void Ranks_without_files_or_shards_have_nothing_to_do(int documents)
    {
        Directory.CreateDirectory(_folder["text"]);
        File.WriteAllLines(Text("a.txt"), Lines(0, documents));
        PreparationOptions options = s_options with { ValidationShare = 0 };
        Prepare("one", options);
        OnThreads.Run(3, world => Prepare("many", options, world));
        Assert.Equal(Fingerprint("one"), Fingerprint("many"));
    }

    /// <summary>A rank fails the first time that it tells how far it is, the second time, and so on; each time all go on from there.</summary>
    [Theory]
    [InlineData(0, true)]
    [InlineData(1, true)]
    [InlineData(2, false)]
    public void Continuing_after_a_rank_was_lost_gives_the_same_bytes(int lost, bool deduplicate)
    {
        WriteCorpus();
        PreparationOptions options = s_options with { Deduplicate = deduplicate };
        Prepare("one", options);
        string expected = Fingerprint("one");
        HashSet<string> stages = [];
        for (int moment = 1; FailsAt(moment); moment++)
        {
            OnThreads.Run(3, world => Prepare("many", options, world));
            Assert.Equal(expected, Fingerprint("many"));
            Directory.Delete(_folder["many"], recursive: true);
        }

        Assert.Equal(["encode", "shuffle"], stages.Order(StringComparer.Ordinal));

        bool FailsAt(int moment)
        {
            int reports = 0;
            Exception?[] ends = Try(3, world => Prepare("many", options, world, world.Rank != lost ? null : progress =>
            {
                if (++reports == moment)
                {
                    stages.Add(progress.Stage);
                    throw new TimeoutException();
                }
            }));
            if (ends.All(end => end is null))
            {
                return false;
            }

            Assert.IsType<TimeoutException>(ends[lost]);
            Assert.All(ends.Where((_, rank) => rank != lost), end => Assert.IsType<CollectiveException>(end));
            Assert.False(File.Exists(_folder["many/manifest.json"]));
            return true;
        }
    }

    [Fact]
    public void A_stop_of_one_rank_reaches_the_work_of_all()
    {
        bool[] stopped = OnThreads.Run(3, world => new PreparationRanks(world)
            .Run(stop => [stop.WaitHandle.WaitOne(TimeSpan.FromSeconds(30)) ? (byte)1 : (byte)0], new CancellationToken(canceled: world.Rank == 1))
            .All(part => part[0] == 1));
        Assert.Equal([true, true, true], stopped);
    }

    [Fact]
    public void A_stop_of_one_rank_stops_all_and_what_was_done_is_not_done_again()
    {
        WriteCorpus();
        PreparationOptions options = s_options with { JournalBytes = long.MaxValue };
        Prepare("one", options);
        long[] documents = new long[2];
        int stops = 0;
        for (bool isFinished = false; !isFinished; stops++)
        {
            long[] first = new long[2];
            Exception?[] ends = Try(2, world =>
            {
                using CancellationTokenSource stop = new();
                int reports = 0;
                return Prepare("many", options, world, Stop, stop.Token);

                void Stop(PreparationProgress progress)
                {
                    if (reports++ == 0)
                    {
                        first[world.Rank] = progress.Stage == "encode" ? progress.Documents : long.MaxValue;
                    }

                    if (world.Rank == 1 && reports == 3 + stops)
                    {
                        stop.Cancel();
                    }
                }
            });
            isFinished = ends.All(end => end is null);
            Assert.True(isFinished || ends.All(end => end is OperationCanceledException), string.Join("; ", ends.Select(end => end?.Message)));
            Assert.True(first[1] > documents[1] || isFinished);
            documents = first;
        }

        Assert.True(stops > 2);
        Assert.Equal(Fingerprint("one"), Fingerprint("many"));
    }

    [Fact]
    public void A_file_that_one_rank_cannot_read_ends_all_at_once()
    {
        WriteCorpus();
        File.WriteAllBytes(Text("z.txt.gz"), RandomNumberGenerator.GetBytes(2000));
        using ManualResetEventSlim failed = new();
        Exception?[] ends = Try(3, world =>
        {
            try
            {
                return Prepare("many", s_options, world, world.Rank == 2 ? null : _ => Assert.True(failed.Wait(TimeSpan.FromSeconds(30)), "it is told when all are done"));
            }
            catch (UserErrorException)
            {
                failed.Set();
                throw;
            }
        });
        Assert.Contains("z.txt.gz", Assert.IsType<UserErrorException>(ends[2]).Message, StringComparison.Ordinal);
        Assert.All(ends[..2], end => Assert.Contains("z.txt.gz", Assert.IsType<CollectiveException>(end).Message, StringComparison.Ordinal));
    }

    [Fact]
    public void Bad_records_of_all_ranks_are_counted_together()
    {
        WriteCorpus();
        Exception?[] ends = Try(3, world => Prepare("many", s_options with { MaximumBadShare = 0.001 }, world));
        string message = Assert.IsType<UserErrorException>(ends[0]).Message;
        Assert.Contains("4 of 3", message, StringComparison.Ordinal);
        Assert.Contains($"{Text("a-bad.txt")}:1: byte 0 is not UTF-8; all are in {_folder["many/quarantine.jsonl"]}", message, StringComparison.Ordinal);
        Assert.Equal(4, File.ReadAllLines(_folder["many/quarantine.jsonl"]).Length);

        // With more allowed it goes on from there.
        OnThreads.Run(3, world => Prepare("many", s_options, world));
        Prepare("one", s_options);
        Assert.Equal(Fingerprint("one"), Fingerprint("many"));
    }

    [Fact]
    public void Another_number_of_ranks_and_ranks_with_other_text_are_refused()
    {
        WriteCorpus();
        Exception?[] ends = Try(2, world => Prepare("many", s_options, world, world.Rank == 0 ? null : _ => throw new TimeoutException()));
        Assert.IsType<TimeoutException>(ends[1]);
        ends = Try(3, world => Prepare("many", s_options, world));
        Assert.Contains("was begun with 2 ranks, now there are 3; go on with 2", Assert.IsType<UserErrorException>(ends[0]).Message, StringComparison.Ordinal);

        ends = Try(2, world => Prepare("other", s_options with { Seed = (ulong)world.Rank }, world));
        Assert.Contains("rank 1 was given other text", Assert.IsType<UserErrorException>(ends[0]).Message, StringComparison.Ordinal);
        Assert.IsType<CollectiveException>(ends[1]);
        Assert.False(Directory.Exists(_folder["other"]));
    }

    private static string[] Lines(int first, int count)
    {
        Random random = new(first);
        return [.. Enumerable.Range(first, count).Select(i => $"{(i % 5 == 3 ? $"again {i % 3}" : $"é{i}")} {new string('x', i % 5 == 3 ? 4 : random.Next(60))}")];
    }

    /// <summary>Every ending that a folder of text has, equal documents in several files, and every kind of what is left out.</summary>
    private void WriteCorpus()
    {
        Directory.CreateDirectory(_folder["text"]);
        File.WriteAllBytes(Text("a-bad.txt"), [0xFF, (byte)'\n', 0xFE, (byte)'\n']);
        File.WriteAllLines(Text("b.txt"), Lines(0, 90));
        File.WriteAllText(Text("c-empty.txt"), "");
        using (GZipStream packed = new(File.Create(Text("d.txt.gz")), CompressionLevel.Fastest))
        using (StreamWriter lines = new(packed))
        {
            Array.ForEach(Lines(90, 40), lines.WriteLine);
        }

        File.WriteAllLines(Text("e.txt"), Lines(0, 30));
        File.WriteAllLines(Text("f.txt"), Lines(130, 150));
        File.WriteAllLines(Text("g.jsonl"), ["{}", "{\"text\":\"again 0 xxxx\"}", "{\"text\":\"\"}", "x", "{\"text\":\"last\"}"]);
    }

    private string Text(string name) => Path.Combine(_folder["text"], name);

    private Manifest Prepare(
        string folder, PreparationOptions options, Collective? world = null, Action<PreparationProgress>? progress = null, CancellationToken stop = default) =>
        DataPreparation.Run(
            _folder[folder],
            TextFiles.Find([_folder["text"]], new TextFileOptions { Lines = true }),
            new ByteTokenizer(),
            options,
            progress,
            world is null ? null : new PreparationRanks(world),
            stop);

    /// <summary>Runs something on every rank, each of which tells the others when it fails, as processes do.</summary>
    /// <returns>How each rank ended.</returns>
    private static Exception?[] Try(int ranks, Func<Collective, Manifest> run) => OnThreads.Run(ranks, world => Record.Exception(() =>
    {
        try
        {
            run(world);
        }
        catch (Exception e) when (e is not OperationCanceledException)
        {
            world.Abort(e.Message, 2);
            throw;
        }
    }));

    /// <summary>Names and hashes of all files.</summary>
    private string Fingerprint(string folder) => string.Join('\n', Directory
        .GetFiles(_folder[folder], "*", SearchOption.AllDirectories)
        .Order(StringComparer.Ordinal)
        .Select(f => $"{Path.GetRelativePath(_folder[folder], f)} {Convert.ToHexString(SHA256.HashData(File.ReadAllBytes(f)))}"));
}
