using TinyLlama.Compute;

namespace TinyLlama.Model;

/// <summary>
/// Parameters that are gathered, reduced and updated together: the embedding, a block, or the final norm with the head (a
/// tied head and the norm are part of the embedding's). One contiguous range of the weights and one of the gradients, at the
/// same offsets, padded with zeros.
/// </summary>
/// <param name="Index">Its place in <see cref="LlamaModel.Units"/>.</param>
/// <param name="Parameters">Its parameters.</param>
/// <param name="Values">All its values, (rows, <see cref="Columns"/>) of F32.</param>
/// <param name="Gradient">All its gradients, of the same shape.</param>
public sealed record ParameterUnit(int Index, IReadOnlyList<Parameter> Parameters, Tensor Values, Tensor Gradient)
{
    /// <summary>Elements of a row: a unit is cut between rows, and whole rows are worth a thread's while.</summary>
    public const int Columns = 256;

    /// <summary>The first element of a parameter, counted from the first of the unit.</summary>
    public long OffsetOf(Parameter parameter) => (parameter.Values.Address - Values.Address) / sizeof(float);
}

/// <summary>
/// Where a model's units are between their uses, for a run that does not keep all of them, or not where they are used. The
/// model says what it needs and what it has done; what that means is the store's.
/// </summary>
public abstract class ParameterStore
{
    /// <summary>Sees to it that a unit's values are there, packed forms too.</summary>
    /// <param name="unit">The unit that is used next.</param>
    /// <param name="next">The unit that will be used after it; negative for none.</param>
    public abstract void Gather(int unit, int next);

    /// <summary>Sees to it that a unit's gradient can be added to.</summary>
    public abstract void BeginGradient(int unit);

    /// <summary>Hears that the micro-batch has added all it has to a unit's gradient.</summary>
    public abstract void EndGradient(int unit);
}
