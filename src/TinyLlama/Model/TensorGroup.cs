using TinyLlama.Compute;
using TinyLlama.Compute.Collectives;

namespace TinyLlama.Model;

/// <summary>
/// Ranks that have the heads and the hidden channels of a model between them (tensor parallelism, Shoeybi et al. 2019). Each has
/// whole rows of q, k, v, gate and up, whole columns of o and down, and all of the embedding, the norms and the head. What o and
/// down give, and what flows back out of the others, are parts of sums: four sums a block, of (N, C) each.
/// </summary>
/// <remarks>
/// The head is not split: it would save V · C / ranks elements of memory and as much of the time, and cost another exchange for
/// the softmax. Sums are pairwise trees over the ranks, so they are the same for the same number of ranks, and close for others.
/// </remarks>
public sealed class TensorGroup
{
    private readonly Collective _ranks;
    private readonly Backend _backend;
    private readonly Tensor _parts;

    /// <summary>Takes room for all ranks' parts of one sum.</summary>
    /// <param name="ranks">The ranks; as many as <see cref="ModelConfig.TensorRanks"/>, a power of two.</param>
    /// <param name="backend">The device; activations in F32.</param>
    /// <param name="arena">Owner of the room.</param>
    /// <param name="config">The shape of a rank's part.</param>
    /// <param name="tokens">Most packed tokens of a forward.</param>
    public TensorGroup(Collective ranks, Backend backend, Arena arena, ModelConfig config, int tokens)
    {
        (_ranks, _backend) = (ranks, backend);
        if (ranks.Size != config.TensorRanks || backend.ActivationType != DType.F32)
        {
            throw new ArgumentException($"{ranks.Size} ranks for a shape of {config.TensorRanks}, with activations in {backend.ActivationType}", nameof(ranks));
        }

        _parts = arena.Take(checked(ranks.Size * tokens), config.Channels);
    }

    /// <summary>The rows and columns of the whole parameter that a rank's part begins with; (0, 0) for one that every rank has.</summary>
    /// <param name="part">A parameter of a model of <see cref="ModelConfig.Part"/>.</param>
    /// <param name="rank">The rank.</param>
    public static (int Row, int Column) FirstOf(Parameter part, int rank) => SplitOf(part.Name) switch
    {
        Split.Rows => (rank * part.Rows, 0),
        Split.Columns => (0, rank * part.Columns),
        _ => (0, 0),
    };

    /// <summary>Whether every rank has all of a parameter, and the same gradient of it.</summary>
    public static bool IsShared(Parameter part) => SplitOf(part.Name) == Split.None;

    /// <summary>Turns every rank's part of a sum into the sum.</summary>
    /// <param name="values">(N, C), contiguous.</param>
    internal void Complete(Tensor values)
    {
        Tensor parts = _parts.RowRange(0, values.Rows * _ranks.Size);
        _ranks.AllGather(parts, values).Wait();
        for (int distance = 1; distance < _ranks.Size; distance *= 2)
        {
            for (int i = 0; i < _ranks.Size; i += 2 * distance)
            {
                _backend.Add(parts.RowRange(i * values.Rows, values.Rows), parts.RowRange((i + distance) * values.Rows, values.Rows));
            }
        }

        _backend.Copy(values, parts.RowRange(0, values.Rows));
    }

    private static Split SplitOf(string name) => name switch
    {
        _ when name.EndsWith("o_proj.weight", StringComparison.Ordinal) || name.EndsWith("down_proj.weight", StringComparison.Ordinal) => Split.Columns,
        _ when name.EndsWith("_proj.weight", StringComparison.Ordinal) => Split.Rows,
        _ => Split.None,
    };

    private enum Split
    {
        None,
        Rows,
        Columns,
    }
}
