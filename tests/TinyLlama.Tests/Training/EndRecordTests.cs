using TinyLlama.Checkpoints;
using TinyLlama.Tests.Checkpoints;
using TinyLlama.Training;

namespace TinyLlama.Tests.Training;

public sealed class EndRecordTests : IDisposable
{
    private readonly TemporaryFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Fact]
    public void It_names_the_last_checkpoint_and_holds_as_long_as_that_is_the_same()
    {
        string run = _folder["run"];
        TrainingCheckpoint checkpoint = TrainingCheckpoint.Save(run, 7, static writer => writer.WriteText("a", "b"));
        Assert.Null(EndRecord.Find(run));
        EndRecord.Write(run, 7, 700);

        EndRecord record = EndRecord.Find(run)!;
        Assert.Equal((7L, 700L, "checkpoints/step-00000007"), (record.Step, record.Tokens, record.Checkpoint));
        Assert.False(File.Exists(Path.Combine(run, EndRecord.FileName + ".tmp")));

        File.AppendAllText(Path.Combine(checkpoint.Path, TrainingCheckpoint.ManifestName), " ");
        Assert.Null(EndRecord.Find(run));
    }

    [Fact]
    public void There_is_none_without_the_checkpoint_of_the_last_step_nor_after_its_removal()
    {
        string run = _folder["run"];
        TrainingCheckpoint.Save(run, 6, static writer => writer.WriteText("a", "b"));
        EndRecord.Write(run, 7, 700);
        Assert.Null(EndRecord.Find(run));

        EndRecord.Write(run, 6, 600);
        EndRecord.Remove(run);
        Assert.Null(EndRecord.Find(run));
    }
}
