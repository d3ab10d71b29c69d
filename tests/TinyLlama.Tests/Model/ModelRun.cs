using TinyLlama.Checkpoints;
using TinyLlama.Compute;
using TinyLlama.Compute.Cpu;
using TinyLlama.Model;

namespace TinyLlama.Tests.Model;

/// <summary>A model, a workspace and the device buffers of one batch: what tests of the whole model run on.</summary>
internal sealed class ModelRun : IDisposable
{
    private readonly Arena _arena;
    private readonly Tensor _tokens;
    private readonly Tensor _targets;
    private readonly Tensor _scale;
    private readonly TokenLayout _layout;
    private int _count;

    public ModelRun(
        ModelConfig config, int capacity, Keep keep, CpuPath? path = null, int threads = 1, DType products = DType.F32,
        Func<string, FrozenStorage>? storage = null)
        : this(CpuBackend.Create(threads, path, products), config, capacity, keep, storage)
    {
    }

    /// <summary>On a device, which it disposes of.</summary>
    public ModelRun(Backend backend, ModelConfig config, int capacity, Keep keep, Func<string, FrozenStorage>? storage = null)
    {
        Backend = backend;
        Model = storage is null
            ? LlamaModel.Allocate(config, Backend, trains: keep != Keep.Nothing)
            : LlamaModel.AllocateFrozen(config, Backend, storage);
        Workspace = Workspace.Allocate(Model, Backend, capacity, keep);
        _arena = Backend.Allocate("batch", ((long)capacity * 28) + 1024);
        _tokens = _arena.Take(capacity, 1, DType.I32);
        _targets = _arena.Take(capacity, 1, DType.I32);
        _scale = _arena.Take(1, 1);
        _layout = new TokenLayout(_arena, capacity, capacity);
    }

    public Backend Backend { get; }

    public LlamaModel Model { get; }

    public Workspace Workspace { get; }

    /// <summary>A model small enough for central differences, with grouped queries and sizes off every vector width.</summary>
    public static ModelConfig TinyConfig(bool tied = false) => new()
    {
        VocabularySize = 41,
        ContextLength = 96,
        Layers = 3,
        Heads = tied ? 3 : 4,
        KeyValueHeads = tied ? 3 : 2,
        Channels = tied ? 18 : 24,
        Hidden = 37,
        TiedEmbeddings = tied,
    };

    /// <summary>Random weights, large enough that every part of the model matters.</summary>
    public void Randomize(int seed)
    {
        var random = new Random(seed);
        foreach (Parameter parameter in Model.Parameters)
        {
            float[] values = new float[parameter.Values.Count];
            for (int i = 0; i < values.Length; i++)
            {
                values[i] = (float)((parameter.IsVector ? 1 : 0) + ((random.NextDouble() - 0.5) * 0.8));
            }

            Backend.Write<float>(parameter.Values, values);
        }

        Model.Pack();
    }

    /// <summary>One forward over sequences, end to end.</summary>
    public void Forward(params int[][] sequences)
    {
        int row = 0;
        var segments = new List<Segment>();
        foreach (int[] sequence in sequences)
        {
            segments.Add(new Segment(row, sequence.Length, 0, row));
            row += sequence.Length;
        }

        _count = row;
        _layout.Set(Backend, segments.ToArray());
        Backend.Write<int>(_tokens.RowRange(0, row), sequences.SelectMany(s => s).ToArray());
        Model.Forward(Workspace, _tokens.RowRange(0, row), _layout, KeyValueSource.Batch);
    }

    /// <summary>The logits of every row of the last forward.</summary>
    public float[] Logits()
    {
        int vocabulary = Model.Config.VocabularySize;
        float[] logits = new float[_count * vocabulary];
        for (int row = 0; row < _count; row += Workspace.LogitsChunk.Rows)
        {
            int rows = Math.Min(Workspace.LogitsChunk.Rows, _count - row);
            Tensor chunk = Workspace.LogitsChunk.RowRange(0, rows);
            Model.Logits(chunk, Workspace.Output(_count).RowRange(row, rows));
            DeviceElements.Read(logits.AsSpan(row * vocabulary, rows * vocabulary), Backend, chunk);
        }

        return logits;
    }

    /// <summary>The mean loss of the last forward.</summary>
    public double Loss(int[] targets)
    {
        Tensor device = _targets.RowRange(0, _count);
        Backend.Write<int>(device, targets);
        Model.Loss(Workspace, device);
        return MeanLoss(targets);
    }

    /// <summary>Adds the gradients of the last forward's mean loss; returns the loss.</summary>
    public double Backward(int[] targets)
    {
        Tensor device = _targets.RowRange(0, _count);
        Backend.Write<int>(device, targets);
        Backend.Write<float>(_scale, [1f / targets.Count(t => t >= 0)]);
        Model.Backward(Workspace, _tokens.RowRange(0, _count), device, _scale, _layout);
        return MeanLoss(targets);
    }

    public float[] Read(Tensor tensor)
    {
        float[] values = new float[tensor.Count];
        for (int row = 0; row < tensor.Rows; row++)
        {
            DeviceElements.Read(values.AsSpan(row * tensor.Columns, tensor.Columns), Backend, tensor.RowRange(row, 1));
        }

        return values;
    }

    public void Dispose()
    {
        _arena.Dispose();
        Workspace.Dispose();
        Model.Dispose();
        Backend.Dispose();
    }

    private double MeanLoss(int[] targets) =>
        Read(Workspace.Losses(_count)).Sum(loss => (double)loss) / targets.Count(t => t >= 0);
}
