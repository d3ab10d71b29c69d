namespace TinyLlama.Tests.Common;

/// <summary>Programs of the machine that some tests need.</summary>
internal static class Programs
{
    /// <summary>Whether a program is on the PATH.</summary>
    public static bool Exists(string name) =>
        (Environment.GetEnvironmentVariable("PATH") ?? "").Split(Path.PathSeparator).Any(folder => File.Exists(Path.Combine(folder, name)));

    /// <summary>Skips the test where it is not.</summary>
    /// <param name="name">The program.</param>
    /// <param name="package">What people know it by, where that is another name.</param>
    public static void Require(string name, string? package = null) => Assert.SkipUnless(Exists(name), $"needs {package ?? name} on the PATH");
}
