using TinyLlama.Training;

namespace TinyLlama.Cli;

/// <summary>What a rank of many says goes to its log; what the first one says goes to the terminal too.</summary>
internal sealed class RankLog : ITrainingObserver, IDisposable
{
    private readonly TextWriter _log;
    private readonly TrainingDisplay? _terminal;

    /// <summary>Opens the log of this process.</summary>
    /// <param name="runFolder">The run.</param>
    /// <param name="rank">The rank.</param>
    /// <param name="size">The number of ranks.</param>
    /// <param name="terminal">Where the first rank shows its progress; null for the others, which show none.</param>
    public RankLog(string runFolder, int rank, int size, TrainingDisplay? terminal)
    {
        _terminal = terminal;

        // A supervisor has opened the log and keeps in it what this process writes to standard error.
        _log = rank > 0 && RankProcess.IsSupervised ? Console.Error : Open(runFolder, rank, size, Environment.ProcessId, RankProcess.StartNumber);
    }

    /// <summary>Opens a log to add to, and begins the part of one process.</summary>
    public static StreamWriter Open(string runFolder, int rank, int size, int pid, int start)
    {
        string path = Heartbeat.PathOf(runFolder, rank, "log");
        Directory.CreateDirectory(Path.GetDirectoryName(path)!);
        var log = new StreamWriter(path, append: true) { AutoFlush = true };
        log.WriteLine(FormattableString.Invariant(
            $"{DateTime.UtcNow:yyyy-MM-dd HH:mm:ss'Z'}: start {start}, rank {rank} of {size}, host {Environment.MachineName}, pid {pid}"));
        return log;
    }

    /// <inheritdoc/>
    public void Measured(Metrics metrics)
    {
        _terminal?.Measured(metrics);
        if (metrics is NoteMetrics note)
        {
            Write($"step {note.Step}: {note.Text}");
        }
    }

    /// <inheritdoc/>
    public void Warn(string message)
    {
        _terminal?.Warn(message);
        Write($"warning: {message}");
    }

    /// <summary>Writes why the rank ends, to the log and to standard error.</summary>
    public void End(string reason)
    {
        _terminal?.Dispose();
        Console.Error.WriteLine(reason);
        if (_log != Console.Error)
        {
            Write(reason);
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        if (_log != Console.Error)
        {
            _log.Dispose();
        }
    }

    // A full disk must not end a rank because of what it has to say.
    private void Write(string line)
    {
        try
        {
            _log.WriteLine(line);
        }
        catch (IOException)
        {
        }
    }
}
