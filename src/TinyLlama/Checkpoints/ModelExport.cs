using TinyLlama.Compute;
using TinyLlama.Compute.Native;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Checkpoints;

/// <summary>Writes a model as a Hugging Face folder that other programs load.</summary>
public static class ModelExport
{
    /// <summary>Writes the folder beside its place and renames it, so that it is never seen half written.</summary>
    /// <param name="folder">Where to; it must be absent or empty, unless <paramref name="force"/>.</param>
    /// <param name="source">The model.</param>
    /// <param name="type">What its weights are stored in: F32, BF16 or F16.</param>
    /// <param name="tokenizer">The tokenizer; null where the model comes without one.</param>
    /// <param name="originals">A folder whose tokenizer files are taken as they are, or null.</param>
    /// <param name="force">Whether files in the folder are replaced, one by one; others stay.</param>
    /// <param name="progress">Is told the number of elements written so far.</param>
    /// <returns>What was written.</returns>
    /// <exception cref="UserErrorException">The folder is not empty.</exception>
    /// <exception cref="IOException">The disk is full or gone; what was begun is removed.</exception>
    public static IReadOnlyList<ListedFile> Write(
        string folder,
        ModelSource source,
        DType type,
        BpeTokenizer? tokenizer,
        string? originals = null,
        bool force = false,
        Action<long>? progress = null)
    {
        folder = Path.TrimEndingDirectorySeparator(Path.GetFullPath(folder));
        RequirePlace(folder, force);
        string unfinished = $"{folder}.{Path.GetRandomFileName()}.tmp";
        try
        {
            Directory.CreateDirectory(unfinished);
            var writer = new FolderWriter(unfinished);
            writer.WriteModel(source, type, tokenizer, originals, progress);
            DirectoryFlush.Flush(unfinished);
            Publish(unfinished, folder);
            return writer.Files;
        }
        finally
        {
            if (Directory.Exists(unfinished))
            {
                Directory.Delete(unfinished, recursive: true);
            }
        }
    }

    /// <summary>Throws unless a folder may be written: before the work, to say so early.</summary>
    /// <param name="folder">The folder.</param>
    /// <param name="force">Whether it may hold something; null where nobody can ask for that.</param>
    /// <exception cref="UserErrorException">It is a file, or not empty, or its folder takes no new files.</exception>
    public static void RequirePlace(string folder, bool? force)
    {
        if (File.Exists(folder))
        {
            throw new UserErrorException($"{folder}: is a file; name a folder");
        }

        if (force != true && Directory.Exists(folder) && Directory.EnumerateFileSystemEntries(folder).Any())
        {
            throw new UserErrorException($"{folder}: is not empty; name another folder{(force is null ? "" : ", or replace files in it with --force")}");
        }

        NewFile.RequireFolder(folder);
    }

    private static void Publish(string unfinished, string folder)
    {
        if (Directory.Exists(folder) && Directory.EnumerateFileSystemEntries(folder).Any())
        {
            foreach (string file in Directory.GetFiles(unfinished))
            {
                File.Move(file, Path.Combine(folder, Path.GetFileName(file)), overwrite: true);
            }

            DirectoryFlush.Flush(folder);
            return;
        }

        if (Directory.Exists(folder))
        {
            Directory.Delete(folder);
        }

        Directory.Move(unfinished, folder);
        DirectoryFlush.Flush(Path.GetDirectoryName(folder) ?? folder);
    }
}
