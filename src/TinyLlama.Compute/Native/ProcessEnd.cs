using System.Runtime.InteropServices;

namespace TinyLlama.Compute.Native;

/// <summary>Ends the process where its own ways to end cannot be waited for: a thread of it may hang in a call of the system.</summary>
public static partial class ProcessEnd
{
    /// <summary>Ends the process at once: nothing is disposed of, no finalizer or handler runs. What was written to files stays.</summary>
    /// <param name="code">The exit code, 0 to 255.</param>
    public static void Now(int code)
    {
        if (OperatingSystem.IsWindows())
        {
            ExitProcess((uint)code);
        }
        else
        {
            ExitAtOnce(code);
        }
    }

    [LibraryImport("libc", EntryPoint = "_exit")]
    [DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]
    private static partial void ExitAtOnce(int code);

    [LibraryImport("kernel32")]
    [DefaultDllImportSearchPaths(DllImportSearchPath.System32)]
    private static partial void ExitProcess(uint code);
}
