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
    // One after the other in the outputs: several only where row groups are stored in different types.
    private readonly Weight[] _weights;

    private Linear(Weight[] weights, Parameter[] parameters) => (_weights, Parameters) = (weights, parameters);

    /// <summary>Gets the number of outputs of all groups.</summary>
    public int Outputs => _weights.Sum(static weight => weight.Outputs);

    /// <summary>Gets the number of inputs.</summary>
    public int Inputs => _weights[0].Inputs;

    /// <summary>Gets the parameters, one a row group.</summary>
    public IReadOnlyList<Parameter> Parameters { get; }

    /// <summary>Takes a weight: dense with its gradient, or frozen, as the arenas say.</summary>
    /// <param name="arenas">Weights, and gradients where the model trains.</param>
    /// <param name="backend">The device, which says how large its packed forms are.</param>
    /// <param name="inputs">I.</param>
    /// <param name="groups">The row groups; their rows add up to O.</param>
    public static Linear Take(ModelArenas arenas, Backend backend, int inputs, params ReadOnlySpan<RowGroup> groups) =>
        arenas.Storage is null ? Dense(arenas, backend, inputs, groups) : Frozen(arenas, backend, inputs, groups);

    /// <summary>Multiplies by a matrix that something else owns: the embedding table, for a tied head.</summary>
    /// <param name="arenas">Room for the packed forms.</param>
    /// <param name="backend">The device.</param>
    /// <param name="parameter">The owner's parameter; it stays the owner's and is not among <see cref="Parameters"/>.</param>
    public static Linear Tied(ModelArenas arenas, Backend backend, Parameter parameter) => parameter.Frozen.Weight is { } weight
        ? new Linear([weight], [])
        : Over(arenas, backend, parameter.Values, parameter.Gradient, []);

    /// <summary>output (N, O) = input (N, I) · Wᵀ.</summary>
    public void Forward(Backend backend, Tensor output, Tensor input)
    {
        int column = 0;
        foreach (Weight weight in _weights)
        {
            backend.MatMul(output.ColumnRange(column, weight.Outputs), input, weight);
            column += weight.Outputs;
        }
    }

    /// <summary>dInput = dOutput · W, and dW += dOutputᵀ · input. Not of a frozen weight.</summary>
    public void Backward(Backend backend, Tensor dInput, Tensor dOutput, Tensor input)
    {
        Weight weight = _weights.Single();
        backend.MatMulBackwardInput(dInput, dOutput, weight);
        if (!weight.Gradient.IsEmpty)
        {
            backend.MatMulBackwardWeight(weight.Gradient, dOutput, input);
        }
    }

    /// <summary>Makes the packed forms follow the values; after loading and after each optimizer step.</summary>
    public void Pack(Backend backend)
    {
        foreach (Weight weight in _weights)
        {
            if (!weight.Values.IsEmpty)
            {
                backend.Pack(weight);
            }
        }
    }

    private static Linear Dense(ModelArenas arenas, Backend backend, int inputs, ReadOnlySpan<RowGroup> groups)
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

    // Neighbours of one type, in place or not, become one weight where rows that are packed together all belong to one of them.
    private static Linear Frozen(ModelArenas arenas, Backend backend, int inputs, ReadOnlySpan<RowGroup> groups)
    {
        var weights = new List<Weight>();
        var parameters = new List<Parameter>();
        for (int first = 0; first < groups.Length;)
        {
            FrozenStorage stored = arenas.Storage!(groups[first].Name);
            bool inPlace = stored.StaysInPlace(backend, inputs);
            List<StoredRows> ranges = [stored.Rows];
            int rows = groups[first].Rows;
            int end = first + 1;
            for (; end < groups.Length && rows % Backend.PackedRows == 0; end++)
            {
                FrozenStorage next = arenas.Storage(groups[end].Name);
                if (next.Type != stored.Type || next.StaysInPlace(backend, inputs) != inPlace)
                {
                    break;
                }

                ranges.Add(next.Rows);
                rows += groups[end].Rows;
            }

            Weight weight = inPlace
                ? Weight.InPlace([.. ranges], inputs, stored.Type)
                : Weight.Frozen(arenas.Weights, backend, rows, inputs, stored.Type);
            weights.Add(weight);
            for (int row = 0; first < end; row += groups[first++].Rows)
            {
                parameters.Add(new Parameter(groups[first].Name, default, default, new FrozenRows(weight, row, groups[first].Rows)));
            }
        }

        return new Linear([.. weights], [.. parameters]);
    }

    private static Linear Over(ModelArenas arenas, Backend backend, Tensor values, Tensor gradient, Parameter[] parameters)
    {
        var weight = new Weight(values, gradient);
        if (arenas.Packed is not null)
        {
            weight.TakePacked(arenas.Packed, backend, backward: !gradient.IsEmpty && arenas.Forms == PackedForms.Both);
        }

        return new Linear([weight], parameters);
    }
}
