namespace TinyLlama.Tests.Common;

/// <summary>
/// Looks up the oracle and golden files, which are not part of the repository: under the folder that
/// <c>TINYLLAMA_SHARED</c> names, else in <c>shared</c> beside the checkout.
/// </summary>
internal static class SharedFiles
{
    /// <summary>The path of an oracle or golden file or folder; skips the calling test where it is not there.</summary>
    /// <param name="relativePath">Such as <c>goldens/llama-tiny/config.json</c>.</param>
    public static string Require(string relativePath)
    {
        string path = Path.Combine(Root(), relativePath);
        Assert.SkipUnless(Path.Exists(path), $"needs {relativePath} of the oracle files, set TINYLLAMA_SHARED to their folder");
        return path;
    }

    /// <summary>The folder of the checkout that the tests were built in, or null where they lie elsewhere.</summary>
    public static string? Checkout()
    {
        DirectoryInfo? folder = new(AppContext.BaseDirectory);
        while (folder is not null && !File.Exists(Path.Combine(folder.FullName, "TinyLlama.slnx")))
        {
            folder = folder.Parent;
        }

        return folder?.FullName;
    }

    private static string Root() =>
        Environment.GetEnvironmentVariable("TINYLLAMA_SHARED") is { Length: > 0 } named ? named
        : Path.Combine(Path.GetDirectoryName(Checkout()) ?? "", "shared");
}
