using System.Diagnostics;
using System.Globalization;
using System.Text.Json.Nodes;
using TinyLlama.Checkpoints;
using TinyLlama.Compute;
using TinyLlama.Compute.Cpu;
using TinyLlama.Compute.Cuda;
using TinyLlama.Data;
using TinyLlama.Inference;
using TinyLlama.Model;

namespace TinyLlama.Cli.Bench;

/// <summary>What a round of inference is.</summary>
/// <param name="Sequences">Sequences that run together.</param>
/// <param name="Depth">Tokens that each has before the round, unmeasured.</param>
/// <param name="Tokens">Tokens of each in the round: prefilled in one piece, or decoded one after the other.</param>
/// <param name="Decode">Whether they are decoded.</param>
/// <param name="CacheType">What keys and values are rounded to; null for what the device likes best.</param>
internal readonly record struct InferenceRound(int Sequences, int Depth, int Tokens, bool Decode, DType? CacheType);

/// <summary>Prefill or decode of random tokens with a model from files, and where the time goes.</summary>
/// <param name="Config">The model's shape.</param>
/// <param name="Round">What was measured.</param>
/// <param name="Time">The time of a round.</param>
/// <param name="Load">Seconds from nothing to the first token.</param>
/// <param name="WeightBytes">Bytes of the weights in memory.</param>
/// <param name="PeakBytes">The most memory that the process held at any time; of a GPU, what the model holds of its memory.</param>
/// <param name="Ceiling">What the machine can do at best: the better of before and after.</param>
/// <param name="Operations">A round by operation, the longest first.</param>
internal sealed record InferenceBench(
    ModelConfig Config, InferenceRound Round, Duration Time, double Load, long WeightBytes, long PeakBytes, Ceiling Ceiling,
    IReadOnlyList<Measurement> Operations)
{
    private const int LeastRounds = 3;
    private static readonly int[] s_firstToken = [1];

    private int Tokens => Round.Sequences * Round.Tokens;

    /// <summary>Measures.</summary>
    /// <param name="device">The device.</param>
    /// <param name="path">The model.</param>
    /// <param name="round">What to measure.</param>
    /// <param name="seconds">How long to measure; at least three rounds are.</param>
    /// <param name="stop">Ends it between two rounds.</param>
    /// <exception cref="UserErrorException">There is no such model.</exception>
    public static InferenceBench Run(Backend device, string path, InferenceRound round, double seconds, CancellationToken stop)
    {
        long start = Stopwatch.GetTimestamp(), held = (device as CudaBackend)?.HeldBytes ?? 0;
        bool together = device is CpuBackend;
        using var backend = new TimedBackend(device) { Times = together };
        using ModelSource source = ModelSource.Open(path, Console.Error.WriteLine);
        using LlamaModel model = LlamaModel.AllocateFrozen(source.Config, backend, source.FrozenStorageOf);
        source.CopyTo(backend, model.Parameters);
        using var engine = new InferenceEngine(model, backend, round.Depth + round.Tokens + 1, round.Sequences, cacheType: round.CacheType);
        CachedSequence[] sequences = [.. Enumerable.Range(0, round.Sequences).Select(_ => engine.Begin())];
        var random = new Random(1);
        int rowWidth = engine.TopLogitsCount > 0 ? TopLogitsRow.Width(engine.TopLogitsCount) : engine.VocabularySize;
        float[] logits = new float[round.Sequences * rowWidth], inverseTemperatures = new float[round.Sequences];
        Array.Fill(inverseTemperatures, 1);
        engine.Forward(new Continuation(sequences[0], s_firstToken));
        ReadLogits(1);
        double load = Stopwatch.GetElapsedTime(start).TotalSeconds;

        // The ceiling first touches what it reads: after the peak is taken.
        Once();
        backend.TakeTimes();
        List<double> times = [];
        using (ProgressDisplay progress = ProgressDisplay.Start("bench", 0, "rounds"))
        {
            while (times.Count < LeastRounds || times.Sum() < seconds)
            {
                stop.ThrowIfCancellationRequested();
                times.Add(Once());
                backend.EndRound();
                progress.Report(times.Count, "");
            }
        }

        if (!together)
        {
            backend.Times = true;
            Once();
            backend.EndRound();
        }

        using var process = Process.GetCurrentProcess();
        long peakBytes = device is CudaBackend gpu ? gpu.HeldBytes - held : process.PeakWorkingSet64;
        OperationTimes[] operations = backend.TakeTimes();
        Ceiling ceiling = Ceiling.Measure(device);
        var shape = new BenchModel(Path.GetFileName(path), source.Config, round.Sequences);
        return new InferenceBench(
            source.Config, round, Duration.Of(times), load, model.ByteCount, peakBytes, ceiling,
            [
                .. operations
                    .Where(operation => operation.Rounds.Count == (together ? times.Count : 1))
                    .Select(operation => new Measurement(shape.NameOf(operation.Operation), operation, ceiling))
                    .OrderByDescending(operation => operation.Time.Median),
            ]);

        double Once()
        {
            foreach (CachedSequence sequence in sequences)
            {
                engine.Truncate(sequence, 0);
                engine.Feed(sequence, Random(round.Depth), stop);
            }

            backend.ForgetRound();
            long begin = Stopwatch.GetTimestamp();
            int forwards = round.Decode ? round.Tokens : 1;
            for (int i = 0; i < forwards; i++)
            {
                if (round.Decode)
                {
                    engine.Forward([.. sequences.Select(sequence => new Continuation(sequence, Random(1)))]);
                }
                else
                {
                    foreach (CachedSequence sequence in sequences)
                    {
                        engine.Feed(sequence, Random(round.Tokens), stop);
                    }
                }

                ReadLogits(round.Decode ? round.Sequences : 1);
            }

            return Stopwatch.GetElapsedTime(begin).TotalSeconds;
        }

        // What the next tokens are chosen from.
        void ReadLogits(int parts)
        {
            Span<float> rows = logits.AsSpan(0, parts * rowWidth);
            if (engine.TopLogitsCount > 0)
            {
                engine.ReadTopLogits(rows, inverseTemperatures.AsSpan(0, parts), engine.VocabularySize);
            }
            else
            {
                engine.ReadLogits(rows);
            }
        }

        int[] Random(int count) => [.. Enumerable.Range(0, count).Select(_ => random.Next(engine.VocabularySize))];
    }

    /// <summary>Writes it for people.</summary>
    public void Write(TextWriter output)
    {
        void Row(string name, FormattableString value) => output.WriteLine($"{name,-12} {value.ToString(CultureInfo.InvariantCulture)}");

        string what = Round.Decode ? "decoded one after the other" : "prefilled";
        Row("model", $"{Config.ParameterCount:N0} parameters, {WeightBytes / (double)(1 << 20):N0} MiB of weights");
        Row("round", $"{Round.Sequences} × {Round.Tokens} tokens {what}, after {Round.Depth}");
        Row("tokens/s", $"{Tokens / Time.Best:N1} best, {Tokens / Time.Median:N1} median");
        if (Round.Decode)
        {
            double rate = Operations.Sum(static operation => operation.Times.Bytes) / Time.Best / 1e9;
            Row("memory", $"{rate:N1} GB/s read and written at best, {rate / Ceiling.Bytes:P0} of the ceiling");
        }

        Row("first token", $"{Load * 1e3:N0} ms after the start of loading");
        Row("peak memory", $"{PeakBytes / (double)(1 << 20):N0} MiB of the {(Ceiling.OneThread > 0 ? "whole process" : "GPU")}");
        output.WriteLine();
        BenchOutput.Write(output, Operations);
    }

    /// <summary>For <c>--json</c>.</summary>
    public JsonObject ToJson() => new()
    {
        ["parameters"] = Config.ParameterCount,
        ["weight_bytes"] = WeightBytes,
        ["sequences"] = Round.Sequences,
        ["depth"] = Round.Depth,
        ["tokens"] = Round.Tokens,
        ["decode"] = Round.Decode,
        ["cache_type"] = Round.CacheType?.ToString(),
        ["best_tokens_per_second"] = Tokens / Time.Best,
        ["median_tokens_per_second"] = Tokens / Time.Median,
        ["first_token_seconds"] = Load,
        ["peak_bytes"] = PeakBytes,
        ["all_threads_read_gigabytes_per_second"] = Ceiling.Bytes,
        ["operations"] = BenchOutput.ToJson(Operations),
    };
}
