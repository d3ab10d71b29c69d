using System.Diagnostics;
using TinyLlama.Compute;
using TinyLlama.Data.Batches;
using TinyLlama.Model;

namespace TinyLlama.Training;

/// <summary>What one step measured.</summary>
/// <param name="Loss">Mean cross-entropy of the step's targets before the update, in nats per token.</param>
/// <param name="GradientNorm">Global norm of the gradient of that mean, unclipped.</param>
/// <param name="Targets">Targets that the mean is over.</param>
public readonly record struct StepResult(double Loss, double GradientNorm, long Targets)
{
    /// <summary>Gets a value indicating whether the update was made: only where loss and norm are finite.</summary>
    public bool IsFinite => double.IsFinite(Loss) && double.IsFinite(GradientNorm);
}

/// <summary>What a rank tells the others in each step, beside its sums.</summary>
/// <param name="Seconds">Time in which it computed, not counting how long it waited for others.</param>
/// <param name="Signals">Whatever the program wants all ranks to know after the same step.</param>
public readonly record struct RankReport(double Seconds, long Signals);

/// <summary>One optimizer update from one global batch. Allocates no managed memory.</summary>
public sealed class TrainingStep
{
    // A rank tells its RankReport, then a sum of squares for each unit of the whole model, then a loss for each of its lanes.
    private const int Told = 2;

    private readonly TrainingMemory _memory;
    private readonly Backend _backend;
    private readonly Sharding _sharding;
    private readonly PipelineStep? _pipeline;
    private readonly Action _accumulate;
    private readonly Action<MicroBatch, int> _fill;
    private readonly double[] _own;
    private readonly double[] _all;
    private readonly double[] _squares;
    private readonly double[] _losses;
    private readonly RankReport[] _reports;
    private readonly int _units;
    private (TokenLoader Loader, long FirstSample, DocumentAttention Documents) _samples;
    private long _targets;
    private int _perLane;
    private int _turn;

    /// <summary>A step over given memory.</summary>
    /// <param name="memory">Model, optimizer and buffers.</param>
    /// <param name="backend">The device.</param>
    public TrainingStep(TrainingMemory memory, Backend backend)
    {
        ArgumentNullException.ThrowIfNull(memory);
        (_memory, _backend, _sharding, _accumulate, _fill) = (memory, backend, memory.Sharding, AccumulateOperations, Fill);
        _pipeline = memory.Model.Stages is { } stages ? new PipelineStep(stages, memory.UnderWay, Forward, BackwardInTurn) : null;
        _units = memory.WholeUnits;
        _own = new double[Told + _units + _sharding.LanesOfRank];
        _all = new double[_own.Length * _sharding.Ranks];
        _squares = new double[_sharding.Shards];
        _losses = new double[_sharding.Lanes];
        _reports = new RankReport[_sharding.Ranks];
    }

    /// <summary>Gets what the ranks told in the last step.</summary>
    public IReadOnlyList<RankReport> Reports => _reports;

    private int Rank => _memory.Mesh?.World.Rank ?? 0;

    /// <summary>Forward, backward and update over the samples of one step.</summary>
    /// <param name="step">1 for the first update.</param>
    /// <param name="firstSample">The first sequence's sample.</param>
    /// <param name="learningRate">Of this update.</param>
    /// <param name="loader">Where samples come from.</param>
    /// <param name="documents">What attention does between documents.</param>
    /// <param name="accumulation">Micro-batches of a step, of all ranks; each lane has as many.</param>
    /// <param name="signals">What all ranks shall know when the step is done.</param>
    public StepResult Run(
        long step, long firstSample, double learningRate, TokenLoader loader, DocumentAttention documents, int accumulation, long signals = 0)
    {
        long start = Stopwatch.GetTimestamp();
        TimeSpan waited = _memory.Mesh?.World.Progress.Waited ?? default;
        int sequences = _memory.Batch.Sequences;
        long targets = 0;
        for (int s = 0; s < sequences * accumulation; s++)
        {
            targets += loader.TargetCount(firstSample + s);
        }

        Begin(targets);
        _samples = (loader, firstSample, documents);
        Accumulate(accumulation / _sharding.Lanes, _fill);
        TimeSpan computed = Stopwatch.GetElapsedTime(start) - ((_memory.Mesh?.World.Progress.Waited ?? default) - waited);
        return End(step, learningRate, new RankReport(computed.TotalSeconds, signals));
    }

    /// <summary>Starts a step. Every target counts the same, whatever micro-batch it is in.</summary>
    /// <param name="targets">Targets of all micro-batches of all ranks.</param>
    public void Begin(long targets)
    {
        _targets = targets;
        Span<float> scale = [(float)(1.0 / targets)];
        _backend.Write<float>(_memory.Scale, scale);
        _backend.Zero(_memory.LossSums);
    }

    /// <summary>Forward and backward of all micro-batches of this rank, lane after lane.</summary>
    /// <param name="perLane">Micro-batches of a lane.</param>
    /// <param name="fill">Loads the tokens of one, by its number among these: alike on ranks that have one model between them.</param>
    public void Accumulate(int perLane, Action<MicroBatch, int> fill)
    {
        ArgumentNullException.ThrowIfNull(fill);
        _perLane = perLane;
        int microBatches = perLane * _sharding.LanesOfRank;
        if (_pipeline is not null)
        {
            _pipeline.Run(microBatches, fill);
            return;
        }

        for (int micro = 0; micro < microBatches; micro++)
        {
            fill(_memory.Batch, micro);
            Accumulate(micro / perLane, EndsLane(micro));
        }
    }

    /// <summary>Forward and backward of the micro-batch that <see cref="TrainingMemory.Batch"/> holds, on a rank that is no stage of a pipeline.</summary>
    /// <param name="turn">Which of the rank's lanes it adds to.</param>
    /// <param name="endsLane">Whether it is the last of the lane.</param>
    public void Accumulate(int turn = 0, bool endsLane = true)
    {
        BeginTurn(turn, endsLane);

        // With one segment a sequence, the launches are those of every such micro-batch, unless other ranks take part in some.
        if (_memory.Parameters is null && _memory.Mesh is null && _memory.Batch.Layout.SegmentCount == _memory.Batch.Sequences)
        {
            _backend.Repeat(_memory.Recording, _accumulate);
        }
        else
        {
            AccumulateOperations();
        }
    }

    /// <summary>Updates the parameters, unless the loss or the gradient is not finite: every rank what it owns, all alike.</summary>
    /// <param name="step">1 for the first update.</param>
    /// <param name="learningRate">Of this update.</param>
    /// <param name="report">What the other ranks are told of this one.</param>
    public StepResult End(long step, double learningRate, RankReport report = default)
    {
        _memory.Parameters?.EndStep();
        (_own[0], _own[1]) = (report.Seconds, report.Signals);
        _memory.Optimizer.SumOfSquares(_own.AsSpan(Told + _memory.FirstUnit));
        _backend.Read(_own.AsSpan(Told + _units), _memory.LossSums);
        if (_memory.Mesh is { } mesh)
        {
            mesh.World.AllGather<double>(_all, _own);
        }
        else
        {
            _own.CopyTo(_all, 0);
        }

        for (int rank = 0; rank < _sharding.Ranks; rank++)
        {
            ReadOnlySpan<double> told = ToldBy(rank);
            _reports[rank] = new RankReport(told[0], (long)told[1]);
        }

        double squares = SumOfSquares();
        var result = new StepResult(SumOfLosses() / _targets, Math.Sqrt(squares), _targets);
        if (result.IsFinite)
        {
            _memory.Optimizer.Update(step, learningRate, squares);
            if (_memory.Parameters is { } parameters)
            {
                parameters.Publish();
            }
            else
            {
                _memory.Model.Pack();
            }
        }

        return result;
    }

    // The first ranks own everything once, the others the same again. A rank tells zero of the units of other stages.
    private double SumOfSquares()
    {
        double sum = 0;
        for (int unit = 0; unit < _units; unit++)
        {
            Array.Clear(_squares);
            for (int rank = 0; rank < _sharding.Shards * _sharding.ModelRanks; rank++)
            {
                _squares[rank / _sharding.ModelRanks] += ToldBy(rank)[Told + unit];
            }

            sum += Sharding.Tree(_squares);
        }

        return sum;
    }

    // Of the ranks that have one model between them the last has the head.
    private double SumOfLosses()
    {
        for (int rank = _sharding.ModelRanks - 1; rank < _sharding.Ranks; rank += _sharding.ModelRanks)
        {
            for (int turn = 0; turn < _sharding.LanesOfRank; turn++)
            {
                _losses[_sharding.LaneOf(rank, turn)] = ToldBy(rank)[Told + _units + turn];
            }
        }

        return Sharding.Tree(_losses);
    }

    private ReadOnlySpan<double> ToldBy(int rank) => _all.AsSpan(rank * _own.Length, _own.Length);

    private void Fill(MicroBatch batch, int micro)
    {
        long first = ((long)_sharding.LaneOf(Rank, micro / _perLane) * _perLane) + (micro % _perLane);
        batch.Fill(_backend, _samples.Loader, _samples.FirstSample + (first * batch.Sequences), _samples.Documents);
    }

    private void AccumulateOperations()
    {
        Forward(_memory.UnderWay[0]);
        Backward(_memory.UnderWay[0]);
    }

    private void Forward(MicroStep step) =>
        _memory.Model.Forward(step.Workspace, step.Batch.Tokens, step.Batch.Layout, KeyValueSource.Batch);

    private void Backward(MicroStep step)
    {
        MicroBatch batch = step.Batch;
        _memory.Model.Backward(step.Workspace, batch.Tokens, batch.Targets, _memory.Scale, batch.Layout);
        if (_memory.Model.Config.HasHead)
        {
            _backend.Sum(_memory.LossSums.ColumnRange(_turn, 1), step.Workspace.Losses(batch.Targets.Rows));
        }
    }

    private void BackwardInTurn(MicroStep step, int micro)
    {
        BeginTurn(micro / _perLane, EndsLane(micro));
        Backward(step);
    }

    private void BeginTurn(int turn, bool endsLane)
    {
        _turn = turn;
        _memory.Parameters?.BeginMicroBatch(turn, endsLane);
    }

    private bool EndsLane(int micro) => micro % _perLane == _perLane - 1;
}
