using System.CommandLine;
using System.Globalization;
using System.Text.Json.Nodes;
using TinyLlama.Compute;
using TinyLlama.Compute.Cuda;
using TinyLlama.Training;

namespace TinyLlama.Cli;

/// <summary><c>tinyllama plan</c>: what a recipe takes on many GPUs, before there are any.</summary>
internal static class PlanCommand
{
    // GB/s of one GPU, in one direction: eight adapters of 400 Gbit/s for eight GPUs; of 200; four of 100; one of 200; one of 100.
    private static readonly double[] s_networks = [50, 25, 6.25, 3.1, 1.25];

    /// <summary>The verb.</summary>
    public static Command Create()
    {
        var recipe = new Option<string>("--recipe")
        {
            Description = "The recipe to plan",
            HelpName = "FILE",
            DefaultValueFactory = _ => Path.Combine("recipes", "tinyllama-1.1b.yaml"),
        };
        var set = CommonOptions.Set();
        var ranks = new Option<int[]>("--ranks")
        {
            Description = "GPUs in all, a power of two; several times for several rows",
            HelpName = "N",
            DefaultValueFactory = _ => [16, 64, 1024],
        };
        var perNode = CommonOptions.AtLeast(new Option<int?>("--per-node") { Description = "GPUs of a node [default: 8]", HelpName = "N" }, 1);
        var nodes = CommonOptions.AtLeast(new Option<int?>("--nodes") { Description = "Nodes, in place of --ranks", HelpName = "N" }, 1);
        var device = new Option<string>("--device") { Description = "The GPU", DefaultValueFactory = _ => "a100-40g" };
        device.AcceptOnlyFromAmong([.. GpuModel.All.Select(gpu => gpu.Name)]);
        var network = new Option<double[]>("--network")
        {
            Description = "GB/s of the network that one GPU has, in one direction; several times for several columns",
            HelpName = "X",
            DefaultValueFactory = _ => s_networks,
        };
        var share = new Option<double>("--share") { Description = "Share of its peak at which one GPU trains", HelpName = "X", DefaultValueFactory = _ => 0.56 };
        var wire = new Option<string>("--wire") { Description = "What gradients are rounded to between the ranks of a shard group", DefaultValueFactory = _ => "fp32" };
        wire.AcceptOnlyFromAmong("fp32", "bf16");
        RequirePositive(ranks);
        RequirePositive(network);
        RequirePositive(share);
        var json = CommonOptions.Json();
        var command = new Command("plan", "Predict memory and time of a recipe on many GPUs, with the arithmetic")
        {
            recipe, set, ranks, perNode, nodes, device, network, share, wire, json,
        };
        command.Validators.Add(result =>
        {
            if (result.GetResult(nodes) is not null && result.GetResult(ranks) is { Implicit: false })
            {
                result.AddError("--nodes takes the place of --ranks; leave one of them out");
            }
        });
        command.SetAction(parse =>
        {
            Recipe read = RecipeFile.Read(parse.GetValue(recipe)!, [.. parse.GetValue(set)!]);
            long ofOneModel = (long)read.Distribution.Tensor * read.Distribution.Pipeline;
            TrainingPlan plan = TrainingRun.PlanOf(
                read, message => Console.Error.WriteLine($"warning: {message}"), (int)Math.Min(int.MaxValue, ofOneModel));
            int node = parse.GetValue(perNode) ?? 8;
            int[] sizes = parse.GetValue(nodes) is int number ? [checked(number * node)] : parse.GetValue(ranks)!;
            GpuModel gpu = GpuModel.All.Single(model => model.Name == parse.GetValue(device));
            ClusterPlan[] clusters =
            [
                .. sizes.Select(size => new ClusterPlan(
                    plan, new Cluster(gpu, size, node, parse.GetValue(share), parse.GetValue(wire) == "bf16" ? DType.BF16 : DType.F32))),
            ];
            TextWriter output = parse.InvocationConfiguration.Output;
            if (parse.GetValue(json))
            {
                output.WriteLine(new JsonArray([.. clusters.Select(cluster => ToJson(plan, cluster, parse.GetValue(network)!))]).ToJsonString(JsonOutput.Options));
            }
            else
            {
                Write(output, plan, clusters, parse.GetValue(network)!);
            }

            return ExitCode.Success;
        });
        return command;
    }

    private static void RequirePositive(Option option) => option.Validators.Add(result =>
    {
        // Text that is no number is reported by the parser itself.
        foreach (string text in result.Tokens.Select(token => token.Value).Where(text => double.TryParse(text, CultureInfo.InvariantCulture, out double value) && !(value > 0)))
        {
            result.AddError($"{option.Name} is {text}, which is not more than 0");
        }
    });

    private static void Write(TextWriter output, TrainingPlan plan, ClusterPlan[] clusters, double[] networks)
    {
        void Line(FormattableString line) => output.WriteLine(line.ToString(CultureInfo.InvariantCulture));

        Cluster any = clusters[0].Cluster;
        GpuModel gpu = any.Gpu;
        Line($"model    {plan.Recipe.Preset ?? "own"}: {plan.Model.ParameterCount:N0} parameters in {clusters[0].Units} units; a step is {plan.SequencesPerStep:N0} × {plan.ContextLength:N0} = {plan.TokensPerStep:N0} tokens");
        Line($"GPU      {gpu.Name}: {Gib(gpu.MemoryBytes):0.0} GiB at {gpu.MemoryRate / 1e9:N0} GB/s, {gpu.PeakFlops / 1e12:N0} TFLOP/s of bf16, {gpu.LinkRate / 1e9:N0} GB/s to its node");
        Line($"assumed  {any.Share:P0} of the peak (--share) / {plan.FlopsPerToken / 1e9:0.000} GFLOP a token = {clusters[0].TokensPerSecond:N0} tokens/s a GPU, recompute {clusters[0].Recompute} included");
        Line($"         weights travel as fp32, gradients as {(any.Wire == DType.F32 ? "fp32" : "bf16")} (--wire): inside a node at {ClusterPlan.LinkShare:P0} of the rate and {ClusterPlan.LinkLatency * 1e6:0} µs a message, between nodes {ClusterPlan.NetworkLatency * 1e6:0} µs");
        Line($"         {ClusterPlan.HidingShare:P0} of computing can hide communication, slowed by {ClusterPlan.SlowdownShare:P0} of it; AdamW at {ClusterPlan.MemoryShare:P0} of the memory's rate; {ClusterPlan.FixedSeconds * 1e3:0} ms a step for the rest");
        output.WriteLine("         no stragglers: real clusters lose 2 to 5 % more");
        foreach (ClusterPlan cluster in clusters)
        {
            output.WriteLine();
            Line($"{cluster.Cluster.Ranks:N0} GPUs, {cluster.Cluster.PerNode} a node; each {cluster.MicroBatches:N0} × {cluster.Sequences} × {plan.ContextLength:N0} tokens a step (micro-batches, sequences)");
            WriteMemory(Line, cluster);
            if (networks is [double network])
            {
                WriteSteps(Line, plan, cluster, network);
            }
            else
            {
                WriteEfficiencies(Line, cluster, networks);
            }
        }

        output.WriteLine();
        output.WriteLine(networks.Length == 1
            ? "step = compute + exposed + slowdown + AdamW + rest; efficiency = compute / step; the formulas are in docs/guides/cluster.md"
            : "--network X shows the parts of the time for one network");
    }

    private static void WriteMemory(Action<FormattableString> line, ClusterPlan cluster)
    {
        (Sharding Way, IReadOnlyList<(string Name, long Bytes)> Arenas)[] memory = [.. cluster.Ways.Select(way => (way, cluster.Memory(way)))];
        string[] names = [.. memory.SelectMany(way => way.Arenas).Select(arena => arena.Name).Distinct()];
        line($"{"GiB of a GPU",-28}{string.Concat(names.Select(name => "  " + name))}   sum of {Gib(cluster.AvailableBytes):0.0}");
        foreach ((Sharding way, IReadOnlyList<(string Name, long Bytes)> arenas) in memory)
        {
            string cells = string.Concat(names.Select(name => FormattableString.Invariant($"{Gib(arenas.FirstOrDefault(arena => arena.Name == name).Bytes):0.00}").PadLeft(2 + name.Length)));
            long sum = arenas.Sum(arena => arena.Bytes);
            line($"{Name(way),-28}{cells} {Gib(sum),6:0.00} {(sum <= cluster.AvailableBytes ? "fits" : "does not fit")}");
        }
    }

    private static void WriteSteps(Action<FormattableString> line, TrainingPlan plan, ClusterPlan cluster, double network)
    {
        line($"{FormattableString.Invariant($"ms of a step, {network:0.##} GB/s"),-28} {"compute",9} {"in nodes",10} {"between",10} {"exposed",8} {"slowdown",12} {"AdamW",7} {"rest",6} {"step",8} {"efficiency",11} {"tokens/s",12} {"run",9}");
        foreach (Sharding way in cluster.Ways)
        {
            ClusterStep step = cluster.Step(way, network * 1e9);
            line($"{Name(way),-28} {step.Compute * 1e3,9:N0} {step.Links * 1e3,10:N1} {step.Network * 1e3,10:N1} {step.Exposed * 1e3,8:N1} {step.Slowdown * 1e3,12:N1} {step.Optimizer * 1e3,7:N1} {ClusterPlan.FixedSeconds * 1e3,6:N0} {step.Seconds * 1e3,8:N0} {step.Efficiency,11:P1} {plan.TokensPerStep / step.Seconds,12:N0} {plan.Steps * step.Seconds / 86_400,4:N1} days");
        }
    }

    private static void WriteEfficiencies(Action<FormattableString> line, ClusterPlan cluster, double[] networks)
    {
        string Cells(Func<double, string> cell) => string.Concat(networks.Select(network => cell(network).PadLeft(12)));
        double compute = cluster.Step(cluster.Ways[0], networks[0] * 1e9).Compute;
        line($"{FormattableString.Invariant($"efficiency; {compute * 1e3:N0} ms compute"),-28}{Cells(network => FormattableString.Invariant($"{network:0.##} GB/s"))}");
        foreach (Sharding way in cluster.Ways)
        {
            line($"{Name(way),-28}{Cells(network => FormattableString.Invariant($"{cluster.Step(way, network * 1e9).Efficiency:P1}"))}");
        }
    }

    private static JsonObject ToJson(TrainingPlan plan, ClusterPlan cluster, double[] networks) => new()
    {
        ["device"] = cluster.Cluster.Gpu.Name,
        ["ranks"] = cluster.Cluster.Ranks,
        ["per_node"] = cluster.Cluster.PerNode,
        ["share_of_peak"] = cluster.Cluster.Share,
        ["wire"] = cluster.Cluster.Wire == DType.F32 ? "fp32" : "bf16",
        ["tokens_per_second_of_one"] = cluster.TokensPerSecond,
        ["sequences_per_micro_batch"] = cluster.Sequences,
        ["micro_batches_per_rank"] = cluster.MicroBatches,
        ["available_bytes"] = cluster.AvailableBytes,
        ["ways"] = new JsonArray([.. cluster.Ways.Select(way => ToJson(plan, cluster, way, networks))]),
    };

    private static JsonObject ToJson(TrainingPlan plan, ClusterPlan cluster, Sharding way, double[] networks)
    {
        IReadOnlyList<(string Name, long Bytes)> memory = cluster.Memory(way);
        long bytes = memory.Sum(arena => arena.Bytes);
        return new JsonObject
        {
            ["tensor"] = way.Tensor,
            ["pipeline"] = way.Pipeline,
            ["zero"] = way.Stage,
            ["shard"] = way.Shards,
            ["reduction_lanes"] = way.Lanes,
            ["arena_bytes"] = new JsonObject(memory.Select(arena => KeyValuePair.Create(arena.Name, (JsonNode?)arena.Bytes))),
            ["memory_bytes"] = bytes,
            ["fits"] = bytes <= cluster.AvailableBytes,
            ["steps"] = new JsonArray([.. networks.Select(network =>
            {
                ClusterStep step = cluster.Step(way, network * 1e9);
                return new JsonObject
                {
                    ["network_gigabytes_per_second"] = network,
                    ["compute_seconds"] = step.Compute,
                    ["links_seconds"] = step.Links,
                    ["network_seconds"] = step.Network,
                    ["exposed_seconds"] = step.Exposed,
                    ["slowdown_seconds"] = step.Slowdown,
                    ["optimizer_seconds"] = step.Optimizer,
                    ["fixed_seconds"] = ClusterPlan.FixedSeconds,
                    ["step_seconds"] = step.Seconds,
                    ["efficiency"] = step.Efficiency,
                    ["tokens_per_second"] = plan.TokensPerStep / step.Seconds,
                    ["run_seconds"] = plan.Steps * step.Seconds,
                };
            })]),
        };
    }

    private static string Name(Sharding way) => way.ModelRanks > 1 ? $"tensor {way.Tensor} × pipeline {way.Pipeline}" : FormattableString.Invariant(
        $"ZeRO-{way.Stage} over {(way.Replicas == 1 ? $"all {way.Shards}" : $"the {way.Shards} of a node")}");

    private static double Gib(long bytes) => bytes / (double)(1L << 30);
}
