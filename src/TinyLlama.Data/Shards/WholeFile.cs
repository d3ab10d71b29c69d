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
