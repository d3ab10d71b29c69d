using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Model;

namespace TinyLlama.Inference;

/// <summary>Continues texts: tokenizer, engine, sampler and the rules for where a text ends.</summary>
/// <remarks>One generation at a time; its memory is taken once.</remarks>
public sealed class TextGenerator : IDisposable
{
    /// <summary>Takes the memory for one sequence.</summary>
    /// <param name="model">The model; it outlives the generator. Its weights may change between generations.</param>
    /// <param name="backend">The device.</param>
    /// <param name="tokenizer">The tokenizer that the model was trained with.</param>
    /// <param name="addBos">Whether a prompt begins with BOS, where the vocabulary has one.</param>
    /// <param name="contextLength">Most tokens of prompt and continuation; by default what the model is trained for.</param>
    /// <exception cref="UserErrorException">The tokenizer is not of the model.</exception>
    /// <exception cref="DeviceException">The device has too little memory.</exception>
    public TextGenerator(LlamaModel model, Backend backend, ITokenizer tokenizer, bool addBos = true, int? contextLength = null)
    {
        if (tokenizer.VocabularySize > model.Config.VocabularySize)
        {
            throw new UserErrorException(
                $"the tokenizer has {tokenizer.VocabularySize} tokens, the model only {model.Config.VocabularySize}: they do not belong together");
        }

        (Tokenizer, AddBos) = (tokenizer, addBos && tokenizer.Bos is not null);
        Engine = new InferenceEngine(model, backend, contextLength);
    }

    /// <summary>Gets the tokenizer.</summary>
    public ITokenizer Tokenizer { get; }

    /// <summary>Gets a value indicating whether a prompt begins with BOS.</summary>
    public bool AddBos { get; }

    /// <summary>Gets the most tokens of prompt and continuation.</summary>
    public int ContextLength => Engine.ContextLength;

    internal InferenceEngine Engine { get; }

    /// <summary>Prepares a continuation; nothing is computed before it is enumerated.</summary>
    /// <param name="prompt">The text to continue; may be empty where the vocabulary has BOS.</param>
    /// <param name="options">How to continue.</param>
    /// <param name="stop">Ends the enumeration with <see cref="OperationCanceledException"/>.</param>
    /// <exception cref="UserErrorException">An option is out of range, or prompt and new tokens do not fit the context.</exception>
    public Generation Generate(string prompt, GenerationOptions? options = null, CancellationToken stop = default)
    {
        ArgumentNullException.ThrowIfNull(prompt);
        options ??= new GenerationOptions();
        options.Validate();
        List<int> tokens = [];
        if (AddBos)
        {
            tokens.Add(Tokenizer.Bos!.Value);
        }

        Tokenizer.Encode(prompt, tokens);
        if (tokens.Count == 0)
        {
            throw new UserErrorException("the prompt is empty, and the model has no token to begin a text with; give it a word to continue");
        }

        RequireRoom(tokens.Count, options);
        return new Generation(this, tokens, options, stop);
    }

    /// <inheritdoc/>
    public void Dispose() => Engine.Dispose();

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
