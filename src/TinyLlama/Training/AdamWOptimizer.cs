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

/// <summary>AdamW over all parameters of a model: moments, global norm, clipping and update, all on the device.</summary>
public sealed class AdamWOptimizer
{
    private readonly LlamaModel _model;
    private readonly Backend _backend;
    private readonly AdamWSettings _settings;
    private readonly DecayGroup _decay;
    private readonly RateFactors _rates;
    private readonly Tensor[] _gradients;
    private readonly Tensor[] _first;
    private readonly Tensor[] _second;
    private readonly Tensor _partials;
    private readonly Tensor _sumOfSquares;
    private readonly Tensor _step;

    /// <summary>Takes two moments a parameter from the arena.</summary>
    /// <param name="model">A model with gradients.</param>
    /// <param name="backend">The device.</param>
    /// <param name="arena">Owner of the moments.</param>
    /// <param name="settings">The constants; its weight decay is for the parameters in <paramref name="decay"/>.</param>
    /// <param name="decay">Which parameters decay.</param>
    /// <param name="rates">Learning rates of the tables.</param>
    public AdamWOptimizer(
        LlamaModel model, Backend backend, Arena arena, AdamWSettings settings, DecayGroup decay, RateFactors rates)
    {
        (_model, _backend, _settings, _decay, _rates) = (model, backend, settings, decay, rates);
        IReadOnlyList<Parameter> parameters = model.Parameters;
        _gradients = [.. parameters.Select(p => p.Gradient)];
        _first = [.. parameters.Select(p => arena.Take(p.Values.Rows, p.Values.Columns))];
        _second = [.. parameters.Select(p => arena.Take(p.Values.Rows, p.Values.Columns))];
        _partials = arena.Take(1, Backend.SumOfSquaresPartials(_gradients), DType.F64);
        _sumOfSquares = arena.Take(1, 1, DType.F64);
        _step = arena.Take(1, 3);
    }

    /// <summary>Gets the moments under the names that a checkpoint keeps: the parameter's, then <c>.first</c> or <c>.second</c>.</summary>
    public IEnumerable<Parameter> State => _model.Parameters.SelectMany((parameter, i) => new[]
    {
        new Parameter(parameter.Name + ".first", _first[i], default),
        new Parameter(parameter.Name + ".second", _second[i], default),
    });

    /// <summary>The global norm of the gradients, unclipped. Waits for the device.</summary>
    public double GradientNorm()
    {
        _backend.SumOfSquares(_sumOfSquares, _partials, _gradients);
        Span<double> sum = stackalloc double[1];
        _backend.Read(sum, _sumOfSquares);
        return Math.Sqrt(sum[0]);
    }

    /// <summary>Updates every parameter from its gradient, after <see cref="GradientNorm"/>; gradients are zero then.</summary>
    /// <param name="step">1 for the first update: the bias corrections need it.</param>
    /// <param name="learningRate">Of this update.</param>
    public void Update(long step, double learningRate)
    {
        Span<float> scalars =
        [
            (float)learningRate,
            (float)(1 - Math.Pow(_settings.Beta1, step)),
            (float)(1 - Math.Pow(_settings.Beta2, step)),
        ];
        _backend.Write<float>(_step, scalars);
        for (int i = 0; i < _gradients.Length; i++)
        {
            Parameter parameter = _model.Parameters[i];
            bool decays = _decay == DecayGroup.All || !parameter.IsVector;
            AdamWSettings settings = _settings with
            {
                WeightDecay = decays ? _settings.WeightDecay : 0,
                RateFactor = parameter.Name switch
                {
                    LlamaModel.EmbeddingName => _rates.Embedding,
                    LlamaModel.HeadName => _rates.Head,
                    _ => 1,
                },
            };
            _backend.AdamW(parameter.Values, _first[i], _second[i], _gradients[i], _step, _sumOfSquares, settings);
        }

        _model.Pack();
    }
}
