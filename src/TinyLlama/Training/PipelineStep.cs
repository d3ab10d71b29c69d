using TinyLlama.Compute.Collectives;
using TinyLlama.Model;

namespace TinyLlama.Training;

/// <summary>
/// Forward and backward of micro-batches through the stages of a pipeline, one forward and one backward in turn (1F1B, Narayanan
/// et al. 2019): a stage keeps the activations of as many micro-batches as there are stages from it to the last.
/// </summary>
/// <remarks>
/// Every stage adds its gradients in the order of the micro-batches: they have the bits of one rank that has all blocks. Of the
/// time of M micro-batches a share of (P - 1) / (M + P - 1) is spent waiting for the first and the last of them.
/// </remarks>
/// <param name="stages">The stages.</param>
/// <param name="underWay">What this one keeps of the micro-batches between their forward and their backward.</param>
/// <param name="forward">The forward of a micro-batch.</param>
/// <param name="backward">The backward of a micro-batch, and its number.</param>
internal sealed class PipelineStep(
    StageGroup stages, IReadOnlyList<MicroStep> underWay, Action<MicroStep> forward, Action<MicroStep, int> backward)
{
    /// <summary>Runs the micro-batches of a step.</summary>
    /// <param name="microBatches">Their number.</param>
    /// <param name="fill">Loads the tokens of one, on every stage alike: each needs its layout, the first its tokens, the last its targets.</param>
    public void Run(int microBatches, Action<MicroBatch, int> fill)
    {
        int ahead = Math.Min(underWay.Count - 1, microBatches);
        for (int micro = 0; micro < ahead; micro++)
        {
            Forward(micro, fill);
            SendOutput(micro);
        }

        // Operations meet in the order in which they are queued. The next stage gives a gradient before it takes another output:
        // so ask for the one before sending the other.
        for (int micro = 0; micro < microBatches; micro++)
        {
            bool hasForward = micro + ahead < microBatches;
            if (hasForward)
            {
                Forward(micro + ahead, fill);
            }

            MicroStep step = StepOf(micro);
            Ticket gradient = stages.ReceiveGradient(step.Workspace, step.Batch.Tokens.Rows);
            if (hasForward)
            {
                SendOutput(micro + ahead);
            }

            gradient.Wait();
            backward(step, micro);
            stages.SendGradient(step.Workspace, step.Batch.Tokens.Rows);
        }
    }

    private void Forward(int micro, Action<MicroBatch, int> fill)
    {
        MicroStep step = StepOf(micro);
        fill(step.Batch, micro);
        stages.ReceiveInput(step.Workspace, step.Batch.Tokens.Rows);
        forward(step);
    }

    // Nobody waits for what is sent: the gradient of it, which is waited for, comes later.
    private void SendOutput(int micro)
    {
        MicroStep step = StepOf(micro);
        stages.SendOutput(step.Workspace, step.Batch.Tokens.Rows);
    }

    private MicroStep StepOf(int micro) => underWay[micro % underWay.Count];
}
