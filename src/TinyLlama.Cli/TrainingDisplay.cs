using System.Globalization;
using TinyLlama.Training;

namespace TinyLlama.Cli;

/// <summary>Shows a training run: a bar with loss, speed, share of peak and time left; validations and samples above it.</summary>
internal sealed class TrainingDisplay : ITrainingObserver, IDisposable
{
    private ProgressDisplay? _progress;
    private long _tokensBefore;
    private double _loss = double.NaN;

    /// <summary>Gets the last validation, if there was one.</summary>
    public ValidationMetrics? LastValidation { get; private set; }

    /// <summary>Begins to show progress.</summary>
    /// <param name="plan">The plan.</param>
    /// <param name="tokensBefore">Tokens that earlier sittings trained on.</param>
    public void Start(TrainingPlan plan, long tokensBefore)
    {
        _tokensBefore = tokensBefore;
        _progress = ProgressDisplay.Start("train", plan.Tokens - tokensBefore, "tokens");
    }

    /// <inheritdoc/>
    public void Measured(Metrics metrics)
    {
        switch (metrics)
        {
            case StepMetrics step:
                // The mean of about the last twenty steps: a single small batch says little.
                _loss = double.IsNaN(_loss) ? step.Loss : _loss + ((step.Loss - _loss) / 20);
                string share = step.Mfu is double mfu ? $" · {mfu:0 %} of peak" : "";
                _progress?.Report(step.Tokens - _tokensBefore, $"step {step.Step + 1} · loss {_loss:0.000}{share}");
                break;
            case ValidationMetrics validation:
                LastValidation = validation;
                string bits = validation.BitsPerByte is double value ? $", {value:0.000} bits per byte" : "";
                WriteLine($"step {validation.Step}: validation loss {validation.Loss:0.0000}, perplexity {validation.Perplexity:0.0}{bits}");
                break;
            case SampleMetrics sample:
                WriteLine($"step {sample.Step}: “{sample.Prompt}{sample.Text.ReplaceLineEndings(" ")}”");
                break;
            case NoteMetrics note:
                WriteLine($"step {note.Step}: {note.Text}");
                break;
        }
    }

    /// <inheritdoc/>
    public void Warn(string message) => WriteLine($"warning: {message}");

    /// <inheritdoc/>
    public void Dispose()
    {
        _progress?.Dispose();
        _progress = null;
    }

    private void WriteLine(FormattableString line) => WriteLine(line.ToString(CultureInfo.InvariantCulture));

    private void WriteLine(string line)
    {
        if (_progress is null)
        {
            Console.Error.WriteLine(line);
        }
        else
        {
            _progress.WriteLine(line);
        }
    }
}
