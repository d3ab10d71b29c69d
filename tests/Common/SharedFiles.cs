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

    private static string Root()
    {
        if (Environment.GetEnvironmentVariable("TINYLLAMA_SHARED") is { Length: > 0 } named)
        {
            return named;
        }

        for (DirectoryInfo? folder = new(AppContext.BaseDirectory); folder is not null; folder = folder.Parent)
        {
            if (File.Exists(Path.Combine(folder.FullName, "TinyLlama.slnx")))
            {
                return Path.Combine(folder.Parent?.FullName ?? folder.FullName, "shared");
            }
        }

        return "shared";
    }
}
