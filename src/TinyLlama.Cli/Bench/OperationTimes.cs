namespace TinyLlama.Cli.Bench;

/// <summary>What <see cref="TimedBackend"/> tells apart: matrix products by their shape, everything else by name.</summary>
/// <param name="Name">The method of the backend.</param>
/// <param name="Tokens">N of a product, else 0.</param>
/// <param name="Outputs">O of its weight.</param>
/// <param name="Inputs">I of its weight.</param>
internal readonly record struct Operation(string Name, int Tokens = 0, int Outputs = 0, int Inputs = 0)
{
    /// <summary>Gets N × O × I of a product, else an empty text.</summary>
    public string Shape => Tokens == 0 ? "" : $"{Tokens} × {Outputs} × {Inputs}";
}

/// <summary>What the calls of one operation took, round by round, and what work they were.</summary>
/// <param name="operation">The operation.</param>
internal sealed class OperationTimes(Operation operation)
{
    private readonly List<double> _rounds = [];
    private (double Seconds, int Calls, long Bytes, long Flops) _round;
    private int _calls;
    private long _bytes;
    private long _flops;

    /// <summary>Gets the operation.</summary>
    public Operation Operation => operation;

    /// <summary>Gets the calls of a round.</summary>
    public int Calls => _calls / Math.Max(1, _rounds.Count);

    /// <summary>Gets the bytes that the calls of a round read and write.</summary>
    public long Bytes => _bytes / Math.Max(1, _rounds.Count);

    /// <summary>Gets the additions and multiplications of a round.</summary>
    public long Flops => _flops / Math.Max(1, _rounds.Count);

    /// <summary>Gets the seconds of the calls of each round.</summary>
    public IReadOnlyList<double> Rounds => _rounds;

    /// <summary>Adds a call to the round.</summary>
    public void Add(double seconds, long bytes, long flops) =>
        _round = (_round.Seconds + seconds, _round.Calls + 1, _round.Bytes + bytes, _round.Flops + flops);

    /// <summary>Ends the round.</summary>
    public void EndRound()
    {
        _rounds.Add(_round.Seconds);
        _calls += _round.Calls;
        _bytes += _round.Bytes;
        _flops += _round.Flops;
        _round = default;
    }

    /// <summary>Forgets the calls since the last round ended.</summary>
    public void ForgetRound() => _round = default;
}
