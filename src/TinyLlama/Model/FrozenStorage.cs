using TinyLlama.Compute;

namespace TinyLlama.Model;

/// <summary>What a file stores a parameter in, and where its rows lie if the file is mapped.</summary>
/// <param name="Type">The type.</param>
/// <param name="Rows">The rows in the mapped file; none where they have to be copied.</param>
public readonly record struct FrozenStorage(DType Type, StoredRows Rows = default)
{
    /// <summary>Whether a frozen model on that device leaves the rows where they lie.</summary>
    public bool StaysInPlace(Backend backend, int inputs) => !Rows.IsEmpty && backend.ReadsInPlace(Type, inputs, Rows);
}
