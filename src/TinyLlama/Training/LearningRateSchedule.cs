namespace TinyLlama.Training;

/// <summary>How the learning rate falls after the warm-up.</summary>
public enum ScheduleKind
{
    /// <summary>Half a cosine from the peak to the minimum.</summary>
    Cosine,

    /// <summary>A straight line from the peak to the minimum.</summary>
    Linear,

    /// <summary>Warm-up, stable, decay: the peak, then a straight line to the minimum over the last share of the run.</summary>
    Wsd,

    /// <summary>The peak, to the end.</summary>
    Constant,
}

/// <summary>What the progress of a schedule is counted in.</summary>
public enum ScheduleUnit
{
    /// <summary>Optimizer steps.</summary>
    Steps,

    /// <summary>Tokens; the curve does not change with the batch size.</summary>
    Tokens,
}

/// <summary>The learning rate as a function of progress. Warm-up is a line from zero.</summary>
/// <remarks>
/// The cosine is <c>get_lr</c> of TinyLlama's <c>pretrain/tinyllama.py</c>, whatever the unit: it counts micro-batches,
/// so progress may be a fraction of a step.
/// </remarks>
/// <param name="Kind">The shape after the warm-up.</param>
/// <param name="Peak">The rate at the end of the warm-up.</param>
/// <param name="Minimum">The rate at and after the end; unused if constant.</param>
/// <param name="Warmup">Progress at which the warm-up ends; 0 for none.</param>
/// <param name="End">Progress at which the minimum is reached.</param>
/// <param name="DecayShare">Wsd only: the share of <paramref name="End"/> that the decay takes, in (0, 1].</param>
public sealed record LearningRateSchedule(
    ScheduleKind Kind, double Peak, double Minimum, double Warmup, double End, double DecayShare = 0.2)
{
    /// <summary>The rate at some progress, from 0, in the unit of <see cref="Warmup"/> and <see cref="End"/>.</summary>
    public double At(double progress)
    {
        if (progress < Warmup)
        {
            return Peak * progress / Warmup;
        }

        if (Kind == ScheduleKind.Constant)
        {
            return Peak;
        }

        if (progress > End)
        {
            return Minimum;
        }

        double decayFrom = Kind == ScheduleKind.Wsd ? Math.Max(Warmup, End * (1 - DecayShare)) : Warmup;
        if (progress < decayFrom)
        {
            return Peak;
        }

        // A decay of no length: the end itself.
        double share = End > decayFrom ? (progress - decayFrom) / (End - decayFrom) : 1;
        double left = Kind == ScheduleKind.Cosine ? 0.5 * (1 + Math.Cos(Math.PI * share)) : 1 - share;
        return Minimum + (left * (Peak - Minimum));
    }
}
