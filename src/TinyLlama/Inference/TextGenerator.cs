using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Model;

namespace TinyLlama.Inference;

/// <summary>Continues texts: tokenizer, engine, sampler and the rules for where a text ends.</summary>
/// <remarks>One generation at a time; its memory is taken once.</remarks>
public sealed class TextGenerator : IDisposable
{
    private readonly PromptReader _prompts;

    /// <summary>Takes the memory for one sequence.</summary>
    /// <param name="model">The model; it outlives the generator. Its weights may change between generations.</param>
    /// <param name="backend">The device.</param>
    /// <param name="tokenizer">The tokenizer that the model was trained with.</param>
    /// <param name="addBos">Whether a prompt begins with BOS, where the vocabulary has one.</param>
    /// <param name="contextLength">Most tokens of prompt and continuation; by default what the model is trained for.</param>
    /// <param name="cacheType">What keys and values are rounded to; by default what the device likes best (<see cref="Backend.CacheType"/>).</param>
    /// <exception cref="UserErrorException">The tokenizer is not of the model.</exception>
    /// <exception cref="DeviceException">The device has too little memory.</exception>
    public TextGenerator(
        LlamaModel model, Backend backend, ITokenizer tokenizer, bool addBos = true, int? contextLength = null, DType? cacheType = null)
    {
        int context = contextLength ?? model.Config.ContextLength;
        _prompts = new PromptReader(tokenizer, addBos, context, model.Config.VocabularySize);
        Engine = new InferenceEngine(model, backend, context, cacheType: cacheType);
    }

    /// <summary>Gets the tokenizer.</summary>
    public ITokenizer Tokenizer => _prompts.Tokenizer;

    /// <summary>Gets a value indicating whether a prompt begins with BOS.</summary>
    public bool AddBos => _prompts.AddBos;

    /// <summary>Gets the most tokens of prompt and continuation.</summary>
    public int ContextLength => Engine.ContextLength;

    /// <summary>Gets or sets what proposes tokens to be verified together; null for nothing. Its owner disposes of it.</summary>
    public Draft? Draft { get; set; }

    /// <summary>Gets or sets where the last prompt's keys and values are kept; null for nowhere.</summary>
    internal PromptCache? PromptCache { get; set; }

    internal InferenceEngine Engine { get; }

    internal ConstraintCache Constraints => _prompts.Constraints;

    /// <summary>Prepares a continuation; nothing is computed before it is enumerated.</summary>
    /// <param name="prompt">The text to continue; may be empty where the vocabulary has BOS.</param>
    /// <param name="options">How to continue.</param>
    /// <param name="stop">Ends the enumeration with <see cref="OperationCanceledException"/>.</param>
    /// <exception cref="UserErrorException">An option is out of range, or prompt and new tokens do not fit the context.</exception>
    public Generation Generate(string prompt, GenerationOptions? options = null, CancellationToken stop = default)
    {
        return Generate(_prompts.Encode(prompt), options, stop);
    }

    /// <summary>Prepares a continuation of tokens, which are taken as they are; nothing is computed before it is enumerated.</summary>
    /// <param name="prompt">At least one token id.</param>
    /// <param name="options">How to continue.</param>
    /// <param name="stop">Ends the enumeration with <see cref="OperationCanceledException"/>.</param>
    /// <exception cref="UserErrorException">An id or option is out of range, or prompt and new tokens do not fit the context.</exception>
    public Generation Generate(int[] prompt, GenerationOptions? options = null, CancellationToken stop = default)
    {
        options ??= new GenerationOptions();
        _prompts.Check(prompt, options);
        return new Generation(this, prompt, options, stop);
    }

    /// <inheritdoc/>
    public void Dispose() => Engine.Dispose();
}
