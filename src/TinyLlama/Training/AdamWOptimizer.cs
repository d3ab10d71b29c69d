using TinyLlama.Compute;
using TinyLlama.Model;

namespace TinyLlama.Training;

/// <summary>Which parameters weight decay shrinks.</summary>
public enum DecayGroup
{
    /// <summary>All of them, norms and embeddings too, as TinyLlama did.</summary>
    All,

    /// <summary>Only those with two dimensions.</summary>
    Matrices,
}

/// <summary>
/// Learning rates of the two tables of tokens as multiples of the others'. A row of the embedding has a gradient only in
/// steps that hold its token, and those are few for most tokens: it can learn much faster.
/// </summary>
/// <param name="Embedding">Of the embedding, also where it is the head.</param>
/// <param name="Head">Of a head of its own.</param>
public readonly record struct RateFactors(float Embedding, float Head)
{
    /// <summary>The same rate for all.</summary>
    public static readonly RateFactors Same = new(1, 1);
}

/// <summary>A range of a parameter's elements that this rank updates: all of them where there is one rank.</summary>
/// <param name="Parameter">The parameter.</param>
/// <param name="First">Its first element in the parameter.</param>
/// <param name="Values">The values, (1, count) of F32, as what follows.</param>
/// <param name="Gradient">Their gradient.</param>
/// <param name="FirstMoment">AdamW's first moment.</param>
/// <param name="SecondMoment">Its second.</param>
public sealed record OwnedPiece(Parameter Parameter, long First, Tensor Values, Tensor Gradient, Tensor FirstMoment, Tensor SecondMoment);

/// <summary>AdamW over the parameters that a rank owns: moments, global norm, clipping and update, all on the device.</summary>
public sealed class AdamWOptimizer
{
    private readonly Backend _backend;
    private readonly AdamWSettings _settings;
    private readonly (OwnedPiece Piece, AdamWSettings Settings)[] _pieces;
    private readonly Tensor[][][] _counted;
    private readonly Tensor _partials;
    private readonly Tensor _sums;
    private readonly Tensor _sumOfSquares;
    private readonly Tensor _step;
    private readonly double[] _read;

    /// <summary>Takes two moments an element from the arena.</summary>
    /// <param name="owned">What this rank updates: rows of every unit of a model.</param>
    /// <param name="subdivisions">Equal parts of the owned rows of a unit whose squares add up before the parts do.</param>
    /// <param name="countsShared">Whether the squares of what other ranks update alike count here (<see cref="TensorGroup.IsShared"/>).</param>
    /// <param name="backend">The device.</param>
    /// <param name="arena">Owner of the moments.</param>
    /// <param name="settings">The constants; its weight decay is for the parameters in <paramref name="decay"/>.</param>
    /// <param name="decay">Which parameters decay.</param>
    /// <param name="rates">Learning rates of the tables.</param>
    public AdamWOptimizer(
        IReadOnlyList<OwnedRows> owned, int subdivisions, bool countsShared, Backend backend, Arena arena, AdamWSettings settings,
        DecayGroup decay, RateFactors rates)
    {
        (_backend, _settings) = (backend, settings);
        _pieces = [.. owned.SelectMany(rows => Pieces(rows, arena)).Select(piece => (piece, SettingsOf(piece.Parameter, settings, decay, rates)))];
        _counted = [.. owned.Select(rows => countsShared ? Divided(rows.Gradient, subdivisions) : [[.. SplitGradients(rows.Unit)]])];
        int sums = _counted.Sum(static unit => unit.Length);
        _partials = arena.Take(1, _counted.Max(static unit => unit.Max(static part => Backend.SumOfSquaresPartials(part))), DType.F64);
        _sums = arena.Take(1, sums, DType.F64);
        _sumOfSquares = arena.Take(1, 1, DType.F64);
        _step = arena.Take(1, 3);
        _read = new double[sums];
    }

    /// <summary>Gets what this rank updates, with its moments, in the order of units.</summary>
    public IEnumerable<OwnedPiece> Owned => _pieces.Select(static entry => entry.Piece);

    /// <summary>
    /// The sums of the squares of the gradients that this rank owns, unclipped: for each unit one sum for each subdivision, then a
    /// pairwise tree. Waits for the device.
    /// </summary>
    /// <param name="units">Receives a sum for each unit; the rest stays.</param>
    public void SumOfSquares(Span<double> units)
    {
        int sum = 0;
        foreach (Tensor[][] unit in _counted)
        {
            foreach (Tensor[] part in unit)
            {
                _backend.SumOfSquares(_sums.ColumnRange(sum++, 1), _partials, part);
            }
        }

        _backend.Read<double>(_read, _sums);
        Span<double> rest = _read;
        for (int u = 0; u < _counted.Length; u++)
        {
            units[u] = Sharding.Tree(rest[.._counted[u].Length]);
            rest = rest[_counted[u].Length..];
        }
    }

    /// <summary>Updates what this rank owns from its gradient, which is zero then.</summary>
    /// <param name="step">1 for the first update: the bias corrections need it.</param>
    /// <param name="learningRate">Of this update.</param>
    /// <param name="sumOfSquares">Of all ranks' gradients: the square of the global norm.</param>
    public void Update(long step, double learningRate, double sumOfSquares)
    {
        Span<float> scalars =
        [
            (float)learningRate,
            (float)(1 - Math.Pow(_settings.Beta1, step)),
            (float)(1 - Math.Pow(_settings.Beta2, step)),
        ];
        _backend.Write<float>(_step, scalars);
        _backend.Write<double>(_sumOfSquares, [sumOfSquares]);
        foreach ((OwnedPiece piece, AdamWSettings settings) in _pieces)
        {
            _backend.AdamW(piece.Values, piece.FirstMoment, piece.SecondMoment, piece.Gradient, _step, _sumOfSquares, settings);
        }
    }

    // The parameters' ranges inside the rows, which pay no heed to where parameters begin.
    private static IEnumerable<OwnedPiece> Pieces(OwnedRows rows, Arena arena)
    {
        Tensor first = arena.Take(rows.Values.Rows, ParameterUnit.Columns), second = arena.Take(rows.Values.Rows, ParameterUnit.Columns);
        long begin = (long)rows.FirstRow * ParameterUnit.Columns, end = begin + rows.Values.Count;
        foreach (Parameter parameter in rows.Unit.Parameters)
        {
            long offset = rows.Unit.OffsetOf(parameter);
            long from = Math.Max(begin, offset), to = Math.Min(end, offset + parameter.Values.Count);
            if (from < to)
            {
                int count = checked((int)(to - from));
                yield return new OwnedPiece(
                    parameter, from - offset, rows.Values.Elements(from - begin, count), rows.Gradient.Elements(from - begin, count),
                    first.Elements(from - begin, count), second.Elements(from - begin, count));
            }
        }
    }

    private static AdamWSettings SettingsOf(Parameter parameter, AdamWSettings settings, DecayGroup decay, RateFactors rates) => settings with
    {
        WeightDecay = decay == DecayGroup.All || !parameter.IsVector ? settings.WeightDecay : 0,
        RateFactor = parameter.Name switch
        {
            LlamaModel.EmbeddingName => rates.Embedding,
            LlamaModel.HeadName => rates.Head,
            _ => 1,
        },
    };

    private static Tensor[][] Divided(Tensor gradient, int subdivisions)
    {
        int rows = gradient.Rows / subdivisions;
        return [.. Enumerable.Range(0, subdivisions).Select(part => new[] { gradient.RowRange(part * rows, rows) })];
    }

    private static IEnumerable<Tensor> SplitGradients(ParameterUnit unit) =>
        unit.Parameters.Where(static parameter => !TensorGroup.IsShared(parameter.Name)).Select(static parameter => parameter.Gradient);
}
