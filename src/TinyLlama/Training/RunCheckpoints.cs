using TinyLlama.Checkpoints;
using TinyLlama.Compute;
using TinyLlama.Compute.Collectives;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Model;

namespace TinyLlama.Training;

/// <summary>
/// The checkpoints of a run on one rank: <see cref="Begin"/> between two steps, <see cref="Finish"/> when every rank's
/// <see cref="State"/> says that its part is written. All ranks call both alike.
/// </summary>
internal sealed class RunCheckpoints : IDisposable
{
    private readonly TrainingMemory _memory;
    private readonly Backend _backend;
    private readonly ModelConfig _model;
    private readonly BpeTokenizer? _tokenizer;
    private readonly CheckpointWriter _writer;

    /// <summary>Checkpoints of a run in memory; from its snapshot where it has one.</summary>
    /// <param name="folder">The run's folder, the same one for all ranks.</param>
    /// <param name="memory">What is saved.</param>
    /// <param name="backend">Its device.</param>
    /// <param name="world">The ranks.</param>
    /// <param name="model">The model's shape.</param>
    /// <param name="tokenizer">The tokenizer; null for one without files.</param>
    /// <param name="limit">How long ranks wait for each other.</param>
    public RunCheckpoints(
        string folder, TrainingMemory memory, Backend backend, Collective world, ModelConfig model, BpeTokenizer? tokenizer, TimeSpan limit)
    {
        (_memory, _backend, _model, _tokenizer) = (memory, backend, model, tokenizer);
        _writer = new CheckpointWriter(folder, world, backend, memory.Checkpoint, memory.Snapshot, world.Size > 1 ? limit : Timeout.InfiniteTimeSpan);
    }

    /// <summary>Gets how far this rank is with its part. Does not wait.</summary>
    public CheckpointState State => _writer.State;

    /// <summary>Begins the checkpoint of a state; without a snapshot <see cref="Finish"/> must follow at once.</summary>
    public void Begin(TrainingState state)
    {
        _writer.Begin(state.Step);
        CopyParameters();
        foreach (OwnedPiece piece in _memory.Optimizer.Owned)
        {
            Copy(MomentPiece.FirstSuffix, piece.FirstMoment);
            Copy(MomentPiece.SecondSuffix, piece.SecondMoment);

            void Copy(string suffix, Tensor moment) => _writer.Copy(piece.Parameter.Name + suffix, piece.First, Whole(piece.Parameter, moment));
        }

        _writer.Write(folder =>
        {
            folder.WriteDescription(_model, _memory.Model.Parameters[0].Values.Type, _tokenizer);
            folder.WriteText(TrainingCheckpoint.StateName, state.ToJson());
        });
    }

    /// <summary>Waits until all parts are written, and makes a checkpoint of them.</summary>
    public CheckpointOutcome Finish() => _writer.Finish();

    /// <summary>Reads this rank's moments of any checkpoint of the run.</summary>
    /// <exception cref="UserErrorException">It is damaged, or of another model.</exception>
    public void LoadMoments(TrainingCheckpoint checkpoint)
    {
        using OptimizerFiles moments = OptimizerFiles.Open(checkpoint, _model);
        foreach (OwnedPiece piece in _memory.Optimizer.Owned)
        {
            Fill(MomentPiece.FirstSuffix, piece.FirstMoment);
            Fill(MomentPiece.SecondSuffix, piece.SecondMoment);

            void Fill(string suffix, Tensor moment)
            {
                string name = piece.Parameter.Name + suffix;
                if (_memory.Split is { } split)
                {
                    split.Fill(piece.Parameter, moment, whole => moments.CopyTo(_backend, whole, name, piece.First));
                }
                else
                {
                    moments.CopyTo(_backend, moment, name, piece.First);
                }
            }
        }
    }

    /// <inheritdoc/>
    public void Dispose() => _writer.Dispose();

    private void CopyParameters()
    {
        if (_memory.Sharding.ModelRanks > 1)
        {
            CopyStages();
        }
        else if (_memory.Parameters is { } shared)
        {
            shared.ForEach(unit => Copy(unit.Parameters));
        }
        else
        {
            Copy(_memory.Model.Parameters);
        }

        void Copy(IReadOnlyList<Parameter> parameters)
        {
            foreach (Parameter parameter in parameters)
            {
                _writer.Copy(parameter.Name, 0, parameter.Values);
            }
        }
    }

    // Stage after stage shows its parameters to all, one after the other, each of them whole.
    private void CopyStages()
    {
        Dictionary<string, Parameter> own = _memory.Model.Parameters.ToDictionary(static parameter => parameter.Name, StringComparer.Ordinal);
        for (int stage = 0; stage < _memory.Sharding.Pipeline; stage++)
        {
            foreach (ModelTensor tensor in ModelTensors.Of(_model.Stage(stage, _memory.Sharding.Pipeline)))
            {
                Tensor whole = own.TryGetValue(tensor.Name, out Parameter? parameter) ? Whole(parameter, parameter.Values) : default;
                if (_memory.Model.Stages is { } stages)
                {
                    stages.Show(stage, whole, tensor.Count, (first, elements) => _writer.Copy(tensor.Name, first, elements));
                }
                else
                {
                    _writer.Copy(tensor.Name, 0, whole);
                }
            }
        }
    }

    private Tensor Whole(Parameter parameter, Tensor part) => _memory.Split is { } split ? split.Gather(parameter, part) : part;
}
