namespace TinyLlama.Tests.Common;

/// <summary>The working tree that the tests were built from.</summary>
internal static class Checkout
{
    /// <summary>Gets its root: the folder with the solution.</summary>
    public static string Root { get; } = Find();

    private static string Find()
    {
        for (DirectoryInfo? folder = new(AppContext.BaseDirectory); folder is not null; folder = folder.Parent)
        {
            if (File.Exists(Path.Combine(folder.FullName, "TinyLlama.slnx")))
            {
                return folder.FullName;
            }
        }

        throw new DirectoryNotFoundException("the tests run outside the repository's artifacts folder");
    }
}
