using System.Diagnostics;
using System.Net;
using System.Net.Sockets;
using TinyLlama.Tests.Checkpoints;
using TinyLlama.Tests.Common;

namespace TinyLlama.Tests.Training;

/// <summary>A SLURM of this machine alone, on ports and in a folder of its own: <c>slurmctld</c> and one <c>slurmd</c>.</summary>
internal sealed class SlurmCluster : IDisposable
{
    private static readonly string[] s_daemons = ["slurmctld", "slurmd"];

    private readonly TemporaryFolder _folder = new();
    private readonly List<Process> _processes = [];

    private SlurmCluster()
    {
        string host = Environment.MachineName.Split('.')[0];
        Directory.CreateDirectory(_folder["state"]);
        Directory.CreateDirectory(_folder["spool"]);
        File.WriteAllText(_folder["slurm.conf"], $"""
            ClusterName=test
            SlurmctldHost={host}(127.0.0.1)
            SlurmUser={Environment.UserName}
            SlurmdUser={Environment.UserName}
            AuthType=auth/none
            CredType=cred/none
            SlurmctldPort={FreePort()}
            SlurmdPort={FreePort()}
            StateSaveLocation={_folder["state"]}
            SlurmdSpoolDir={_folder["spool"]}
            SlurmctldPidFile={_folder["slurmctld.pid"]}
            SlurmdPidFile={_folder["slurmd.pid"]}
            ProctrackType=proctrack/linuxproc
            TaskPlugin=task/none
            SelectType=select/linear
            ReturnToService=2
            NodeName={host} NodeAddr=127.0.0.1 CPUs={Environment.ProcessorCount} State=UNKNOWN
            PartitionName=all Nodes=ALL Default=YES State=UP

            """);
        foreach (string daemon in s_daemons)
        {
            _processes.Add(Start(daemon, "-D"));
            _processes[^1].BeginOutputReadLine();
        }

        if (!WaitUntilIdle())
        {
            Dispose();
            throw new InvalidOperationException("SLURM does not start");
        }
    }

    /// <summary>Starts one that takes work; skips the test where it is not installed.</summary>
    public static SlurmCluster Require()
    {
        foreach (string program in s_daemons.Append("srun"))
        {
            Programs.Require(program);
        }

        return new SlurmCluster();
    }

    /// <summary>The command that starts another one as so many tasks.</summary>
    /// <param name="tasks">Their number.</param>
    /// <param name="plugin">What they meet by.</param>
    public string[] Run(int tasks, string plugin) => ["env", .. Command("srun", "-n", $"{tasks}", "--overcommit", $"--mpi={plugin}")];

    /// <summary>What a command of this cluster prints.</summary>
    public string Ask(params string[] words)
    {
        using Process process = Start(words);
        string text = process.StandardOutput.ReadToEnd();
        process.WaitForExit();
        return text.Trim();
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        // A task's keeper (slurmstepd) that ends without slurmd stays for ever.
        WaitUntilIdle();
        foreach (Process process in _processes.AsEnumerable().Reverse())
        {
            process.Kill(entireProcessTree: true);
            process.WaitForExit();
            process.Dispose();
        }

        _folder.Dispose();
    }

    private bool WaitUntilIdle() => SpinWait.SpinUntil(() => Ask("sinfo", "-h", "-o", "%T") == "idle", TimeSpan.FromSeconds(60));

    private string[] Command(params string[] words) => [$"SLURM_CONF={_folder["slurm.conf"]}", .. words];

    // What it says of errors is read, and dropped.
    private Process Start(params string[] words)
    {
        Process process = Process.Start(new ProcessStartInfo("env", Command(words))
        {
            UseShellExecute = false,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        })!;
        process.BeginErrorReadLine();
        return process;
    }

    private static int FreePort()
    {
        using var listener = new TcpListener(IPAddress.Loopback, 0);
        listener.Start();
        return ((IPEndPoint)listener.LocalEndpoint).Port;
    }
}
