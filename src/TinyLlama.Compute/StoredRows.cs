namespace TinyLlama.Compute;

/// <summary>Rows of a matrix in host memory as a file keeps them: a mapped file, or a copy of its bytes. It owns nothing.</summary>
/// <param name="Address">Address of the first byte; 0 for none.</param>
/// <param name="Count">The number of rows.</param>
/// <param name="HeadDim">
/// D where the file has rows i and i + D/2 of each head of D rows next to each other, as GGUF has those of q and k; 0 where it
/// has all in their order.
/// </param>
public readonly record struct StoredRows(nint Address, int Count, int HeadDim = 0)
{
    /// <summary>Gets a value indicating whether there are none.</summary>
    public bool IsEmpty => Count == 0;

    /// <summary>Whether every so many rows, from the first on, are equally far from each other.</summary>
    public bool IsRegular(int together) => Count % together == 0 && HeadDim / 2 % together == 0;

    /// <summary>Where a row lies.</summary>
    /// <param name="row">The row.</param>
    /// <param name="rowBytes">Bytes of a row.</param>
    /// <returns>Its address, and the bytes from it to the next.</returns>
    public (nint Address, nint Step) At(int row, nint rowBytes)
    {
        if (HeadDim == 0)
        {
            return (Address + (row * rowBytes), rowBytes);
        }

        int half = HeadDim / 2;
        (int head, int i) = Math.DivRem(row, HeadDim);
        int stored = (head * HeadDim) + (i < half ? 2 * i : (2 * (i - half)) + 1);
        return (Address + (stored * rowBytes), 2 * rowBytes);
    }
}
