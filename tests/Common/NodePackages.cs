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
}
