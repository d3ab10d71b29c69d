using System.Security.Cryptography;
using System.Text;
using System.Text.Json.Nodes;
using TinyLlama.Checkpoints;
using TinyLlama.Compute.Native;
using TinyLlama.Data;

namespace TinyLlama.Training;

/// <summary>
/// The proof that a run is finished: a file that is written once the last checkpoint is on the disk. Exit codes are none,
/// since a launcher may report success where a rank was lost.
/// </summary>
/// <param name="Step">The last step.</param>
/// <param name="Tokens">Tokens trained on.</param>
/// <param name="Checkpoint">The last checkpoint's folder, within the run's.</param>
/// <param name="ManifestSha256">Hash of that checkpoint's manifest, which has those of its files.</param>
public sealed record EndRecord(long Step, long Tokens, string Checkpoint, string ManifestSha256)
{
    /// <summary>The file's name in a run's folder.</summary>
    public const string FileName = "finished.json";

    /// <summary>Writes the record of a run whose last checkpoint is durable; without that checkpoint there is none.</summary>
    /// <param name="runFolder">The run.</param>
    /// <param name="step">The last step.</param>
    /// <param name="tokens">Tokens trained on.</param>
    /// <exception cref="IOException">The disk is full or gone.</exception>
    public static void Write(string runFolder, long step, long tokens)
    {
        if (TrainingCheckpoint.List(runFolder) is not [.., (long newest, string checkpoint)] || newest != step)
        {
            return;
        }

        string path = Path.Combine(runFolder, FileName);
        string unfinished = path + ".tmp";
        File.Delete(unfinished);
        using (var file = new NewFile(unfinished))
        {
            file.Write(Encoding.UTF8.GetBytes(new JsonObject
            {
                ["step"] = step,
                ["tokens"] = tokens,
                ["checkpoint"] = Path.GetRelativePath(runFolder, checkpoint).Replace('\\', '/'),
                ["manifest_sha256"] = HashOf(checkpoint),
            }.ToJsonString(JsonText.Indented) + "\n"));
            file.Flush(flushToDisk: true);
        }

        File.Move(unfinished, path, overwrite: true);
        DirectoryFlush.Flush(runFolder);
    }

    /// <summary>Reads the record of a run; null where it is not finished, or its last checkpoint is not the one recorded.</summary>
    public static EndRecord? Find(string runFolder)
    {
        string path = Path.Combine(runFolder, FileName);
        if (!File.Exists(path))
        {
            return null;
        }

        try
        {
            JsonKeys keys = JsonKeys.Read(path);
            var record = new EndRecord(
                keys.Integer("step", 0, long.MaxValue), keys.Integer("tokens", 0, long.MaxValue),
                keys.Text("checkpoint") ?? "", keys.Text("manifest_sha256") ?? "");
            return HashOf(Path.Combine(runFolder, record.Checkpoint)) == record.ManifestSha256 ? record : null;
        }
        catch (Exception e) when (e is UserErrorException or IOException or UnauthorizedAccessException)
        {
            return null;
        }
    }

    /// <summary>Removes the record: the run goes on beyond it.</summary>
    public static void Remove(string runFolder) => File.Delete(Path.Combine(runFolder, FileName));

    private static string HashOf(string checkpoint) =>
        Convert.ToHexStringLower(SHA256.HashData(File.ReadAllBytes(Path.Combine(checkpoint, TrainingCheckpoint.ManifestName))));
}
