using TinyLlama.Compute;

namespace TinyLlama.Model;

/// <summary>Which packed forms of its matrices a model keeps; what it does not keep is packed by each product that reads it, to the same bits.</summary>
public enum PackedForms
{
    /// <summary>None: the least memory.</summary>
    None,

    /// <summary>The one that forward reads.</summary>
    Forward,

    /// <summary>Also the one that backward reads, where there are gradients.</summary>
    Both,
}

/// <summary>Where a model's own memory lives: one arena for each lifetime.</summary>
/// <param name="Weights">Master values.</param>
/// <param name="Packed">The device's packed forms of the matrices; null for <see cref="PackedForms.None"/>.</param>
/// <param name="Gradients">Gradients of all parameters; null for a model that only runs forward.</param>
/// <param name="Forms">Which packed forms are kept.</param>
/// <param name="Storage">
/// How the parameter of some name is stored, for a frozen model: one that only runs forward and keeps nothing of its
/// matrices but what the device's products read. Null for one that can train.
/// </param>
public sealed record ModelArenas(
    Arena Weights, Arena? Packed, Arena? Gradients, PackedForms Forms, Func<string, FrozenStorage>? Storage = null) : IDisposable
{
    /// <summary>Gets the number of equal parts, of whole rows, that every unit has.</summary>
    public int Subdivisions { get; init; } = 1;

    /// <summary>Gets what units take turns in, in place of <see cref="Gradients"/>; null where each has its own gradient.</summary>
    public TurnArenas? GradientTurns { get; init; }

    /// <summary>Gets what units take turns in, in place of <see cref="Weights"/>; null where each has its own values.</summary>
    public TurnArenas? WeightTurns { get; init; }

    /// <summary>Gets the same for <see cref="Packed"/>.</summary>
    public TurnArenas? PackedTurns { get; init; }

    /// <summary>Gets all arenas that there are.</summary>
    public IEnumerable<Arena> All =>
        new[] { Weights, Packed, Gradients }.OfType<Arena>().Concat(new[] { WeightTurns, PackedTurns, GradientTurns }.OfType<TurnArenas>().SelectMany(static turns => turns.Arenas));

    /// <summary>Arenas that only count.</summary>
    /// <param name="forms">Which packed forms are kept.</param>
    /// <param name="trains">Whether there are gradients.</param>
    public static ModelArenas Plan(PackedForms forms, bool trains) => new(
        Arena.Plan("weights"), forms == PackedForms.None ? null : Arena.Plan("packed weights"),
        trains ? Arena.Plan("gradients") : null, forms);

    /// <summary>Arenas of a model that trains in which units take turns, that only count.</summary>
    /// <param name="forms">Which packed forms are kept.</param>
    /// <param name="subdivisions">Equal parts of a unit.</param>
    /// <param name="gradients">Whether gradients take turns.</param>
    /// <param name="weights">Whether values and packed forms do.</param>
    public static ModelArenas PlanSharded(PackedForms forms, int subdivisions, bool gradients, bool weights) => Plan(forms, trains: true) with
    {
        Subdivisions = subdivisions,
        GradientTurns = gradients ? TurnArenas.Plan("gradients") : null,
        WeightTurns = weights ? TurnArenas.Plan("weights") : null,
        PackedTurns = weights && forms != PackedForms.None ? TurnArenas.Plan("packed weights") : null,
    };

    /// <summary>Arenas of a frozen model that only count.</summary>
    /// <param name="storage">How the parameter of a name is stored.</param>
    public static ModelArenas PlanFrozen(Func<string, FrozenStorage> storage) => new(Arena.Plan("weights"), null, null, PackedForms.None, storage);

    /// <summary>Allocates what a plan counted.</summary>
    public static ModelArenas Allocate(Backend backend, ModelArenas plan) =>
        new(backend.AllocateAs(plan.Weights), plan.Packed is null ? null : backend.AllocateAs(plan.Packed),
            plan.Gradients is null ? null : backend.AllocateAs(plan.Gradients), plan.Forms, plan.Storage)
        {
            Subdivisions = plan.Subdivisions,
            GradientTurns = plan.GradientTurns?.AllocateAs(backend),
            WeightTurns = plan.WeightTurns?.AllocateAs(backend),
            PackedTurns = plan.PackedTurns?.AllocateAs(backend),
        };

    /// <summary>What the parameters of one unit are taken from.</summary>
    /// <param name="turn">Whose turn it is: 0 for embedding and head, 1 and 2 for blocks one after the other.</param>
    public ModelArenas Of(int turn) => this with
    {
        Weights = WeightTurns?.Take(turn) ?? Weights,
        Packed = PackedTurns?.Take(turn) ?? Packed,
        Gradients = GradientTurns?.Take(turn) ?? Gradients,
    };

    /// <inheritdoc/>
    public void Dispose()
    {
        foreach (Arena arena in All)
        {
            arena.Dispose();
        }
    }
}

/// <summary>
/// Three arenas for units that take turns: one is filled or emptied while another is used. Embedding and head share the first:
/// one is done before the other begins.
/// </summary>
/// <param name="Arenas">The arenas.</param>
public sealed record TurnArenas(IReadOnlyList<Arena> Arenas)
{
    /// <summary>Turns: 0 for embedding and head, 1 and 2 for blocks.</summary>
    public const int Count = 3;

    /// <summary>Arenas that only count.</summary>
    public static TurnArenas Plan(string name) => new([.. Enumerable.Range(0, Count).Select(_ => Arena.Plan(name))]);

    /// <summary>Allocates what a plan counted.</summary>
    public TurnArenas AllocateAs(Backend backend) => new([.. Arenas.Select(backend.AllocateAs)]);

    /// <summary>The arena of a turn, from its first byte on.</summary>
    public Arena Take(int turn)
    {
        Arenas[turn].Rewind();
        return Arenas[turn];
    }
}
