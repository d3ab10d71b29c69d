using System.Runtime.InteropServices;

namespace TinyLlama.Cli;

/// <summary>
/// Ctrl-C and SIGTERM as a cancellation: the first asks the verb to stop cleanly (a training run saves a checkpoint),
/// the second is left to the system, which ends the process at once.
/// </summary>
internal sealed class StopSignals : IDisposable
{
    private static Action? s_onInterrupt;

    private readonly CancellationTokenSource _stop = new();
    private readonly PosixSignalRegistration[] _registrations;
    private bool _asked;

    public StopSignals()
    {
        _registrations =
        [
            PosixSignalRegistration.Create(PosixSignal.SIGINT, OnSignal),
            PosixSignalRegistration.Create(PosixSignal.SIGTERM, OnSignal),
        ];
    }

    /// <summary>Gets what the first signal cancels.</summary>
    public CancellationToken Token => _stop.Token;

    /// <summary>Asks for what the first signal asks for.</summary>
    public void Stop()
    {
        try
        {
            _stop.Cancel();
        }
        catch (ObjectDisposedException)
        {
            // The verb has just ended by itself.
        }
    }

    /// <summary>Gives Ctrl-C another meaning for a while: it ends a reply, say, and not the program.</summary>
    /// <param name="action">What it does until the result is disposed of.</param>
    public static IDisposable DivertInterrupts(Action action)
    {
        s_onInterrupt = action;
        return new Diversion();
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        foreach (PosixSignalRegistration registration in _registrations)
        {
            registration.Dispose();
        }

        _stop.Dispose();
    }

    private void OnSignal(PosixSignalContext signal)
    {
        if (signal.Signal == PosixSignal.SIGINT && s_onInterrupt is { } diverted)
        {
            signal.Cancel = true;
            diverted();
            return;
        }

        if (Interlocked.Exchange(ref _asked, true))
        {
            return;
        }

        signal.Cancel = true;
        if (!RankProcess.IsSupervised)
        {
            Console.Error.WriteLine("stopping; once more to abort");
        }

        Stop();
    }

    private sealed class Diversion : IDisposable
    {
        public void Dispose() => s_onInterrupt = null;
    }
}
