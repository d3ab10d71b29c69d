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

    /// <summary>Gets what is subtracted from the logits of tokens that were generated already, once each.</summary>
    public double PresencePenalty { get; init; }

    /// <summary>Gets what is subtracted from the logit of a token each time that it was generated already.</summary>
    public double FrequencyPenalty { get; init; }

    /// <summary>Gets what is added to the logits of some tokens; minus infinity forbids one.</summary>
    public IReadOnlyDictionary<int, double> LogitBias { get; init; } = new Dictionary<int, double>();

    /// <summary>Gets the seed: the same model, prompt, options and seed give the same text.</summary>
    public ulong Seed { get; init; }

    /// <summary>Gets strings before which the text ends; no part of them is given out.</summary>
    public IReadOnlyList<string> StopStrings { get; init; } = [];

    /// <summary>Gets tokens that end the text as EOS does; they are not given out as text.</summary>
    public IReadOnlyList<int> StopTokens { get; init; } = [];

    /// <summary>Gets what the text must be, to its end; null for anything.</summary>
    public JsonConstraint? Json { get; init; }

    /// <summary>Gets how many of the likeliest tokens to give the log-probabilities of, besides the chosen one's; null for no log-probabilities.</summary>
    public int? LogProbabilities { get; init; }

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
        Require(double.IsFinite(PresencePenalty), $"presence penalty is {PresencePenalty}, it must be a number (0 for none)");
        Require(double.IsFinite(FrequencyPenalty), $"frequency penalty is {FrequencyPenalty}, it must be a number (0 for none)");
        Require(
            LogitBias.Values.All(bias => double.IsFinite(bias) || double.IsNegativeInfinity(bias)),
            "a logit bias is not a number; minus infinity forbids a token");
        Require(LogProbabilities is null or >= 0, $"log-probabilities are asked for {LogProbabilities} tokens, it must be 0 or more");
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
