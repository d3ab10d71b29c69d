using System.Text.Json;
using System.Text.Json.Nodes;
using TinyLlama.Compute;
using TinyLlama.Data;

namespace TinyLlama.Training;

/// <summary>Where a run stands between two steps: with the weights and the moments, all that resuming needs.</summary>
/// <param name="Step">Optimizer steps done.</param>
/// <param name="Tokens">Tokens trained on.</param>
/// <param name="Samples">Sequences trained on; the loader's position.</param>
/// <param name="Seconds">Time spent in steps, over all sittings.</param>
/// <param name="DataSha256">Hash of the manifest of the token shards.</param>
/// <param name="Device"><see cref="Backend.Arithmetic"/>: another one gives other last bits.</param>
public sealed record TrainingState(long Step, long Tokens, long Samples, double Seconds, string DataSha256, string Device)
{
    private const int FormatVersion = 1;

    /// <summary>The JSON object that a checkpoint keeps.</summary>
    public string ToJson() => new JsonObject
    {
        ["version"] = FormatVersion,
        ["step"] = Step,
        ["tokens"] = Tokens,
        ["samples"] = Samples,
        ["seconds"] = Seconds,
        ["data_sha256"] = DataSha256,
        ["device"] = Device,
    }.ToJsonString(new JsonSerializerOptions { WriteIndented = true }) + "\n";

    /// <summary>Reads what <see cref="ToJson"/> wrote.</summary>
    /// <param name="path">The file.</param>
    /// <exception cref="UserErrorException">It is damaged or of another version.</exception>
    public static TrainingState Read(string path)
    {
        try
        {
            JsonNode json = JsonNode.Parse(File.ReadAllText(path)) ?? throw new FormatException("it is null");
            int version = json["version"]!.GetValue<int>();
            if (version != FormatVersion)
            {
                throw new UserErrorException($"{path}: version {version}, this program knows version {FormatVersion}: use a newer one");
            }

            return new TrainingState(
                json["step"]!.GetValue<long>(), json["tokens"]!.GetValue<long>(), json["samples"]!.GetValue<long>(),
                json["seconds"]!.GetValue<double>(), json["data_sha256"]!.GetValue<string>(), json["device"]!.GetValue<string>());
        }
        catch (Exception e) when (e is JsonException or FormatException or InvalidOperationException or NullReferenceException)
        {
            throw new UserErrorException($"{path}: not the state of a training run: {e.Message}", e);
        }
    }
}
