using System.Text.Json;
using System.Text.Json.Serialization;
using TinyLlama.Data;

namespace TinyLlama.Training;

/// <summary>One line of a run's metrics.</summary>
/// <param name="Step">The optimizer steps done before what is recorded, so that a step's own record has its number.</param>
[JsonPolymorphic(TypeDiscriminatorPropertyName = "kind")]
[JsonDerivedType(typeof(StepMetrics), "step")]
[JsonDerivedType(typeof(ValidationMetrics), "validation")]
[JsonDerivedType(typeof(SampleMetrics), "sample")]
[JsonDerivedType(typeof(NoteMetrics), "note")]
public abstract record Metrics(long Step);

/// <summary>A step: the loss before its update, and the update.</summary>
/// <param name="Step">The step, from 0.</param>
/// <param name="Tokens">Tokens trained on up to and with this step.</param>
/// <param name="Loss">Mean over the step's targets, nats per token.</param>
/// <param name="GradientNorm">The global norm before clipping.</param>
/// <param name="LearningRate">The rate of the update.</param>
/// <param name="TokensPerSecond">The speed of the step.</param>
/// <param name="Mfu">Model FLOPs achieved, as a share of the machine's measured peak; null where that is not measured.</param>
public sealed record StepMetrics(
    long Step, long Tokens, double Loss, double GradientNorm, double LearningRate, double TokensPerSecond, double? Mfu)
    : Metrics(Step);

/// <summary>A validation, always on the same tokens.</summary>
/// <param name="Step">Steps done before.</param>
/// <param name="Tokens">Tokens trained on before.</param>
/// <param name="Loss">Mean over the targets, nats per token.</param>
/// <param name="Perplexity">exp(loss).</param>
/// <param name="BitsPerByte">loss · tokens / (ln 2 · bytes); null where the bytes are not known.</param>
public sealed record ValidationMetrics(long Step, long Tokens, double Loss, double Perplexity, double? BitsPerByte)
    : Metrics(Step);

/// <summary>A text that the model wrote.</summary>
/// <param name="Step">Steps done before.</param>
/// <param name="Prompt">What it was given.</param>
/// <param name="Text">What it wrote after that.</param>
public sealed record SampleMetrics(long Step, string Prompt, string Text) : Metrics(Step);

/// <summary>Something that happened to the run: a resume, a setting that changed, a checkpoint set aside.</summary>
/// <param name="Step">Steps done before.</param>
/// <param name="Text">What, in words.</param>
public sealed record NoteMetrics(long Step, string Text) : Metrics(Step);

/// <summary>
/// A run's metrics as JSON lines, one record a line, steps never falling. Written as the run goes; a line that a crash
/// tore is dropped when the log is opened again.
/// </summary>
public sealed class MetricsLog : IDisposable
{
    /// <summary>The file's name in a run's folder.</summary>
    public const string FileName = "metrics.jsonl";

    private readonly FileStream _file;

    private MetricsLog(FileStream file) => _file = file;

    /// <summary>
    /// Opens a log to append to. What was recorded at or after the step that the run goes on with is dropped: the run
    /// does it again, and the log ends as if it had never been stopped.
    /// </summary>
    /// <param name="path">The file; made where it is missing.</param>
    /// <param name="step">The step that comes next; 0 begins the log anew.</param>
    /// <exception cref="UserErrorException">A line in the middle is damaged.</exception>
    public static MetricsLog Open(string path, long step)
    {
        var file = new FileStream(path, FileMode.OpenOrCreate, FileAccess.ReadWrite, FileShare.Read, bufferSize: 0);
        try
        {
            long end = 0;
            foreach ((Metrics record, long byteCount) in ReadLines(file, path))
            {
                if (record.Step >= step)
                {
                    break;
                }

                end += byteCount;
            }

            file.SetLength(end);
            file.Position = end;
            return new MetricsLog(file);
        }
        catch
        {
            file.Dispose();
            throw;
        }
    }

    /// <summary>All whole records of a log; one that is being written may be read.</summary>
    /// <exception cref="UserErrorException">The file is missing, or a line in the middle is damaged.</exception>
    public static IReadOnlyList<Metrics> Read(string path)
    {
        if (!File.Exists(path))
        {
            throw new UserErrorException($"{path}: there are no metrics");
        }

        using var file = new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.ReadWrite);
        return [.. ReadLines(file, path).Select(line => line.Record)];
    }

    /// <summary>Adds a record; it is with the operating system when this returns.</summary>
    /// <exception cref="IOException">The disk is full or gone; the log is as it was before.</exception>
    public void Append(Metrics record)
    {
        byte[] line = JsonSerializer.SerializeToUtf8Bytes(record, MetricsJson.Default.Metrics);
        long end = _file.Position;
        try
        {
            _file.Write([.. line, (byte)'\n']);
        }
        catch (IOException)
        {
            // Half a line would be damage in the middle of the log once the disk has room again.
            _file.SetLength(end);
            _file.Position = end;
            throw;
        }
    }

    /// <inheritdoc/>
    public void Dispose() => _file.Dispose();

    private static IEnumerable<(Metrics Record, long ByteCount)> ReadLines(FileStream file, string path)
    {
#pragma warning disable CA2000 // Disposing the buffer would close the file, which is the caller's.
        var reader = new BufferedStream(file, 1 << 16);
#pragma warning restore CA2000
        var line = new MemoryStream();
        for (long number = 1; ; line.SetLength(0))
        {
            int next;
            while ((next = reader.ReadByte()) is >= 0 and not '\n')
            {
                line.WriteByte((byte)next);
            }

            // Without a line feed at its end, a line is torn.
            if (next < 0)
            {
                yield break;
            }

            yield return (Parse(line, path, number++), line.Length + 1);
        }
    }

    private static Metrics Parse(MemoryStream line, string path, long number)
    {
        try
        {
            return JsonSerializer.Deserialize(line.GetBuffer().AsSpan(0, (int)line.Length), MetricsJson.Default.Metrics)
                ?? throw new JsonException("null is no record");
        }
        catch (Exception error) when (error is JsonException or NotSupportedException)
        {
            throw new UserErrorException($"{path}:{number}: not a record of metrics: {error.Message}", error);
        }
    }
}

/// <summary>How metrics become JSON, without reflection.</summary>
[JsonSourceGenerationOptions(
    PropertyNamingPolicy = JsonKnownNamingPolicy.SnakeCaseLower,
    NumberHandling = JsonNumberHandling.AllowNamedFloatingPointLiterals)]
[JsonSerializable(typeof(Metrics))]
internal sealed partial class MetricsJson : JsonSerializerContext;
