using System.Numerics;
using TinyLlama.Checkpoints;
using TinyLlama.Compute;
using TinyLlama.Compute.Collectives;
using TinyLlama.Compute.Cpu;
using TinyLlama.Compute.Cuda;
using TinyLlama.Data;
using TinyLlama.Data.Batches;
using TinyLlama.Data.Shards;
using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Training;

/// <summary>
/// A run and its folder: recipe, data, device and trainer put together. Opening the folder again goes on with the run.
/// </summary>
public sealed class TrainingRun : IDisposable
{
    /// <summary>The resolved recipe in the run's folder.</summary>
    public const string RecipeName = "recipe.yaml";

    private const string LockName = "lock";

    private readonly FileStream? _lock;
    private readonly TokenShards _shards;
    private readonly NcclCollective? _gpus;

    private TrainingRun(FileStream? runLock, TokenShards shards, Backend backend, NcclCollective? gpus, Trainer trainer, TrainingPlan plan) =>
        (_lock, _shards, Backend, _gpus, Trainer, Plan) = (runLock, shards, backend, gpus, trainer, plan);

    /// <summary>Gets the device.</summary>
    public Backend Backend { get; }

    /// <summary>Gets the trainer.</summary>
    public Trainer Trainer { get; }

    /// <summary>Gets the plan.</summary>
    public TrainingPlan Plan { get; }

    /// <summary>Derives a run's plan from its recipe and, where it is there, from its data.</summary>
    /// <param name="recipe">The recipe.</param>
    /// <param name="warn">Is told, in one line, what the user should know.</param>
    /// <param name="ranks">The number of ranks that train.</param>
    /// <exception cref="UserErrorException">The recipe, the data or the initial model do not fit together.</exception>
    public static TrainingPlan PlanOf(Recipe recipe, Action<string> warn, int ranks = 1)
    {
        using ModelSource? initial = recipe.Init == Recipe.Scratch ? null : ModelSource.Open(recipe.Init, warn);
        using TokenShards? shards = recipe.Data.Path is string path && Directory.Exists(path) ? TokenShards.Open(path) : null;
        return PlanOf(recipe, initial, shards, ranks, neighbours: 1);
    }

    /// <summary>Makes the device of a recipe ready.</summary>
    /// <param name="recipe">The recipe.</param>
    /// <param name="warn">As of <see cref="Device.Open"/>; also of what the recipe says and the device takes no heed of.</param>
    /// <exception cref="DeviceException">There is no such device, or it cannot be used.</exception>
    /// <exception cref="UserErrorException">The recipe asks for what the device has not.</exception>
    public static Backend OpenDevice(Recipe recipe, Action<string>? warn = null)
    {
        Backend backend = recipe.Device.Open(recipe.Threads, recipe.Products, recipe.Deterministic, warn);
        try
        {
            RequireSupport(recipe, backend);
            if (backend is CpuBackend && !recipe.Deterministic)
            {
                warn?.Invoke($"{recipe.Origins.Describe("deterministic")} is false, which has no effect: a CPU gives the same bits every time");
            }

            return backend;
        }
        catch
        {
            backend.Dispose();
            throw;
        }
    }

    /// <summary>Refuses what a recipe asks for and a device has not.</summary>
    /// <exception cref="UserErrorException">A GPU is to compute in fp32.</exception>
    public static void RequireSupport(Recipe recipe, Backend backend)
    {
        if (backend is not CpuBackend && recipe.Precision == DType.F32)
        {
            throw new UserErrorException($"{recipe.Origins.Describe("precision")} is fp32, but a GPU computes in bf16; leave it out, or set device: cpu");
        }
    }

    /// <summary>The FLOP/s that a device can do at best: measured on a CPU, by the data sheet of a GPU. Null where it is not known.</summary>
    public static double? PeakFlops(Backend backend) => backend switch
    {
        CpuBackend cpu => CpuCeiling.Measure(cpu).AllThreads * 1e9,
        CudaBackend cuda => cuda.Gpu?.PeakFlops,
        _ => null,
    };

    /// <summary>Opens a run: new in an empty folder, else it goes on from the newest valid checkpoint.</summary>
    /// <param name="recipe">The recipe.</param>
    /// <param name="folder">The run's folder, made where it is missing.</param>
    /// <param name="observer">Is told of everything.</param>
    /// <param name="world">The ranks that train the run together, each of which opens it; the caller disposes of it, after the run. By default this process alone.</param>
    /// <exception cref="UserErrorException">Something does not fit together, or another process trains the run.</exception>
    public static TrainingRun Open(Recipe recipe, string folder, ITrainingObserver observer, Collective? world = null)
    {
        world ??= new SingleCollective();
        string dataFolder = recipe.Data.Path ?? throw new UserErrorException(
            "data.path is missing: name a folder that 'tinyllama data prepare' made, in the recipe or with --set data.path=DIR");
        Directory.CreateDirectory(folder);
        FileStream? runLock = world.Rank == 0 ? Lock(folder) : null;
        TokenShards? shards = null;
        Backend? backend = null;
        NcclCollective? gpus = null;
        try
        {
            shards = TokenShards.Open(dataFolder);
            ITokenizer tokenizer = TokenizerOf(shards, dataFolder);
            using ModelSource? initial = recipe.Init == Recipe.Scratch ? null : ModelSource.Open(recipe.Init, observer.Warn);
            Recipe? before = Before(folder);
            recipe = KeepLanes(recipe, before);
            TrainingPlan plan = PlanOf(recipe, initial, shards, world.Size, Neighbours(world.Hosts));
            if (tokenizer.VocabularySize > plan.Model.VocabularySize)
            {
                throw new UserErrorException(
                    $"{recipe.Origins.Describe("model.vocabulary")} is {plan.Model.VocabularySize}, but the tokenizer of {dataFolder} has {tokenizer.VocabularySize} ids; raise it");
            }

            // The sum's tree is part of what the run is: the next start has it too, whatever its number of ranks.
            recipe = recipe with { Distribution = recipe.Distribution with { ReductionLanes = plan.Sharding.Lanes } };
            plan = plan with { Recipe = recipe };
            IReadOnlyList<string> changes = Changes(recipe, before, folder);
            backend = OpenDevice(recipe with { Device = DeviceOf(recipe.Device, world) }, observer.Warn);
            if (world.Size > 1 && backend is CudaBackend gpu)
            {
                world = gpus = NcclCollective.Create(gpu, world, TimeSpan.FromSeconds(recipe.Distribution.TimeoutSeconds));
            }

            if (backend is CpuBackend && recipe.Precision != DType.F32 && CpuPaths.Bf16Fault is string fault)
            {
                observer.Warn($"products in bf16 use instructions of fp32: {fault}");
            }

            new MemoryPlan(plan, backend).RequireFits();
            var trainer = new Trainer(plan, folder, backend, shards, dataFolder, tokenizer, initial, PeakFlops(backend), observer, world);
            if (world.Rank == 0)
            {
                WriteRecipe(recipe, Path.Combine(folder, RecipeName));
            }

            foreach (string change in changes)
            {
                trainer.Record(new NoteMetrics(trainer.State.Step, "changed " + change));
            }

            return new TrainingRun(runLock, shards, backend, gpus, trainer, plan);
        }
        catch
        {
            gpus?.Dispose();
            backend?.Dispose();
            shards?.Dispose();
            runLock?.Dispose();
            throw;
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        Trainer.Dispose();
        _gpus?.Dispose();
        Backend.Dispose();
        _shards.Dispose();
        _lock?.Dispose();
    }

    // Of several ranks each takes a GPU of its host, in turn; where a launcher shows each its own, that one. CPUs train with CPUs.
    // Ranks of one host where every host has as many, one after the other, and they are a power of two; else 1.
    private static int Neighbours(IReadOnlyList<string> hosts)
    {
        int count = hosts.TakeWhile(host => host == hosts[0]).Count();
        return BitOperations.IsPow2(count) && hosts.Chunk(count).All(chunk => chunk.Length == count && chunk.Distinct().Count() == 1) ? count : 1;
    }

    private static Device DeviceOf(Device device, Collective world)
    {
        if (world.Size == 1 || device.Kind == DeviceKind.Cpu)
        {
            return device;
        }

        if (device.Ordinal > 0)
        {
            throw new UserErrorException($"device is {device}, one GPU, and {world.Size} ranks train: --device cuda gives each one of its own");
        }

        int[] counts = new int[world.Size];
        world.AllGather<int>(counts, [Gpu.All().Count(gpu => gpu.Fault is null)]);
        return counts.Contains(0)
            ? device.Kind == DeviceKind.Auto ? new Device(DeviceKind.Cpu)
                : throw new DeviceException($"rank {Array.IndexOf(counts, 0)} ({world.Hosts[Array.IndexOf(counts, 0)]}) has no GPU that can be used: see tinyllama env there, or use --device cpu")
            : new Device(DeviceKind.Cuda, world.LocalRank % counts[world.Rank]);
    }

    // Bytes need no file; any other tokenizer lies beside the shards.
    private static ITokenizer TokenizerOf(TokenShards shards, string folder)
    {
        var bytes = new ByteTokenizer();
        return shards.Manifest.TokenizerSha256 == bytes.Hash ? bytes : Tokenizer.Load(folder);
    }

    private static TrainingPlan PlanOf(Recipe recipe, ModelSource? initial, TokenShards? shards, int ranks, int neighbours)
    {
        // The number of sequences depends on the context, which the plan chooses: ask it once without the data.
        long? sequences = null;
        if (shards is not null)
        {
            int context = recipe.Batch.Context ?? recipe.Model?.ContextLength ?? initial?.Config.ContextLength ?? 0;
            sequences = context > 0 ? new TokenLoader(shards, Split.Train, context, recipe.Seed).BlocksPerEpoch : null;
        }

        return TrainingPlan.Create(recipe, initial?.Config, sequences, ranks, neighbours);
    }

    // The recipe that the run had at its last start; null where it is new.
    private static Recipe? Before(string folder)
    {
        string path = Path.Combine(folder, RecipeName);
        return File.Exists(path) ? RecipeFile.Parse(File.ReadAllText(path), path) : null;
    }

    private static Recipe KeepLanes(Recipe recipe, Recipe? before) => recipe.Distribution.ReductionLanes > 0 || before is null
        ? recipe
        : recipe with { Distribution = recipe.Distribution with { ReductionLanes = before.Distribution.ReductionLanes } };

    // What may change when a run goes on is noted in its log; what would make it another run is refused.
    private static IReadOnlyList<string> Changes(Recipe recipe, Recipe? before, string folder)
    {
        if (before is null)
        {
            return [];
        }

        IReadOnlyList<(string Key, string Before, string After)> differences = RecipeFile.Differences(before, recipe);
        string[] refused =
        [
            .. differences
                .Where(key => key.Key is "seed" or "init" or "initialization" || key.Key.StartsWith("model", StringComparison.Ordinal))
                .Select(key => $"{key.Key} {key.Before} → {key.After}"),
        ];
        return refused.Length == 0
            ? [.. differences.Select(key => $"{key.Key} {key.Before} → {key.After}")]
            : throw new UserErrorException(
                $"{folder} holds a run with another recipe ({string.Join(", ", refused)}); choose another --out, or delete that run");
    }

    private static void WriteRecipe(Recipe recipe, string path)
    {
        string unfinished = path + ".tmp";
        File.WriteAllText(unfinished, RecipeFile.Write(recipe));
        File.Move(unfinished, path, overwrite: true);
    }

    private static FileStream Lock(string folder)
    {
        try
        {
            return new FileStream(Path.Combine(folder, LockName), FileMode.OpenOrCreate, FileAccess.ReadWrite, FileShare.None);
        }
        catch (IOException e) when (e is not (DirectoryNotFoundException or PathTooLongException))
        {
            throw new UserErrorException($"{folder}: another process trains this run ({e.Message})", e);
        }
    }
}
