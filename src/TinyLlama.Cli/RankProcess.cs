using System.Diagnostics;
using System.Globalization;
using TinyLlama.Compute.Native;

namespace TinyLlama.Cli;

/// <summary>
/// A process that is one rank. Its standard input is a pipe of the supervisor's: a line in it asks for a checkpoint and a
/// stop, its end is the end of the supervisor, however that came, and of the rank.
/// </summary>
internal sealed class RankProcess : IDisposable
{
    /// <summary>The environment variable that tells a process that its standard input is such a pipe; its value is the number of the start.</summary>
    private const string Variable = "TINYLLAMA_SUPERVISED";

    private readonly Process _process;
    private readonly StreamWriter? _log;
    private readonly Task _output;

    private RankProcess(Process process, int rank, StreamWriter? log)
    {
        (_process, Rank, _log) = (process, rank, log);
        _output = log is null ? Task.CompletedTask : Task.WhenAll(CopyAsync(process.StandardOutput), CopyAsync(process.StandardError));
        Ended = EndAsync();
    }

    /// <summary>Gets a value indicating whether this process is a rank with a supervisor; its standard error is its log then, but for rank 0's.</summary>
    public static bool IsSupervised => Environment.GetEnvironmentVariable(Variable) is not null;

    /// <summary>Gets how often the ranks of this process's run were started, this time included.</summary>
    public static int StartNumber => int.TryParse(Environment.GetEnvironmentVariable(Variable), CultureInfo.InvariantCulture, out int number) ? number : 1;

    /// <summary>Gets the number of the rank.</summary>
    public int Rank { get; }

    /// <summary>Gets the process.</summary>
    public int Id => _process.Id;

    /// <summary>Gets the last line that went to the log.</summary>
    public string? LastLine { get; private set; }

    /// <summary>Gets a value indicating whether <see cref="Kill"/> ended it.</summary>
    public bool WasKilled { get; private set; }

    /// <summary>Gets what ends with the process; its value is the exit code, 128 and the signal of one that a signal ended.</summary>
    public Task<int> Ended { get; }

    /// <summary>This program with other arguments.</summary>
    public static ProcessStartInfo Command(IEnumerable<string> arguments)
    {
        // Built as a library, the program is an argument of the host that runs it.
        string program = Environment.ProcessPath!;
        bool isHost = Path.GetFileNameWithoutExtension(program) == "dotnet";
        return new ProcessStartInfo(program, isHost ? [typeof(Program).Assembly.Location, .. arguments] : arguments);
    }

    /// <summary>Starts a rank. The first one's output is the terminal's, that of the others goes to their logs.</summary>
    /// <param name="command">Program, arguments and environment.</param>
    /// <param name="runFolder">The run.</param>
    /// <param name="rank">The rank.</param>
    /// <param name="size">The number of ranks.</param>
    /// <param name="start">The number of the start, from 1.</param>
    public static RankProcess Start(ProcessStartInfo command, string runFolder, int rank, int size, int start)
    {
        command.UseShellExecute = false;
        command.RedirectStandardInput = true;
        command.RedirectStandardOutput = rank > 0;
        command.RedirectStandardError = rank > 0;
        command.Environment[Variable] = start.ToString(CultureInfo.InvariantCulture);
        var process = Process.Start(command)!;
        return new RankProcess(process, rank, rank > 0 ? RankLog.Open(runFolder, rank, size, process.Id, start) : null);
    }

    /// <summary>In a rank: follows the supervisor's wishes, and ends the process when the supervisor is gone.</summary>
    /// <param name="stop">Asks the verb to stop cleanly.</param>
    public static void FollowSupervisor(Action stop)
    {
        new Thread(Follow) { IsBackground = true, Name = "supervisor" }.Start();

        void Follow()
        {
            using Stream pipe = Console.OpenStandardInput();
            while (pipe.ReadByte() >= 0)
            {
                stop();
            }

            ProcessEnd.Now(ExitCode.RanksLost);
        }
    }

    /// <summary>Asks the rank to save and to end.</summary>
    public void AskToStop()
    {
        try
        {
            _process.StandardInput.WriteLine();
            _process.StandardInput.Flush();
        }
        catch (Exception e) when (e is IOException or ObjectDisposedException)
        {
            // It has ended already.
        }
    }

    /// <summary>Ends the process at once, if it still runs.</summary>
    public void Kill()
    {
        if (!Ended.IsCompleted)
        {
            WasKilled = true;
            _process.Kill(entireProcessTree: true);
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _process.Dispose();
        _log?.Dispose();
    }

    // A process that the rank started may hold its output open for ever: what comes later is not waited for.
    private async Task<int> EndAsync()
    {
        await _process.WaitForExitAsync();
        await Task.WhenAny(_output, Task.Delay(TimeSpan.FromSeconds(1)));
        return _process.ExitCode;
    }

    private async Task CopyAsync(StreamReader output)
    {
        while (await output.ReadLineAsync() is string line)
        {
            lock (_process)
            {
                LastLine = line.Length > 0 ? line : LastLine;
                TryLog(line);
            }
        }
    }

    // A full disk must not block the rank, which waits until its output is read.
    private void TryLog(string line)
    {
        try
        {
            _log!.WriteLine(line);
        }
        catch (Exception e) when (e is IOException or ObjectDisposedException)
        {
        }
    }
}
