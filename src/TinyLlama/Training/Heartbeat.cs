using System.Globalization;
using System.Text.Json;
using System.Text.Json.Serialization;

namespace TinyLlama.Training;

/// <summary>What a rank last said of itself, in a file of the run that every other rank and every person can read.</summary>
/// <param name="Rank">Its number.</param>
/// <param name="Size">The number of ranks.</param>
/// <param name="Host">The machine.</param>
/// <param name="Pid">The process there.</param>
/// <param name="Step">The steps that are done, which is the number of the one under way.</param>
/// <param name="Operation">The collective operation that it waits in, <see cref="Ended"/>, or null while it computes.</param>
/// <param name="Operations">Collective operations that are done.</param>
/// <param name="Since">Since when it has been doing that.</param>
/// <param name="Time">When it said so.</param>
public sealed record Heartbeat(
    int Rank, int Size, string Host, int Pid, long Step, string? Operation, long Operations, DateTime Since, DateTime Time)
{
    /// <summary>The folder of a run with a heartbeat and a log for every rank.</summary>
    public const string FolderName = "ranks";

    /// <summary>The operation of a rank that has left the run in good order.</summary>
    public const string Ended = "ended";

    /// <summary>A rank that has been silent for so long is stopped, dead, or cut off from the run's folder.</summary>
    public static readonly TimeSpan Silence = TimeSpan.FromSeconds(30);

    /// <summary>The file of a rank.</summary>
    /// <param name="runFolder">The run.</param>
    /// <param name="rank">The rank.</param>
    /// <param name="extension"><c>json</c> for the heartbeat, <c>log</c> for the log.</param>
    public static string PathOf(string runFolder, int rank, string extension = "json") =>
        Path.Combine(runFolder, FolderName, $"{rank.ToString("D5", CultureInfo.InvariantCulture)}.{extension}");

    /// <summary>Reads a rank's heartbeat; null where there is none that can be read.</summary>
    public static Heartbeat? TryRead(string runFolder, int rank)
    {
        try
        {
            return JsonSerializer.Deserialize(File.ReadAllBytes(PathOf(runFolder, rank)), HeartbeatJson.Default.Heartbeat);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or JsonException)
        {
            return null;
        }
    }

    /// <summary>Puts the heartbeat in the place of the one before; readers see one or the other.</summary>
    /// <exception cref="IOException">The disk is full or gone.</exception>
    public void Write(string runFolder)
    {
        string path = PathOf(runFolder, Rank);
        string unfinished = path + ".tmp";
        File.WriteAllBytes(unfinished, JsonSerializer.SerializeToUtf8Bytes(this, HeartbeatJson.Default.Heartbeat));
        File.Move(unfinished, path, overwrite: true);
    }

    /// <summary>The ranks that the others wait for, and what they do, in one line.</summary>
    /// <param name="own">The heartbeat of a rank that waits.</param>
    /// <param name="others">Those of the other ranks; null for one that has none.</param>
    /// <returns>Such as <c>rank 1 (host a, pid 7) is in step 12 since 14:03:07, computing; the others wait in all-gather of step 12</c>.</returns>
    public static string NameLaggards(Heartbeat own, IReadOnlyList<(int Rank, Heartbeat? Heartbeat)> others)
    {
        List<string> silent =
        [
            .. others
                .Where(other => other.Heartbeat is null || (other.Heartbeat.Operation != Ended && own.Time - other.Heartbeat.Time > Silence))
                .Select(static other => other.Heartbeat is { } last
                    ? $"{last.Describe()}, silent since {Clock(last.Time)}: stopped, dead or cut off"
                    : $"rank {other.Rank} has given no sign of life"),
        ];
        string wait = $"wait in {own.Operation} of step {own.Step} since {Clock(own.Since)}";
        if (silent.Count > 0)
        {
            return $"{string.Join("; ", silent)}; the others {wait}";
        }

        // The one that has done least holds up the rest; one that computes is late before one that waits.
        Heartbeat[] all = [own, .. others.Select(static other => other.Heartbeat!)];
        Heartbeat[] late = [.. all.Where(static rank => rank.Operation is null or Ended)];
        if (late.Length == 0)
        {
            late = [.. all.Where(rank => rank.Operations == all.Min(static other => other.Operations))];
        }

        return late.Length == all.Length
            ? $"all {all.Length} ranks {wait}: look at the network between them"
            : $"{string.Join("; ", late.Select(static rank => rank.Describe()))}; the others {wait}";
    }

    /// <summary>Which rank, where, and what it was doing.</summary>
    public string Describe() => $"rank {Rank} (host {Host}, pid {Pid}) is in step {Step} since {Clock(Since)}, {Operation switch
    {
        null => "computing",
        Ended => "and has ended",
        _ => $"waiting in {Operation}",
    }}";

    private static string Clock(DateTime time) => time.ToString("HH:mm:ss'Z'", CultureInfo.InvariantCulture);
}

/// <summary>How heartbeats become JSON, without reflection.</summary>
[JsonSourceGenerationOptions(PropertyNamingPolicy = JsonKnownNamingPolicy.SnakeCaseLower)]
[JsonSerializable(typeof(Heartbeat))]
internal sealed partial class HeartbeatJson : JsonSerializerContext;
