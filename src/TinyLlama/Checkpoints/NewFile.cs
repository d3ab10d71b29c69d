using TinyLlama.Data;

namespace TinyLlama.Checkpoints;

/// <summary>
/// A file that is written for the first time. Where it may not grow, as beyond 4 GiB on FAT32, a <see cref="FileStream"/>
/// complains about an argument; this throws an <see cref="IOException"/>, as a full disk does.
/// </summary>
internal sealed class NewFile(string path) : FileStream(path, FileMode.CreateNew, FileAccess.Write, FileShare.None, bufferSize: 0)
{
    /// <summary>Throws unless a file may be written: before the work, to say so early.</summary>
    /// <param name="path">The file.</param>
    /// <param name="force">Whether one that is there is replaced.</param>
    /// <exception cref="UserErrorException">It is a folder, or it is there, or its folder takes no new files.</exception>
    public static void RequirePlace(string path, bool force)
    {
        if (Directory.Exists(path))
        {
            throw new UserErrorException($"{path}: is a folder; name a file");
        }

        if (!force && File.Exists(path))
        {
            throw new UserErrorException($"{path}: is there already; name another file, or replace it (--force)");
        }

        RequireFolder(path);
    }

    /// <summary>Throws unless the folder of a new file or folder, or the nearest above that is there, takes new files.</summary>
    /// <exception cref="UserErrorException">It does not: it may not be written, or its file system is read-only.</exception>
    public static void RequireFolder(string path)
    {
        string? folder = Path.GetDirectoryName(Path.GetFullPath(path));
        while (folder is not null && !Directory.Exists(folder))
        {
            folder = Path.GetDirectoryName(folder);
        }

        string probe = Path.Combine(folder ?? "", Path.GetRandomFileName());
        try
        {
            using var file = new FileStream(probe, FileMode.CreateNew, FileAccess.Write, FileShare.None, bufferSize: 0, FileOptions.DeleteOnClose);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new UserErrorException($"{path}: cannot be written, {folder} takes no new files ({e.Message.Replace(probe, folder, StringComparison.Ordinal)}); name another place", e);
        }
    }

    /// <summary>Writes bytes; spans come here too.</summary>
    /// <exception cref="IOException">The disk is full or gone, or the file may not grow.</exception>
    public override void Write(byte[] buffer, int offset, int count)
    {
        try
        {
            base.Write(buffer, offset, count);
        }
        catch (ArgumentOutOfRangeException e)
        {
            throw new IOException($"{Name}: the file system or a limit of this session allows no file of this size; write to another disk", e);
        }
    }
}
