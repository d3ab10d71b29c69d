using System.Diagnostics;
using System.Globalization;
using System.Net;
using System.Net.Sockets;
using System.Security.Cryptography;
using TinyLlama.Training;

namespace TinyLlama.Cli;

/// <summary>
/// Starts the ranks of one run, or of one preparation of data, as processes of this machine. When one fails it ends the others,
/// says which one it was, and starts all of them again as often as allowed: they go on from what is on the disk. Success is what
/// the folder proves, not what the ranks report.
/// </summary>
/// <param name="ranks">The number of ranks.</param>
/// <param name="restarts">How often all may be started again.</param>
/// <param name="runFolder">What they work on; logs and heartbeats of the ranks are in there.</param>
/// <param name="proof">The name of the file in there that proves that everything is done.</param>
/// <param name="command">Makes the command of a rank.</param>
/// <param name="isDone">Whether the folder proves that everything asked for is done.</param>
/// <param name="terminal">Is told what happens to the ranks.</param>
internal sealed class RankSupervisor(
    int ranks, int restarts, string runFolder, string proof, Func<ProcessStartInfo> command, Func<bool> isDone, TextWriter terminal)
{
    /// <summary>Gets how long the ranks that are left have to say what they know and to end, once one has failed.</summary>
    public TimeSpan Grace { get; init; } = TimeSpan.FromSeconds(5);

    /// <summary>Runs the ranks to their end.</summary>
    /// <param name="stop">Asks them to save and to end.</param>
    /// <returns>One of <see cref="ExitCode"/>, or that of the rank that failed, 128 and a signal's number where one ended it.</returns>
    public async Task<int> RunAsync(CancellationToken stop)
    {
        for (int left = restarts; ; left--)
        {
            int code = await RunOnceAsync(1 + restarts - left, stop);

            // What the user has to mend is not mended by trying again.
            if (code is ExitCode.Success or ExitCode.Stopped or ExitCode.UserError || left == 0 || stop.IsCancellationRequested)
            {
                return code;
            }

            terminal.WriteLine($"starting all ranks again; {left - 1} restarts left");
        }
    }

    private async Task<int> RunOnceAsync(int start, CancellationToken stop)
    {
        var processes = new List<RankProcess>();
        try
        {
            Start(processes, start);
            using (stop.Register(() => processes.ForEach(static process => process.AskToStop())))
            {
                await WaitAsync(processes);
            }

            return Judge(processes);
        }
        finally
        {
            processes.ForEach(static process => process.Kill());
            processes.ForEach(static process => process.Dispose());
        }
    }

    private void Start(List<RankProcess> processes, int start)
    {
        Directory.CreateDirectory(Path.Combine(runFolder, Heartbeat.FolderName));
        string port = FreePort().ToString(CultureInfo.InvariantCulture);
        string token = Convert.ToHexStringLower(RandomNumberGenerator.GetBytes(16));
        for (int rank = 0; rank < ranks; rank++)
        {
            ProcessStartInfo info = command();
            info.Environment["RANK"] = info.Environment["LOCAL_RANK"] = rank.ToString(CultureInfo.InvariantCulture);
            info.Environment["WORLD_SIZE"] = ranks.ToString(CultureInfo.InvariantCulture);
            info.Environment["MASTER_ADDR"] = IPAddress.Loopback.ToString();
            info.Environment["MASTER_PORT"] = port;
            info.Environment["TINYLLAMA_RUN_ID"] = token;
            if (rank > 0)
            {
                info.Environment["TERM"] = "dumb";
            }

            processes.Add(RankProcess.Start(info, runFolder, rank, ranks, start));
        }
    }

    /// <summary>Waits until all have ended: in good order, or, once one has failed, soon.</summary>
    private async Task WaitAsync(List<RankProcess> processes)
    {
        List<Task<int>> running = [.. processes.Select(static process => process.Ended)];
        while (running.Count > 0 && !processes.Any(Failed))
        {
            running.Remove(await Task.WhenAny(running));
        }

        Task rest = Task.WhenAll(running);
        if (await Task.WhenAny(rest, Task.Delay(Grace)) != rest)
        {
            processes.ForEach(static process => process.Kill());
            await rest;
        }
    }

    private int Judge(List<RankProcess> processes)
    {
        // Ranks that lose another one end with a code of their own: the cause is whoever ended otherwise.
        RankProcess? cause = processes
            .Where(static process => Failed(process) && !process.WasKilled)
            .OrderBy(static process => process.Ended.Result switch
            {
                > 128 => 0,
                ExitCode.RanksLost => 2,
                _ => 1,
            })
            .FirstOrDefault();
        if (cause is not null)
        {
            Tell(cause);
            return cause.Ended.Result;
        }

        if (isDone())
        {
            return ExitCode.Success;
        }

        if (processes.Any(static process => process.Ended.Result == ExitCode.Stopped))
        {
            return ExitCode.Stopped;
        }

        terminal.WriteLine(
            $"error: all ranks ended without an error, but {Path.Combine(runFolder, proof)} does not prove that all is done; the same command goes on from there");
        return ExitCode.Failure;
    }

    private void Tell(RankProcess cause)
    {
        int code = cause.Ended.Result;
        string log = Heartbeat.PathOf(runFolder, cause.Rank, "log");

        // A line of the rank's own says it all; that of the first rank is on the terminal already.
        if (code is ExitCode.UserError or ExitCode.RanksLost)
        {
            if (cause.Rank > 0)
            {
                terminal.WriteLine($"{cause.LastLine ?? $"exit code {code}"} (rank {cause.Rank}, {log})");
            }

            return;
        }

        string who = Heartbeat.TryRead(runFolder, cause.Rank) is { } last && last.Pid == cause.Id
            ? $"{last.Describe()};"
            : $"rank {cause.Rank} (host {Environment.MachineName}, pid {cause.Id}):";
        string end = code > 128 ? $"signal {code - 128} ended it" : $"it ended with exit code {code}";
        string why = code < 128 && cause.LastLine is string line ? $": {line}" : "";
        terminal.WriteLine($"{who} {end}{why}{(cause.Rank > 0 ? $" ({log})" : "")}");
    }

    private static bool Failed(RankProcess process) =>
        process.Ended.IsCompleted && process.Ended.Result is not (ExitCode.Success or ExitCode.Stopped);

    private static int FreePort()
    {
        using var listener = new TcpListener(IPAddress.Loopback, 0);
        listener.Start();
        return ((IPEndPoint)listener.LocalEndpoint).Port;
    }
}
