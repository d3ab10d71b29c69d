using TinyLlama.Compute;

namespace TinyLlama.Model;

/// <summary>What one block's forward leaves for its backward. N packed tokens.</summary>
/// <param name="Input">(N, C): the residual stream before the block.</param>
/// <param name="Norm1">(N, C).</param>
/// <param name="R1">(N, 1): reciprocal root mean squares of Input.</param>
/// <param name="Qkv">(N, (Hq + 2 Hkv) · D): q | k | v, q and k rotated.</param>
/// <param name="Context">(N, Hq · D): attention before the output projection.</param>
/// <param name="LogSumExp">(N, Hq).</param>
/// <param name="Middle">(N, C): the residual stream between attention and feed-forward.</param>
/// <param name="Norm2">(N, C).</param>
/// <param name="R2">(N, 1).</param>
/// <param name="GateUp">(N, 2H).</param>
/// <param name="Gated">(N, H).</param>
internal readonly record struct BlockActivations(
    Tensor Input, Tensor Norm1, Tensor R1, Tensor Qkv, Tensor Context, Tensor LogSumExp,
    Tensor Middle, Tensor Norm2, Tensor R2, Tensor GateUp, Tensor Gated)
{
    /// <summary>Takes the buffers of a block.</summary>
    /// <param name="arena">Their owner.</param>
    /// <param name="type">The type of activations; statistics are F32.</param>
    /// <param name="c">The model's shape.</param>
    /// <param name="tokens">Most packed tokens.</param>
    /// <param name="shared">The block whose Norm1, Norm2 and Gated this one overwrites; null for its own.</param>
    public static BlockActivations Take(Arena arena, DType type, ModelConfig c, int tokens, BlockActivations? shared) => new(
        arena.Take(tokens, c.Channels, type), shared?.Norm1 ?? arena.Take(tokens, c.Channels, type), arena.Take(tokens, 1),
        arena.Take(tokens, c.QueryChannels + (2 * c.KeyValueChannels), type), arena.Take(tokens, c.QueryChannels, type), arena.Take(tokens, c.Heads),
        arena.Take(tokens, c.Channels, type), shared?.Norm2 ?? arena.Take(tokens, c.Channels, type), arena.Take(tokens, 1),
        arena.Take(tokens, 2 * c.Hidden, type), shared?.Gated ?? arena.Take(tokens, c.Hidden, type));

    public BlockActivations Rows(int n) => new(
        Input.RowRange(0, n), Norm1.RowRange(0, n), R1.RowRange(0, n), Qkv.RowRange(0, n), Context.RowRange(0, n),
        LogSumExp.RowRange(0, n), Middle.RowRange(0, n), Norm2.RowRange(0, n), R2.RowRange(0, n),
        GateUp.RowRange(0, n), Gated.RowRange(0, n));
}

/// <summary>Gradients of a block's activations; one set serves all blocks. Shapes as in <see cref="BlockActivations"/>.</summary>
/// <param name="Norm">(N, C): of either norm's output.</param>
/// <param name="Qkv">(N, (Hq + 2 Hkv) · D).</param>
/// <param name="Context">(N, Hq · D).</param>
/// <param name="Scratch">(N, <see cref="Backend.AttentionScratchColumns"/>) of F32: of the attention backward.</param>
/// <param name="GateUp">(N, 2H).</param>
/// <param name="Gated">(N, H).</param>
internal readonly record struct BlockGradients(
    Tensor Norm, Tensor Qkv, Tensor Context, Tensor Scratch, Tensor GateUp, Tensor Gated)
{
    public static BlockGradients Take(Arena arena, Backend backend, ModelConfig c, int tokens)
    {
        DType type = backend.ActivationType;
        return new(
            arena.Take(tokens, c.Channels, type), arena.Take(tokens, c.QueryChannels + (2 * c.KeyValueChannels), type),
            arena.Take(tokens, c.QueryChannels, type), arena.Take(tokens, backend.AttentionScratchColumns(c.Heads, c.HeadDim)),
            arena.Take(tokens, 2 * c.Hidden, type), arena.Take(tokens, c.Hidden, type));
    }

    public BlockGradients Rows(int n) => new(
        Norm.RowRange(0, n), Qkv.RowRange(0, n), Context.RowRange(0, n), Scratch.RowRange(0, n),
        GateUp.RowRange(0, n), Gated.RowRange(0, n));
}

/// <summary>Pre-norm attention and SwiGLU around the residual stream (Touvron et al. 2023; grouped queries, Ainslie et al. 2023).</summary>
internal sealed class TransformerBlock
{
    private readonly ModelConfig _config;
    private readonly int _layer;
    private readonly Parameter _norm1;
    private readonly Linear _qkv;
    private readonly Linear _output;
    private readonly Parameter _norm2;
    private readonly Linear _gateUp;
    private readonly Linear _down;

    /// <summary>Takes the block's parameters, which follow each other in every arena.</summary>
    public TransformerBlock(ModelConfig c, int layer, ModelArenas arenas, Backend backend)
    {
        (_config, _layer) = (c, layer);
        string name = $"model.layers.{c.FirstLayer + layer}.";
        _norm1 = LlamaModel.Norm(name + "input_layernorm.weight", arenas, c.Channels);
        _qkv = Linear.Take(
            arenas, backend, c.Channels,
            new RowGroup(name + "self_attn.q_proj.weight", c.QueryChannels),
            new RowGroup(name + "self_attn.k_proj.weight", c.KeyValueChannels),
            new RowGroup(name + "self_attn.v_proj.weight", c.KeyValueChannels));
        _output = Linear.Take(arenas, backend, c.QueryChannels, new RowGroup(name + "self_attn.o_proj.weight", c.Channels));
        _norm2 = LlamaModel.Norm(name + "post_attention_layernorm.weight", arenas, c.Channels);
        _gateUp = Linear.Take(
            arenas, backend, c.Channels,
            new RowGroup(name + "mlp.gate_proj.weight", c.Hidden), new RowGroup(name + "mlp.up_proj.weight", c.Hidden));
        _down = Linear.Take(arenas, backend, c.Hidden, new RowGroup(name + "mlp.down_proj.weight", c.Channels));
    }

    /// <summary>Gets or sets the ranks that the block is split over; null for none.</summary>
    public TensorGroup? Group { get; set; }

    /// <summary>Gets the parameters in checkpoint order.</summary>
    public IEnumerable<Parameter> Parameters =>
        [_norm1, .. _qkv.Parameters, .. _output.Parameters, _norm2, .. _gateUp.Parameters, .. _down.Parameters];

    /// <summary>Makes the packed forms of all products follow their values.</summary>
    public void Pack(Backend backend)
    {
        _qkv.Pack(backend);
        _output.Pack(backend);
        _gateUp.Pack(backend);
        _down.Pack(backend);
    }

    /// <summary>
    /// Fills <paramref name="a"/>, then writes what the feed-forward adds to the residual stream into
    /// <paramref name="branch"/>: the next block's norm adds it.
    /// </summary>
    /// <param name="b">The device.</param>
    /// <param name="a">This block's activations.</param>
    /// <param name="branch">In: what the block before left, unless <paramref name="residual"/> is empty. Out: this block's.</param>
    /// <param name="residual">The block before's Middle; empty where a.Input is there already (the first block).</param>
    /// <param name="rope">The table of <see cref="Backend.Rope"/>.</param>
    /// <param name="layout">Which keys each token sees.</param>
    /// <param name="source">Where keys and values lie.</param>
    public void Forward(
        Backend b, in BlockActivations a, Tensor branch, Tensor residual, Tensor rope, TokenLayout layout, KeyValueSource source)
    {
        Activate(b, a, branch, residual, rope, layout, source);
        _down.Forward(b, branch, a.Gated);
        Group?.Complete(branch);
    }

    /// <summary>The forward up to what backward needs: everything but the last product.</summary>
    public void Activate(
        Backend b, in BlockActivations a, Tensor branch, Tensor residual, Tensor rope, TokenLayout layout, KeyValueSource source)
    {
        if (residual.IsEmpty)
        {
            b.RmsNorm(a.Norm1, a.R1, a.Input, _norm1.Values, _config.NormEpsilon);
        }
        else
        {
            b.AddRmsNorm(a.Input, a.Norm1, a.R1, residual, branch, _norm1.Values, _config.NormEpsilon);
        }

        _qkv.Forward(b, a.Qkv, a.Norm1);
        (Tensor q, Tensor k, Tensor v) = Split(a.Qkv);
        b.Rope(RotatedHeads(a.Qkv), layout.Positions.RowRange(0, a.Qkv.Rows), rope);
        (Tensor keys, Tensor values) = source.Append(b, _layer, k, v, layout);
        b.Attention(a.Context, a.LogSumExp, q, keys, values, layout, _config.HeadDim);
        _output.Forward(b, branch, a.Context);
        Group?.Complete(branch);

        b.AddRmsNorm(a.Middle, a.Norm2, a.R2, a.Input, branch, _norm2.Values, _config.NormEpsilon);
        _gateUp.Forward(b, a.GateUp, a.Norm2);
        b.SwiGlu(a.Gated, a.GateUp);
    }

    /// <summary>Computes what <see cref="Keep.Products"/> does not keep again: to the same bits, as <see cref="Backend.AddRmsNorm"/> promises.</summary>
    public void Restore(Backend b, in BlockActivations a)
    {
        b.RmsNorm(a.Norm1, a.R1, a.Input, _norm1.Values, _config.NormEpsilon);
        b.RmsNorm(a.Norm2, a.R2, a.Middle, _norm2.Values, _config.NormEpsilon);
        b.SwiGlu(a.Gated, a.GateUp);
    }

    /// <summary>Turns the gradient of the residual stream after the block into the one before it, in place.</summary>
    public void Backward(Backend b, in BlockActivations a, in BlockGradients d, Tensor dResidual, Tensor rope, TokenLayout layout)
    {
        _down.Backward(b, d.Gated, dResidual, a.Gated);
        b.SwiGluBackward(d.GateUp, d.Gated, a.GateUp);
        _gateUp.Backward(b, d.Norm, d.GateUp, a.Norm2);
        Group?.Complete(d.Norm);
        b.RmsNormBackward(dResidual, _norm2.Gradient, d.Norm, a.Middle, _norm2.Values, a.R2);

        _output.Backward(b, d.Context, dResidual, a.Context);
        (Tensor q, Tensor k, Tensor v) = Split(a.Qkv);
        (Tensor dq, Tensor dk, Tensor dv) = Split(d.Qkv);
        b.AttentionBackward(dq, dk, dv, d.Scratch, d.Context, a.Context, a.LogSumExp, q, k, v, layout, _config.HeadDim);
        b.Rope(RotatedHeads(d.Qkv), layout.Positions.RowRange(0, d.Qkv.Rows), rope, inverse: true);
        _qkv.Backward(b, d.Norm, d.Qkv, a.Norm1);
        Group?.Complete(d.Norm);
        b.RmsNormBackward(dResidual, _norm1.Gradient, d.Norm, a.Input, _norm1.Values, a.R1);
    }

    private (Tensor Q, Tensor K, Tensor V) Split(Tensor qkv) => (
        qkv.ColumnRange(0, _config.QueryChannels),
        qkv.ColumnRange(_config.QueryChannels, _config.KeyValueChannels),
        qkv.ColumnRange(_config.QueryChannels + _config.KeyValueChannels, _config.KeyValueChannels));

    private Tensor RotatedHeads(Tensor qkv) => qkv.ColumnRange(0, _config.QueryChannels + _config.KeyValueChannels);
}
