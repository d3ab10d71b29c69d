using System.Globalization;
using System.Runtime.CompilerServices;
using System.Security.Cryptography;
using Microsoft.Extensions.AI;
using TinyLlama.Data;

namespace TinyLlama.Inference;

/// <summary>A model as a client of Microsoft.Extensions.AI; several conversations at a time are computed together.</summary>
/// <example>
/// <code>
/// using LanguageModel model = LanguageModel.Load("model.gguf");
/// using IChatClient chat = model.AsChatClient();
/// Console.WriteLine(await chat.GetResponseAsync("What is a llama?"));
/// </code>
/// </example>
public sealed class ModelChatClient : IChatClient
{
    private readonly ChatFormat _chat;
    private readonly BatchGenerator _generator;
    private readonly bool _ownsGenerator;

    /// <summary>Makes a client.</summary>
    /// <param name="chat">How conversations become prompts.</param>
    /// <param name="generator">What computes the replies.</param>
    /// <param name="ownsGenerator">Whether the generator is disposed of with the client.</param>
    public ModelChatClient(ChatFormat chat, BatchGenerator generator, bool ownsGenerator = false) =>
        (_chat, _generator, _ownsGenerator) = (chat, generator, ownsGenerator);

    /// <inheritdoc/>
    /// <exception cref="UserErrorException">An option is out of range or not supported, the conversation does not fit the context, or the queue is full.</exception>
    public async Task<ChatResponse> GetResponseAsync(
        IEnumerable<ChatMessage> messages, ChatOptions? options = null, CancellationToken cancellationToken = default)
    {
        var updates = new List<ChatResponseUpdate>();
        await foreach (ChatResponseUpdate update in GetStreamingResponseAsync(messages, options, cancellationToken))
        {
            updates.Add(update);
        }

        return updates.ToChatResponse();
    }

    /// <inheritdoc/>
    /// <exception cref="UserErrorException">An option is out of range or not supported, the conversation does not fit the context, or the queue is full.</exception>
    public async IAsyncEnumerable<ChatResponseUpdate> GetStreamingResponseAsync(
        IEnumerable<ChatMessage> messages, ChatOptions? options = null, [EnumeratorCancellation] CancellationToken cancellationToken = default)
    {
        ArgumentNullException.ThrowIfNull(messages);
        IReadOnlyList<Chat.ChatMessage> conversation = [.. Instructions(options), .. messages.Select(static message => new Chat.ChatMessage(message.Role.Value, TextOf(message)))];

        // Who stops enumerating wants no more of it.
        using var end = CancellationTokenSource.CreateLinkedTokenSource(cancellationToken);
        try
        {
            BatchGeneration reply = _generator.TrySubmit(_chat.Encode(conversation), _chat.EndingTurn(Read(options)), stop: end.Token)?[0]
                ?? throw new UserErrorException("too many conversations wait already; try again later");
            string id = Guid.NewGuid().ToString("N", CultureInfo.InvariantCulture);
            await foreach (GeneratedToken token in reply)
            {
                if (token.Text.Length > 0)
                {
                    yield return new ChatResponseUpdate(ChatRole.Assistant, token.Text) { ResponseId = id, MessageId = id };
                }
            }

            var usage = new UsageDetails
            {
                InputTokenCount = reply.PromptTokens,
                OutputTokenCount = reply.NewTokens,
                TotalTokenCount = reply.PromptTokens + reply.NewTokens,
            };
            yield return new ChatResponseUpdate(ChatRole.Assistant, [new UsageContent(usage)])
            {
                ResponseId = id,
                MessageId = id,
                FinishReason = reply.Finish is FinishReason.MaxTokens or FinishReason.ContextFull ? ChatFinishReason.Length : ChatFinishReason.Stop,
            };
        }
        finally
        {
            await end.CancelAsync();
        }
    }

    /// <inheritdoc/>
    public object? GetService(Type serviceType, object? serviceKey = null)
    {
        ArgumentNullException.ThrowIfNull(serviceType);
        return serviceKey is not null ? null
            : serviceType == typeof(ChatClientMetadata) ? new ChatClientMetadata("tinyllama")
            : serviceType.IsInstanceOfType(this) ? this
            : serviceType.IsInstanceOfType(_generator) ? _generator
            : null;
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        if (_ownsGenerator)
        {
            _generator.Dispose();
        }
    }

    private static IEnumerable<Chat.ChatMessage> Instructions(ChatOptions? options) =>
        options?.Instructions is { Length: > 0 } text ? [new Chat.ChatMessage("system", text)] : [];

    private static string TextOf(ChatMessage message) => message.Contents.FirstOrDefault(static content => content is not TextContent) is { } other
        ? throw new UserErrorException($"a message has content of the type {other.GetType().Name}; only text is supported")
        : message.Text;

    private static GenerationOptions Read(ChatOptions? options)
    {
        if (options is { Tools.Count: > 0 })
        {
            throw new UserErrorException("tools are not supported: this model was not taught to call them");
        }

        return new GenerationOptions
        {
            MaxTokens = options?.MaxOutputTokens,
            Temperature = options?.Temperature ?? 1,
            TopP = options?.TopP ?? 1,
            TopK = options?.TopK ?? 0,
            PresencePenalty = options?.PresencePenalty ?? 0,
            FrequencyPenalty = options?.FrequencyPenalty ?? 0,
            Seed = unchecked((ulong)(options?.Seed ?? RandomNumberGenerator.GetInt32(int.MaxValue))),
            StopStrings = [.. options?.StopSequences ?? []],
            Json = options?.ResponseFormat switch
            {
                ChatResponseFormatJson { Schema: { } schema } => JsonConstraint.FromSchema(schema.GetRawText()),
                ChatResponseFormatJson => JsonConstraint.AnyObject,
                _ => null,
            },
        };
    }
}
