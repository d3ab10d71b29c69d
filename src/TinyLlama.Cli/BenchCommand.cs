using System.CommandLine;
using TinyLlama.Cli.Bench;
using TinyLlama.Compute;
using TinyLlama.Training;

namespace TinyLlama.Cli;

/// <summary><c>tinyllama bench</c>: how long operations take, beside the ceiling of this machine, measured in the same run.</summary>
internal sealed class BenchCommand
{
    private readonly Option<string> _model = new("--model")
    {
        Description = "The shape: S, M, L or a preset",
        HelpName = "NAME",
        DefaultValueFactory = _ => "S",
    };

    private readonly Option<int?> _sequences = CommonOptions.AtLeast(
        new Option<int?>("--sequences") { Description = "Sequences of a micro-batch [default: the model's]", HelpName = "N" }, 1);

    private readonly Option<int?> _context = CommonOptions.Context();
    private readonly Option<string> _precision = new Option<string>("--precision")
    {
        Description = "What operands of matrix products are rounded to: fp32 or bf16",
        DefaultValueFactory = _ => "fp32",
    }.AcceptOnlyFromAmong("fp32", "bf16");

    private readonly Option<Device?> _device = CommonOptions.Device();
    private readonly Option<bool> _atomics = new("--atomics") { Description = "On a GPU: add gradients of queries up by atomics, as recipes with deterministic: false do" };
    private readonly Option<double?> _seconds;
    private readonly Option<int?> _threads = CommonOptions.Threads();
    private readonly Option<bool> _json = CommonOptions.Json();

    private BenchCommand(string secondsDescription) => _seconds = CommonOptions.AtLeast(
        new Option<double?>("--seconds") { Description = secondsDescription, HelpName = "X" }, 0);

    /// <summary>The verb.</summary>
    public static Command Create() => new("bench", "Measure training, inference and operations beside what this machine can do at best")
    {
        new BenchCommand("How long to measure [default: 20]").Train(),
        new BenchCommand("How long to measure each operation [default: 0.5]").Operations(
            "matmul", "Measure matrix products: a model's, those of decoding, square ones", MatMulBench.Run),
        new BenchCommand("How long to measure each operation [default: 0.5]").Operations(
            "kernels", "Measure the other operations of a training step", KernelBench.Run),
        new BenchCommand("How long to measure [default: 10]").Inference(
            "decode", "Decode random tokens, one forward a token", tokens: 128, decode: true),
        new BenchCommand("How long to measure [default: 10]").Inference("prefill", "Prefill random tokens", tokens: 512, decode: false),
        ServeBenchCommand.Create(),
    };

    private Command Train()
    {
        Option<string> recompute = new Option<string>("--recompute")
        {
            Description = "What backward computes again in place of keeping it, as in recipes",
            DefaultValueFactory = _ => Recipe.Recomputations[0].Name,
        }.AcceptOnlyFromAmong([.. Recipe.Recomputations.Select(static way => way.Name)]);
        var command = new Command("train", "Train on random tokens and show where the time of a step goes")
        {
            _model, _sequences, _context, _device, _precision, recompute, _atomics, _seconds, _threads, _json,
        };
        command.SetAction((parse, stop) =>
        {
            TextWriter output = parse.InvocationConfiguration.Output;
            string name = parse.GetRequiredValue(recompute);
            BenchModel model = Model(parse) with { Keep = Recipe.Recomputations.First(way => way.Name == name).Keep };
            using Backend device = Open(parse);
            TrainBench bench = TrainBench.Run(device, model, parse.GetValue(_seconds) ?? 20, stop);
            if (parse.GetValue(_json))
            {
                output.WriteLine(BenchOutput.ToJson(bench).ToJsonString(JsonOutput.Options));
            }
            else
            {
                BenchOutput.Write(output, device, bench.Ceiling);
                BenchOutput.Write(output, bench);
            }

            return Task.FromResult(ExitCode.Success);
        });
        return command;
    }

    private Command Operations(string name, string description, Action<OperationBench, BenchModel> run)
    {
        var only = new Option<string>("--only")
        {
            Description = "Measure only the operations with this in their name",
            HelpName = "TEXT",
            DefaultValueFactory = _ => "",
        };
        var command = new Command(name, description) { _model, _sequences, _context, _device, _precision, _atomics, only, _seconds, _threads, _json };
        command.SetAction((parse, stop) =>
        {
            TextWriter output = parse.InvocationConfiguration.Output;
            BenchModel model = Model(parse);
            using Backend device = Open(parse);
            using var bench = new OperationBench(device, parse.GetValue(_seconds) ?? 0.5, parse.GetRequiredValue(only), stop);
            run(bench, model);
            if (parse.GetValue(_json))
            {
                output.WriteLine(BenchOutput.ToJson(bench.Measurements).ToJsonString(JsonOutput.Options));
            }
            else
            {
                BenchOutput.Write(output, device, bench.Ceiling);
                BenchOutput.Write(output, bench.Measurements);
            }

            return Task.FromResult(ExitCode.Success);
        });
        return command;
    }

    private Command Inference(string name, string description, int tokens, bool decode)
    {
        Argument<string> model = CommonOptions.Model();
        Option<int?> tokensOption = CommonOptions.AtLeast(
            new Option<int?>("--tokens") { Description = $"Tokens of a sequence in a round [default: {tokens}]", HelpName = "N" }, 1);
        Option<int?> depth = CommonOptions.AtLeast(
            new Option<int?>("--depth") { Description = "Tokens that a sequence has before a round [default: 0]", HelpName = "N" }, 0);
        Option<int?> sequences = CommonOptions.AtLeast(
            new Option<int?>("--sequences") { Description = "Sequences that run together [default: 1]", HelpName = "N" }, 1);
        Option<DType?> cacheType = CommonOptions.CacheType();
        var command = new Command(name, description) { model, tokensOption, depth, sequences, cacheType, _device, _precision, _seconds, _threads, _json };
        command.SetAction((parse, stop) =>
        {
            var round = new InferenceRound(
                parse.GetValue(sequences) ?? 1, parse.GetValue(depth) ?? 0, parse.GetValue(tokensOption) ?? tokens, decode, parse.GetValue(cacheType));
            using Backend device = Open(parse);
            InferenceBench bench = InferenceBench.Run(device, parse.GetRequiredValue(model), round, parse.GetValue(_seconds) ?? 10, stop);
            TextWriter output = parse.InvocationConfiguration.Output;
            if (parse.GetValue(_json))
            {
                output.WriteLine(bench.ToJson().ToJsonString(JsonOutput.Options));
            }
            else
            {
                BenchOutput.Write(output, device, bench.Ceiling);
                bench.Write(output);
            }

            return Task.FromResult(ExitCode.Success);
        });
        return command;
    }

    private Backend Open(ParseResult parse) => (parse.GetValue(_device) ?? default).Open(
        parse.GetValue(_threads) ?? 0, parse.GetRequiredValue(_precision) == "bf16" ? DType.BF16 : DType.F32, !parse.GetValue(_atomics));

    private BenchModel Model(ParseResult parse) =>
        BenchModel.Find(parse.GetRequiredValue(_model), parse.GetValue(_sequences), parse.GetValue(_context));
}
