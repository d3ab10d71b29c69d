using TinyLlama.Compute;
using TinyLlama.Compute.Collectives;

namespace TinyLlama.Model;

/// <summary>
/// Ranks that have the heads and the hidden channels of a model between them (tensor parallelism, Shoeybi et al. 2019). Each has
/// whole rows of q, k, v, gate and up, whole columns of o and down, and all of the embedding, the norms and the head. What o and
/// down give, and what flows back out of the others, are parts of sums: four sums a block, of (N, C) each.
/// </summary>
/// <remarks>
/// The head is not split: each rank would have V / ranks of its rows, and the softmax would need two exchanges more. Sums are pairwise trees over the ranks, so they are the same for the same number of ranks, and close for others.
/// </remarks>
public sealed class TensorGroup
{
    private readonly Collective? _ranks;
    private readonly Backend _backend;
    private readonly int _size;
    private readonly int _tokens;
    private readonly Tensor _padded;
    private readonly Tensor _received;
    private readonly Tensor _sum;
    private readonly Tensor _gathered;
    private readonly Tensor _whole;

    /// <summary>Takes room for one sum and for the largest parameter, each twice.</summary>
    /// <param name="ranks">The ranks, as many as <see cref="ModelConfig.TensorRanks"/>, a power of two; null to count the bytes.</param>
    /// <param name="backend">The device.</param>
    /// <param name="arena">Owner of the room.</param>
    /// <param name="model">One rank's part of a model.</param>
    /// <param name="tokens">Packed tokens that are summed at once.</param>
    public TensorGroup(Collective? ranks, Backend backend, Arena arena, LlamaModel model, int tokens)
    {
        (_ranks, _backend, _size, _tokens) = (ranks, backend, model.Config.TensorRanks, tokens);
        if (ranks is not null && ranks.Size != _size)
        {
            throw new ArgumentException($"{ranks.Size} ranks for a shape of {_size}", nameof(ranks));
        }

        (int rows, int columns) = (RowsOfRank(tokens), model.Config.Channels);
        (_padded, _received) = (arena.Take(_size * rows, columns, backend.ActivationType), arena.Take(_size * rows, columns, backend.ActivationType));
        _sum = arena.Take(rows, columns);
        int most = model.Parameters.Where(static part => !IsShared(part.Name)).Max(static part => checked((int)part.Values.Count));
        (_gathered, _whole) = (arena.Take(_size, most), arena.Take(_size, most));
    }

    /// <summary>Whether every rank has all of a parameter, and the same gradient of it.</summary>
    /// <param name="name">The parameter's name.</param>
    public static bool IsShared(string name) => !name.EndsWith("_proj.weight", StringComparison.Ordinal);

    /// <summary>Lets a whole parameter be filled, or a moment of it, and keeps this rank's part.</summary>
    /// <param name="parameter">This rank's part of the parameter.</param>
    /// <param name="part">The same part of what is filled, contiguous.</param>
    /// <param name="fill">Fills the whole.</param>
    public void Fill(Parameter parameter, Tensor part, Action<Tensor> fill)
    {
        ArgumentNullException.ThrowIfNull(parameter);
        ArgumentNullException.ThrowIfNull(fill);
        if (IsShared(parameter.Name))
        {
            fill(part);
            return;
        }

        Tensor whole = Whole(parameter);
        fill(whole);
        _backend.Copy(Shaped(part, parameter.Rows, parameter.Columns), PartOf(parameter.Name, whole, _ranks!.Rank, _size));
    }

    /// <summary>The whole parameter, or a moment of it, of all ranks' parts; there until the next call. All ranks call it.</summary>
    /// <param name="parameter">This rank's part of the parameter.</param>
    /// <param name="part">The same part of what is gathered, contiguous.</param>
    public Tensor Gather(Parameter parameter, Tensor part)
    {
        ArgumentNullException.ThrowIfNull(parameter);
        if (IsShared(parameter.Name))
        {
            return part;
        }

        (int rows, int columns) = (parameter.Rows, parameter.Columns);
        Tensor gathered = Shaped(_gathered, _size * rows, columns);
        _ranks!.AllGather(gathered, Shaped(part, rows, columns)).Wait();
        Tensor whole = Whole(parameter);
        for (int rank = 0; rank < _size; rank++)
        {
            _backend.Copy(PartOf(parameter.Name, whole, rank, _size), gathered.RowRange(rank * rows, rows));
        }

        return whole;
    }

    /// <summary>Turns every rank's part of a sum into the sum.</summary>
    /// <param name="values">(N, C) of the type of activations, contiguous; they add up in F32.</param>
    internal void Complete(Tensor values)
    {
        for (int first = 0; first < values.Rows; first += _tokens)
        {
            Sum(values.RowRange(first, Math.Min(_tokens, values.Rows - first)));
        }
    }

    private void Sum(Tensor values)
    {
        // Each rank adds up its share of the rows, rounded up, and gives it to the others.
        int rows = RowsOfRank(values.Rows);
        bool divides = rows * _size == values.Rows;
        Tensor all = divides ? values : _padded.RowRange(0, rows * _size);
        Tensor sum = _sum.RowRange(0, rows), own = all.RowRange(_ranks!.Rank * rows, rows);
        if (!divides)
        {
            _backend.Copy(all.RowRange(0, values.Rows), values);
        }

        _ranks.ReduceScatter(sum, all, _received.RowRange(0, rows * _size)).Wait();
        _backend.Copy(own, sum);
        _ranks.AllGather(all, own).Wait();
        if (!divides)
        {
            _backend.Copy(values, all.RowRange(0, values.Rows));
        }
    }

    private int RowsOfRank(int rows) => (rows + _size - 1) / _size;

    private Tensor Whole(Parameter parameter) => IsSplitByColumns(parameter.Name)
        ? Shaped(_whole, parameter.Rows, _size * parameter.Columns)
        : Shaped(_whole, _size * parameter.Rows, parameter.Columns);

    // A rank's rows or columns of a whole parameter.
    private static Tensor PartOf(string name, Tensor whole, int rank, int ranks)
    {
        (int rows, int columns) = (whole.Rows / ranks, whole.Columns / ranks);
        return IsSplitByColumns(name) ? whole.ColumnRange(rank * columns, columns) : whole.RowRange(rank * rows, rows);
    }

    private static bool IsSplitByColumns(string name) =>
        name.EndsWith("o_proj.weight", StringComparison.Ordinal) || name.EndsWith("down_proj.weight", StringComparison.Ordinal);

    private static Tensor Shaped(Tensor elements, int rows, int columns) => elements with { Rows = rows, Columns = columns, Stride = columns };
}
