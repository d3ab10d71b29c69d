using TinyLlama.Data;

namespace TinyLlama.Inference;

/// <summary>What happens when a text outgrows the context.</summary>
public enum ContextOverflow
{
    /// <summary>A request that cannot fit is refused before the first token; an open one ends where the context ends.</summary>
    Error,

    /// <summary>
    /// The last half of the context stays (after BOS, where the prompt began with it), at positions from 0 on, and its
    /// keys and values are computed anew.
    /// </summary>
    Sliding,
}

/// <summary>How a text is continued. The defaults sample from the whole distribution.</summary>
public sealed record GenerationOptions
{
    /// <summary>Gets the most new tokens; null for as many as the context holds.</summary>
    public int? MaxTokens { get; init; }

    /// <summary>Gets what logits are divided by; 0 takes the likeliest token (greedy).</summary>
    public double Temperature { get; init; } = 1;

    /// <summary>Gets the number of likeliest tokens that may be drawn; 0 for all.</summary>
    public int TopK { get; init; }

    /// <summary>Gets the probability that the likeliest tokens must reach together to be all that may be drawn; 1 for all.</summary>
    public double TopP { get; init; } = 1;

    /// <summary>Gets the least probability, as a share of the likeliest token's, that may be drawn; 0 for all.</summary>
    public double MinP { get; init; }

    /// <summary>Gets what logits of tokens already in the context are divided by (multiplied, where negative); 1 for none.</summary>
    public double RepetitionPenalty { get; init; } = 1;

    /// <summary>Gets the seed: the same model, prompt, options and seed give the same text.</summary>
    public ulong Seed { get; init; }

    /// <summary>Gets strings before which the text ends; no part of them is given out.</summary>
    public IReadOnlyList<string> StopStrings { get; init; } = [];

    /// <summary>Gets what happens when the text outgrows the context.</summary>
    public ContextOverflow Overflow { get; init; }

    /// <summary>Refuses values without a meaning.</summary>
    /// <exception cref="UserErrorException">One is out of range.</exception>
    public void Validate()
    {
        Require(MaxTokens is null or >= 0, $"max tokens is {MaxTokens}, it must be 0 or more");
        Require(Temperature >= 0 && double.IsFinite(Temperature), $"temperature is {Temperature}, it must be 0 or more");
        Require(TopK >= 0, $"top-k is {TopK}, it must be 1 or more, or 0 for all tokens");
        Require(TopP is > 0 and <= 1, $"top-p is {TopP}, it must be above 0 and at most 1");
        Require(MinP is >= 0 and <= 1, $"min-p is {MinP}, it must be from 0 to 1");
        Require(
            RepetitionPenalty > 0 && double.IsFinite(RepetitionPenalty),
            $"repetition penalty is {RepetitionPenalty}, it must be above 0 (1 for none)");
        Require(StopStrings.All(stop => stop.Length > 0), "a stop string is empty");

        static void Require(bool condition, string problem)
        {
            if (!condition)
            {
                throw new UserErrorException(problem);
            }
        }
    }
}
