using System.Diagnostics;
using System.Globalization;
using TinyLlama.Cli;
using TinyLlama.Data.Documents;
using TinyLlama.Data.Shards;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Tests.Checkpoints;
using TinyLlama.Tests.Common;

namespace TinyLlama.Tests.Training;

/// <summary>Text, its shards and a recipe of a model of seconds, for tests that start the program.</summary>
internal static class TinyRun
{
    /// <summary>Longer than anything takes here on a busy machine, in milliseconds.</summary>
    private const int Deadline = 120_000;

    /// <summary>Writes them to a folder.</summary>
    /// <param name="folder">The folder; shards go to <c>data</c>.</param>
    /// <param name="steps">Steps of the run, with a checkpoint every 20.</param>
    /// <returns>The recipe's path.</returns>
    public static string Prepare(TemporaryFolder folder, int steps)
    {
        Directory.CreateDirectory(folder["text"]);
        for (int i = 0; i < 40; i++)
        {
            File.WriteAllText(
                Path.Combine(folder["text"], $"{i:00}.txt"),
                string.Concat(Enumerable.Range(0, 30).Select(n => $"{n * i} times a word is {n + i}. ")));
        }

        DataPreparation.Run(
            folder["data"], TextFiles.Find([folder["text"]], new TextFileOptions()), new ByteTokenizer(),
            new PreparationOptions { ValidationShare = 0.1 });
        File.WriteAllText(folder["tiny.yaml"], $$"""
            model: { vocabulary: 258, context: 64, layers: 2, heads: 4, key_value_heads: 2, channels: 64, hidden: 176 }
            data: { path: '{{folder["data"]}}' }
            batch: { global_tokens: 512, micro_sequences: 4 }
            budget: { steps: {{steps}} }
            optimizer: { learning_rate: 1e-3 }
            schedule: { warmup: 20 }
            validation: { every_steps: 100, tokens: 512 }
            checkpoints: { every_steps: 20, keep_last: 2 }
            """);
        return folder["tiny.yaml"];
    }

    /// <summary>Starts the program on the recipe.</summary>
    /// <param name="folder">The folder.</param>
    /// <param name="run">The run in there.</param>
    /// <param name="options">More words of the command.</param>
    /// <returns>The process; whoever starts it reads what it writes.</returns>
    public static Process Start(TemporaryFolder folder, string run, params string[] options) => Launch([], folder, run, options);

    /// <summary>Starts something that starts the program on the recipe.</summary>
    /// <param name="launcher">Its command, to which the program's is added.</param>
    /// <param name="folder">The folder.</param>
    /// <param name="run">The run in there.</param>
    /// <param name="options">More words of the program's command.</param>
    /// <returns>The process; whoever starts it reads what it writes.</returns>
    public static Process Launch(IReadOnlyList<string> launcher, TemporaryFolder folder, string run, params string[] options) =>
        Launch(launcher, ["pretrain", "--recipe", folder["tiny.yaml"], "--out", folder[run], .. options]);

    /// <summary>Starts something that starts the program.</summary>
    /// <param name="launcher">Its command; empty where the program is started itself.</param>
    /// <param name="command">The words of the program's command.</param>
    /// <returns>The process; whoever starts it reads what it writes.</returns>
    public static Process Launch(IReadOnlyList<string> launcher, IReadOnlyList<string> command)
    {
        string program = Environment.ProcessPath is { } host && Path.GetFileNameWithoutExtension(host) == "dotnet" ? host : "dotnet";
        string[] words = [.. launcher, program, typeof(CommandLine).Assembly.Location, .. command];
        return Process.Start(new ProcessStartInfo(words[0], words.Skip(1))
        {
            UseShellExecute = false,
            RedirectStandardInput = true,
            RedirectStandardError = true,
            RedirectStandardOutput = true,
        })!;
    }

    /// <summary>The command of a launcher of ranks; the test is skipped where it is not installed.</summary>
    /// <param name="name"><c>mpirun.openmpi</c>, <c>mpirun.mpich</c>, or nothing for the program, which starts its ranks itself.</param>
    /// <param name="ranks">The number of ranks.</param>
    public static string[] Launcher(string name, int ranks)
    {
        if (name.Length == 0)
        {
            return [];
        }

        Programs.Require(name);
        return name == "mpirun.openmpi"
            ? [name, "--oversubscribe", "--allow-run-as-root", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1", "-n", $"{ranks}"]
            : [name, "-n", $"{ranks}"];
    }

    /// <summary>Waits for a process that must not hang, and disposes of it.</summary>
    /// <returns>Its exit code and what it wrote.</returns>
    public static (int Code, string Said) End(Process process)
    {
        using (process)
        {
            Task<string> output = process.StandardOutput.ReadToEndAsync(), error = process.StandardError.ReadToEndAsync();
            if (!process.WaitForExit(Deadline))
            {
                process.Kill(entireProcessTree: true);
                Assert.Fail("it hangs");
            }

            return (process.ExitCode, $"{error.Result}{output.Result}");
        }
    }

    /// <summary>A number that the environment may change.</summary>
    public static int FromEnvironment(string name, int otherwise) =>
        int.TryParse(Environment.GetEnvironmentVariable(name), CultureInfo.InvariantCulture, out int value) ? value : otherwise;
}
