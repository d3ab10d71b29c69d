using System.Globalization;
using System.Security.Cryptography;
using System.Text.Json;
using TinyLlama.Inference;

namespace TinyLlama.Server;

/// <summary>From a request's keys to what the generator is told.</summary>
internal static class GenerationSettings
{
    private const int MostStops = 16;

    // Keys of other servers that would change a reply.
    private static readonly string[] s_unsupported =
    [
        "grammar", "json_schema", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "stop_token_ids", "bad_words",
        "allowed_token_ids", "min_tokens", "ignore_eos", "n_predict", "repeat_penalty", "typical_p", "tfs_z", "mirostat", "best_of", "use_beam_search",
        "length_penalty", "truncate_prompt_tokens", "continue_final_message", "echo", "prompt_logprobs", "chat_template", "audio", "web_search_options",
    ];

    /// <summary>Most replies to one prompt.</summary>
    public const int MostCompletions = 16;

    /// <summary>The options of a request.</summary>
    /// <param name="request">The request.</param>
    /// <param name="maxTokens">The most new tokens it asks for, or null.</param>
    /// <param name="limit">The most that the server gives, or null.</param>
    /// <param name="logProbabilities">How many likeliest tokens it asks the log-probabilities of, or null for none.</param>
    /// <param name="json">What the reply must be, or null for any text.</param>
    /// <param name="vocabulary">The number of tokens.</param>
    /// <exception cref="ApiException">A value has no meaning.</exception>
    public static GenerationOptions Read(GenerationRequest request, int? maxTokens, int? limit, int? logProbabilities, JsonConstraint? json, int vocabulary)
    {
        if (request.Others?.FirstOrDefault(static pair => s_unsupported.Contains(pair.Key) && ChangesReply(pair.Key, pair.Value)).Key is { } key)
        {
            throw ApiException.Invalid($"'{key}' is not supported{(key == "repeat_penalty" ? "; it is 'repetition_penalty' here" : "")}", key, "unsupported_parameter");
        }

        IReadOnlyList<string> stops = RequestReader.Strings(request.Stop, "stop");
        if (stops.Count > MostStops)
        {
            throw ApiException.Invalid($"'stop' has {stops.Count} strings, at most {MostStops} are allowed", "stop");
        }

        if (request.N is < 1 or > MostCompletions)
        {
            throw ApiException.Invalid($"'n' is {request.N}, it must be from 1 to {MostCompletions}", "n");
        }

        var options = new GenerationOptions
        {
            MaxTokens = maxTokens is { } asked ? Math.Min(asked, limit ?? asked) : limit,
            Temperature = request.Temperature ?? 1,
            TopK = request.TopK ?? 0,
            TopP = request.TopP ?? 1,
            MinP = request.MinP ?? 0,
            RepetitionPenalty = request.RepetitionPenalty ?? 1,
            PresencePenalty = request.PresencePenalty ?? 0,
            FrequencyPenalty = request.FrequencyPenalty ?? 0,
            LogitBias = Biases(request.LogitBias, vocabulary),
            Seed = unchecked((ulong)(request.Seed ?? RandomNumberGenerator.GetInt32(int.MaxValue))),
            StopStrings = stops,
            LogProbabilities = logProbabilities,
            Json = json,
        };
        return options.Problem is { } problem ? throw ApiException.Invalid(problem.Message, problem.Key) : options;
    }

    /// <summary>Fits the number of new tokens to the room that a prompt leaves.</summary>
    /// <exception cref="ApiException">The prompt leaves none, or not as much as is asked for.</exception>
    public static GenerationOptions Fit(GenerationOptions options, int promptTokens, int contextLength, int? limit)
    {
        int room = contextLength - promptTokens;
        if (room <= 0)
        {
            throw ApiException.TooLong($"the prompt has {promptTokens} tokens, the context {contextLength}: shorten the prompt", null);
        }

        if (options.MaxTokens > room)
        {
            // The server's own limit is not what the client asked for.
            return options.MaxTokens == limit
                ? options with { MaxTokens = null }
                : throw ApiException.TooLong(
                    $"{promptTokens} tokens of the prompt and {options.MaxTokens} new ones are more than the context of {contextLength}; ask for {room} at most",
                    "max_tokens");
        }

        return options;
    }

    // Clients send values too that say as much as none.
    private static bool ChangesReply(string key, JsonElement value) => value.ValueKind switch
    {
        JsonValueKind.Null or JsonValueKind.False => false,
        JsonValueKind.Number => value.GetDouble() is double number && number != 0 && number != Neutral(key),
        JsonValueKind.String => value.GetRawText() != "\"\"",
        JsonValueKind.Array => value.GetArrayLength() > 0,
        _ => true,
    };

    private static double Neutral(string key) => key switch
    {
        "n_predict" or "truncate_prompt_tokens" => -1,
        "repeat_penalty" or "typical_p" or "tfs_z" or "best_of" or "length_penalty" => 1,
        _ => 0,
    };

    private static Dictionary<int, double> Biases(Dictionary<string, double>? biases, int vocabulary)
    {
        var byToken = new Dictionary<int, double>();
        foreach ((string key, double bias) in biases ?? [])
        {
            if (!int.TryParse(key, NumberStyles.None, CultureInfo.InvariantCulture, out int token) || bias is not (>= -100 and <= 100))
            {
                throw ApiException.Invalid($"'logit_bias' has '{key}': {bias.ToString(CultureInfo.InvariantCulture)}; it goes from token ids to numbers from -100 to 100", "logit_bias");
            }

            if (token >= vocabulary)
            {
                throw ApiException.Invalid($"'logit_bias' has the token {token}; tokens are 0 to {vocabulary - 1}", "logit_bias");
            }

            byToken[token] = bias;
        }

        return byToken;
    }
}
