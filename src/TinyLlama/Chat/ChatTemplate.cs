using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Chat;

/// <summary>
/// How a conversation becomes the prompt that a model was taught: a Jinja template as Hugging Face and GGUF files carry it.
/// </summary>
/// <remarks>
/// Control symbols such as <c>&lt;/s&gt;</c> count only where the template itself writes them; in a message they are text, so
/// that nobody can end his turn and speak for another.
/// </remarks>
public sealed class ChatTemplate
{
    private const string UserProbe = "UserProbe";
    private const string AssistantProbe = "AssistantProbe";

    private readonly Jinja _template;

    private ChatTemplate(string name, Jinja template) => (Name, _template) = (name, template);

    /// <summary>Gets the template of TinyLlama-1.1B-Chat v0.1: <c>### Human:</c> and <c>### Assistant:</c>.</summary>
    public static ChatTemplate HumanAssistant { get; } = Parse(
        """
        {%- for message in messages -%}
        {%- if not loop.first %} {% endif -%}
        {%- if message.role == 'user' %}### Human: {% elif message.role == 'assistant' %}### Assistant: {% endif -%}
        {{- message.content -}}
        {%- endfor -%}
        {%- if add_generation_prompt %} ### Assistant:{% endif -%}
        """,
        "human-assistant");

    /// <summary>Gets the template of TinyLlama-1.1B-Chat v0.2 to v0.4.</summary>
    public static ChatTemplate ChatMl { get; } = Parse(
        """
        {%- for message in messages -%}
        {{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
        {%- endfor -%}
        {%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
        """,
        "chatml");

    /// <summary>Gets the template of TinyLlama-1.1B-Chat v0.6 and v1.0.</summary>
    public static ChatTemplate Zephyr { get; } = Parse(
        """
        {%- for message in messages -%}
        {{ '<|' + message.role + '|>\n' + message.content + eos_token + '\n' }}
        {%- endfor -%}
        {%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif -%}
        """,
        "zephyr");

    /// <summary>Gets the template of a model that was not taught to talk: it continues what is written.</summary>
    public static ChatTemplate Plain { get; } = Parse(
        """
        {%- for message in messages -%}
        {{ message.content }}{% if message.role != 'user' and not loop.last %}{{ '\n' }}{% endif -%}
        {%- endfor -%}
        """,
        "plain");

    /// <summary>Gets the templates that can be asked for by name.</summary>
    public static IReadOnlyList<ChatTemplate> BuiltIn { get; } = [HumanAssistant, ChatMl, Zephyr, Plain];

    /// <summary>Gets the name, or where the template was read from.</summary>
    public string Name { get; }

    /// <summary>Reads a template.</summary>
    /// <param name="source">The Jinja template.</param>
    /// <param name="name">Its name or file, for messages.</param>
    /// <exception cref="UserErrorException">It is damaged, too large, or uses what is not supported; the message names it.</exception>
    public static ChatTemplate Parse(string source, string name) => new(name, Jinja.Parse(source, name));

    /// <summary>A template by the name of a built-in one, or from a file.</summary>
    /// <exception cref="UserErrorException">There is neither, or the file cannot be read as a template.</exception>
    public static ChatTemplate Load(string nameOrFile)
    {
        if (BuiltIn.FirstOrDefault(template => template.Name == nameOrFile) is { } named)
        {
            return named;
        }

        try
        {
            return Parse(File.ReadAllText(nameOrFile), nameOrFile);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or ArgumentException)
        {
            string names = string.Join(", ", BuiltIn.Select(static template => template.Name));
            throw new UserErrorException($"{nameOrFile}: no chat template has this name ({names}), and it is no file that can be read", e);
        }
    }

    /// <summary>The prompt as text.</summary>
    /// <param name="messages">The conversation.</param>
    /// <param name="tokenizer">Names BOS and EOS.</param>
    /// <param name="addGenerationPrompt">Whether the assistant's next turn begins at its end.</param>
    /// <exception cref="UserErrorException">The template refuses the conversation, or does what has no meaning.</exception>
    public string Render(IReadOnlyList<ChatMessage> messages, BpeTokenizer tokenizer, bool addGenerationPrompt = true) =>
        RenderMarked(messages, tokenizer, addGenerationPrompt).Text;

    /// <summary>The prompt's tokens.</summary>
    /// <param name="messages">The conversation; the assistant's next turn is to follow.</param>
    /// <param name="tokenizer">The vocabulary.</param>
    /// <param name="addBos">Whether the model wants BOS before a text; it comes once, also where the template writes it.</param>
    /// <exception cref="UserErrorException">The template refuses the conversation, or does what has no meaning.</exception>
    public int[] Encode(IReadOnlyList<ChatMessage> messages, BpeTokenizer tokenizer, bool addBos)
    {
        MarkedText prompt = RenderMarked(messages, tokenizer, addGenerationPrompt: true);
        List<int> tokens = [];
        tokenizer.EncodeWithControls(prompt.Text, prompt.IsForeign, tokens);
        if (addBos && tokenizer.Bos is { } bos && (tokens.Count == 0 || tokens[0] != bos))
        {
            tokens.Insert(0, bos);
        }

        return [.. tokens];
    }

    /// <summary>
    /// What ends the assistant's turn: what the template writes after it. A control symbol is a token to stop at; other text
    /// is a string.
    /// </summary>
    /// <param name="tokenizer">The vocabulary.</param>
    /// <returns>Either or none of both; none where EOS does it, or where the template refuses to be tried.</returns>
    public (int? Token, string? Text) TurnEnd(BpeTokenizer tokenizer)
    {
        string text;
        try
        {
            text = Render([new("user", "x"), new("assistant", AssistantProbe), new("user", UserProbe)], tokenizer);
        }
        catch (UserErrorException)
        {
            return default;
        }

        int start = text.IndexOf(AssistantProbe, StringComparison.Ordinal) + AssistantProbe.Length;
        int end = text.IndexOf(UserProbe, StringComparison.Ordinal);
        if (start < AssistantProbe.Length || end <= start)
        {
            return default;
        }

        string between = text[start..end];
        List<int> tokens = [];
        tokenizer.EncodeWithControls(between, new bool[between.Length], tokens);
        int control = tokens.FindIndex(tokenizer.IsControl);
        if (control >= 0)
        {
            return (tokens[control] == tokenizer.Eos ? null : tokens[control], null);
        }

        string line = between.Trim().Split('\n')[0];
        return (null, line.Length > 0 ? line : null);
    }

    private MarkedText RenderMarked(IReadOnlyList<ChatMessage> messages, BpeTokenizer tokenizer, bool addGenerationPrompt)
    {
        MarkedText Symbol(int? id) => MarkedText.Own(id is { } found ? tokenizer.Model.Pieces[found].Text : "");
        return _template.Render(new(StringComparer.Ordinal)
        {
            ["messages"] = messages.Select(Value).ToList(),
            ["add_generation_prompt"] = addGenerationPrompt,
            ["bos_token"] = Symbol(tokenizer.Bos),
            ["eos_token"] = Symbol(tokenizer.Eos),
            ["tools"] = null,
            ["documents"] = null,
        });
    }

    private static object? Value(ChatMessage message) => new Dictionary<string, object?>(StringComparer.Ordinal)
    {
        ["role"] = MarkedText.Foreign(message.Role),
        ["content"] = MarkedText.Foreign(message.Content),
    };
}
