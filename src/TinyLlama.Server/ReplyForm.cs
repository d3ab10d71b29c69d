using System.Text;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Inference;

namespace TinyLlama.Server;

/// <summary>How a reply is written: as a chat's message or as a completion's text.</summary>
internal abstract class ReplyForm(BpeTokenizer tokenizer)
{
    /// <summary>Gets what ids begin with.</summary>
    public abstract string IdPrefix { get; }

    /// <summary>What the reply says that it is.</summary>
    public abstract string Object(bool stream);

    /// <summary>What a stream begins with for each choice, or null for nothing.</summary>
    public abstract Choice? Opening(int index);

    /// <summary>Some text of a choice and the tokens behind it.</summary>
    /// <param name="index">The choice.</param>
    /// <param name="text">The text.</param>
    /// <param name="tokens">The tokens with log-probabilities, or null where none are asked for.</param>
    /// <param name="offset">The characters of the reply before.</param>
    /// <param name="finish">Why it ended, or null where it goes on.</param>
    /// <param name="whole">Whether this is all of it, not a chunk of a stream.</param>
    public abstract Choice Part(int index, string text, IReadOnlyList<GeneratedToken>? tokens, int offset, string? finish, bool whole);

    /// <summary>OpenAI's word for why a text ended.</summary>
    public static string FinishWord(FinishReason reason) => reason switch
    {
        FinishReason.EndOfText or FinishReason.StopString or FinishReason.StopToken => "stop",
        FinishReason.MaxTokens or FinishReason.ContextFull => "length",
        _ => throw new ArgumentOutOfRangeException(nameof(reason), reason, "the text has not ended"),
    };

    /// <summary>A token's text: a control symbol's name; U+FFFD for bytes that are no whole character.</summary>
    protected string TextOf(TokenLogProbability token) => token.Bytes.IsEmpty ? tokenizer.Model.Pieces[token.Token].Text : Encoding.UTF8.GetString(token.Bytes.Span);

    protected TokenInfo Info(TokenLogProbability token, IReadOnlyList<TokenInfo>? top) =>
        new(TextOf(token), Finite(token.LogProbability), [.. token.Bytes.ToArray()], top);

    /// <summary>JSON has no infinity.</summary>
    protected static double Finite(double logProbability) => Math.Max(logProbability, -9999);
}

/// <summary>The form of <c>/v1/chat/completions</c>.</summary>
internal sealed class ChatForm(BpeTokenizer tokenizer) : ReplyForm(tokenizer)
{
    public override string IdPrefix => "chatcmpl-";

    public override string Object(bool stream) => stream ? "chat.completion.chunk" : "chat.completion";

    public override Choice? Opening(int index) => new() { Index = index, Delta = new ReplyMessage("assistant", "") };

    public override Choice Part(int index, string text, IReadOnlyList<GeneratedToken>? tokens, int offset, string? finish, bool whole) => new()
    {
        Index = index,
        Message = whole ? new ReplyMessage("assistant", text) : null,
        Delta = whole ? null : new ReplyMessage(null, text.Length > 0 ? text : null),
        Logprobs = tokens is null ? null : new ChoiceLogProbabilities
        {
            Content = [.. tokens.Select(token => Info(
                token.LogProbabilities!.Chosen, [.. token.LogProbabilities.Top.Select(other => Info(other, null))]))],
        },
        FinishReason = finish,
    };
}

/// <summary>The form of <c>/v1/completions</c>.</summary>
internal sealed class TextForm(BpeTokenizer tokenizer) : ReplyForm(tokenizer)
{
    public override string IdPrefix => "cmpl-";

    public override string Object(bool stream) => "text_completion";

    public override Choice? Opening(int index) => null;

    public override Choice Part(int index, string text, IReadOnlyList<GeneratedToken>? tokens, int offset, string? finish, bool whole)
    {
        ChoiceLogProbabilities? logProbabilities = null;
        if (tokens is not null)
        {
            var offsets = new List<int>();
            foreach (GeneratedToken token in tokens)
            {
                offsets.Add(offset);
                offset += token.Text.Length;
            }

            logProbabilities = new ChoiceLogProbabilities
            {
                Tokens = [.. tokens.Select(token => TextOf(token.LogProbabilities!.Chosen))],
                TokenLogprobs = [.. tokens.Select(token => Finite(token.LogProbabilities!.Chosen.LogProbability))],
                TopLogprobs = [.. tokens.Select(TopByText)],
                TextOffset = offsets,
            };
        }

        return new Choice { Index = index, Text = text, Logprobs = logProbabilities, FinishReason = finish };
    }

    // Different tokens can have the same text: the likelier one, which comes first, stays.
    private Dictionary<string, double> TopByText(GeneratedToken token)
    {
        var byText = new Dictionary<string, double>(StringComparer.Ordinal);
        foreach (TokenLogProbability other in token.LogProbabilities!.Top)
        {
            byText.TryAdd(TextOf(other), Finite(other.LogProbability));
        }

        return byText;
    }
}
