using System.Diagnostics;

namespace TinyLlama.Tests.Common;

/// <summary>Programs of others, installed by npm into the folder that <c>TINYLLAMA_NODE_MODULES</c> names.</summary>
internal static class NodePackages
{
    /// <summary>The folder of a package; skips the calling test where it is not there.</summary>
    /// <param name="package">Such as <c>node-llama-cpp</c>.</param>
    public static string Require(string package)
    {
        string? modules = Environment.GetEnvironmentVariable("TINYLLAMA_NODE_MODULES");
        string folder = Path.Combine(modules ?? "", package.Replace('/', Path.DirectorySeparatorChar));
        Assert.SkipUnless(
            !string.IsNullOrEmpty(modules) && Directory.Exists(folder),
            $"needs {package} of npm; set TINYLLAMA_NODE_MODULES to the node_modules folder that has it");
        return folder;
    }

    /// <summary>Runs a module by node; returns the lines that it writes.</summary>
    /// <param name="path">Where the module is written, <c>.mjs</c>.</param>
    /// <param name="script">Its text.</param>
    public static string[] Run(string path, string script)
    {
        File.WriteAllText(path, script);
        var start = new ProcessStartInfo("node", [path]) { RedirectStandardOutput = true, RedirectStandardError = true, UseShellExecute = false };
        using Process process = Process.Start(start)!;
        Task<string> errors = process.StandardError.ReadToEndAsync();
        string[] lines = process.StandardOutput.ReadToEnd().Split('\n', StringSplitOptions.RemoveEmptyEntries);
        process.WaitForExit();
        Assert.True(process.ExitCode == 0, errors.Result);
        return lines;
    }
}
