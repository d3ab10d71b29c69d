using TinyLlama.Compute;

namespace TinyLlama.Model;

/// <summary>
/// A Llama over packed tokens: training, prefill, decode and validation are one forward, told apart by the
/// <see cref="TokenLayout"/> and the <see cref="KeyValueSource"/> alone.
/// </summary>
public sealed class LlamaModel : IDisposable
{
    /// <summary>Name of the embedding, which is the head too where <see cref="ModelConfig.TiedEmbeddings"/> says so.</summary>
    public const string EmbeddingName = "model.embed_tokens.weight";

    /// <summary>Name of a head of its own.</summary>
    public const string HeadName = "lm_head.weight";

    private const string NormName = "model.norm.weight";

    private readonly Backend _backend;
    private readonly Parameter? _embedding;
    private readonly Tensor _table;
    private readonly TransformerBlock[] _blocks;
    private readonly Parameter? _norm;
    private readonly Linear? _head;

    // Weights in place, of which the first so many have been packed.
    private readonly Weight[] _awaitPacking;
    private int _packed;
    private ModelArenas? _own;

    /// <summary>Takes the parameters from the arenas; their values are zero until initialized or loaded.</summary>
    /// <param name="config">The shape.</param>
    /// <param name="backend">The device.</param>
    /// <param name="arenas">Where parameters live, and gradients if the model trains.</param>
    /// <exception cref="DeviceException">The device has no kernels for the shape.</exception>
    public LlamaModel(ModelConfig config, Backend backend, ModelArenas arenas)
    {
        backend.RequireModel(config.Channels, config.Hidden, config.HeadDim);
        (Config, _backend) = (config, backend);
        if (config.TiedEmbeddings && !(config.HasEmbedding && config.HasHead))
        {
            throw new ArgumentException("an embedding that is the head too cannot be in two stages", nameof(config));
        }

        var units = new List<ParameterUnit>();
        Parameter? embedding = null, norm = null;
        Linear? head = null;
        if (config.HasEmbedding)
        {
            Together(units, arenas.Of(0), own =>
            {
                embedding = Embedding(own);
                if (!config.TiedEmbeddings)
                {
                    return [embedding];
                }

                norm = Norm(NormName, own, config.Channels);
                head = Linear.Tied(own, backend, embedding);
                return [embedding, norm];
            });
            _table = embedding!.Values.IsEmpty ? embedding.Frozen.Weight!.PackedForward : embedding.Values;
        }

        _blocks = new TransformerBlock[config.Layers];
        for (int l = 0; l < config.Layers; l++)
        {
            Together(units, arenas.Of(1 + (l % 2)), own => (_blocks[l] = new TransformerBlock(config, l, own, backend)).Parameters);
        }

        if (config.HasHead && !config.TiedEmbeddings)
        {
            Together(units, arenas.Of(0), own =>
            {
                norm = Norm(NormName, own, config.Channels);
                head = Linear.Take(own, backend, config.Channels, new RowGroup(HeadName, config.VocabularySize));
                return [norm, .. head.Parameters];
            });
        }

        (_embedding, _norm, _head) = (embedding, norm, head);
        Units = units;
        Parameters =
        [
            .. new[] { _embedding }.OfType<Parameter>(), .. _blocks.SelectMany(block => block.Parameters),
            .. new[] { _norm }.OfType<Parameter>(), .. _head?.Parameters ?? [],
        ];

        // Behind everything else, so that no page of theirs is touched before they are packed. A table is never packed.
        _awaitPacking =
        [
            .. Parameters.Where(parameter => parameter.IsInPlace && parameter != _embedding).Select(static parameter => parameter.Frozen.Weight!).Distinct(),
        ];
        Array.ForEach(_awaitPacking, weight => weight.AwaitPacking(arenas.Weights, backend));
    }

    /// <summary>Gets the shape.</summary>
    public ModelConfig Config { get; }

    /// <summary>Gets every parameter, in checkpoint order.</summary>
    public IReadOnlyList<Parameter> Parameters { get; }

    /// <summary>Gets the units of a model that trains, in the order of the forward; none of one that does not.</summary>
    public IReadOnlyList<ParameterUnit> Units { get; }

    /// <summary>Gets or sets where units are between their uses; null where all are always there.</summary>
    public ParameterStore? Store { get; set; }

    /// <summary>Gets or sets the stages that this model's blocks are one of; null for a whole model.</summary>
    public StageGroup? Stages { get; set; }

    /// <summary>Gets the bytes that the parameters take in memory, their packed forms and mapped files included; 0 where others own it.</summary>
    public long ByteCount => _own is null ? 0 : _own.Weights.UsedBytes + (_own.Packed?.UsedBytes ?? 0)
        + Parameters.Where(static parameter => parameter.Frozen.Weight is { IsInPlace: true, AwaitsPacking: false }).Sum(static parameter => parameter.Rows * parameter.Frozen.Weight!.Type.RowBytes(parameter.Columns));

    /// <summary>Sets the ranks that have the blocks between them, where the shape is one rank's part.</summary>
    public void Join(TensorGroup group) => Array.ForEach(_blocks, block => block.Group = group);

    /// <summary>A model in memory of its own, counted and then allocated.</summary>
    /// <param name="config">The shape.</param>
    /// <param name="backend">The device; dispose of the model before it.</param>
    /// <param name="trains">Whether there are gradients.</param>
    /// <exception cref="DeviceException">The device has not that much memory.</exception>
    public static LlamaModel Allocate(ModelConfig config, Backend backend, bool trains)
    {
        ModelArenas plan = ModelArenas.Plan(PackedForms.Both, trains);
        _ = new LlamaModel(config, backend, plan);
        ModelArenas arenas = ModelArenas.Allocate(backend, plan);
        return new LlamaModel(config, backend, arenas) { _own = arenas };
    }

    /// <summary>A frozen model in memory of its own: it only runs forward, and its weights stay in the types that they are stored in.</summary>
    /// <param name="config">The shape.</param>
    /// <param name="backend">The device; dispose of the model before it.</param>
    /// <param name="storage">How the parameter of a name is stored; what the device reads in place is to outlive the model.</param>
    /// <exception cref="DeviceException">The device has not that much memory.</exception>
    public static LlamaModel AllocateFrozen(ModelConfig config, Backend backend, Func<string, FrozenStorage> storage)
    {
        ModelArenas plan = ModelArenas.PlanFrozen(storage);
        _ = new LlamaModel(config, backend, plan);
        ModelArenas arenas = ModelArenas.Allocate(backend, plan);
        return new LlamaModel(config, backend, arenas) { _own = arenas };
    }

    /// <summary>Makes packed forms follow the values. Call after loading and after each optimizer step.</summary>
    public void Pack()
    {
        foreach (TransformerBlock block in _blocks)
        {
            block.Pack(_backend);
        }

        _head?.Pack(_backend);
    }

    /// <summary>
    /// Packs a quarter of the weights in place that products would read faster packed. Called before each forward but the first, it
    /// lets a model begin at once and lose little time to its first forwards. Bits stay.
    /// </summary>
    public void PackSome()
    {
        int end = Math.Min(_awaitPacking.Length, _packed + (_awaitPacking.Length / 4) + 1);
        for (; _packed < end; _packed++)
        {
            _backend.Pack(_awaitPacking[_packed]);
        }
    }

    /// <summary>Makes the packed forms of one unit follow its values.</summary>
    public void Pack(ParameterUnit unit)
    {
        ArgumentNullException.ThrowIfNull(unit);
        int block = unit.Index - FirstBlockUnit;
        if (block >= 0 && block < _blocks.Length)
        {
            _blocks[block].Pack(_backend);
        }
        else if (unit.Index == HeadUnit)
        {
            Head.Pack(_backend);
        }
    }

    /// <summary>Fills the workspace's table of rotations. Call once after its memory is allocated.</summary>
    /// <remarks>Angle of pair i at position p: p times <see cref="ModelConfig.RopeFrequency"/> (Su et al. 2021), computed in fp64, kept in fp32.</remarks>
    public void Prepare(Workspace w)
    {
        int half = Config.HeadDim / 2;
        float[] row = new float[Config.HeadDim];
        for (int p = 0; p < w.Rope.Rows; p++)
        {
            for (int i = 0; i < half; i++)
            {
                (double sine, double cosine) = Math.SinCos(p * Config.RopeFrequency(i));
                (row[i], row[half + i]) = ((float)cosine, (float)sine);
            }

            _backend.Write<float>(w.Rope.RowRange(p, 1), row);
        }
    }

    /// <summary>
    /// tokens (N, 1) of I32 to the final norm's output, left in <see cref="Workspace.Output"/>. A stage without the embedding begins
    /// with what is in <see cref="Workspace.Input"/>, one without the head leaves what the next begins with.
    /// </summary>
    public void Forward(Workspace w, Tensor tokens, TokenLayout layout, KeyValueSource source)
    {
        int n = tokens.Rows;
        Tensor branch = w.Branch(n);
        BlockActivations a = w.Block(0, n);
        if (Config.HasEmbedding)
        {
            Store?.Gather(0, 1);
            _backend.Embedding(a.Input, _table, tokens);
        }

        Tensor residual = default;
        for (int l = 0; l < _blocks.Length; l++)
        {
            Store?.Gather(BlockUnit(l), l + 1 < _blocks.Length ? BlockUnit(l + 1) : _norm is null ? -1 : HeadUnit);
            a = w.Block(l, n);
            _blocks[l].Forward(_backend, a, branch, residual, w.Rope, layout, source);
            residual = a.Middle;
        }

        if (_norm is null)
        {
            _backend.Copy(w.Output(n), residual);
            _backend.Add(w.Output(n), branch);
            return;
        }

        Store?.Gather(HeadUnit, -1);
        _backend.AddRmsNorm(w.Final(n), w.Output(n), w.OutputR(n), residual, branch, _norm.Values, Config.NormEpsilon);
    }

    /// <summary>logits (R, V) = hidden (R, C), rows of <see cref="Workspace.Output"/>, times the head.</summary>
    public void Logits(Tensor logits, Tensor hidden) => Head.Forward(_backend, logits, hidden);

    /// <summary>The loss of each token of the last forward, left in <see cref="Workspace.Losses"/>.</summary>
    /// <param name="w">The workspace of the forward.</param>
    /// <param name="targets">(N, 1) of I32; negative ones are ignored.</param>
    public void Loss(Workspace w, Tensor targets)
    {
        for (int row = 0; row < targets.Rows; row += w.LogitsChunk.Rows)
        {
            int count = Math.Min(w.LogitsChunk.Rows, targets.Rows - row);
            Tensor logits = w.LogitsChunk.RowRange(0, count);
            Head.Forward(_backend, logits, w.Output(targets.Rows).RowRange(row, count));
            _backend.CrossEntropy(w.Losses(targets.Rows).RowRange(row, count), logits, targets.RowRange(row, count));
        }
    }

    /// <summary>
    /// Adds the gradients of scale · Σ loss to every parameter's, and leaves each token's loss in
    /// <see cref="Workspace.Losses"/>. Call after <see cref="Forward"/> on the same workspace. A stage without the head begins
    /// with the gradient of its output in <see cref="Workspace.Gradient"/>, and leaves that of its input there.
    /// </summary>
    /// <param name="w">The workspace of the forward; it must not keep nothing.</param>
    /// <param name="tokens">(N, 1) of I32, as in the forward.</param>
    /// <param name="targets">(N, 1) of I32; negative ones are ignored.</param>
    /// <param name="scale">(1, 1) of F32: one over the targets of the whole step.</param>
    /// <param name="layout">As in the forward.</param>
    public void Backward(Workspace w, Tensor tokens, Tensor targets, Tensor scale, TokenLayout layout)
    {
        int n = tokens.Rows;
        BlockGradients d = w.Gradients(n);
        Tensor dResidual = w.DResidual(n);
        if (_norm is not null)
        {
            Store?.Gather(HeadUnit, BlockUnit(_blocks.Length - 1));
            Store?.BeginGradient(HeadUnit);
            BackwardHead(w, targets, scale);
            _backend.Zero(dResidual);
            _backend.RmsNormBackward(dResidual, _norm.Gradient, w.DFinal(n), w.Final(n), _norm.Values, w.OutputR(n));
            if (HeadUnit > 0)
            {
                Store?.EndGradient(HeadUnit);
            }
        }

        for (int l = _blocks.Length - 1; l >= 0; l--)
        {
            Store?.Gather(BlockUnit(l), l > 0 ? BlockUnit(l - 1) : -1);
            Store?.BeginGradient(BlockUnit(l));
            BlockActivations a = w.Block(l, n);
            if (w.Keep == Keep.BlockInputs)
            {
                _blocks[l].Activate(_backend, a, w.Branch(n), residual: default, w.Rope, layout, KeyValueSource.Batch);
            }
            else if (w.Keep == Keep.Products)
            {
                _blocks[l].Restore(_backend, a);
            }

            _blocks[l].Backward(_backend, a, d, dResidual, w.Rope, layout);
            Store?.EndGradient(BlockUnit(l));
        }

        if (_embedding is null)
        {
            return;
        }

        if (HeadUnit > 0)
        {
            Store?.BeginGradient(0);
        }

        _backend.EmbeddingBackward(_embedding.Gradient, dResidual, tokens);
        Store?.EndGradient(0);
    }

    /// <summary>Gives back the memory that <see cref="Allocate"/> took; arenas that were given stay their owner's.</summary>
    public void Dispose()
    {
        _own?.Dispose();
        _own = null;
    }

    private Linear Head => _head ?? throw new InvalidOperationException("the head is in another stage");

    private int FirstBlockUnit => Config.HasEmbedding ? 1 : 0;

    // The unit of the final norm and the head: that of the embedding where they are tied.
    private int HeadUnit => Config.TiedEmbeddings ? 0 : BlockUnit(_blocks.Length);

    private int BlockUnit(int block) => FirstBlockUnit + block;

    internal static Parameter Norm(string name, ModelArenas arenas, int channels) => Matrix(name, arenas, 1, channels);

    // Takes the parameters of a unit one after the other, from the weights and, at the same offsets, from the gradients.
    private static void Together(List<ParameterUnit> units, ModelArenas own, Func<ModelArenas, IEnumerable<Parameter>> take)
    {
        if (own.Gradients is null)
        {
            take(own);
            return;
        }

        IEnumerable<Parameter> parameters = [];
        Tensor gradient = default;
        Tensor values = own.Weights.TakeTogether(
            () => gradient = own.Gradients.TakeTogether(() => parameters = take(own), ParameterUnit.Columns, own.Subdivisions),
            ParameterUnit.Columns, own.Subdivisions);
        units.Add(new ParameterUnit(units.Count, [.. parameters], values, gradient));
    }

    private static Parameter Matrix(string name, ModelArenas arenas, int rows, int columns) =>
        new(name, arenas.Weights.Take(rows, columns), arenas.Gradients?.Take(rows, columns) ?? default);

    // A frozen table is read by rows: as it is stored, or from the packed form of a quantized one, which a tied head reads too.
    private Parameter Embedding(ModelArenas arenas)
    {
        (int rows, int columns) = (Config.VocabularySize, Config.Channels);
        if (arenas.Storage?.Invoke(EmbeddingName) is not { Type: var type } stored)
        {
            return Matrix(EmbeddingName, arenas, rows, columns);
        }

        // A table is never packed in turn: one of 16 bits that is also the head is at once, a quantized one stays rows.
        if (stored.StaysInPlace(_backend, columns) && _backend.ReadsTable(type) && (!Config.TiedEmbeddings || type.IsQuantized()))
        {
            return new Parameter(EmbeddingName, default, default, new FrozenRows(Weight.InPlace([stored.Rows], columns, type), 0, rows));
        }

        Tensor values = type.IsQuantized() ? default : arenas.Weights.Take(rows, columns, type);
        Weight? weight = type.IsQuantized() || Config.TiedEmbeddings ? Weight.Frozen(arenas.Weights, _backend, rows, columns, type) : null;
        return new Parameter(EmbeddingName, values, default, new FrozenRows(weight, 0, rows));
    }

    // Head, loss and their backward chunk by chunk: (N, V) never exists in full.
    private void BackwardHead(Workspace w, Tensor targets, Tensor scale)
    {
        int n = targets.Rows;
        for (int row = 0; row < n; row += w.LogitsChunk.Rows)
        {
            int count = Math.Min(w.LogitsChunk.Rows, n - row);
            Tensor logits = w.LogitsChunk.RowRange(0, count);
            Tensor hidden = w.Output(n).RowRange(row, count);
            Head.Forward(_backend, logits, hidden);
            _backend.CrossEntropy(w.Losses(n).RowRange(row, count), logits, targets.RowRange(row, count), scale);
            Head.Backward(_backend, w.DFinal(n).RowRange(row, count), logits, hidden);
        }
    }
}
