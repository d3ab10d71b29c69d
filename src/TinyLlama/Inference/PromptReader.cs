using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;

namespace TinyLlama.Inference;

/// <summary>Turns prompts into tokens, and refuses what cannot be continued before anything is computed.</summary>
internal sealed class PromptReader
{
    /// <summary>Checks that tokenizer and model belong together.</summary>
    /// <exception cref="UserErrorException">The tokenizer has more tokens than the model.</exception>
    public PromptReader(ITokenizer tokenizer, bool addBos, int contextLength, int vocabularySize)
    {
        if (tokenizer.VocabularySize > vocabularySize)
        {
            throw new UserErrorException(
                $"the tokenizer has {tokenizer.VocabularySize} tokens, the model only {vocabularySize}: they do not belong together");
        }

        (Tokenizer, AddBos, ContextLength) = (tokenizer, addBos && tokenizer.Bos is not null, contextLength);
        Constraints = new ConstraintCache(tokenizer);
    }

    public ITokenizer Tokenizer { get; }

    public bool AddBos { get; }

    public int ContextLength { get; }

    public ConstraintCache Constraints { get; }

    /// <summary>The prompt's tokens, after BOS where the model wants it.</summary>
    public int[] Encode(string prompt)
    {
        ArgumentNullException.ThrowIfNull(prompt);
        List<int> tokens = [];
        if (AddBos)
        {
            tokens.Add(Tokenizer.Bos!.Value);
        }

        Tokenizer.Encode(prompt, tokens);
        return [.. tokens];
    }

    /// <summary>Refuses what cannot be continued.</summary>
    /// <exception cref="UserErrorException">The prompt is empty, an id or option is out of range, or prompt and new tokens do not fit the context.</exception>
    public void Check(ReadOnlySpan<int> prompt, GenerationOptions options)
    {
        options.Validate();
        if (prompt.IsEmpty)
        {
            throw new UserErrorException("the prompt is empty, and the model has no token to begin a text with; give it a word to continue");
        }

        RequireIds(prompt);

        foreach (int id in options.StopTokens)
        {
            RequireId(id, "a stop token is");
        }

        foreach (int id in options.LogitBias.Keys)
        {
            RequireId(id, "a logit bias is for");
        }

        RequireRoom(prompt.Length, options);
    }

    /// <summary>Refuses what cannot be embedded.</summary>
    /// <exception cref="UserErrorException">The text is empty or longer than the context, or an id is out of range.</exception>
    public void Check(ReadOnlySpan<int> text)
    {
        if (text.IsEmpty)
        {
            throw new UserErrorException("the text is empty: it has no embedding");
        }

        if (text.Length > ContextLength)
        {
            throw new UserErrorException($"the text has {text.Length} tokens, more than the context of {ContextLength}; shorten it");
        }

        RequireIds(text);
    }

    private void RequireIds(ReadOnlySpan<int> prompt)
    {
        foreach (int id in prompt)
        {
            RequireId(id, "the prompt has");
        }
    }

    private void RequireId(int id, string what)
    {
        if ((uint)id >= (uint)Tokenizer.VocabularySize)
        {
            throw new UserErrorException($"{what} token {id}; tokens are 0 to {Tokenizer.VocabularySize - 1}");
        }
    }

    private void RequireRoom(int prompt, GenerationOptions options)
    {
        int room = ContextLength - prompt;
        if (options.Overflow == ContextOverflow.Sliding || (room > 0 && options.MaxTokens is null) || options.MaxTokens <= room)
        {
            return;
        }

        throw new UserErrorException(
            room <= 0
                ? $"the prompt has {prompt} tokens and leaves no room in a context of {ContextLength}; shorten it, or let the context slide (--overflow sliding)"
                : $"{prompt} tokens of the prompt and {options.MaxTokens} new ones are more than the context of {ContextLength}; ask for {room} at most, or let the context slide (--overflow sliding)");
    }
}
