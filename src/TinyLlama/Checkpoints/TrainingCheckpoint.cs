using System.Globalization;
using System.Security.Cryptography;
using System.Text.Json.Nodes;
using TinyLlama.Compute.Native;
using TinyLlama.Data;

namespace TinyLlama.Checkpoints;

/// <summary>
/// A folder <c>checkpoints/step-00001000</c> of a run: a Hugging Face folder (model, config, tokenizer), what resuming
/// needs (optimizer, state), and a manifest with the size and SHA-256 of every file.
/// </summary>
/// <remarks>
/// It is written under another name (<c>.tmp</c>), flushed to the disk and renamed, so that a folder with the right
/// name is whole, whenever the program or the machine stopped. A folder that another hand damaged is told by its hashes.
/// </remarks>
public sealed class TrainingCheckpoint
{
    /// <summary>The model's weights, under Hugging Face names.</summary>
    public const string ModelName = "model.safetensors";

    /// <summary>The optimizer's tensors.</summary>
    public const string OptimizerName = "optimizer.safetensors";

    /// <summary>What else resuming needs: a JSON object of the trainer's.</summary>
    public const string StateName = "state.json";

    /// <summary>The list of the other files.</summary>
    public const string ManifestName = "manifest.json";

    /// <summary>The folder in a run that holds the checkpoints.</summary>
    public const string FolderName = "checkpoints";

    private const int FormatVersion = 1;
    private const string Prefix = "step-";
    private const string Unfinished = ".tmp";
    private const string Replaced = ".replaced";
    private const string Damaged = ".damaged";

    private TrainingCheckpoint(string path, long step, IReadOnlyList<ListedFile> files) => (Path, Step, Files) = (path, step, files);

    /// <summary>Gets the folder.</summary>
    public string Path { get; }

    /// <summary>Gets the number of steps that made it.</summary>
    public long Step { get; }

    /// <summary>Gets the files that the manifest lists.</summary>
    public IReadOnlyList<ListedFile> Files { get; }

    /// <summary>Gets the size of all files, in bytes.</summary>
    public long ByteCount => Files.Sum(static file => file.ByteCount);

    /// <summary>Writes the checkpoint of a step; one that is already there for this step is replaced once the new one is whole.</summary>
    /// <param name="runFolder">The run.</param>
    /// <param name="step">Number of steps done.</param>
    /// <param name="write">Writes every file except the manifest.</param>
    /// <exception cref="IOException">
    /// The disk is full or gone. What was begun is removed, earlier checkpoints are as they were: training can go on.
    /// </exception>
    public static TrainingCheckpoint Save(string runFolder, long step, Action<FolderWriter> write)
    {
        try
        {
            Begin(runFolder, step);
            FolderWriter writer = Join(runFolder, step);
            write(writer);
            return Commit(runFolder, step, writer.Files);
        }
        catch (Exception e)
        {
            Abandon(runFolder, step);
            if (e is UnauthorizedAccessException)
            {
                throw new IOException(e.Message, e);
            }

            throw;
        }
    }

    /// <summary>
    /// Makes the folder into which ranks write the checkpoint of a step: one of them calls this before any calls
    /// <see cref="Join"/>, and when all files are on the disk <see cref="Commit"/>, or else <see cref="Abandon"/>.
    /// </summary>
    /// <exception cref="IOException">The disk is full or gone.</exception>
    /// <exception cref="UnauthorizedAccessException">The run's folder may not be written.</exception>
    internal static void Begin(string runFolder, long step)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(step);
        string unfinished = PathOf(runFolder, step) + Unfinished;
        DeleteIfThere(unfinished);
        Directory.CreateDirectory(unfinished);
    }

    /// <summary>Writes a rank's files of the checkpoint that another one began.</summary>
    /// <exception cref="IOException">Its folder is not to be seen here.</exception>
    internal static FolderWriter Join(string runFolder, long step)
    {
        string unfinished = PathOf(runFolder, step) + Unfinished;
        return Directory.Exists(unfinished)
            ? new FolderWriter(unfinished)
            : throw new IOException($"{unfinished}: not found; the run's folder must be the same one on every host");
    }

    /// <summary>Turns what the ranks wrote into a checkpoint.</summary>
    /// <param name="runFolder">The run.</param>
    /// <param name="step">The step that was begun.</param>
    /// <param name="files">The files of all ranks.</param>
    /// <exception cref="IOException">The disk is full or gone, or a file is not there in its size.</exception>
    /// <exception cref="UnauthorizedAccessException">The run's folder may not be written.</exception>
    internal static TrainingCheckpoint Commit(string runFolder, long step, IReadOnlyList<ListedFile> files)
    {
        string path = PathOf(runFolder, step);
        string unfinished = path + Unfinished;
        foreach (ListedFile file in files)
        {
            if (Fault(unfinished, file) is string fault)
            {
                throw new IOException(fault);
            }
        }

        new FolderWriter(unfinished).WriteText(ManifestName, Manifest(step, files));
        DirectoryFlush.Flush(unfinished);
        Publish(unfinished, path);
        DirectoryFlush.Flush(System.IO.Path.GetDirectoryName(path)!);
        DirectoryFlush.Flush(runFolder);
        return new TrainingCheckpoint(path, step, files);
    }

    /// <summary>Removes what was begun, as far as the disk lets it; the next start removes the rest.</summary>
    internal static void Abandon(string runFolder, long step)
    {
        string path = PathOf(runFolder, step);
        try
        {
            DeleteIfThere(path + Unfinished);
            if (!Directory.Exists(path) && Directory.Exists(path + Replaced))
            {
                Directory.Move(path + Replaced, path);
            }

            string folder = System.IO.Path.GetDirectoryName(path)!;
            if (Directory.Exists(folder) && !Directory.EnumerateFileSystemEntries(folder).Any())
            {
                Directory.Delete(folder);
            }
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            // The caller has a failure to tell of already.
        }
    }

    /// <summary>Reads a checkpoint's manifest and checks that its files are there in their sizes. Hashes: <see cref="Verify"/>.</summary>
    /// <exception cref="UserErrorException">The manifest or a file is missing, damaged or of an unknown version.</exception>
    public static TrainingCheckpoint Open(string path)
    {
        JsonKeys manifest = JsonKeys.Read(System.IO.Path.Combine(path, ManifestName));
        long version = manifest.Integer("version", 1, long.MaxValue);
        if (version != FormatVersion)
        {
            throw manifest.Error("version", $"is {version}, this program knows version {FormatVersion}: use a newer one");
        }

        long step = manifest.Integer("step", 0, long.MaxValue);
        var files = new List<ListedFile>();
        JsonKeys listed = manifest.Object("files") ?? throw manifest.Error("files", "is missing");
        foreach (string name in listed.Names)
        {
            // A manifest must not lead out of its folder.
            if (name.Length == 0 || name is "." or ".." || name.IndexOfAny(['/', '\\', ':', '\0']) >= 0)
            {
                throw listed.Error(name, "is not a plain file name");
            }

            JsonKeys keys = listed.Object(name) ?? throw listed.Error(name, "is null");
            string hash = keys.Text("sha256") ?? throw keys.Error("sha256", "is missing");
            var file = new ListedFile(name, keys.Integer("bytes", 0, long.MaxValue), hash);
            if (Fault(path, file) is string fault)
            {
                throw new UserErrorException(fault);
            }

            files.Add(file);
        }

        return new TrainingCheckpoint(path, step, files);
    }

    /// <summary>The folder of a step's checkpoint.</summary>
    public static string PathOf(string runFolder, long step) => System.IO.Path.Combine(runFolder, FolderName, Name(step));

    /// <summary>The checkpoints of a run by their folders' names, oldest first; nothing in them is read.</summary>
    public static IReadOnlyList<(long Step, string Path)> List(string runFolder)
    {
        string folder = System.IO.Path.Combine(runFolder, FolderName);
        if (!Directory.Exists(folder))
        {
            return [];
        }

        // By number, not by name: names sort wrongly once a number outgrows its zeros.
        return
        [
            .. Directory.EnumerateDirectories(folder)
                .Select(static path => (Step: StepOf(path), path))
                .Where(static found => found.Step >= 0)
                .OrderBy(static found => found.Step),
        ];
    }

    /// <summary>
    /// Finds the checkpoint to resume from: the newest whose manifest and hashes hold. Damaged ones are set aside by
    /// renaming, and what an interrupted save left is removed. Only for the program that trains the run.
    /// </summary>
    /// <param name="runFolder">The run.</param>
    /// <param name="warn">Is told, in one line, what was set aside and why.</param>
    /// <returns>The checkpoint, or null where there is none.</returns>
    public static TrainingCheckpoint? FindNewestValid(string runFolder, Action<string> warn)
    {
        Tidy(runFolder);
        foreach ((long _, string path) in List(runFolder).Reverse())
        {
            IReadOnlyList<string> faults = Verify(path);
            if (faults.Count == 0)
            {
                return Open(path);
            }

            string aside = FreeName(path + Damaged);
            Directory.Move(path, aside);
            warn($"{faults[0]}; the checkpoint is set aside as {aside}");
        }

        return null;
    }

    /// <summary>Finds the newest checkpoint to read from, and changes nothing: for programs beside the one that trains.</summary>
    /// <param name="runFolder">The run.</param>
    /// <param name="warn">Is told, in one line, which newer checkpoint is damaged.</param>
    /// <returns>The checkpoint, or null where there is none. Its hashes are not verified.</returns>
    public static TrainingCheckpoint? FindNewest(string runFolder, Action<string> warn)
    {
        foreach ((long _, string path) in List(runFolder).Reverse())
        {
            try
            {
                return Open(path);
            }
            catch (UserErrorException e)
            {
                warn($"{e.Message}; this checkpoint is passed over");
            }
        }

        return null;
    }

    /// <summary>Reads every byte of a checkpoint and compares it with the manifest.</summary>
    /// <param name="path">The checkpoint's folder.</param>
    /// <returns>What is wrong, a line each; nothing where all is well.</returns>
    public static IReadOnlyList<string> Verify(string path)
    {
        TrainingCheckpoint checkpoint;
        try
        {
            checkpoint = Open(path);
        }
        catch (UserErrorException e)
        {
            return [e.Message];
        }

        var faults = new List<string>();
        if (StepOf(path) is var step and >= 0 && step != checkpoint.Step)
        {
            faults.Add($"{path}: the manifest is that of step {checkpoint.Step}");
        }

        foreach (ListedFile file in checkpoint.Files)
        {
            string filePath = System.IO.Path.Combine(path, file.Name);
            try
            {
                using var stream = new FileStream(filePath, FileMode.Open, FileAccess.Read, FileShare.Read, bufferSize: 0);
                if (Convert.ToHexStringLower(SHA256.HashData(stream)) != file.Sha256)
                {
                    faults.Add($"{filePath}: damaged, its SHA-256 is not the manifest's");
                }
            }
            catch (Exception e) when (e is IOException or UnauthorizedAccessException)
            {
                faults.Add($"{filePath}: cannot be read: {e.Message}");
            }
        }

        return faults;
    }

    /// <summary>Deletes a checkpoint so that no moment shows half of one under its name.</summary>
    internal static void Delete(string path)
    {
        string unfinished = path + Unfinished;
        DeleteIfThere(unfinished);
        Directory.Move(path, unfinished);
        Directory.Delete(unfinished, recursive: true);
    }

    private static string Name(long step) => Prefix + step.ToString("D8", CultureInfo.InvariantCulture);

    // Only the name that Save gives counts: not 'step-5', not 'step-00000005.tmp'.
    private static long StepOf(string path)
    {
        string name = System.IO.Path.GetFileName(path);
        return name.StartsWith(Prefix, StringComparison.Ordinal)
            && long.TryParse(name.AsSpan(Prefix.Length), NumberStyles.None, CultureInfo.InvariantCulture, out long step)
            && Name(step) == name
            ? step
            : -1;
    }

    // What is wrong with a listed file, hashes apart; null where nothing is.
    private static string? Fault(string folder, ListedFile file)
    {
        var info = new FileInfo(System.IO.Path.Combine(folder, file.Name));
        if (info.Exists && info.Length == file.ByteCount)
        {
            return null;
        }

        string state = info.Exists ? $"has {info.Length} bytes" : "is missing";
        return $"{info.FullName}: {state}, the manifest says {file.ByteCount} bytes";
    }

    private static string Manifest(long step, IReadOnlyList<ListedFile> files)
    {
        var listed = new JsonObject();
        foreach (ListedFile file in files)
        {
            listed[file.Name] = new JsonObject { ["bytes"] = file.ByteCount, ["sha256"] = file.Sha256 };
        }

        return new JsonObject { ["version"] = FormatVersion, ["step"] = step, ["files"] = listed }.ToJsonString(JsonText.Indented) + "\n";
    }

    // A directory cannot replace another in one step; the old one waits under a name that Tidy knows how to undo.
    private static void Publish(string unfinished, string path)
    {
        string replaced = path + Replaced;
        if (!Directory.Exists(path))
        {
            Directory.Move(unfinished, path);
            return;
        }

        DeleteIfThere(replaced);
        Directory.Move(path, replaced);
        Directory.Move(unfinished, path);
        Directory.Delete(replaced, recursive: true);
    }

    private static void Tidy(string runFolder)
    {
        string folder = System.IO.Path.Combine(runFolder, FolderName);
        if (!Directory.Exists(folder))
        {
            return;
        }

        foreach (string path in Directory.GetDirectories(folder, Prefix + "*"))
        {
            if (path.EndsWith(Unfinished, StringComparison.Ordinal))
            {
                Directory.Delete(path, recursive: true);
            }
            else if (path.EndsWith(Replaced, StringComparison.Ordinal))
            {
                string original = path[..^Replaced.Length];
                if (Directory.Exists(original))
                {
                    Directory.Delete(path, recursive: true);
                }
                else
                {
                    Directory.Move(path, original);
                }
            }
        }
    }

    private static string FreeName(string path)
    {
        string free = path;
        for (int number = 2; System.IO.Path.Exists(free); number++)
        {
            free = $"{path}-{number}";
        }

        return free;
    }

    private static void DeleteIfThere(string path)
    {
        if (Directory.Exists(path))
        {
            Directory.Delete(path, recursive: true);
        }
    }
}
