using TinyLlama.Compute;
using TinyLlama.Data.Batches;
using TinyLlama.Model;

namespace TinyLlama.Training;

/// <summary>What one step measured.</summary>
/// <param name="Loss">Mean cross-entropy of the step's targets before the update, in nats per token.</param>
/// <param name="GradientNorm">Global norm of the gradient of that mean, unclipped.</param>
/// <param name="Targets">Targets that the mean is over.</param>
public readonly record struct StepResult(double Loss, double GradientNorm, long Targets)
{
    /// <summary>Gets a value indicating whether the update was made: only where loss and norm are finite.</summary>
    public bool IsFinite => double.IsFinite(Loss) && double.IsFinite(GradientNorm);
}

/// <summary>One optimizer update from one global batch. Allocates no managed memory.</summary>
public sealed class TrainingStep
{
    private readonly TrainingMemory _memory;
    private readonly Backend _backend;
    private readonly Action _accumulate;
    private long _targets;

    /// <summary>A step over given memory.</summary>
    /// <param name="memory">Model, optimizer and buffers.</param>
    /// <param name="backend">The device.</param>
    public TrainingStep(TrainingMemory memory, Backend backend) => (_memory, _backend, _accumulate) = (memory, backend, AccumulateOperations);

    /// <summary>Forward, backward and update over the samples of one step.</summary>
    /// <param name="step">1 for the first update.</param>
    /// <param name="firstSample">The first sequence's sample.</param>
    /// <param name="learningRate">Of this update.</param>
    /// <param name="loader">Where samples come from.</param>
    /// <param name="documents">What attention does between documents.</param>
    /// <param name="accumulation">Micro-batches of a step.</param>
    public StepResult Run(
        long step, long firstSample, double learningRate, TokenLoader loader, DocumentAttention documents, int accumulation)
    {
        int sequences = _memory.Batch.Sequences;
        long targets = 0;
        for (int s = 0; s < sequences * accumulation; s++)
        {
            targets += loader.TargetCount(firstSample + s);
        }

        Begin(targets);
        for (int micro = 0; micro < accumulation; micro++)
        {
            _memory.Batch.Fill(_backend, loader, firstSample + ((long)micro * sequences), documents);
            Accumulate();
        }

        return End(step, learningRate);
    }

    /// <summary>Starts a step. Every target counts the same, whatever micro-batch it is in.</summary>
    /// <param name="targets">Targets of all its micro-batches.</param>
    public void Begin(long targets)
    {
        _targets = targets;
        Span<float> scale = [(float)(1.0 / targets)];
        _backend.Write<float>(_memory.Scale, scale);
        _backend.Zero(_memory.LossSum);
    }

    /// <summary>Forward and backward of the micro-batch that <see cref="TrainingMemory.Batch"/> holds.</summary>
    public void Accumulate()
    {
        // With one segment a sequence, the launches are those of every such micro-batch.
        if (_memory.Batch.Layout.SegmentCount == _memory.Batch.Sequences)
        {
            _backend.Repeat(_memory.MicroStep, _accumulate);
        }
        else
        {
            AccumulateOperations();
        }
    }

    /// <summary>Updates the parameters, unless the loss or the gradient is not finite.</summary>
    /// <param name="step">1 for the first update.</param>
    /// <param name="learningRate">Of this update.</param>
    public StepResult End(long step, double learningRate)
    {
        Span<double> sum = stackalloc double[1];
        _backend.Read(sum, _memory.LossSum);
        var result = new StepResult(sum[0] / _targets, _memory.Optimizer.GradientNorm(), _targets);
        if (result.IsFinite)
        {
            _memory.Optimizer.Update(step, learningRate);
        }

        return result;
    }

    private void AccumulateOperations()
    {
        MicroBatch batch = _memory.Batch;
        _memory.Model.Forward(_memory.Workspace, batch.Tokens, batch.Layout, KeyValueSource.Batch);
        _memory.Model.Backward(_memory.Workspace, batch.Tokens, batch.Targets, _memory.Scale, batch.Layout);
        _backend.Sum(_memory.LossSum, _memory.Workspace.Losses(batch.Targets.Rows));
    }
}
