namespace TinyLlama.Compute.Collectives;

/// <summary>A world of one rank: nothing moves but copies.</summary>
public sealed class SingleCollective : Collective
{
    /// <inheritdoc/>
    public override int Rank => 0;

    /// <inheritdoc/>
    public override int Size => 1;

    /// <inheritdoc/>
    public override string Description => "one process";

    /// <inheritdoc/>
    public override IReadOnlyList<string> Hosts { get; } = [Environment.MachineName];

    /// <inheritdoc/>
    public override CollectiveProgress Progress => default;

    /// <inheritdoc/>
    public override Collective Split(int color, int key) => new SingleCollective();

    /// <inheritdoc/>
    public override void Abort(string reason, int exitCode)
    {
    }

    // Whoever shards over one rank keeps everything where it is, and does not ask.
    internal override Ticket Queue(in CollectiveOperation operation) =>
        operation.Kind == CollectiveKind.Broadcast ? default : throw new InvalidOperationException("there is one rank alone");

    internal override void Wait(long number)
    {
    }

    /// <inheritdoc/>
    protected override void GatherBytes(Span<byte> all, ReadOnlySpan<byte> own) => own.CopyTo(all);

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
    }
}
