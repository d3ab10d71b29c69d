using TinyLlama.Compute;

namespace TinyLlama.Checkpoints;

/// <summary>A tensor of a file, as far as its format does not matter.</summary>
/// <param name="Name">Its name.</param>
/// <param name="Type">Its type in the words of safetensors, such as <c>BF16</c>.</param>
/// <param name="Shape">Its dimensions; none for a scalar.</param>
public abstract record TensorEntry(string Name, string Type, IReadOnlyList<long> Shape)
{
    /// <summary>Gets the element type, or null where it is none that a tensor can have here, such as I64.</summary>
    public DType? ElementType => Type switch
    {
        "F32" => DType.F32,
        "BF16" => DType.BF16,
        "F16" => DType.F16,
        "F64" => DType.F64,
        "I32" => DType.I32,
        _ => null,
    };

    /// <summary>Gets the number of elements.</summary>
    public long Count => Shape.Aggregate(1L, static (product, dimension) => product * dimension);
}
