using System.Text.Encodings.Web;
using System.Text.Json;
using System.Text.Json.Serialization;

namespace TinyLlama.Server;

/// <summary>What requests for text have in common. Keys are OpenAI's, and top_k, min_p and repetition_penalty besides.</summary>
internal abstract record GenerationRequest
{
    public string? Model { get; init; }

    public int? MaxTokens { get; init; }

    public int? N { get; init; }

    public long? Seed { get; init; }

    /// <summary>Gets a string, or an array of up to 16.</summary>
    public JsonElement? Stop { get; init; }

    public bool? Stream { get; init; }

    public StreamOptions? StreamOptions { get; init; }

    public double? Temperature { get; init; }

    public double? TopP { get; init; }

    public int? TopK { get; init; }

    public double? MinP { get; init; }

    public double? RepetitionPenalty { get; init; }

    public double? PresencePenalty { get; init; }

    public double? FrequencyPenalty { get; init; }

    /// <summary>Gets biases by token id.</summary>
    public Dictionary<string, double>? LogitBias { get; init; }

    public ResponseFormat? ResponseFormat { get; init; }

    /// <summary>Gets or sets the keys that are no others' here.</summary>
    [JsonExtensionData]
    public Dictionary<string, JsonElement>? Others { get; set; }
}

/// <summary>What a stream tells besides text.</summary>
internal sealed record StreamOptions
{
    public bool? IncludeUsage { get; init; }
}

/// <summary>The form that a reply must have.</summary>
internal sealed record ResponseFormat
{
    public string? Type { get; init; }

    public JsonSchemaFormat? JsonSchema { get; init; }
}

/// <summary>The schema of a reply.</summary>
internal sealed record JsonSchemaFormat
{
    public string? Name { get; init; }

    public JsonElement? Schema { get; init; }

    public bool? Strict { get; init; }
}

/// <summary><c>/v1/chat/completions</c>.</summary>
internal sealed record ChatCompletionRequest : GenerationRequest
{
    public List<RequestMessage>? Messages { get; init; }

    public int? MaxCompletionTokens { get; init; }

    public bool? Logprobs { get; init; }

    public int? TopLogprobs { get; init; }

    public JsonElement? Tools { get; init; }

    public JsonElement? Functions { get; init; }
}

/// <summary>A turn of a conversation.</summary>
internal sealed record RequestMessage
{
    public string? Role { get; init; }

    /// <summary>Gets a string, or an array of parts of the type text.</summary>
    public JsonElement? Content { get; init; }
}

/// <summary><c>/v1/completions</c>.</summary>
internal sealed record CompletionRequest : GenerationRequest
{
    /// <summary>Gets a string, an array of strings, an array of token ids, or an array of such arrays.</summary>
    public JsonElement? Prompt { get; init; }

    public int? Logprobs { get; init; }

    public bool? Echo { get; init; }

    public string? Suffix { get; init; }

    public int? BestOf { get; init; }
}

/// <summary><c>/v1/embeddings</c>.</summary>
internal sealed record EmbeddingRequest
{
    public string? Model { get; init; }

    /// <summary>Gets a string, an array of strings, an array of token ids, or an array of such arrays.</summary>
    public JsonElement? Input { get; init; }

    /// <summary>Gets float or base64.</summary>
    public string? EncodingFormat { get; init; }

    public int? Dimensions { get; init; }
}

/// <summary><c>/tokenize</c>, with the keys of llama.cpp.</summary>
internal sealed record TokenizeRequest
{
    public string? Content { get; init; }

    public bool? AddSpecial { get; init; }
}

/// <summary><c>/detokenize</c>.</summary>
internal sealed record DetokenizeRequest
{
    public int[]? Tokens { get; init; }
}

/// <summary>The JSON of requests and replies, without reflection.</summary>
[JsonSourceGenerationOptions(
    PropertyNamingPolicy = JsonKnownNamingPolicy.SnakeCaseLower,
    DefaultIgnoreCondition = JsonIgnoreCondition.WhenWritingNull)]
[JsonSerializable(typeof(ChatCompletionRequest))]
[JsonSerializable(typeof(CompletionRequest))]
[JsonSerializable(typeof(EmbeddingRequest))]
[JsonSerializable(typeof(TokenizeRequest))]
[JsonSerializable(typeof(DetokenizeRequest))]
[JsonSerializable(typeof(ErrorBody))]
[JsonSerializable(typeof(ModelList))]
[JsonSerializable(typeof(Completion))]
[JsonSerializable(typeof(EmbeddingList))]
[JsonSerializable(typeof(float[]))]
[JsonSerializable(typeof(string))]
[JsonSerializable(typeof(TokenList))]
[JsonSerializable(typeof(TextContent))]
[JsonSerializable(typeof(Status))]
internal sealed partial class ServerJson : JsonSerializerContext
{
    private static ServerJson? s_readable;

    /// <summary>Gets the context whose texts stay as they are, quotes and characters outside ASCII too: people read replies in terminals.</summary>
    public static ServerJson Readable => s_readable ??= new(new JsonSerializerOptions(Default.Options) { Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping });
}
