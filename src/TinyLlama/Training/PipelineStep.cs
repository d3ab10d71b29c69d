using TinyLlama.Compute;
using TinyLlama.Compute.Collectives;
using TinyLlama.Model;

namespace TinyLlama.Training;

/// <summary>
/// Forward and backward of micro-batches through stages on as many ranks, one forward and one backward in turn (1F1B, Narayanan
/// et al. 2019): a stage keeps the activations of as many micro-batches as there are stages from it to the last.
/// </summary>
/// <remarks>
/// Every stage adds its gradients in the order of the micro-batches: they have the bits of one rank that has all blocks. Of the
/// time of M micro-batches a share of (P - 1) / (M + P - 1) is spent waiting for the first and the last of them.
/// </remarks>
public sealed class PipelineStep
{
    private readonly Collective _stages;
    private readonly Backend _backend;
    private readonly LlamaModel _model;
    private readonly Slot[] _slots;
    private readonly Tensor _losses;
    private readonly Tensor _received;

    /// <summary>Takes what a stage keeps for micro-batches that are under way.</summary>
    /// <param name="stages">The stages; rank p is stage p.</param>
    /// <param name="backend">The device.</param>
    /// <param name="model">This stage's blocks: <see cref="ModelConfig.Stage"/>.</param>
    /// <param name="arena">Owner of the activations.</param>
    /// <param name="sequences">Sequences of a micro-batch.</param>
    /// <param name="context">Tokens of a sequence.</param>
    /// <param name="keep">Which activations stay for backward.</param>
    public PipelineStep(Collective stages, Backend backend, LlamaModel model, Arena arena, int sequences, int context, Keep keep)
    {
        (_stages, _backend, _model) = (stages, backend, model);
        int tokens = checked(sequences * context);
        _slots =
        [
            .. Enumerable.Range(0, stages.Size - stages.Rank).Select(_ => new Slot(
                new Workspace(arena, arena, backend, model.Config, tokens, keep), new MicroBatch(arena, sequences, context),
                arena.Take(tokens, model.Config.Channels, backend.ActivationType))),
        ];
        _losses = arena.Take(1, 1, DType.F64);
        _received = arena.Take(tokens, model.Config.Channels, backend.ActivationType);
    }

    private bool IsFirst => _stages.Rank == 0;

    private bool IsLast => _stages.Rank == _stages.Size - 1;

    /// <summary>Fills the tables of all workspaces, once after their memory is allocated.</summary>
    public void Prepare() => Array.ForEach(_slots, slot => _model.Prepare(slot.Workspace));

    /// <summary>Adds the gradients of all micro-batches of a step to those of this stage.</summary>
    /// <param name="microBatches">Their number.</param>
    /// <param name="fill">Loads the tokens of one, on every stage alike: each needs its layout, the first its tokens, the last its targets.</param>
    /// <param name="scale">(1, 1) of F32: one over the targets of the step.</param>
    /// <returns>The sum of the losses of all targets, on every stage.</returns>
    public double Run(int microBatches, Action<MicroBatch, int> fill, Tensor scale)
    {
        ArgumentNullException.ThrowIfNull(fill);
        _backend.Zero(_losses);
        int ahead = Math.Min(_slots.Length - 1, microBatches);
        for (int micro = 0; micro < ahead; micro++)
        {
            Forward(micro, fill);
            SendOutput(micro);
        }

        // Operations meet in the order in which they are queued. The next stage gives a gradient before it takes another output:
        // so ask for the one before sending the other.
        for (int micro = 0; micro < microBatches; micro++)
        {
            bool forward = micro + ahead < microBatches;
            if (forward)
            {
                Forward(micro + ahead, fill);
            }

            Ticket gradient = IsLast ? default : _stages.Receive(_received, _stages.Rank + 1);
            if (forward)
            {
                SendOutput(micro + ahead);
            }

            gradient.Wait();
            Backward(micro, scale);
        }

        Span<double> sum = stackalloc double[1];
        _backend.Read(sum, _losses);
        double[] all = new double[_stages.Size];
        _stages.AllGather<double>(all, sum);
        return all[^1];
    }

    private void Forward(int micro, Action<MicroBatch, int> fill)
    {
        Slot slot = _slots[micro % _slots.Length];
        fill(slot.Batch, micro);
        int n = slot.Batch.Tokens.Rows;
        if (!IsFirst)
        {
            _stages.Receive(slot.Workspace.Input(n), _stages.Rank - 1).Wait();
        }

        _model.Forward(slot.Workspace, slot.Batch.Tokens, slot.Batch.Layout, KeyValueSource.Batch);
    }

    private void SendOutput(int micro)
    {
        if (!IsLast)
        {
            Slot slot = _slots[micro % _slots.Length];
            slot.Sent.Wait();
            _backend.Copy(slot.Output, slot.Workspace.Output(slot.Output.Rows));
            slot.Sent = _stages.Send(slot.Output, _stages.Rank + 1);
        }
    }

    private void Backward(int micro, Tensor scale)
    {
        Slot slot = _slots[micro % _slots.Length];
        int n = slot.Batch.Tokens.Rows;
        if (!IsLast)
        {
            _backend.Copy(slot.Workspace.Gradient(n), _received);
        }

        _model.Backward(slot.Workspace, slot.Batch.Tokens, slot.Batch.Targets, scale, slot.Batch.Layout);
        if (IsLast)
        {
            _backend.Sum(_losses, slot.Workspace.Losses(n));
        }

        if (!IsFirst)
        {
            _stages.Send(slot.Workspace.Gradient(n), _stages.Rank - 1).Wait();
        }
    }

    // What a micro-batch needs while it is under way.
    private sealed class Slot(Workspace workspace, MicroBatch batch, Tensor output)
    {
        public Workspace Workspace { get; } = workspace;

        public MicroBatch Batch { get; } = batch;

        public Tensor Output { get; } = output;

        public Ticket Sent { get; set; }
    }
}
