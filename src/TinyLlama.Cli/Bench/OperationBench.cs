using TinyLlama.Compute;

namespace TinyLlama.Cli.Bench;

/// <summary>Measures operations one by one, each between two measurements of the machine's ceiling.</summary>
internal sealed class OperationBench : IDisposable
{
    private readonly Backend _device;
    private readonly double _seconds;
    private readonly string _only;
    private readonly CancellationToken _stop;
    private readonly List<Measurement> _measurements = [];
    private readonly ProgressDisplay _progress = ProgressDisplay.Start("bench", 0, "operations");
    private Ceiling _before;

    /// <summary>Measures the ceiling.</summary>
    /// <param name="device">The device.</param>
    /// <param name="seconds">How long to measure each operation.</param>
    /// <param name="only">Measures only what has this in its name; empty for everything.</param>
    /// <param name="stop">Ends it.</param>
    public OperationBench(Backend device, double seconds, string only, CancellationToken stop)
    {
        (_device, _seconds, _only, _stop) = (device, seconds, only, stop);
        Timed = new TimedBackend(device);
        Ceiling = _before = Bench.Ceiling.Measure(device);
    }

    /// <summary>Gets the backend to call.</summary>
    public TimedBackend Timed { get; }

    /// <summary>Gets the best ceiling of the run.</summary>
    public Ceiling Ceiling { get; private set; }

    /// <summary>Gets what was measured so far.</summary>
    public IReadOnlyList<Measurement> Measurements => _measurements;

    /// <summary>Measures one operation.</summary>
    /// <param name="name">What the table calls it.</param>
    /// <param name="call">Calls one operation of <see cref="Timed"/>.</param>
    public void Measure(string name, Action call)
    {
        if (!name.Contains(_only, StringComparison.OrdinalIgnoreCase))
        {
            return;
        }

        Duration.Measure(Timed, _seconds, call, _stop);
        Ceiling after = Bench.Ceiling.Measure(_device);
        _measurements.Add(new Measurement(name, Timed.TakeTimes().Single(), _before.Better(after)));
        Ceiling = Ceiling.Better(after);
        _before = after;
        _progress.Report(_measurements.Count, name);
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _progress.Dispose();
        Timed.Dispose();
    }
}
