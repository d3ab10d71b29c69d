using System.Text.Json.Serialization;

namespace TinyLlama.Server;

/// <summary><c>/v1/models</c>.</summary>
internal sealed record ModelList(IReadOnlyList<ModelInfo> Data)
{
    public string Object { get; } = "list";
}

/// <summary>A served model.</summary>
internal sealed record ModelInfo(string Id, long Created, ModelMeta Meta)
{
    public string Object { get; } = "model";

    public string OwnedBy { get; } = "tinyllama";
}

/// <summary>What a client may want to know of a model: parameters, most tokens of a text, size of the vocabulary.</summary>
internal sealed record ModelMeta(long NParams, int NCtx, int NVocab);

/// <summary>A reply, whole or a chunk of a stream, to either kind of request.</summary>
internal sealed record Completion
{
    public required string Id { get; init; }

    public required string Object { get; init; }

    public required long Created { get; init; }

    public required string Model { get; init; }

    public required IReadOnlyList<Choice> Choices { get; init; }

    public Usage? Usage { get; init; }
}

/// <summary>One of n replies, or what came of it since the chunk before.</summary>
internal sealed record Choice
{
    public required int Index { get; init; }

    /// <summary>Gets the whole message of a chat.</summary>
    public ReplyMessage? Message { get; init; }

    /// <summary>Gets the next part of a chat's message.</summary>
    public ReplyMessage? Delta { get; init; }

    /// <summary>Gets the text of a completion.</summary>
    public string? Text { get; init; }

    public ChoiceLogProbabilities? Logprobs { get; init; }

    [JsonIgnore(Condition = JsonIgnoreCondition.Never)]
    public string? FinishReason { get; init; }
}

/// <summary>What the assistant says.</summary>
internal sealed record ReplyMessage(string? Role, string? Content);

/// <summary>Log-probabilities: <see cref="Content"/> of a chat, the other lists of a completion.</summary>
internal sealed record ChoiceLogProbabilities
{
    public IReadOnlyList<TokenInfo>? Content { get; init; }

    public IReadOnlyList<string>? Tokens { get; init; }

    public IReadOnlyList<double>? TokenLogprobs { get; init; }

    public IReadOnlyList<Dictionary<string, double>>? TopLogprobs { get; init; }

    public IReadOnlyList<int>? TextOffset { get; init; }
}

/// <summary>A token with its log-probability, in nats.</summary>
internal sealed record TokenInfo(string Token, double Logprob, IReadOnlyList<int> Bytes, IReadOnlyList<TokenInfo>? TopLogprobs);

/// <summary>What a request cost, in tokens; embeddings complete nothing.</summary>
internal sealed record Usage(int PromptTokens, int? CompletionTokens)
{
    public int TotalTokens => PromptTokens + (CompletionTokens ?? 0);
}

/// <summary>The reply of <c>/v1/embeddings</c>.</summary>
internal sealed record EmbeddingList(IReadOnlyList<EmbeddingInfo> Data, string Model, Usage Usage)
{
    public string Object { get; } = "list";
}

/// <summary>A text's vector.</summary>
/// <param name="Index">The text, counted from 0.</param>
/// <param name="Embedding">The C numbers: an array of float, or a string in base64.</param>
internal sealed record EmbeddingInfo(int Index, object Embedding)
{
    public string Object { get; } = "embedding";
}

/// <summary>The reply of <c>/tokenize</c>.</summary>
internal sealed record TokenList(IReadOnlyList<int> Tokens);

/// <summary>The reply of <c>/detokenize</c>.</summary>
internal sealed record TextContent(string Content);

/// <summary>The reply of <c>/health</c>.</summary>
internal sealed record Status([property: JsonPropertyName("status")] string State);
