using TinyLlama.Compute;

namespace TinyLlama.Model;

/// <summary>Rows of a <see cref="Linear"/> that have a name of their own: q, k and v, or gate and up.</summary>
/// <param name="Name">The parameter's name.</param>
/// <param name="Rows">Its outputs.</param>
public readonly record struct RowGroup(string Name, int Rows);

/// <summary>
/// A matrix product with a weight. It alone knows what its weight is; the transformer block never asks.
/// </summary>
/// <remarks>
/// The outputs are one or more named row groups, one below the other, so that q | k | v is one product and yet three
/// parameters. y (N, O) = x (N, I) · Wᵀ; no bias, as in Llama.
/// </remarks>
public sealed class Linear
{
    private readonly Weight _weight;

    private Linear(Weight weight, Parameter[] parameters) => (_weight, Parameters) = (weight, parameters);

    /// <summary>Gets the number of outputs of all groups.</summary>
    public int Outputs => _weight.Outputs;

    /// <summary>Gets the number of inputs.</summary>
    public int Inputs => _weight.Inputs;

    /// <summary>Gets the parameters, one a row group, which are row ranges of one matrix.</summary>
    public IReadOnlyList<Parameter> Parameters { get; }

    /// <summary>Takes a dense weight.</summary>
    /// <param name="arenas">Weights, and gradients where the model trains.</param>
    /// <param name="backend">The device, which says how large its packed forms are.</param>
    /// <param name="inputs">I.</param>
    /// <param name="groups">The row groups; their rows add up to O.</param>
    public static Linear Dense(ModelArenas arenas, Backend backend, int inputs, params ReadOnlySpan<RowGroup> groups)
    {
        int outputs = 0;
        foreach (RowGroup group in groups)
        {
            outputs += group.Rows;
        }

        Tensor values = arenas.Weights.Take(outputs, inputs);
        Tensor gradient = arenas.Gradients?.Take(outputs, inputs) ?? default;
        var parameters = new Parameter[groups.Length];
        for (int g = 0, row = 0; g < groups.Length; row += groups[g++].Rows)
        {
            parameters[g] = new Parameter(
                groups[g].Name,
                values.RowRange(row, groups[g].Rows),
                gradient.IsEmpty ? default : gradient.RowRange(row, groups[g].Rows));
        }

        return Over(arenas, backend, values, gradient, parameters);
    }

    /// <summary>Multiplies by a matrix that something else owns: the embedding table, for a tied head.</summary>
    /// <param name="arenas">Room for the packed forms.</param>
    /// <param name="backend">The device.</param>
    /// <param name="parameter">The owner's parameter; it stays the owner's and is not among <see cref="Parameters"/>.</param>
    public static Linear Tied(ModelArenas arenas, Backend backend, Parameter parameter) =>
        Over(arenas, backend, parameter.Values, parameter.Gradient, []);

    /// <summary>output (N, O) = input (N, I) · Wᵀ.</summary>
    public void Forward(Backend backend, Tensor output, Tensor input) => backend.MatMul(output, input, _weight);

    /// <summary>dInput = dOutput · W, and dW += dOutputᵀ · input.</summary>
    public void Backward(Backend backend, Tensor dInput, Tensor dOutput, Tensor input)
    {
        backend.MatMulBackwardInput(dInput, dOutput, _weight);
        if (!_weight.Gradient.IsEmpty)
        {
            backend.MatMulBackwardWeight(_weight.Gradient, dOutput, input);
        }
    }

    /// <summary>Makes the packed forms follow the values; after loading and after each optimizer step.</summary>
    public void Pack(Backend backend) => backend.Pack(_weight);

    private static Linear Over(ModelArenas arenas, Backend backend, Tensor values, Tensor gradient, Parameter[] parameters)
    {
        var weight = new Weight(values, gradient);
        if (arenas.Packed is not null)
        {
            weight.TakePacked(arenas.Packed, backend, backward: !gradient.IsEmpty && arenas.Forms == PackedForms.Both);
        }

        return new Linear(weight, parameters);
    }
}
