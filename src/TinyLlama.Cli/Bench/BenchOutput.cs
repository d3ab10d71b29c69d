using System.Globalization;
using System.Text.Json.Nodes;
using TinyLlama.Compute;
using TinyLlama.Model;

namespace TinyLlama.Cli.Bench;

/// <summary>Measurements as tables for people or as JSON.</summary>
internal static class BenchOutput
{
    /// <summary>Writes a table of operations.</summary>
    /// <param name="output">Where to.</param>
    /// <param name="operations">The rows.</param>
    public static void Write(TextWriter output, IReadOnlyList<Measurement> operations)
    {
        int name = operations.Select(o => o.Name.Length).Append("operation".Length).Max();
        int shape = operations.Select(o => o.Times.Operation.Shape.Length).Append("N × O × I".Length).Max();
        output.WriteLine(
            $"{"operation".PadRight(name)} {"N × O × I".PadRight(shape)} calls   ms best    median      MFLOP        MB  GFLOP/s    GB/s  floor ms  of ceiling");
        foreach (Measurement o in operations)
        {
            OperationTimes times = o.Times;
            output.WriteLine(string.Create(
                CultureInfo.InvariantCulture,
                $"{o.Name.PadRight(name)} {times.Operation.Shape.PadRight(shape)} {times.Calls,5} {o.Time.Best * 1e3,9:F3} {o.Time.Median * 1e3,9:F3} {times.Flops / 1e6,10:F1} {times.Bytes / 1e6,9:F2} {times.Flops / o.Time.Best / 1e9,8:F1} {times.Bytes / o.Time.Best / 1e9,7:F1} {o.Floor * 1e3,9:F3} {o.Floor / o.Time.Best,10:P0}"));
        }
    }

    /// <summary>Writes a training step.</summary>
    public static void Write(TextWriter output, TrainBench bench)
    {
        (BenchModel model, Duration step) = (bench.Model, bench.Step);
        void Row(string name, FormattableString value) =>
            output.WriteLine($"{name,-12} {value.ToString(CultureInfo.InvariantCulture)}");

        string Both(Func<double, double> of, string format) =>
            $"{of(step.Best).ToString(format, CultureInfo.InvariantCulture)} best, {of(step.Median).ToString(format, CultureInfo.InvariantCulture)} median";

        Row("model", $"{model.Name}: {model.Config.ParameterCount:N0} parameters, {model.Sequences} × {model.Config.ContextLength} tokens a step, {bench.Steps} steps{(model.Keep == Keep.Everything ? "" : $", recompute {model.Recompute}")}");
        Row("step", $"{Both(s => s * 1e3, "N1")} ms");
        Row("tokens/s", $"{Both(s => model.Tokens / s, "N0")}");
        Row("GFLOP/s", $"{Both(s => bench.StepFlops / s / 1e9, "N1")}");
        Row("of ceiling", $"{Both(s => bench.StepFlops / s / (bench.Ceiling.Flops * 1e9), "P0")}");
        if (bench.Ceiling.OneThread > 0)
        {
            Row("processor", $"{bench.ProcessorSeconds * 1e3:N1} ms a step of all threads, {bench.StepFlops / bench.ProcessorSeconds / (bench.Ceiling.OneThread * 1e9):P0} of the ceiling of one");
        }

        Row("peak memory", $"{bench.PeakBytes / (double)(1 << 20):N0} MiB of the {(bench.Ceiling.OneThread > 0 ? "whole process" : "GPU")}");
        output.WriteLine();
        Write(output, bench.Operations);
        if (bench.Ceiling.OneThread == 0)
        {
            output.WriteLine("operations were measured one by one, in other steps: each is waited for");
        }

        double products = bench.Operations.Where(o => o.Times.Operation.Tokens > 0).Sum(o => o.Time.Mean);
        double others = bench.Operations.Sum(o => o.Time.Mean) - products;
        output.WriteLine(string.Create(
            CultureInfo.InvariantCulture,
            $"on average: matrix products {products * 1e3:F1} ms, other operations {others * 1e3:F1} ms, between them {(step.Mean - products - others) * 1e3:F1} ms"));
    }

    /// <summary>Writes what a run of <c>bench</c> is measured against.</summary>
    public static void Write(TextWriter output, Backend device, Ceiling ceiling) => output.WriteLine(string.Create(
        CultureInfo.InvariantCulture,
        $"{device.Description}; ceiling {ceiling.Flops:F1} GFLOP/s of multiply-adds, {ceiling.Bytes:F1} GB/s of memory, measured in this run"));

    /// <summary>Operations for <c>--json</c>.</summary>
    public static JsonArray ToJson(IReadOnlyList<Measurement> operations) => new([.. operations.Select(o => new JsonObject
    {
        ["name"] = o.Name,
        ["tokens"] = o.Times.Operation.Tokens,
        ["outputs"] = o.Times.Operation.Outputs,
        ["inputs"] = o.Times.Operation.Inputs,
        ["calls"] = o.Times.Calls,
        ["best_seconds"] = o.Time.Best,
        ["median_seconds"] = o.Time.Median,
        ["flops"] = o.Times.Flops,
        ["bytes"] = o.Times.Bytes,
        ["floor_seconds"] = o.Floor,
    })]);

    /// <summary>A training step for <c>--json</c>.</summary>
    public static JsonObject ToJson(TrainBench bench) => new()
    {
        ["model"] = bench.Model.Name,
        ["parameters"] = bench.Model.Config.ParameterCount,
        ["sequences"] = bench.Model.Sequences,
        ["context"] = bench.Model.Config.ContextLength,
        ["recompute"] = bench.Model.Recompute,
        ["steps"] = bench.Steps,
        ["best_seconds"] = bench.Step.Best,
        ["median_seconds"] = bench.Step.Median,
        ["best_tokens_per_second"] = bench.Model.Tokens / bench.Step.Best,
        ["median_tokens_per_second"] = bench.Model.Tokens / bench.Step.Median,
        ["processor_seconds"] = bench.ProcessorSeconds,
        ["flops"] = bench.StepFlops,
        ["peak_bytes"] = bench.PeakBytes,
        ["all_threads_gflops"] = bench.Ceiling.Flops,
        ["all_threads_read_gigabytes_per_second"] = bench.Ceiling.Bytes,
        ["operations"] = ToJson(bench.Operations),
    };
}
