using TinyLlama.Chat;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Inference;

/// <summary>A chat template with the vocabulary of a model: the tokens of a conversation, and what ends a reply to it.</summary>
public sealed class ChatFormat
{
    private readonly bool _addBos;
    private readonly (int? Token, string? Text) _turnEnd;

    /// <summary>Binds a template to a vocabulary.</summary>
    /// <param name="template">The template.</param>
    /// <param name="tokenizer">The vocabulary.</param>
    /// <param name="addBos">Whether the model wants BOS before a text.</param>
    public ChatFormat(ChatTemplate template, BpeTokenizer tokenizer, bool addBos)
    {
        ArgumentNullException.ThrowIfNull(template);
        (Template, Tokenizer, _addBos, _turnEnd) = (template, tokenizer, addBos, template.TurnEnd(tokenizer));
    }

    /// <summary>Gets the template.</summary>
    public ChatTemplate Template { get; }

    /// <summary>Gets the vocabulary.</summary>
    public BpeTokenizer Tokenizer { get; }

    /// <summary>The tokens of a conversation, to be continued by the assistant's reply.</summary>
    /// <exception cref="UserErrorException">The template refuses the conversation.</exception>
    public int[] Encode(IReadOnlyList<ChatMessage> conversation) => Template.Encode(conversation, Tokenizer, _addBos);

    /// <summary>The same options, by which a reply also ends where the template ends the assistant's turn.</summary>
    public GenerationOptions EndingTurn(GenerationOptions options)
    {
        ArgumentNullException.ThrowIfNull(options);
        return options with
        {
            StopTokens = _turnEnd.Token is { } token ? [.. options.StopTokens, token] : options.StopTokens,
            StopStrings = _turnEnd.Text is { } text ? [.. options.StopStrings, text] : options.StopStrings,
        };
    }
}
