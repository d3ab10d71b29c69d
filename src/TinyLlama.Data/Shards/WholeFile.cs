using System.Security.Cryptography;
using Microsoft.Win32.SafeHandles;

namespace TinyLlama.Data.Shards;

/// <summary>Files that are there in full or not at all.</summary>
internal static class WholeFile
{
    /// <summary>Replaces a file by way of a temporary one beside it, so that a crash leaves the old or the new.</summary>
    /// <param name="path">The file.</param>
    /// <param name="content">Its bytes.</param>
    public static void Write(string path, ReadOnlySpan<byte> content)
    {
        string temporary = path + ".tmp";
        using (FileStream file = new(temporary, FileMode.Create, FileAccess.Write, FileShare.None, bufferSize: 0))
        {
            file.Write(content);
            file.Flush(flushToDisk: true);
        }

        File.Move(temporary, path, overwrite: true);
    }

    /// <summary>Replaces files of a folder, none of them before all are written.</summary>
    /// <param name="folder">The folder.</param>
    /// <param name="files">Their names and bytes.</param>
    public static void WriteAll(string folder, IReadOnlyList<(string Name, byte[] Content)> files)
    {
        try
        {
            foreach ((string name, byte[] content) in files)
            {
                using FileStream file = new(Temporary(name), FileMode.Create, FileAccess.Write, FileShare.None, bufferSize: 0);
                file.Write(content);
                file.Flush(flushToDisk: true);
            }

            foreach ((string name, _) in files)
            {
                File.Move(Temporary(name), Path.Combine(folder, name), overwrite: true);
            }
        }
        finally
        {
            foreach (string left in files.Select(file => Temporary(file.Name)).Where(File.Exists))
            {
                File.Delete(left);
            }
        }

        string Temporary(string name) => Path.Combine(folder, name + ".tmp");
    }

    /// <summary>The SHA-256 of a file in lower-case hexadecimal.</summary>
    /// <param name="path">The file.</param>
    public static string Sha256(string path)
    {
        using FileStream file = new(path, FileMode.Open, FileAccess.Read, FileShare.Read, bufferSize: 1 << 20, FileOptions.SequentialScan);
        return Convert.ToHexStringLower(SHA256.HashData(file));
    }

    /// <summary>Reads bytes at a place of a file.</summary>
    /// <returns>How many there were: fewer than asked for at the end of the file only.</returns>
    public static int ReadAt(SafeFileHandle file, Span<byte> destination, long offset)
    {
        int done = 0;
        while (done < destination.Length && RandomAccess.Read(file, destination[done..], offset + done) is int read and > 0)
        {
            done += read;
        }

        return done;
    }
}
