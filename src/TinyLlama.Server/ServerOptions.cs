using TinyLlama.Compute;
using TinyLlama.Data;
using TinyLlama.Inference;

namespace TinyLlama.Server;

/// <summary>What is served, to whom, and how much of it at a time.</summary>
public sealed class ServerOptions
{
    private const int MostPlaces = 1024;

    /// <summary>Gets or sets the model: a run, a checkpoint, a Hugging Face folder, a <c>.gguf</c> file, or a <c>.bin</c> file of llama2.c.</summary>
    public string Model { get; set; } = "";

    /// <summary>Gets or sets the name that requests call the model by; by default its file or folder.</summary>
    public string? Name { get; set; }

    /// <summary>Gets or sets a built-in chat template or a file with one; by default the model's own, else <c>plain</c>.</summary>
    public string? ChatTemplate { get; set; }

    /// <summary>Gets or sets a folder in which PEFT saved a LoRA adapter, which is added to the weights; null for none.</summary>
    public string? Adapter { get; set; }

    /// <summary>Gets or sets what to compute on.</summary>
    public Device Device { get; set; }

    /// <summary>Gets or sets the threads to compute with; 0 for one a core.</summary>
    public int Threads { get; set; }

    /// <summary>Gets or sets the most tokens of prompt and reply; by default what the model is trained for.</summary>
    public int? ContextLength { get; set; }

    /// <summary>Gets or sets the number of replies that are computed together.</summary>
    public int Places { get; set; } = 16;

    /// <summary>Gets or sets the number of replies that may wait for a place; more are refused with 429.</summary>
    public int Queue { get; set; } = 256;

    /// <summary>Gets or sets the memory for keys and values of all replies; by default 1 GiB, or less where all places need less.</summary>
    public long? CacheBytes { get; set; }

    /// <summary>Gets or sets what keys and values are rounded to; by default what the device likes best.</summary>
    public DType? CacheType { get; set; }

    /// <summary>
    /// Gets or sets the most tokens, up to 64, that a reply tries at a time where its last ones stood before, while few replies run; 0 for none. The
    /// replies are the same, sooner where they repeat their prompts.
    /// </summary>
    public int Lookup { get; set; }

    /// <summary>Gets or sets the most new tokens of a reply; null for as many as the context holds.</summary>
    public int? MaxTokens { get; set; }

    /// <summary>Gets or sets the most bytes of a request's body; more are refused with 413.</summary>
    public long MaxBodyBytes { get; set; } = 2 << 20;

    /// <summary>Gets or sets the most time that a reply may take, its waiting included.</summary>
    public TimeSpan Timeout { get; set; } = TimeSpan.FromMinutes(10);

    /// <summary>Gets the keys of which a request must bear one; none for a server that is open to all who reach it.</summary>
    public IList<string> ApiKeys { get; } = [];

    /// <summary>Gets the origins whose web pages may use the server besides its own; <c>*</c> for all.</summary>
    public IList<string> CorsOrigins { get; } = [];

    /// <summary>Gets or sets what is told, in one line, what is wrong but can be worked around.</summary>
    public Action<string> Warn { get; set; } = static _ => { };

    /// <summary>Refuses values without a meaning.</summary>
    /// <exception cref="UserErrorException">One is out of range.</exception>
    public void Validate()
    {
        Require(Model.Length > 0, "no model is named");
        Require(Places is >= 1 and <= MostPlaces, $"places is {Places}, it must be from 1 to {MostPlaces}");
        Require(Queue >= 1, $"queue is {Queue}, it must be 1 or more");
        Require(CacheType is null or DType.F32 or DType.F16 or DType.BF16 or DType.Q8_0, $"the cache is of {CacheType}, it must be of F32, F16, BF16 or Q8_0");
        Require(CacheBytes is null or >= 1, $"the cache has {CacheBytes} bytes, it must have 1 or more");
        Require(Lookup is >= 0 and <= Draft.MostTokens, $"lookup is {Lookup}, it must be from 0 to {Draft.MostTokens}");
        Require(MaxTokens is null or >= 1, $"max tokens is {MaxTokens}, it must be 1 or more");
        Require(MaxBodyBytes >= 1, $"the largest body is {MaxBodyBytes} bytes, it must be 1 or more");
        Require(Timeout > TimeSpan.Zero && Timeout.TotalMilliseconds <= int.MaxValue, $"the timeout is {Timeout.TotalSeconds} s, it must be from above 0 to 24 days");
        Require(ApiKeys.All(static key => key.Length > 0), "an API key is empty");
        foreach (string origin in CorsOrigins)
        {
            Require(
                origin == "*" || (Uri.TryCreate(origin, UriKind.Absolute, out Uri? address) && address.Host.Length > 0 && address.PathAndQuery == "/"),
                $"'{origin}' is no origin; write one such as https://example.com, or * for all");
        }

        static void Require(bool condition, string problem)
        {
            if (!condition)
            {
                throw new UserErrorException(problem);
            }
        }
    }
}
