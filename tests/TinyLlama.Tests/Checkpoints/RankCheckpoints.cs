using TinyLlama.Checkpoints;
using TinyLlama.Compute;
using TinyLlama.Model;
using TinyLlama.Tests.Model;
using TinyLlama.Tests.Training;

namespace TinyLlama.Tests.Checkpoints;

/// <summary>A model with random weights and moments, cut over ranks at random places, that writes checkpoints.</summary>
internal sealed class RankCheckpoints : IDisposable
{
    /// <summary>Files of so few bytes that a tiny model has several.</summary>
    public const long LeastFileBytes = 4096;

    private readonly ModelRun _model = new(ModelRun.TinyConfig(), 1, Keep.Nothing);
    private readonly Arena _arena;
    private readonly Dictionary<string, (Tensor First, Tensor Second)> _moments = [];

    public RankCheckpoints()
    {
        _model.Randomize(1);
        _arena = _model.Backend.Allocate("moments", 1 << 20);
        var random = new Random(2);
        foreach (Parameter parameter in Parameters)
        {
            Tensor first = _arena.Take(parameter.Rows, parameter.Columns);
            Tensor second = _arena.Take(parameter.Rows, parameter.Columns);
            foreach (Tensor tensor in (Tensor[])[first, second])
            {
                foreach (ref float value in tensor.HostSpan<float>())
                {
                    value = random.NextSingle();
                }
            }

            _moments.Add(parameter.Name, (first, second));
        }
    }

    public Backend Backend => _model.Backend;

    public ModelConfig Config => _model.Model.Config;

    public IReadOnlyList<Parameter> Parameters => _model.Model.Parameters;

    public void Dispose()
    {
        _arena.Dispose();
        _model.Dispose();
    }

    /// <summary>What each rank owns: of every parameter the elements between two random cuts, none of some.</summary>
    public MomentPiece[][] Cut(int ranks, int seed)
    {
        var random = new Random(seed);
        MomentPiece[][] owned = [.. Enumerable.Range(0, ranks).Select(_ => new MomentPiece[Parameters.Count])];
        for (int p = 0; p < Parameters.Count; p++)
        {
            int count = checked((int)Parameters[p].Values.Count);
            int[] cuts = [0, .. Enumerable.Range(1, ranks - 1).Select(_ => random.Next(count + 1)).Order(), count];
            (Tensor first, Tensor second) = _moments[Parameters[p].Name];
            for (int rank = 0; rank < ranks; rank++)
            {
                int length = cuts[rank + 1] - cuts[rank];
                owned[rank][p] = new MomentPiece(
                    Parameters[p].Name, cuts[rank], first.Elements(cuts[rank], length), second.Elements(cuts[rank], length));
            }
        }

        return owned;
    }

    /// <summary>Saves with so many ranks, each a thread; returns what became of it.</summary>
    public CheckpointOutcome Save(string run, long step, int ranks, bool asynchronous = false, int seed = 3, Action<int>? begun = null)
    {
        MomentPiece[][] owned = Cut(ranks, seed);
        CheckpointOutcome[] outcomes = OnThreads.Run(ranks, world =>
        {
            CheckpointPart part = Part(owned, world.Rank);
            Arena plan = Arena.Plan("checkpoint snapshot");
            part.Snapshot(plan);
            using Arena memory = Backend.AllocateAs(plan);
            using var writer = new CheckpointWriter(run, world, Backend, part, asynchronous ? part.Snapshot(memory) : null, Timeout.InfiniteTimeSpan);
            writer.Begin(step);
            begun?.Invoke(world.Rank);
            CopyTo(writer, owned[world.Rank]);
            writer.Write(Describe);
            CheckpointOutcome outcome = writer.Finish();
            Assert.Equal(CheckpointState.Idle, writer.State);
            return outcome;
        });
        Assert.All(outcomes, outcome => Assert.Equal(outcomes[0], outcome));
        return outcomes[0];
    }

    /// <summary>Copies all parameters and a rank's moments to its snapshot.</summary>
    public void CopyTo(CheckpointWriter writer, MomentPiece[] owned)
    {
        foreach (Parameter parameter in Parameters)
        {
            writer.Copy(parameter.Name, 0, parameter.Values);
        }

        foreach (MomentPiece piece in owned)
        {
            writer.Copy(piece.Name + ".first", piece.Offset, piece.First);
            writer.Copy(piece.Name + ".second", piece.Offset, piece.Second);
        }
    }

    public CheckpointPart Part(MomentPiece[][] owned, int rank) =>
        new(Backend, Parameters, owned[rank], rank, owned.Length, owned.Length, LeastFileBytes);

    public void Describe(FolderWriter writer)
    {
        writer.WriteDescription(Config, DType.F32, tokenizer: null);
        writer.WriteText(TrainingCheckpoint.StateName, "{}");
    }

    /// <summary>Reads moments and weights back, cut otherwise, and compares every bit.</summary>
    public void RequireSame(TrainingCheckpoint checkpoint, int ranks, int seed)
    {
        using OptimizerFiles files = OptimizerFiles.Open(checkpoint, Config);
        foreach (MomentPiece piece in Cut(ranks, seed).SelectMany(static pieces => pieces))
        {
            using Arena arena = Backend.Allocate("read", 1 << 17);
            MomentPiece read = piece with
            {
                First = arena.Take(1, piece.First.Columns),
                Second = arena.Take(1, piece.Second.Columns),
            };
            files.CopyTo(Backend, read);
            Assert.Equal(piece.First.HostSpan<uint>(), read.First.HostSpan<uint>());
            Assert.Equal(piece.Second.HostSpan<uint>(), read.Second.HostSpan<uint>());
        }

        using ModelSource model = ModelSource.Open(checkpoint.Path, Assert.Fail);
        foreach (Parameter parameter in Parameters)
        {
            float[] read = new float[parameter.Values.Count];
            model.Read(read, parameter.Name, 0);
            Assert.Equal(parameter.Values.HostSpan<float>().ToArray(), read);
        }
    }
}
