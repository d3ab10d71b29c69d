namespace TinyLlama.Compute;

/// <summary>What <see cref="Backend.TopLogits"/> finds in a row of logits: the largest, and how much the others weigh.</summary>
/// <remarks>A logit's weight is exp((logit - largest) · inverse temperature).</remarks>
/// <param name="row">The <see cref="Width"/> numbers of the row.</param>
public readonly ref struct TopLogitsRow(ReadOnlySpan<float> row)
{
    /// <summary>The columns that a row of logits may have: their numbers are fp32.</summary>
    public const int MostColumns = 1 << 20;

    /// <summary>How far a sum of other weights is from the exact one at most, as a share of it.</summary>
    /// <remarks>
    /// Of a weight that is no less than the smallest normal number the exponent is below 126, so its four roundings make less
    /// than 2.1e-5, and the exponential 2⁻²² (PTX); a sum has fewer than 1,100 roundings in a row, 6.6e-5.
    /// </remarks>
    public const double OthersError = 1e-4;

    private readonly ReadOnlySpan<float> _row = row;

    /// <summary>Gets the number of largest logits.</summary>
    public int Count => (_row.Length - 2) / 3;

    /// <summary>Gets the largest logits, by rising column.</summary>
    public ReadOnlySpan<float> Logits => _row[..Count];

    /// <summary>Gets the sum of all other weights.</summary>
    public float Others => _row[^2];

    /// <summary>Gets the sum of all other weights at temperature 1.</summary>
    public float OthersAtOne => _row[^1];

    /// <summary>The numbers of a row with so many logits.</summary>
    public static int Width(int count) => (3 * count) + 2;

    /// <summary>Gets their columns: whole numbers.</summary>
    public ReadOnlySpan<float> Columns => _row.Slice(Count, Count);

    /// <summary>The column of the logit at a place.</summary>
    public int Column(int place) => (int)Columns[place];

    /// <summary>The sum of the other weights in columns before that of the logit at a place.</summary>
    public float OthersBefore(int place) => _row[(2 * Count) + place];
}
