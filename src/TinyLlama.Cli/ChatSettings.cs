using System.Globalization;
using System.Security.Cryptography;
using TinyLlama.Data;
using TinyLlama.Inference;

namespace TinyLlama.Cli;

/// <summary>How replies are sampled, by the names that <c>/set</c> knows. The defaults are those of TinyLlama's chat models.</summary>
internal sealed class ChatSettings
{
    /// <summary>The names of all settings.</summary>
    public const string Names = "temperature, top_k, top_p, min_p, repetition_penalty, max_tokens, seed";

    private ulong _replies;

    /// <summary>Gets what the settings are.</summary>
    public GenerationOptions Options { get; private set; } = new()
    {
        Temperature = 0.7,
        TopK = 50,
        TopP = 0.95,
        Seed = (ulong)RandomNumberGenerator.GetInt32(int.MaxValue),
    };

    /// <summary>The options of the next reply: each has a seed of its own, in a row from the one that is set.</summary>
    public GenerationOptions Next() => Options with { Seed = Options.Seed + _replies++ };

    /// <summary>Changes a setting.</summary>
    /// <exception cref="UserErrorException">There is none of that name, or it cannot have that value.</exception>
    public void Set(string name, string value)
    {
        GenerationOptions changed = name switch
        {
            "temperature" => Options with { Temperature = Number() },
            "top_k" => Options with { TopK = Integer() },
            "top_p" => Options with { TopP = Number() },
            "min_p" => Options with { MinP = Number() },
            "repetition_penalty" => Options with { RepetitionPenalty = Number() },
            "max_tokens" => Options with { MaxTokens = value == "none" ? null : Integer() },
            "seed" => Options with { Seed = (ulong)Integer() },
            _ => throw new UserErrorException($"there is no setting '{name}'; settings are {Names}"),
        };
        changed.Validate();
        _replies = name == "seed" ? 0 : _replies;
        Options = changed;

        double Number() => double.TryParse(value, NumberStyles.Float, CultureInfo.InvariantCulture, out double number)
            ? number
            : throw new UserErrorException($"{name} is '{value}', a number is needed");

        int Integer() => int.TryParse(value, NumberStyles.None, CultureInfo.InvariantCulture, out int number)
            ? number
            : throw new UserErrorException($"{name} is '{value}', a whole number is needed");
    }

    /// <inheritdoc/>
    public override string ToString() => string.Create(
        CultureInfo.InvariantCulture,
        $"temperature {Options.Temperature} · top_k {Options.TopK} · top_p {Options.TopP} · min_p {Options.MinP} · repetition_penalty {Options.RepetitionPenalty} · max_tokens {Options.MaxTokens?.ToString(CultureInfo.InvariantCulture) ?? "none"} · seed {Options.Seed}");
}
