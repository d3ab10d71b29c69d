using TinyLlama.Compute;

namespace TinyLlama.Model;

/// <summary>A named tensor that training changes and a checkpoint keeps, under its Hugging Face name.</summary>
/// <param name="Name">Such as <c>model.layers.0.self_attn.q_proj.weight</c>.</param>
/// <param name="Values">Its values: (O, I), or (1, C) for a norm; empty where they are only <paramref name="Frozen"/>.</param>
/// <param name="Gradient">Its gradient, of the same shape; empty where there is none.</param>
/// <param name="Frozen">Its rows of a frozen weight; none where the model trains.</param>
public sealed record Parameter(string Name, Tensor Values, Tensor Gradient, FrozenRows Frozen = default)
{
    /// <summary>Gets the number of rows: outputs (O), tokens (V), or 1 for a norm.</summary>
    public int Rows => Values.IsEmpty ? Frozen.Count : Values.Rows;

    /// <summary>Gets the number of columns.</summary>
    public int Columns => Values.IsEmpty ? Frozen.Weight!.Inputs : Values.Columns;

    /// <summary>Gets a value indicating whether its values lie in a mapped file: nothing copies them.</summary>
    public bool IsInPlace => Frozen.Weight is { IsInPlace: true };

    /// <summary>Gets a value indicating whether files keep it with one dimension: a norm's weight.</summary>
    public bool IsVector => Rows == 1;
}

/// <summary>Rows of a frozen weight (<see cref="Weight.Frozen"/>).</summary>
/// <param name="Weight">The weight; null for none.</param>
/// <param name="First">The first row.</param>
/// <param name="Count">Their number.</param>
public readonly record struct FrozenRows(Weight? Weight, int First, int Count);
