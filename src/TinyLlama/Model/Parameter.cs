using TinyLlama.Compute;

namespace TinyLlama.Model;

/// <summary>A named tensor that training changes and a checkpoint keeps, under its Hugging Face name.</summary>
/// <param name="Name">Such as <c>model.layers.0.self_attn.q_proj.weight</c>.</param>
/// <param name="Values">Its values: (O, I), or (1, C) for a norm.</param>
/// <param name="Gradient">Its gradient, of the same shape; empty where there is none.</param>
public sealed record Parameter(string Name, Tensor Values, Tensor Gradient)
{
    /// <summary>Gets a value indicating whether files keep it with one dimension: a norm's weight.</summary>
    public bool IsVector => Values.Rows == 1;
}
