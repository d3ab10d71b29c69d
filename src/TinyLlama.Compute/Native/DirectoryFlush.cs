using System.Runtime.InteropServices;

namespace TinyLlama.Compute.Native;

/// <summary>Makes renames and new names in a directory survive a power cut, which .NET has no call for.</summary>
public static partial class DirectoryFlush
{
    // What fsync says on file systems (some network ones) that have nothing to flush for a directory.
    private const int InvalidArgument = 22;

    /// <summary>Waits until the directory's entries are on the disk (fsync). Windows writes them through; nothing is done there.</summary>
    /// <exception cref="IOException">The directory cannot be opened or the disk refuses.</exception>
    public static void Flush(string path)
    {
        if (OperatingSystem.IsWindows())
        {
            return;
        }

        // Flags 0: read only, the same on every Unix.
        int descriptor = Open(path, 0);
        if (descriptor < 0)
        {
            throw Failure(path);
        }

        try
        {
            if (FSync(descriptor) != 0 && Marshal.GetLastPInvokeError() != InvalidArgument)
            {
                throw Failure(path);
            }
        }
        finally
        {
            _ = Close(descriptor);
        }
    }

    private static IOException Failure(string path) =>
        new($"{path}: cannot be flushed to the disk: {Marshal.GetPInvokeErrorMessage(Marshal.GetLastPInvokeError())}");

    [LibraryImport("libc", EntryPoint = "open", StringMarshalling = StringMarshalling.Utf8, SetLastError = true)]
    [DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]
    private static partial int Open(string path, int flags);

    [LibraryImport("libc", EntryPoint = "fsync", SetLastError = true)]
    [DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]
    private static partial int FSync(int descriptor);

    [LibraryImport("libc", EntryPoint = "close")]
    [DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]
    private static partial int Close(int descriptor);
}
