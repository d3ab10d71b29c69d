using TinyLlama.Checkpoints;
using TinyLlama.Compute;
using TinyLlama.Compute.Collectives;
using TinyLlama.Data;
using TinyLlama.Model;
using TinyLlama.Tests.Training;

namespace TinyLlama.Tests.Checkpoints;

/// <summary>Checkpoints that several ranks write together, and that any number of ranks reads.</summary>
public sealed class RankCheckpointTests : IDisposable
{
    private readonly TemporaryFolder _run = new();
    private readonly RankCheckpoints _ranks = new();
    private readonly List<string> _warnings = [];

    public void Dispose()
    {
        _ranks.Dispose();
        _run.Dispose();
    }

    [Theory]
    [InlineData(1, false)]
    [InlineData(1, true)]
    [InlineData(2, false)]
    [InlineData(2, true)]
    [InlineData(4, true)]
    public void What_any_number_of_ranks_writes_any_other_number_reads(int ranks, bool asynchronous)
    {
        for (int seed = 0; seed < 5; seed++)
        {
            Assert.Null(_ranks.Save(_run.Path, seed, ranks, asynchronous, seed).Failure);
            TrainingCheckpoint checkpoint = Saved(seed);
            Assert.Empty(TrainingCheckpoint.Verify(checkpoint.Path));
            Assert.Equal(
                checkpoint.Files.Select(static file => file.Name).Append(TrainingCheckpoint.ManifestName).Order(StringComparer.Ordinal),
                Directory.GetFiles(checkpoint.Path).Select(Path.GetFileName).Order(StringComparer.Ordinal));
            foreach (int readers in (int[])[1, 2, 4])
            {
                _ranks.RequireSame(checkpoint, readers, seed + 100);
            }
        }
    }

    [Fact]
    public void Each_rank_writes_one_file_of_moments_and_one_of_weights()
    {
        Assert.Null(_ranks.Save(_run.Path, 1, ranks: 4).Failure);
        Assert.Equal(
            [
                "config.json", "generation_config.json", "model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors",
                "model-00003-of-00004.safetensors", "model-00004-of-00004.safetensors", "model.safetensors.index.json",
                "optimizer-00001-of-00004.safetensors", "optimizer-00002-of-00004.safetensors", "optimizer-00003-of-00004.safetensors",
                "optimizer-00004-of-00004.safetensors", "state.json",
            ],
            Saved(1).Files.Select(static file => file.Name).Order(StringComparer.Ordinal));
    }

    [Fact]
    public void One_rank_writes_the_files_that_a_plain_save_writes()
    {
        Assert.Null(_ranks.Save(_run.Path, 1, ranks: 1, asynchronous: true).Failure);
        string plain = TrainingCheckpoint.Save(_run.Path, 2, writer =>
        {
            writer.WriteTensors(TrainingCheckpoint.ModelName, _ranks.Backend, [.. _ranks.Parameters.Select(Named)]);
            writer.WriteTensors(TrainingCheckpoint.OptimizerName, _ranks.Backend,
            [
                .. _ranks.Cut(1, 0)[0].Zip(_ranks.Parameters).SelectMany(static pair => new[]
                {
                    Named(pair.Second with { Name = pair.First.Name + ".first", Values = Shaped(pair.First.First, pair.Second) }),
                    Named(pair.Second with { Name = pair.First.Name + ".second", Values = Shaped(pair.First.Second, pair.Second) }),
                }),
            ]);
        }).Path;
        string ranked = Saved(1).Path;
        foreach (string name in (string[])[TrainingCheckpoint.ModelName, TrainingCheckpoint.OptimizerName])
        {
            Assert.Equal(File.ReadAllBytes(Path.Combine(plain, name)), File.ReadAllBytes(Path.Combine(ranked, name)));
        }

        static NamedTensor Named(Parameter parameter) => new(parameter.Name, parameter.Values, parameter.IsVector);

        static Tensor Shaped(Tensor values, Parameter parameter) =>
            values with { Rows = parameter.Rows, Columns = parameter.Columns, Stride = parameter.Columns };
    }

    [Fact]
    public void A_small_model_of_many_ranks_is_one_file()
    {
        ModelTensor[] tensors = [new("a", 100, 1000), new("b", 100, 1000)];
        Assert.Equal("model.safetensors", new ModelFiles(tensors, DType.F32, most: 4).Name(0));
        Assert.Equal(2, new ModelFiles(tensors, DType.F32, most: 2, leastBytes: 400_000).Count);
        Assert.Equal(1, new ModelFiles(tensors, DType.F32, most: 2, leastBytes: 400_001).Count);
    }

    [Fact]
    public void A_tensor_larger_than_its_share_leaves_no_empty_file()
    {
        var files = new ModelFiles([new("small", 1, 10), new("large", 1000, 1000), new("last", 1, 10)], DType.F32, most: 8, leastBytes: 1);
        Assert.Equal(["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"], [files.Name(0), files.Name(2)]);
        Assert.Equal(3, Enumerable.Range(0, files.Count).Sum(file => files.Tensors(file).Count));
    }

    [Theory]
    [InlineData("unlisted", "are in no optimizer file")]
    [InlineData("twice", "holds those up to")]
    [InlineData("offset beyond", "elements from 9223372036854775807 on, the parameter has 984")]
    [InlineData("offset negative", "begins at element '-1', which is no whole number")]
    [InlineData("offset text", "begins at element 'x', which is no whole number")]
    [InlineData("gap", "are in no optimizer file")]
    [InlineData("overlap", "begins at element")]
    [InlineData("unknown", "tensor 'x.first' is of no parameter of this model")]
    [InlineData("type", "is BF16, F32 is needed")]
    [InlineData("none", "has no optimizer.safetensors")]
    public void Pieces_that_are_no_whole_are_refused_by_name(string damage, string complaint)
    {
        Assert.Null(_ranks.Save(_run.Path, 1, ranks: 3).Failure);
        TrainingCheckpoint whole = Saved(1);
        string name = "optimizer-00002-of-00003.safetensors";
        string path = Path.Combine(whole.Path, name);
        string embedding = LlamaModel.EmbeddingName + ".first";
        List<string> names = [.. whole.Files.Select(static file => file.Name)];
        switch (damage)
        {
            case "unlisted":
                names.Remove(name);
                break;
            case "twice":
                File.Copy(path, Path.Combine(whole.Path, "optimizer-00004-of-00003.safetensors"));
                names.Add("optimizer-00004-of-00003.safetensors");
                break;
            case "none":
                names.RemoveAll(static name => name.StartsWith("optimizer", StringComparison.Ordinal));
                break;
            default:
                Rewrite(path, damage, embedding);
                break;
        }

        UserErrorException refused = Assert.Throws<UserErrorException>(() => OptimizerFiles.Open(whole.Path, names, _ranks.Config));
        Assert.Contains(complaint, refused.Message, StringComparison.Ordinal);
        Assert.Contains(whole.Path, refused.Message, StringComparison.Ordinal);
        Assert.DoesNotContain('\n', refused.Message);
    }

    [Fact]
    public void The_moments_of_another_model_are_refused()
    {
        Assert.Null(_ranks.Save(_run.Path, 1, ranks: 1).Failure);
        ModelConfig wider = _ranks.Config with { Hidden = _ranks.Config.Hidden + 1 };
        UserErrorException refused = Assert.Throws<UserErrorException>(() => OptimizerFiles.Open(Saved(1), wider));
        Assert.Contains("has the shape [37, 24], [38, 24] is needed", refused.Message, StringComparison.Ordinal);
    }

    [Fact]
    public void Altered_files_of_moments_are_read_or_refused_but_break_nothing()
    {
        Assert.Null(_ranks.Save(_run.Path, 1, ranks: 2).Failure);
        TrainingCheckpoint checkpoint = Saved(1);
        string path = Path.Combine(checkpoint.Path, "optimizer-00002-of-00002.safetensors");
        byte[] whole = File.ReadAllBytes(path);
        int refused = 0;
        const int Rounds = 1000;
        for (int round = 0; round < Rounds; round++)
        {
            File.WriteAllBytes(path, Mutation.Apply(whole, whole, new Random(round)));
            try
            {
                using OptimizerFiles files = OptimizerFiles.Open(checkpoint.Path, checkpoint.Files.Select(static file => file.Name), _ranks.Config);
            }
            catch (UserErrorException)
            {
                refused++;
            }
        }

        Assert.InRange(refused, Rounds / 50, Rounds * 49 / 50);
    }

    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    public void A_rank_that_cannot_write_costs_the_checkpoint_and_is_named(int failing)
    {
        Assert.Null(_ranks.Save(_run.Path, 1, ranks: 4).Failure);
        foreach (bool asynchronous in (bool[])[false, true])
        {
            foreach (long step in (long[])[1, 2])
            {
                // A folder stands where the rank's file is to be.
                CheckpointOutcome outcome = _ranks.Save(_run.Path, step, 4, asynchronous, begun: rank =>
                {
                    if (rank == failing)
                    {
                        Directory.CreateDirectory(Path.Combine(
                            TrainingCheckpoint.PathOf(_run.Path, step) + ".tmp", $"optimizer-0000{rank + 1}-of-00004.safetensors"));
                    }
                });
                Assert.Equal(step, outcome.Step);
                Assert.StartsWith($"rank {failing}: ", outcome.Failure, StringComparison.Ordinal);
                Assert.Contains($"optimizer-0000{failing + 1}-of-00004.safetensors", outcome.Failure, StringComparison.Ordinal);
                RequireOnly(1);
            }
        }

        Assert.Null(_ranks.Save(_run.Path, 2, ranks: 4).Failure);
        Assert.Equal(2, TrainingCheckpoint.FindNewestValid(_run.Path, _warnings.Add)!.Step);
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void A_full_disk_loses_no_earlier_checkpoint(bool asynchronous)
    {
        using SmallDisk disk = SmallDisk.Mount(_run["disk"], kilobytes: 360);
        Assert.Null(_ranks.Save(disk.Path, 1, 4, asynchronous).Failure);
        foreach (long step in (long[])[1, 2])
        {
            CheckpointOutcome outcome = _ranks.Save(disk.Path, step, 4, asynchronous);
            Assert.Matches("^rank [0-3]: No space left on device", outcome.Failure);
        }

        Assert.Single(Directory.GetDirectories(Path.Combine(disk.Path, TrainingCheckpoint.FolderName)));
        _ranks.RequireSame(TrainingCheckpoint.FindNewestValid(disk.Path, _warnings.Add)!, 2, 5);
        Assert.Empty(_warnings);
    }

    [Fact]
    public void Training_goes_on_while_a_snapshot_of_the_step_is_written()
    {
        using var world = new SingleCollective();
        MomentPiece[][] owned = _ranks.Cut(1, 0);
        CheckpointPart part = _ranks.Part(owned, 0);
        using Arena memory = _ranks.Backend.Allocate("checkpoint snapshot", 1 << 20);
        using var writer = new CheckpointWriter(_run.Path, world, _ranks.Backend, part, part.Snapshot(memory), Timeout.InfiniteTimeSpan);
        using var trained = new ManualResetEventSlim();
        Assert.Equal(CheckpointState.Idle, writer.State);
        Parameter parameter = _ranks.Parameters[1];
        float before = parameter.Values.HostSpan<float>()[0];

        writer.Begin(1);
        _ranks.CopyTo(writer, owned[0]);
        writer.Write(folder =>
        {
            trained.Wait();
            _ranks.Describe(folder);
        });
        Assert.Equal(CheckpointState.Writing, writer.State);
        Assert.Throws<InvalidOperationException>(() => writer.Begin(2));
        parameter.Values.HostSpan<float>().Fill(before + 1);
        trained.Set();
        Assert.Null(writer.Finish().Failure);
        Assert.Equal(CheckpointState.Idle, writer.State);

        using ModelSource saved = ModelSource.Open(Saved(1).Path, Assert.Fail);
        float[] read = new float[1];
        saved.Read(read, parameter.Name, 0);
        Assert.Equal(before, read[0]);
    }

    [Theory]
    [InlineData(true)]
    [InlineData(false)]
    public void Ranks_that_wait_for_a_slow_disk_meet_meanwhile(bool asynchronous)
    {
        MomentPiece[][] owned = _ranks.Cut(2, 0);
        var worlds = new Collective[2];
        string?[] failures = OnThreads.Run(2, world =>
        {
            worlds[world.Rank] = world;
            CheckpointPart part = _ranks.Part(owned, world.Rank);
            using Arena memory = _ranks.Backend.Allocate("checkpoint snapshot", 1 << 20);
            using var writer = new CheckpointWriter(_run.Path, world, _ranks.Backend, part, asynchronous ? part.Snapshot(memory) : null, Timeout.InfiniteTimeSpan);
            writer.Begin(1);
            long met = worlds[0].Progress.Done;
            _ranks.CopyTo(writer, owned[world.Rank]);
            writer.Write(folder =>
            {
                Assert.True(SpinWait.SpinUntil(() => worlds[0].Progress.Done >= met + 3, TimeSpan.FromSeconds(30)), "no rank met another");
                _ranks.Describe(folder);
            });
            return writer.Finish().Failure;
        });
        Assert.All(failures, Assert.Null);
        Assert.Empty(TrainingCheckpoint.Verify(Saved(1).Path));
    }

    [Fact]
    public void A_rank_whose_disk_hangs_says_so_and_the_others_do_not_wait_for_ever()
    {
        MomentPiece[][] owned = _ranks.Cut(2, 0);
        using var hangs = new ManualResetEventSlim();
        string[] errors = OnThreads.Run(2, world =>
        {
            CheckpointPart part = _ranks.Part(owned, world.Rank);
            using Arena memory = _ranks.Backend.Allocate("checkpoint snapshot", 1 << 20);
            using var writer = new CheckpointWriter(
                _run.Path, world, _ranks.Backend, part, part.Snapshot(memory), world.Rank == 0 ? TimeSpan.FromMilliseconds(300) : Timeout.InfiniteTimeSpan);
            writer.Begin(1);
            writer.Write(_ => hangs.Wait());
            try
            {
                return Assert.Throws<CollectiveException>(writer.Finish).Message;
            }
            finally
            {
                world.Abort("its disk hangs", 3);
                hangs.Set();
            }
        });
        Assert.Matches("^host .+: the disk of .+ has taken nothing of the checkpoint of step 1 for 0\\.3 s$", errors[0]);
        Assert.Contains("its disk hangs", errors[1], StringComparison.Ordinal);
    }

    [Fact]
    public void A_rank_that_does_not_see_the_folder_of_rank_0_says_what_is_needed()
    {
        TrainingCheckpoint.Begin(_run["here"], 1);
        IOException alone = Assert.Throws<IOException>(() => TrainingCheckpoint.Join(_run["there"], 1));
        Assert.Contains("must be the same one on every host", alone.Message, StringComparison.Ordinal);
    }

    [Fact]
    public void Wherever_ranks_are_killed_the_checkpoint_before_stays_the_newest()
    {
        Assert.Null(_ranks.Save(_run.Path, 1, ranks: 2).Failure);
        Assert.Null(_ranks.Save(_run["other"], 2, ranks: 2).Failure);
        TrainingCheckpoint next = TrainingCheckpoint.Open(TrainingCheckpoint.PathOf(_run["other"], 2));
        string[] names = [.. next.Files.Select(static file => file.Name), TrainingCheckpoint.ManifestName];
        string unfinished = Path.Combine(_run[TrainingCheckpoint.FolderName], "step-00000002.tmp");
        for (int written = 0; written <= names.Length; written++)
        {
            Directory.CreateDirectory(unfinished);
            foreach (string name in names[..written])
            {
                File.Copy(Path.Combine(next.Path, name), Path.Combine(unfinished, name));
            }

            if (written < names.Length)
            {
                byte[] bytes = File.ReadAllBytes(Path.Combine(next.Path, names[written]));
                File.WriteAllBytes(Path.Combine(unfinished, names[written]), bytes[..(bytes.Length / 2)]);
            }

            Assert.Equal(1, TrainingCheckpoint.FindNewest(_run.Path, _warnings.Add)!.Step);
            Assert.Equal(1, TrainingCheckpoint.FindNewestValid(_run.Path, _warnings.Add)!.Step);
            RequireOnly(1);
        }

        Assert.Empty(_warnings);
    }

    private static void Rewrite(string path, string damage, string embedding)
    {
        Dictionary<string, string> metadata;
        List<StoredTensor> tensors = [];
        using (SafetensorsFile file = SafetensorsFile.Open(path))
        {
            metadata = new(file.Metadata, StringComparer.Ordinal);
            foreach (SafetensorsEntry entry in file.Entries)
            {
                byte[] bytes = file.Bytes(entry, 0, (int)entry.ByteCount).ToArray();
                bool shortened = damage == "gap" && entry.Name == embedding;
                bool narrow = damage == "type" && entry.Name == embedding;
                int count = (int)entry.Count - (shortened ? 1 : 0);
                tensors.Add(new StoredTensor(entry.Name, [count], narrow ? DType.BF16 : DType.F32, (first, destination) =>
                    bytes.AsSpan((int)first * sizeof(float), destination.Length).CopyTo(destination)));
            }
        }

        switch (damage)
        {
            case "offset beyond":
                metadata[embedding] = "9223372036854775807";
                break;
            case "offset negative":
                metadata[embedding] = "-1";
                break;
            case "offset text":
                metadata[embedding] = "x";
                break;
            case "overlap":
                metadata.Remove(embedding);
                break;
            case "unknown":
                tensors.Add(new StoredTensor("x.first", [1], DType.F32, static (_, bytes) => bytes.Clear()));
                break;
            default:
                break;
        }

        using FileStream stream = File.Create(path);
        Safetensors.Write(stream, tensors, metadata);
    }

    private void RequireOnly(long step)
    {
        Assert.Equal(
            [$"step-0000000{step}"], Directory.GetDirectories(_run[TrainingCheckpoint.FolderName]).Select(Path.GetFileName));
        Assert.Empty(TrainingCheckpoint.Verify(Saved(step).Path));
    }

    private TrainingCheckpoint Saved(long step) => TrainingCheckpoint.Open(TrainingCheckpoint.PathOf(_run.Path, step));
}
