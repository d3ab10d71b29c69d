using System.Diagnostics;
using TinyLlama.Checkpoints;
using TinyLlama.Compute;
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
    private readonly TrainingPlan _plan;
    private readonly string _folder;
    private readonly Backend _backend;
    private readonly TrainingMemory _memory;
    private readonly TrainingStep _step;
    private readonly TokenLoader _loader;
    private readonly ITokenizer _tokenizer;
    private readonly EvaluationTokens? _validation;
    private readonly MetricsLog _log;
    private readonly ITrainingObserver _observer;
    private readonly Dictionary<long, double> _validationLosses;
    private readonly double? _peakFlops;
    private readonly string _dataFolder;
    private readonly TextGenerator? _generator;
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
    /// <exception cref="UserErrorException">The recipe, the data or the checkpoint do not fit together.</exception>
    public Trainer(
        TrainingPlan plan, string folder, Backend backend, TokenShards shards, string dataFolder, ITokenizer tokenizer,
        ModelSource? initial, double? peakFlops, ITrainingObserver observer)
    {
        (_plan, _folder, _backend, _tokenizer, _peakFlops, _observer, _dataFolder) =
            (plan, folder, backend, tokenizer, peakFlops, observer, dataFolder);
        _loader = new TokenLoader(shards, Split.Train, plan.ContextLength, plan.Recipe.Seed);
        _validation = shards.TokenCount(Split.Validation) >= 2
            ? EvaluationTokens.FromShards(shards, Split.Validation, tokenizer, plan.Recipe.Validation.Tokens)
            : null;
        _memory = TrainingMemory.Allocate(plan.Shape, backend);
        _step = new TrainingStep(_memory, backend);
        _state = new TrainingState(0, 0, 0, 0, shards.Sha256, backend.Arithmetic);
        try
        {
            if (TrainingCheckpoint.FindNewestValid(folder, observer.Warn) is { } checkpoint)
            {
                Load(checkpoint);
            }
            else if (initial is not null)
            {
                initial.CopyTo(backend, _memory.Model.Parameters);
                _memory.Model.Pack();
            }
            else
            {
                Initialization.Initialize(_memory.Model, backend, plan.Recipe.Initialization, plan.Recipe.Seed);
            }

            // Now, so that a device without room for it is found before the first step.
            _generator = plan.Recipe.Samples.EverySteps > 0
                ? new TextGenerator(_memory.Model, backend, tokenizer, contextLength: plan.ContextLength)
                : null;
            string log = Path.Combine(folder, MetricsLog.FileName);
            _log = MetricsLog.Open(log, _state.Step);
            _validationLosses = MetricsLog.Read(log).OfType<ValidationMetrics>()
                .GroupBy(metrics => metrics.Step).ToDictionary(group => group.Key, group => group.Last().Loss);
        }
        catch
        {
            _generator?.Dispose();
            _memory.Dispose();
            throw;
        }
    }

    /// <summary>Gets where the run stands.</summary>
    public TrainingState State => _state;

    /// <summary>Gets a value indicating whether the last step is done.</summary>
    public bool IsFinished => _state.Step >= _plan.Steps;

    /// <summary>Gets the model.</summary>
    public LlamaModel Model => _memory.Model;

    /// <summary>Trains until the plan is done or a stop is asked for, and saves either way.</summary>
    /// <param name="stop">Asks to stop after the step that is under way.</param>
    /// <param name="lastStep">Stops after this many steps in all, though the plan has more; its schedule stays.</param>
    /// <exception cref="UserErrorException">The loss is not finite; no update was made with it.</exception>
    /// <exception cref="DeviceException">The device failed; says from where the run can go on.</exception>
    public void Run(CancellationToken stop, long lastStep = long.MaxValue)
    {
        try
        {
            RunSteps(lastStep, stop);
        }
        catch (DeviceException e)
        {
            string saved = _savedStep < 0
                ? "nothing was saved yet: the same command begins anew"
                : $"the checkpoint of step {_savedStep} is whole: the same command goes on from there";
            throw new DeviceException($"step {_state.Step}: {e.Message}; {saved}", e);
        }
    }

    /// <summary>Writes a line to the run's log and tells the observer.</summary>
    public void Record(Metrics metrics)
    {
        try
        {
            _log.Append(metrics);
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
        _log.Dispose();
        _memory.Dispose();
    }

    private void RunSteps(long lastStep, CancellationToken stop)
    {
        while (!IsFinished && _state.Step < lastStep && !stop.IsCancellationRequested)
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

            Step();
        }

        Save();
        if (IsFinished)
        {
            Validate();
            Sample();
            Retain();
        }
    }

    private void Step()
    {
        long start = Stopwatch.GetTimestamp();
        long step = _state.Step;
        double learningRate = _plan.LearningRateAt(step);
        StepResult result = _step.Run(
            step + 1, _state.Samples, learningRate, _loader, _plan.Recipe.Data.MaskedDocuments ? DocumentAttention.Masked : DocumentAttention.Joined, _plan.AccumulationSteps);
        if (!result.IsFinite)
        {
            throw NotFinite(result);
        }

        double seconds = Stopwatch.GetElapsedTime(start).TotalSeconds;
        _state = _state with
        {
            Step = step + 1,
            Tokens = _state.Tokens + _plan.TokensPerStep,
            Samples = _state.Samples + _plan.SequencesPerStep,
            Seconds = _state.Seconds + seconds,
        };
        double rate = _plan.TokensPerStep / seconds;
        double? mfu = _peakFlops is double peak ? rate * _plan.FlopsPerToken / peak : null;
        Record(new StepMetrics(step, _state.Tokens, result.Loss, result.GradientNorm, learningRate, rate, mfu));
    }

    private void Validate()
    {
        if (_validation is null)
        {
            return;
        }

        Score score = Perplexity.Measure(
            _memory.Model, _backend, _memory.Workspace, _validation, _plan.Recipe.Data.MaskedDocuments, _plan.ContextLength);
        _validationLosses[_state.Step] = score.Loss;
        Record(new ValidationMetrics(_state.Step, _state.Tokens, score.Loss, score.Perplexity, score.BitsPerByte));
    }

    private void Sample()
    {
        SampleSettings settings = _plan.Recipe.Samples;
        if (_generator is null)
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

    // A full disk costs a checkpoint, not the run: the ones before are untouched.
    private void Save()
    {
        if (_savedStep == _state.Step)
        {
            return;
        }

        try
        {
            TrainingCheckpoint.Save(_folder, _state.Step, Write);
            _savedStep = _state.Step;
            Retain();
        }
        catch (IOException e)
        {
            _observer.Warn($"step {_state.Step}: the checkpoint could not be written: {e.Message}; training goes on, earlier checkpoints are untouched");
        }
    }

    private void Retain()
    {
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

    private void Write(FolderWriter writer)
    {
        writer.WriteModel(_plan.Model, _backend, _memory.Model.Parameters, _tokenizer as BpeTokenizer);
        writer.WriteTensors(TrainingCheckpoint.OptimizerName, _backend, Named(_memory.Optimizer.State));
        writer.WriteText(TrainingCheckpoint.StateName, _state.ToJson());
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
            model.CopyTo(_backend, _memory.Model.Parameters);
        }

        using (SafetensorsFile moments = SafetensorsFile.Open(Path.Combine(checkpoint.Path, TrainingCheckpoint.OptimizerName)))
        {
            foreach (Parameter moment in _memory.Optimizer.State)
            {
                moments.CopyTo(_backend, moment.Values, moment.Name);
            }
        }

        if (state.Device != _state.Device)
        {
            _observer.Warn($"the run goes on with '{_state.Device}', it was saved with '{state.Device}': last bits may differ from an unbroken run");
        }

        _memory.Model.Pack();
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
            File.WriteAllLines(path, named);
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

    private static IReadOnlyList<NamedTensor> Named(IEnumerable<Parameter> parameters) =>
        [.. parameters.Select(parameter => new NamedTensor(parameter.Name, parameter.Values, parameter.IsVector))];
}
