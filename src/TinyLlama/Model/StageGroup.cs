using TinyLlama.Compute;
using TinyLlama.Compute.Collectives;

namespace TinyLlama.Model;

/// <summary>
/// Ranks that have the blocks of a model between them, one stage after the other (pipeline parallelism): the residual stream goes
/// from each to the next, its gradient back.
/// </summary>
public sealed class StageGroup
{
    // Elements that are shown at once.
    private const int ShownElements = 1 << 20;

    private readonly Collective? _stages;
    private readonly Tensor _shown;

    /// <summary>Takes room for what other stages show.</summary>
    /// <param name="stages">The stages; rank p is stage p. Null to count the bytes.</param>
    /// <param name="arena">Owner of the room.</param>
    public StageGroup(Collective? stages, Arena arena) => (_stages, _shown) = (stages, arena.Take(1, ShownElements));

    private Collective Stages => _stages ?? throw new InvalidOperationException("only bytes are counted");

    private int Stage => Stages.Rank;

    private bool IsLast => Stage == Stages.Size - 1;

    /// <summary>Waits for what the stage before leaves of n tokens. Nothing for the first.</summary>
    public void ReceiveInput(Workspace w, int n)
    {
        if (Stage > 0)
        {
            Stages.Receive(w.Input(n), Stage - 1).Wait();
        }
    }

    /// <summary>Gives what this stage leaves of n tokens to the next. Nothing for the last.</summary>
    public Ticket SendOutput(Workspace w, int n) => IsLast ? default : Stages.Send(w.Output(n), Stage + 1);

    /// <summary>Asks for the gradient of what this stage left of n tokens. Nothing for the last.</summary>
    public Ticket ReceiveGradient(Workspace w, int n) => IsLast ? default : Stages.Receive(w.Gradient(n), Stage + 1);

    /// <summary>Gives the gradient of this stage's input to the one before. Nothing for the first.</summary>
    public void SendGradient(Workspace w, int n)
    {
        if (Stage > 0)
        {
            Stages.Send(w.Gradient(n), Stage - 1).Wait();
        }
    }

    /// <summary>The value that the last stage has.</summary>
    public double OfLast(double value)
    {
        double[] all = new double[Stages.Size];
        Stages.AllGather<double>(all, [value]);
        return all[^1];
    }

    /// <summary>Shows all stages what one of them has, piece by piece.</summary>
    /// <param name="stage">The stage that has it.</param>
    /// <param name="values">What it shows, of F32; on the other stages nothing.</param>
    /// <param name="count">The number of its elements.</param>
    /// <param name="use">Receives the number of a piece's first element, and the piece.</param>
    public void Show(int stage, Tensor values, long count, Action<long, Tensor> use)
    {
        ArgumentNullException.ThrowIfNull(use);
        for (long first = 0; first < count; first += ShownElements)
        {
            int length = (int)Math.Min(ShownElements, count - first);
            Tensor piece = stage == Stage ? values.Elements(first, length) : _shown.Elements(0, length);
            Stages.Broadcast(piece, stage).Wait();
            use(first, piece);
        }
    }
}
