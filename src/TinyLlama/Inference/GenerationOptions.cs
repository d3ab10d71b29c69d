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

    /// <summary>Gets what of these is out of range: its key, as requests have it, and in one line what is wrong; null where all is well.</summary>
    public (string Key, string Message)? Problem =>
        MaxTokens < 0 ? ("max_tokens", $"max tokens is {MaxTokens}, it must be 0 or more")
        : !(Temperature >= 0 && double.IsFinite(Temperature)) ? ("temperature", $"temperature is {Temperature}, it must be 0 or more")
        : TopK < 0 ? ("top_k", $"top-k is {TopK}, it must be 1 or more, or 0 for all tokens")
        : TopP is not (> 0 and <= 1) ? ("top_p", $"top-p is {TopP}, it must be above 0 and at most 1")
        : MinP is not (>= 0 and <= 1) ? ("min_p", $"min-p is {MinP}, it must be from 0 to 1")
        : !(RepetitionPenalty > 0 && double.IsFinite(RepetitionPenalty))
            ? ("repetition_penalty", $"repetition penalty is {RepetitionPenalty}, it must be above 0 (1 for none)")
        : !double.IsFinite(PresencePenalty) ? ("presence_penalty", $"presence penalty is {PresencePenalty}, it must be a number (0 for none)")
        : !double.IsFinite(FrequencyPenalty) ? ("frequency_penalty", $"frequency penalty is {FrequencyPenalty}, it must be a number (0 for none)")
        : !LogitBias.Values.All(bias => double.IsFinite(bias) || double.IsNegativeInfinity(bias))
            ? ("logit_bias", "a logit bias is not a number; minus infinity forbids a token")
        : LogProbabilities < 0 ? ("logprobs", $"log-probabilities are asked for {LogProbabilities} tokens, it must be 0 or more")
        : StopStrings.Any(stop => stop.Length == 0) ? ("stop", "a stop string is empty")
        : null;

    /// <summary>Refuses values without a meaning.</summary>
    /// <exception cref="UserErrorException">There is a <see cref="Problem"/>.</exception>
    public void Validate()
    {
        if (Problem is { } problem)
        {
            throw new UserErrorException(problem.Message);
        }
    }
}
