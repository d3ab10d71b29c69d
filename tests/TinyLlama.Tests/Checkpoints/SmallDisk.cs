using System.Diagnostics;

namespace TinyLlama.Tests.Checkpoints;

/// <summary>A file system of a few kilobytes in memory; skips the calling test where the user may not mount one.</summary>
internal sealed class SmallDisk : IDisposable
{
    private SmallDisk(string path) => Path = path;

    public string Path { get; }

    public static SmallDisk Mount(string path, int kilobytes)
    {
        Directory.CreateDirectory(path);
        bool mounted = OperatingSystem.IsLinux() && Environment.IsPrivilegedProcess && File.Exists("/usr/bin/mount")
            && Run("mount", "-t", "tmpfs", "-o", $"size={kilobytes}k", "tmpfs", path);
        Assert.SkipUnless(mounted, "needs the right to mount a small file system in memory");
        return new SmallDisk(path);
    }

    public void Dispose() => Run("umount", Path);

    private static bool Run(string program, params string[] arguments)
    {
        var start = new ProcessStartInfo(program, arguments) { RedirectStandardError = true, UseShellExecute = false };
        using Process? process = Process.Start(start);
        process!.StandardError.ReadToEnd();
        process.WaitForExit();
        return process.ExitCode == 0;
    }
}
