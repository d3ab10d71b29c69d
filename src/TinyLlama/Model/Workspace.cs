using TinyLlama.Compute;

namespace TinyLlama.Model;

/// <summary>How much of a forward a workspace keeps.</summary>
public enum Keep
{
    /// <summary>Nothing: inference and validation. One set of block activations.</summary>
    Nothing,

    /// <summary>Each block's input; backward runs the block's forward again.</summary>
    BlockInputs,

    /// <summary>What products and attention read and write; backward computes the outputs of norms and of SwiGLU again.</summary>
    Products,

    /// <summary>Everything that backward reads.</summary>
    Everything,
}

/// <summary>Everything that a forward and a backward write and that is neither a parameter nor its gradient.</summary>
public sealed class Workspace : IDisposable
{
    private readonly BlockActivations[] _blocks;
    private readonly Tensor[] _inputs;
    private readonly BlockGradients _gradients;
    private readonly Tensor _branch;
    private readonly Tensor _output;
    private readonly Tensor _outputR;
    private readonly Tensor _final;
    private readonly Tensor _dFinal;
    private readonly Tensor _dResidual;
    private readonly Tensor _losses;
    private (Arena Activations, Arena? Gradients)? _own;

    /// <summary>Takes the buffers.</summary>
    /// <param name="activations">Owner of what the forward writes.</param>
    /// <param name="gradients">Owner of what the backward writes; null where there is none.</param>
    /// <param name="backend">The device, which says what type activations have.</param>
    /// <param name="config">The model's shape.</param>
    /// <param name="tokens">Most packed tokens (N) of a forward.</param>
    /// <param name="keep">How much of the forward stays.</param>
    public Workspace(Arena activations, Arena? gradients, Backend backend, ModelConfig config, int tokens, Keep keep)
    {
        DType type = backend.ActivationType;
        (Capacity, Keep) = (tokens, keep);
        _blocks = new BlockActivations[keep >= Keep.Products ? config.Layers : 1];
        for (int i = 0; i < _blocks.Length; i++)
        {
            _blocks[i] = BlockActivations.Take(activations, type, config, tokens, keep == Keep.Products && i > 0 ? _blocks[0] : null);
        }

        _inputs = new Tensor[config.Layers];
        for (int l = 0; l < config.Layers; l++)
        {
            // One set serves all blocks, but block l's input has to stay until its backward.
            _inputs[l] = keep == Keep.BlockInputs && l > 0
                ? activations.Take(tokens, config.Channels, type)
                : _blocks[l % _blocks.Length].Input;
        }

        _branch = activations.Take(tokens, config.Channels, type);
        _output = activations.Take(tokens, config.Channels, type);
        _outputR = activations.Take(tokens, 1);
        _final = activations.Take(tokens, config.Channels, type);
        _losses = activations.Take(tokens, 1);
        DType logits = keep == Keep.Nothing ? DType.F32 : type;
        LogitsChunk = config.HasHead
            ? activations.Take(Math.Min(tokens, RowsOfLogits(backend, config.VocabularySize, logits)), config.VocabularySize, logits)
            : default;
        Rope = activations.Take(config.ContextLength, config.HeadDim);
        if (gradients is not null)
        {
            _gradients = BlockGradients.Take(gradients, backend, config, tokens);
            _dFinal = gradients.Take(tokens, config.Channels, type);
            _dResidual = gradients.Take(tokens, config.Channels, type);
        }
    }

    /// <summary>A workspace in memory of its own, counted, allocated and prepared for a model.</summary>
    /// <param name="model">The model; dispose of the workspace before it.</param>
    /// <param name="backend">The device.</param>
    /// <param name="tokens">Most packed tokens (N) of a forward.</param>
    /// <param name="keep">How much of the forward stays; there is room for a backward unless it is nothing.</param>
    /// <param name="contextLength">Positions that tokens may have; by default those that the model is trained for.</param>
    /// <exception cref="DeviceException">The device has not that much memory.</exception>
    public static Workspace Allocate(LlamaModel model, Backend backend, int tokens, Keep keep, int? contextLength = null)
    {
        ModelConfig config = model.Config with { ContextLength = contextLength ?? model.Config.ContextLength };
        Arena activations = Arena.Plan("activations");
        Arena? gradients = keep == Keep.Nothing ? null : Arena.Plan("activation gradients");
        _ = new Workspace(activations, gradients, backend, config, tokens, keep);
        activations = backend.AllocateAs(activations);
        gradients = gradients is null ? null : backend.AllocateAs(gradients);
        var workspace = new Workspace(activations, gradients, backend, config, tokens, keep) { _own = (activations, gradients) };
        model.Prepare(workspace);
        return workspace;
    }

    /// <summary>Gets the most packed tokens of a forward.</summary>
    public int Capacity { get; }

    /// <summary>Gets how much of the forward stays.</summary>
    public Keep Keep { get; }

    /// <summary>Gets room for the logits of some rows, (R, V): all logits never exist at once. F32 where they are only read; where they become their gradient, as all activations.</summary>
    public Tensor LogitsChunk { get; }

    /// <summary>Gets the table of <see cref="Backend.Rope"/>, (T, D).</summary>
    public Tensor Rope { get; }

    /// <summary>The output of the last forward over n tokens, (n, C): the final norm, which the head reads.</summary>
    public Tensor Output(int n) => _output.RowRange(0, n);

    /// <summary>The residual stream of n tokens before the first block, (n, C).</summary>
    public Tensor Input(int n) => _inputs[0].RowRange(0, n);

    /// <summary>The gradient of the residual stream of n tokens, (n, C), where the last backward left it: before the first block.</summary>
    public Tensor Gradient(int n) => _dResidual.RowRange(0, n);

    /// <summary>The loss of each of n tokens in nats, (n, 1).</summary>
    public Tensor Losses(int n) => _losses.RowRange(0, n);

    /// <summary>Gives back the memory that <see cref="Allocate"/> took; arenas that were given stay their owner's.</summary>
    public void Dispose()
    {
        _own?.Activations.Dispose();
        _own?.Gradients?.Dispose();
        _own = null;
    }

    internal BlockActivations Block(int layer, int n) =>
        (_blocks[layer % _blocks.Length] with { Input = _inputs[layer] }).Rows(n);

    internal BlockGradients Gradients(int n) => _gradients.Rows(n);

    internal Tensor Branch(int n) => _branch.RowRange(0, n);

    internal Tensor OutputR(int n) => _outputR.RowRange(0, n);

    internal Tensor Final(int n) => _final.RowRange(0, n);

    internal Tensor DFinal(int n) => _dFinal.RowRange(0, n);

    internal Tensor DResidual(int n) => _dResidual.RowRange(0, n);

    private static int RowsOfLogits(Backend backend, int vocabulary, DType type) =>
        Math.Max(64, backend.LogitsBytes / type.ByteCount() / vocabulary / 64 * 64);
}
