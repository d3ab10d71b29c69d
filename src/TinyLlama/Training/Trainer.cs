using System.Diagnostics;
using TinyLlama.Checkpoints;
using TinyLlama.Compute;
using TinyLlama.Compute.Collectives;
using TinyLlama.Data;
using TinyLlama.Data.Batches;
using TinyLlama.Data.Shards;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Evaluation;
using TinyLlama.Inference;
using TinyLlama.Model;

namespace TinyLlama.Training;

/// <summary>What a trainer tells while it runs.</summary>
public interface ITrainingObserver
{
    /// <summary>Something was measured; the log has it already.</summary>
    void Measured(Metrics metrics);

    /// <summary>Something happened that the user should know, in one line.</summary>
    void Warn(string message);
}

/// <summary>Runs optimizer steps until the plan's last. May stop after any step and go on from there, with the same bits.</summary>
public sealed class Trainer : IDisposable
{
    // Of RankReport.Signals: the rank was asked to stop; its part of the checkpoint that was begun is written.
    private const long StopSignal = 1;
    private const long WrittenSignal = 2;

    private readonly TrainingPlan _plan;
    private readonly string _folder;
    private readonly Backend _backend;
    private readonly TrainingMemory _memory;
    private readonly TrainingStep _step;
    private readonly TokenLoader _loader;
    private readonly ITokenizer _tokenizer;
    private readonly EvaluationTokens? _validation;
    private readonly MetricsLog? _log;
    private readonly ITrainingObserver _observer;
    private readonly Dictionary<long, double> _validationLosses;
    private readonly double? _peakFlops;
    private readonly string _dataFolder;
    private readonly TextGenerator? _generator;
    private readonly Collective _world;
    private readonly Mesh? _mesh;
    private readonly Stragglers? _stragglers;
    private readonly RunCheckpoints _checkpoints;
    private bool _stops;
    private TimeSpan _stepping;
    private TrainingState _state;
    private long _savedStep = -1;

    /// <summary>Takes memory and the initial weights, or those of the newest valid checkpoint of the run's folder.</summary>
    /// <param name="plan">The plan.</param>
    /// <param name="folder">The run's folder.</param>
    /// <param name="backend">The device.</param>
    /// <param name="shards">The corpus; the caller disposes of it.</param>
    /// <param name="dataFolder">Its folder, which holds the tokenizer's files.</param>
    /// <param name="tokenizer">The tokenizer that wrote it.</param>
    /// <param name="initial">Weights to begin with; null for random ones.</param>
    /// <param name="peakFlops">FLOP/s that the machine can do, for MFU; null where that was not measured.</param>
    /// <param name="observer">Is told of everything.</param>
    /// <param name="world">The ranks that train, as many as the plan says; the caller disposes of it, after this.</param>
    /// <exception cref="UserErrorException">The recipe, the data or the checkpoint do not fit together.</exception>
    public Trainer(
        TrainingPlan plan, string folder, Backend backend, TokenShards shards, string dataFolder, ITokenizer tokenizer,
        ModelSource? initial, double? peakFlops, ITrainingObserver observer, Collective world)
    {
        ArgumentNullException.ThrowIfNull(world);
        (_plan, _folder, _backend, _tokenizer, _peakFlops, _observer, _dataFolder, _world) =
            (plan, folder, backend, tokenizer, peakFlops, observer, dataFolder, world);
        _loader = new TokenLoader(shards, Split.Train, plan.ContextLength, plan.Recipe.Seed);
        _validation = shards.TokenCount(Split.Validation) >= 2
            ? EvaluationTokens.FromShards(shards, Split.Validation, tokenizer, plan.Recipe.Validation.Tokens)
            : null;
        _mesh = world.Size > 1 ? new Mesh(world, plan.Sharding) : null;
        _stragglers = world.Size > 1 ? new Stragglers(world.Size) : null;
        _memory = TrainingMemory.Allocate(plan.Shape, backend, _mesh);
        _step = new TrainingStep(_memory, backend);
        _checkpoints = new RunCheckpoints(
            folder, _memory, backend, world, plan.Model, tokenizer as BpeTokenizer, TimeSpan.FromSeconds(plan.Recipe.Distribution.TimeoutSeconds));
        _state = new TrainingState(0, 0, 0, 0, shards.Sha256, backend.Arithmetic);
        try
        {
            if (FindCheckpoint() is { } checkpoint)
            {
                Load(checkpoint);
            }
            else if (initial is not null)
            {
                Fill(initial);
            }
            else
            {
                _memory.Fill(parameters => Initialization.Initialize(
                    parameters, plan.Model, backend, plan.Recipe.Initialization, plan.Recipe.Seed));
            }

            // Now, so that a device without room for it is found before the first step.
            _generator = plan.Recipe.Samples.EverySteps > 0
                ? new TextGenerator(_memory.Model, backend, tokenizer, contextLength: plan.ContextLength)
                : null;
            string log = Path.Combine(folder, MetricsLog.FileName);
            _log = IsFirst ? MetricsLog.Open(log, _state.Step) : null;
            _validationLosses = !IsFirst ? [] : MetricsLog.Read(log).OfType<ValidationMetrics>()
                .GroupBy(metrics => metrics.Step).ToDictionary(group => group.Key, group => group.Last().Loss);
        }
        catch
        {
            _generator?.Dispose();
            _memory.Dispose();
            _mesh?.Dispose();
            throw;
        }
    }

    /// <summary>Gets where the run stands.</summary>
    public TrainingState State => _state;

    /// <summary>Gets a value indicating whether the last step is done.</summary>
    public bool IsFinished => _state.Step >= _plan.Steps;

    /// <summary>Gets the model.</summary>
    public LlamaModel Model => _memory.Model;

    // The rank that keeps the log and speaks for all.
    private bool IsFirst => _world.Rank == 0;

    /// <summary>Trains until the plan is done or a stop is asked for, and saves either way.</summary>
    /// <param name="stop">Asks to stop after the step that is under way.</param>
    /// <param name="lastStep">Stops after this many steps in all, though the plan has more; its schedule stays.</param>
    /// <exception cref="UserErrorException">The loss is not finite; no update was made with it.</exception>
    /// <exception cref="DeviceException">The device failed; says from where the run can go on.</exception>
    /// <exception cref="CollectiveException">Another rank was lost; says the same.</exception>
    public void Run(CancellationToken stop, long lastStep = long.MaxValue)
    {
        try
        {
            RunSteps(lastStep, stop);
        }
        catch (Exception e) when (e is DeviceException or CollectiveException)
        {
            string saved = _savedStep < 0
                ? "nothing was saved yet: the same command begins anew"
                : $"the checkpoint of step {_savedStep} is whole: the same command goes on from there";
            string rank = _world.Size > 1 ? $"rank {_world.Rank} of {_world.Size}, " : "";
            string message = $"{rank}step {_state.Step}: {e.Message}; {saved}";
            throw e is CollectiveException ? new CollectiveException(message, e) : new DeviceException(message, e);
        }
    }

    /// <summary>Writes a line to the run's log and tells the observer.</summary>
    public void Record(Metrics metrics)
    {
        try
        {
            _log?.Append(metrics);
        }
        catch (IOException e)
        {
            _observer.Warn($"{Path.Combine(_folder, MetricsLog.FileName)}: a line could not be written: {e.Message}");
        }

        _observer.Measured(metrics);
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _generator?.Dispose();
        _log?.Dispose();
        _checkpoints.Dispose();
        _memory.Dispose();
        _mesh?.Dispose();
    }

    private void RunSteps(long lastStep, CancellationToken stop)
    {
        if (IsFirst && !IsFinished)
        {
            EndRecord.Remove(_folder);
        }

        while (!IsFinished && _state.Step < lastStep && !Stops(stop))
        {
            if (_plan.SavesAt(_state.Step))
            {
                Save();
            }

            if (_plan.ValidatesAt(_state.Step))
            {
                Validate();
            }

            if (_plan.SamplesAt(_state.Step))
            {
                Sample();
            }

            Step(stop);
        }

        Note(_stragglers?.End());
        Note(Overlap());
        Save();
        FinishSave();
        if (IsFinished)
        {
            Validate();
            Sample();
            Retain();
            if (IsFirst)
            {
                EndRecord.Write(_folder, _state.Step, _state.Tokens);
            }
        }

        // What was gathered for a step that does not come still moves this memory; and no rank ends before the run is on the disk.
        _world.Barrier();
    }

    // One rank alone stops when it is asked to; many stop after the step in which one of them said that it was.
    private bool Stops(CancellationToken stop) => _stops || (_world.Size == 1 && stop.IsCancellationRequested);

    private void Step(CancellationToken stop)
    {
        long start = Stopwatch.GetTimestamp();
        long step = _state.Step;
        double learningRate = _plan.LearningRateAt(step);
        StepResult result = _step.Run(
            step + 1, _state.Samples, learningRate, _loader, _plan.Recipe.Data.MaskedDocuments ? DocumentAttention.Masked : DocumentAttention.Joined, _plan.AccumulationSteps,
            (stop.IsCancellationRequested ? StopSignal : 0) | (_checkpoints.State == CheckpointState.Written ? WrittenSignal : 0));
        double seconds = Stopwatch.GetElapsedTime(start).TotalSeconds;
        _stepping += TimeSpan.FromSeconds(seconds);
        bool isWritten = true;
        foreach (RankReport report in _step.Reports)
        {
            _stops |= (report.Signals & StopSignal) != 0;
            isWritten &= (report.Signals & WrittenSignal) != 0;
        }

        if (isWritten || !result.IsFinite)
        {
            FinishSave();
        }

        if (!result.IsFinite)
        {
            throw NotFinite(result);
        }

        _state = _state with
        {
            Step = step + 1,
            Tokens = _state.Tokens + _plan.TokensPerStep,
            Samples = _state.Samples + _plan.SequencesPerStep,
            Seconds = _state.Seconds + seconds,
        };
        double rate = _plan.TokensPerStep / seconds;
        double? mfu = _peakFlops is double peak ? rate * _plan.FlopsPerToken / (peak * _world.Size) : null;
        Record(new StepMetrics(step, _state.Tokens, result.Loss, result.GradientNorm, learningRate, rate, mfu));
        Note(_stragglers?.Add(_step.Reports));
    }

    // How much of the steps' communication was hidden behind computing; null where there was none, or a device queued it.
    private string? Overlap()
    {
        CollectiveProgress progress = _world.Progress;
        return _stepping == TimeSpan.Zero || progress.Busy == TimeSpan.Zero ? null : FormattableString.Invariant(
            $"communication took {progress.Busy.TotalSeconds:0.0} s of {_stepping.TotalSeconds:0.0} s of steps, {100 * Math.Max(0, 1 - (progress.Waited / progress.Busy)):0} % of it beside computing");
    }

    private void Note(string? line)
    {
        if (line is not null)
        {
            Record(new NoteMetrics(_state.Step - 1, line));
        }
    }

    private void Validate()
    {
        if (_validation is null)
        {
            return;
        }

        Score score = Perplexity.Measure(
            _memory.Model, _backend, _memory.Workspace, _validation, _plan.Recipe.Data.MaskedDocuments, _plan.ContextLength,
            ranks: _plan.Sharding switch
            {
                { ShardsWeights: true } => null,
                { ModelRanks: > 1 } => _mesh!.Replica,
                _ => _world,
            });
        _validationLosses[_state.Step] = score.Loss;
        Record(new ValidationMetrics(_state.Step, _state.Tokens, score.Loss, score.Perplexity, score.BitsPerByte));
    }

    private void Sample()
    {
        SampleSettings settings = _plan.Recipe.Samples;
        // Where weights are sharded every rank takes part in each forward of any; where blocks are split those that share them.
        if (_generator is null || !(_world.Rank < _plan.Sharding.ModelRanks || _plan.Sharding.ShardsWeights))
        {
            return;
        }

        var options = new GenerationOptions
        {
            MaxTokens = settings.MaxTokens,
            Temperature = settings.Temperature,
            Seed = _plan.Recipe.Seed,
            Overflow = ContextOverflow.Sliding,
        };
        foreach (string prompt in settings.Prompts)
        {
            Record(new SampleMetrics(_state.Step, prompt, string.Concat(_generator.Generate(prompt, options))));
        }
    }

    private void Save()
    {
        FinishSave();
        if (_savedStep == _state.Step)
        {
            return;
        }

        _checkpoints.Begin(_state);
        if (!_plan.SavesAsynchronously)
        {
            FinishSave();
        }
    }

    // Waits for the checkpoint that was begun, if one was. A full disk costs a checkpoint, not the run: the ones before are untouched.
    private void FinishSave()
    {
        if (_checkpoints.State == CheckpointState.Idle)
        {
            return;
        }

        CheckpointOutcome outcome = _checkpoints.Finish();
        if (outcome.Failure is null)
        {
            _savedStep = outcome.Step;
            Retain();
        }
        else if (IsFirst)
        {
            _observer.Warn($"step {outcome.Step}: the checkpoint could not be written: {outcome.Failure}; training goes on, earlier checkpoints are untouched");
        }
    }

    private void Retain()
    {
        if (!IsFirst)
        {
            return;
        }

        CheckpointSettings keep = _plan.Recipe.Checkpoints;
        try
        {
            new Retention(keep.KeepLast, keep.KeepEvery, keep.KeepBest).Apply(_folder, _validationLosses);
        }
        catch (IOException e)
        {
            _observer.Warn($"an old checkpoint could not be deleted: {e.Message}");
        }
    }

    // The first rank looks, and sets damaged ones aside; the others open what it found.
    private TrainingCheckpoint? FindCheckpoint()
    {
        TrainingCheckpoint? checkpoint = _world.Await(
            IsFirst ? Task.Run(() => TrainingCheckpoint.FindNewestValid(_folder, _observer.Warn)) : Task.FromResult<TrainingCheckpoint?>(null));
        Span<long> all = stackalloc long[_world.Size];
        _world.AllGather<long>(all, [checkpoint?.Step ?? -1]);
        return IsFirst || all[0] < 0 ? checkpoint : TrainingCheckpoint.Open(TrainingCheckpoint.PathOf(_folder, all[0]));
    }

    private void Fill(ModelSource source)
    {
        source.Require(ModelTensors.Of(_plan.Model));
        _memory.Fill(parameters => source.CopySomeTo(_backend, parameters));
    }

    private void Load(TrainingCheckpoint checkpoint)
    {
        TrainingState state = TrainingState.Read(Path.Combine(checkpoint.Path, TrainingCheckpoint.StateName));
        if (state.DataSha256 != _state.DataSha256)
        {
            throw new UserErrorException(
                $"{checkpoint.Path} was trained on other data than {_dataFolder}; give the data it began with, or begin another run with init: {checkpoint.Path}");
        }

        using (ModelSource model = ModelSource.Open(checkpoint.Path, _observer.Warn))
        {
            Fill(model);
        }

        _checkpoints.LoadMoments(checkpoint);
        if (state.Device != _state.Device)
        {
            _observer.Warn($"the run goes on with '{_state.Device}', it was saved with '{state.Device}': last bits may differ from an unbroken run");
        }

        _savedStep = state.Step;
        _state = state with { Device = _state.Device };
    }

    private UserErrorException NotFinite(StepResult result)
    {
        IEnumerable<string> documents = Enumerable.Range(0, (int)_plan.SequencesPerStep)
            .SelectMany(s => _loader.Documents(_loader.BlockOf(_state.Samples + s)))
            .Select(document => document.ToString())
            .Distinct();
        string[] named = [.. documents.Take(200)];
        string path = Path.Combine(_folder, $"not-finite-step-{_state.Step}.txt");
        try
        {
            if (IsFirst)
            {
                File.WriteAllLines(path, named);
            }
        }
        catch (IOException e)
        {
            _observer.Warn($"{path}: {e.Message}");
        }

        return new UserErrorException(
            $"step {_state.Step}: loss {result.Loss}, gradient norm {result.GradientNorm}; nothing was updated. "
            + $"Its batch holds {string.Join(", ", named.Take(3))}{(named.Length > 3 ? $" and more, listed in {path}" : "")}. "
            + "Lower optimizer.learning_rate or mend the data, and run again: it goes on from the newest checkpoint");
    }
}
