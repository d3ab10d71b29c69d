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
/// What a parameter of some name is stored in, for a frozen model: one that only runs forward and keeps nothing of its
/// matrices but what the device's products read. Null for one that can train.
/// </param>
public sealed record ModelArenas(
    Arena Weights, Arena? Packed, Arena? Gradients, PackedForms Forms, Func<string, DType>? Storage = null) : IDisposable
{
    /// <summary>Arenas that only count.</summary>
    /// <param name="forms">Which packed forms are kept.</param>
    /// <param name="trains">Whether there are gradients.</param>
    public static ModelArenas Plan(PackedForms forms, bool trains) => new(
        Arena.Plan("weights"), forms == PackedForms.None ? null : Arena.Plan("packed weights"),
        trains ? Arena.Plan("gradients") : null, forms);

    /// <summary>Arenas of a frozen model that only count.</summary>
    /// <param name="storage">What the parameter of a name is stored in.</param>
    public static ModelArenas PlanFrozen(Func<string, DType> storage) => new(Arena.Plan("weights"), null, null, PackedForms.None, storage);

    /// <summary>Allocates what a plan counted.</summary>
    public static ModelArenas Allocate(Backend backend, ModelArenas plan) =>
        new(backend.AllocateAs(plan.Weights), plan.Packed is null ? null : backend.AllocateAs(plan.Packed),
            plan.Gradients is null ? null : backend.AllocateAs(plan.Gradients), plan.Forms, plan.Storage);

    /// <inheritdoc/>
    public void Dispose()
    {
        Weights.Dispose();
        Packed?.Dispose();
        Gradients?.Dispose();
    }
}
