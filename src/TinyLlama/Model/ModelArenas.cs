using TinyLlama.Compute;

namespace TinyLlama.Model;

/// <summary>Where a model's own memory lives: one arena for each lifetime.</summary>
/// <param name="Weights">Master values.</param>
/// <param name="Packed">The device's packed forms of the matrices; null to pack on the fly.</param>
/// <param name="Gradients">Gradients of all parameters; null for a model that only runs forward.</param>
public sealed record ModelArenas(Arena Weights, Arena? Packed, Arena? Gradients) : IDisposable
{
    /// <summary>Arenas that only count.</summary>
    /// <param name="packed">Whether packed forms are kept.</param>
    /// <param name="trains">Whether there are gradients.</param>
    public static ModelArenas Plan(bool packed, bool trains) =>
        new(Arena.Plan("weights"), packed ? Arena.Plan("packed weights") : null, trains ? Arena.Plan("gradients") : null);

    /// <summary>Allocates what a plan counted.</summary>
    public static ModelArenas Allocate(Backend backend, ModelArenas plan) =>
        new(backend.AllocateAs(plan.Weights), plan.Packed is null ? null : backend.AllocateAs(plan.Packed),
            plan.Gradients is null ? null : backend.AllocateAs(plan.Gradients));

    /// <inheritdoc/>
    public void Dispose()
    {
        Weights.Dispose();
        Packed?.Dispose();
        Gradients?.Dispose();
    }
}
