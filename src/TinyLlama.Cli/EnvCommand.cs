using System.CommandLine;
using System.Globalization;
using System.Runtime.InteropServices;
using System.Text.Json.Nodes;
using TinyLlama.Compute.Cpu;

namespace TinyLlama.Cli;

/// <summary><c>tinyllama env</c>: what this machine is and which path the kernels take on it.</summary>
internal static class EnvCommand
{
    /// <summary>The verb.</summary>
    public static Command Create()
    {
        var json = CommonOptions.Json();
        var command = new Command("env", "Show this machine and which kernels run on it") { json };
        command.SetAction(parse =>
        {
            JsonObject facts = Facts();
            TextWriter output = parse.InvocationConfiguration.Output;
            if (parse.GetValue(json))
            {
                output.WriteLine(facts.ToJsonString(JsonOutput.Options));
            }
            else
            {
                int width = facts.Max(fact => fact.Key.Length);
                foreach ((string name, JsonNode? value) in facts)
                {
                    output.WriteLine($"{name.Replace('_', ' ').PadRight(width)}  {value}");
                }
            }

            return ExitCode.Success;
        });
        return command;
    }

    private static JsonObject Facts()
    {
        long memory = GC.GetGCMemoryInfo().TotalAvailableMemoryBytes;
        CpuPath chosen = CpuPaths.Choose();
        return new JsonObject
        {
            ["version"] = Program.Version,
            ["system"] = $"{RuntimeInformation.OSDescription}, {RuntimeInformation.OSArchitecture}",
            ["runtime"] = RuntimeInformation.FrameworkDescription,
            ["processor"] = ProcessorName(),
            ["cores"] = Environment.ProcessorCount,
            ["memory"] = string.Create(CultureInfo.InvariantCulture, $"{memory / (double)(1 << 30):0.0} GiB"),
            ["path"] = chosen.ToString(),
            ["path_why"] = Why(chosen),
        };
    }

    private static string Why(CpuPath chosen)
    {
        string? forced = Environment.GetEnvironmentVariable(CpuPaths.Variable);
        string best = CpuPaths.Best switch
        {
            CpuPath.Vector512 => "the processor has AVX-512",
            CpuPath.Vector256 => "the processor has AVX2 and FMA, no AVX-512",
            CpuPath.Vector128 => "128-bit registers are the widest that the runtime uses here",
            _ => "the runtime uses no vector registers here",
        };
        return string.IsNullOrEmpty(forced)
            ? best
            : $"{CpuPaths.Variable}={forced} asks for it; without it {CpuPaths.Best}: {best}"
                + (chosen < CpuPaths.Best ? "; unproved: the runtime emulates what the processor lacks" : "");
    }

    private static string ProcessorName()
    {
        const string Source = "/proc/cpuinfo";
        if (File.Exists(Source))
        {
            string? line = File.ReadLines(Source).FirstOrDefault(line => line.StartsWith("model name", StringComparison.Ordinal));
            if (line?.IndexOf(':') is int colon and >= 0)
            {
                return line[(colon + 1)..].Trim();
            }
        }

        return Environment.GetEnvironmentVariable("PROCESSOR_IDENTIFIER") ?? RuntimeInformation.ProcessArchitecture.ToString();
    }
}
