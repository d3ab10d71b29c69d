using System.Globalization;
using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Model;

namespace TinyLlama.Training;

/// <summary>A way to run that fits a device's memory.</summary>
/// <param name="Keep">Which activations stay for backward.</param>
/// <param name="Packed">Which packed forms of the weights are kept.</param>
/// <param name="Sequences">Sequences of a micro-batch; they divide a step.</param>
/// <param name="Bytes">The memory that it takes.</param>
public readonly record struct MemoryChoice(Keep Keep, PackedForms Packed, int Sequences, long Bytes)
{
    /// <summary>Gets what recipes call <see cref="Keep"/>.</summary>
    public string Recompute => RecipeKeys.Name(Keep);
}

/// <summary>What a run takes of a device's memory, and what would fit. Allocates nothing.</summary>
public sealed class MemoryPlan
{
    private static readonly Keep[] s_keeps = [Keep.Everything, Keep.Products, Keep.BlockInputs];

    private readonly TrainingPlan _plan;
    private readonly Backend _backend;

    /// <summary>Counts the bytes.</summary>
    /// <param name="plan">The run.</param>
    /// <param name="backend">The device.</param>
    /// <param name="availableBytes">Memory that the run may take; by default what the device has.</param>
    public MemoryPlan(TrainingPlan plan, Backend backend, long? availableBytes = null)
    {
        (_plan, _backend, AvailableBytes) = (plan, backend, availableBytes ?? backend.AvailableBytes);
        Arenas = TrainingMemory.PlanFullest(plan.Shape, backend);
    }

    /// <summary>Gets the bytes of each arena, on the rank that takes the most.</summary>
    public IReadOnlyList<(string Name, long Bytes)> Arenas { get; }

    /// <summary>Gets the bytes of the run.</summary>
    public long Bytes => Arenas.Sum(arena => arena.Bytes);

    /// <summary>Gets the memory that the run may take.</summary>
    public long AvailableBytes { get; }

    /// <summary>The largest micro-batch that fits and divides a step, for each way to recompute with which one fits; the least recomputation first.</summary>
    public IReadOnlyList<MemoryChoice> Choices() =>
    [
        .. s_keeps.Select(keep => Largest(keep, _plan.Recipe.PackedWeights, (int)Math.Min(int.MaxValue, _plan.SequencesPerStep))).OfType<MemoryChoice>(),
    ];

    /// <summary>Refuses a run that the device cannot hold.</summary>
    /// <exception cref="UserErrorException">It cannot fit; says what takes how much, and what to change.</exception>
    public void RequireFits()
    {
        if (Bytes <= AvailableBytes)
        {
            return;
        }

        string parts = string.Join(", ", Arenas.Select(arena => $"{arena.Name} {Gib(arena.Bytes)}"));
        throw new UserErrorException($"the run needs {Gib(Bytes)} ({parts}), but the device has {Gib(AvailableBytes)}; try {Remedy()}");
    }

    // What is kept of activations goes last: it costs the most time.
    private string Remedy()
    {
        Recipe recipe = _plan.Recipe;
        foreach (Keep keep in s_keeps.Where(keep => keep <= recipe.Keep))
        {
            for (PackedForms packed = recipe.PackedWeights; packed >= PackedForms.None; packed--)
            {
                if (Largest(keep, packed, _plan.SequencesPerMicroBatch) is { } fits)
                {
                    string[] changes =
                    [
                        .. fits.Sequences == _plan.SequencesPerMicroBatch
                            ? Array.Empty<string>() : [$"{recipe.Origins.Describe("batch.micro_sequences")} {fits.Sequences}"],
                        .. packed == recipe.PackedWeights ? Array.Empty<string>() : [$"packed_weights {RecipeKeys.Name(packed)}"],
                        .. keep == recipe.Keep ? Array.Empty<string>() : [$"recompute {fits.Recompute}"],
                    ];
                    return $"{string.Join(" and ", changes)}, which takes {Gib(fits.Bytes)}";
                }
            }
        }

        return "a smaller model or context";
    }

    private MemoryChoice? Largest(Keep keep, PackedForms packed, int most)
    {
        MemoryChoice? largest = null;
        Sharding sharding = _plan.Sharding;
        int parts = sharding.ReducesEachMicroBatch ? sharding.Ranks : sharding.Lanes;
        for (int sequences = 1; sequences <= most; sequences++)
        {
            if (_plan.SequencesPerStep % ((long)sequences * parts) != 0)
            {
                continue;
            }

            TrainingShape shape = _plan.Shape with { Keep = keep, Packed = packed, Sequences = sequences };
            long bytes = TrainingMemory.PlanFullest(shape, _backend).Sum(arena => arena.Bytes);
            if (bytes > AvailableBytes)
            {
                break;
            }

            largest = new MemoryChoice(keep, packed, sequences, bytes);
        }

        return largest;
    }

    private static string Gib(long bytes) => string.Create(CultureInfo.InvariantCulture, $"{bytes / (double)(1L << 30):0.00} GiB");
}
