using System.Text.Json.Nodes;
using TinyLlama.Checkpoints;
using TinyLlama.Compute;
using TinyLlama.Compute.Cpu;
using TinyLlama.Data;

namespace TinyLlama.Tests.Checkpoints;

public sealed class TrainingCheckpointTests : IDisposable
{
    private readonly CpuBackend _backend = CpuBackend.Create(threads: 1);
    private readonly Arena _arena;
    private readonly Tensor _weights;
    private readonly TemporaryFolder _run = new();
    private readonly List<string> _warnings = [];

    public TrainingCheckpointTests()
    {
        _arena = _backend.Allocate("test", 1 << 20);
        _weights = _arena.Take(100, 300);
    }

    private string Checkpoints => _run[TrainingCheckpoint.FolderName];

    public void Dispose()
    {
        _arena.Dispose();
        _backend.Dispose();
        _run.Dispose();
    }

    [Fact]
    public void A_saved_checkpoint_is_whole_and_found()
    {
        TrainingCheckpoint saved = Save(1000);
        Assert.Equal(Path.Combine(Checkpoints, "step-00001000"), saved.Path);
        Assert.Empty(TrainingCheckpoint.Verify(saved.Path));
        TrainingCheckpoint? found = TrainingCheckpoint.FindNewestValid(_run.Path, _warnings.Add);
        Assert.NotNull(found);
        Assert.Equal(1000, found.Step);
        Assert.Equal(["model.safetensors", "state.json"], found.Files.Select(static file => file.Name));
        Assert.Equal(saved.Files, found.Files);
        Assert.Empty(_warnings);
        Assert.Equal(["step-00001000"], Names());
    }

    [Fact]
    public void The_hash_in_the_manifest_is_the_SHA_256_of_the_file()
    {
        TrainingCheckpoint saved = Save(1);
        foreach (ListedFile file in saved.Files)
        {
            byte[] bytes = File.ReadAllBytes(Path.Combine(saved.Path, file.Name));
            Assert.Equal(bytes.Length, file.ByteCount);
            Assert.Equal(Convert.ToHexStringLower(System.Security.Cryptography.SHA256.HashData(bytes)), file.Sha256);
        }
    }

    [Fact]
    public void A_run_without_checkpoints_has_no_newest()
    {
        Assert.Null(TrainingCheckpoint.FindNewestValid(_run.Path, _warnings.Add));
        Assert.Null(TrainingCheckpoint.FindNewest(_run.Path, _warnings.Add));
    }

    [Fact]
    public void The_newest_is_the_highest_number_not_the_last_name()
    {
        // "step-100000000" sorts before "step-99999999".
        Save(99_999_999);
        Save(100_000_000);
        Assert.Equal(100_000_000, TrainingCheckpoint.FindNewestValid(_run.Path, _warnings.Add)!.Step);
    }

    [Fact]
    public void A_save_that_was_interrupted_is_removed_and_the_one_before_is_used()
    {
        Save(1);
        string unfinished = Directory.CreateDirectory(Path.Combine(Checkpoints, "step-00000002.tmp")).FullName;
        File.WriteAllText(Path.Combine(unfinished, "model.safetensors"), "half of it");
        Assert.Equal(1, TrainingCheckpoint.FindNewestValid(_run.Path, _warnings.Add)!.Step);
        Assert.Empty(_warnings);
        Assert.Equal(["step-00000001"], Names());
    }

    [Fact]
    public void A_replacement_that_was_interrupted_is_undone()
    {
        string first = Save(1).Path;
        Directory.Move(first, first + ".replaced");
        Assert.Equal(1, TrainingCheckpoint.FindNewestValid(_run.Path, _warnings.Add)!.Step);
        Assert.Equal(["step-00000001"], Names());
    }

    [Theory]
    [InlineData("truncated model")]
    [InlineData("flipped bit")]
    [InlineData("missing state")]
    [InlineData("missing manifest")]
    [InlineData("truncated manifest")]
    [InlineData("empty manifest")]
    [InlineData("manifest of another step")]
    public void A_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_used(string damage)
    {
        Save(1);
        string other = Save(2).Path;
        string newest = Save(3).Path;
        string model = Path.Combine(newest, "model.safetensors");
        string manifest = Path.Combine(newest, "manifest.json");
        switch (damage)
        {
            case "truncated model":
                File.WriteAllBytes(model, File.ReadAllBytes(model)[..^1]);
                break;
            case "flipped bit":
                byte[] bytes = File.ReadAllBytes(model);
                bytes[^7] ^= 1;
                File.WriteAllBytes(model, bytes);
                break;
            case "missing state":
                File.Delete(Path.Combine(newest, "state.json"));
                break;
            case "missing manifest":
                File.Delete(manifest);
                break;
            case "truncated manifest":
                File.WriteAllBytes(manifest, File.ReadAllBytes(manifest)[..^20]);
                break;
            case "empty manifest":
                File.WriteAllBytes(manifest, []);
                break;
            default:
                File.Copy(Path.Combine(other, "manifest.json"), manifest, overwrite: true);
                break;
        }

        Assert.NotEmpty(TrainingCheckpoint.Verify(newest));
        Assert.Equal(2, TrainingCheckpoint.FindNewestValid(_run.Path, _warnings.Add)!.Step);
        Assert.Contains("set aside", Assert.Single(_warnings), StringComparison.Ordinal);
        Assert.Equal(["step-00000001", "step-00000002", "step-00000003.damaged"], Names());
    }

    [Fact]
    public void A_reader_beside_the_trainer_changes_nothing()
    {
        Save(1);
        File.Delete(Path.Combine(Save(2).Path, "state.json"));
        Directory.CreateDirectory(Path.Combine(Checkpoints, "step-00000003.tmp"));
        Assert.Equal(1, TrainingCheckpoint.FindNewest(_run.Path, _warnings.Add)!.Step);
        Assert.Single(_warnings);
        Assert.Equal(["step-00000001", "step-00000002", "step-00000003.tmp"], Names());
    }

    [Theory]
    [InlineData("../outside")]
    [InlineData("..")]
    [InlineData("a/b")]
    [InlineData("a\\b")]
    [InlineData("c:x")]
    [InlineData(".")]
    [InlineData("")]
    public void A_manifest_that_leads_out_of_its_folder_is_refused(string name)
    {
        string path = Save(1).Path;
        var manifest = new JsonObject
        {
            ["version"] = 1,
            ["step"] = 1,
            ["files"] = new JsonObject { [name] = new JsonObject { ["bytes"] = 0, ["sha256"] = "" } },
        };
        File.WriteAllText(Path.Combine(path, "manifest.json"), manifest.ToJsonString());
        Assert.Contains("plain file name", Assert.Throws<UserErrorException>(() => TrainingCheckpoint.Open(path)).Message, StringComparison.Ordinal);
    }

    [Fact]
    public void Any_flipped_bit_of_a_manifest_is_noticed()
    {
        string path = TrainingCheckpoint.Save(_run.Path, 1, static writer => writer.WriteText("state.json", "{}")).Path;
        string manifest = Path.Combine(path, "manifest.json");
        byte[] whole = File.ReadAllBytes(manifest);
        for (int bit = 0; bit < whole.Length * 8; bit++)
        {
            byte[] damaged = [.. whole];
            damaged[bit / 8] ^= (byte)(1 << (bit % 8));
            File.WriteAllBytes(manifest, damaged);
            Assert.True(TrainingCheckpoint.Verify(path).Count > 0, $"bit {bit % 8} of byte {bit / 8}");
        }
    }

    [Fact]
    public void A_manifest_with_half_a_character_is_refused()
    {
        string path = Save(1).Path;
        File.WriteAllText(Path.Combine(path, "manifest.json"), """{"version":1,"step":1,"files":{"\ud800":{"bytes":0,"sha256":""}}}""");
        Assert.Throws<UserErrorException>(() => TrainingCheckpoint.Open(path));
    }

    [Fact]
    public void A_manifest_of_a_later_version_is_refused_with_both_versions()
    {
        string path = Save(1).Path;
        string manifest = Path.Combine(path, "manifest.json");
        File.WriteAllText(manifest, File.ReadAllText(manifest).Replace("\"version\": 1", "\"version\": 2", StringComparison.Ordinal));
        string message = Assert.Throws<UserErrorException>(() => TrainingCheckpoint.Open(path)).Message;
        Assert.Contains("is 2, this program knows version 1", message, StringComparison.Ordinal);
    }

    [Fact]
    public void A_save_that_fails_loses_nothing_and_leaves_nothing()
    {
        Save(1);
        Save(2, value: 2);
        foreach (long step in new[] { 2L, 3L })
        {
            Assert.Throws<IOException>(() => TrainingCheckpoint.Save(_run.Path, step, writer =>
            {
                writer.WriteTensors("model.safetensors", _backend, [new("w", _weights, false)]);
                writer.Write("state.json", static _ => throw new IOException("No space left on device"));
            }));
        }

        Assert.Equal(["step-00000001", "step-00000002"], Names());
        Assert.Empty(TrainingCheckpoint.Verify(Path.Combine(Checkpoints, "step-00000002")));
        Save(3);
        Assert.Equal(3, TrainingCheckpoint.FindNewestValid(_run.Path, _warnings.Add)!.Step);
        Assert.Empty(_warnings);
    }

    [Fact]
    public void A_full_disk_loses_no_earlier_checkpoint()
    {
        using SmallDisk disk = SmallDisk.Mount(_run["disk"], kilobytes: 192);
        SaveIn(disk.Path, 1, value: 1);
        Assert.Throws<IOException>(() => SaveIn(disk.Path, 2, value: 2));
        Assert.Throws<IOException>(() => SaveIn(disk.Path, 1, value: 2));
        Assert.Equal(1, TrainingCheckpoint.FindNewestValid(disk.Path, _warnings.Add)!.Step);
        Assert.Single(Directory.GetDirectories(Path.Combine(disk.Path, TrainingCheckpoint.FolderName)));
        Assert.Empty(_warnings);
    }

    [Fact]
    public void The_same_step_saved_again_replaces_the_first()
    {
        Save(1, value: 1);
        string path = Save(1, value: 2).Path;
        Assert.Empty(TrainingCheckpoint.Verify(path));
        using SafetensorsFile file = SafetensorsFile.Open(Path.Combine(path, "model.safetensors"));
        float[] first = new float[1];
        file.Read(first, "w");
        Assert.Equal(2, first[0]);
        Assert.Equal(["step-00000001"], Names());
    }

    [Theory]
    [InlineData(1, 0, false, "50")]
    [InlineData(3, 0, false, "30 40 50")]
    [InlineData(9, 0, false, "0 10 20 30 40 50")]
    [InlineData(1, 20, false, "0 20 40 50")]
    [InlineData(1, 0, true, "20 50")]
    [InlineData(2, 30, true, "0 20 30 40 50")]
    public void Retention_keeps_the_last_the_regular_and_the_best(int last, long every, bool best, string expected)
    {
        var losses = new Dictionary<long, double> { [10] = 2.5, [20] = 2, [30] = double.NaN, [40] = 2.1, [60] = 1 };
        foreach (long step in new[] { 30, 0, 10, 50, 40, 20 })
        {
            Save(step);
        }

        new Retention(last, every, best).Apply(_run.Path, losses);
        Assert.Equal(expected, string.Join(' ', TrainingCheckpoint.List(_run.Path).Select(static checkpoint => checkpoint.Step)));
        Assert.All(TrainingCheckpoint.List(_run.Path), static checkpoint => Assert.Empty(TrainingCheckpoint.Verify(checkpoint.Path)));
    }

    [Fact]
    public void Of_two_best_checkpoints_the_newer_is_kept()
    {
        var losses = new Dictionary<long, double> { [1] = 2, [2] = 2, [3] = 3 };
        Assert.Equal(2, Retention.Best([1, 2, 3], losses));
        Assert.Null(Retention.Best([4], losses));
    }

    private TrainingCheckpoint Save(long step, float value = 1) => SaveIn(_run.Path, step, value);

    private TrainingCheckpoint SaveIn(string run, long step, float value)
    {
        _weights.HostSpan<float>().Fill(value);
        return TrainingCheckpoint.Save(run, step, writer =>
        {
            writer.WriteTensors(TrainingCheckpoint.ModelName, _backend, [new("w", _weights, false)]);
            writer.WriteText(TrainingCheckpoint.StateName, $$"""{"step":{{step}}}""");
        });
    }

    private string[] Names() =>
        [.. Directory.GetDirectories(Checkpoints).Select(static path => Path.GetFileName(path)!).Order(StringComparer.Ordinal)];
}
