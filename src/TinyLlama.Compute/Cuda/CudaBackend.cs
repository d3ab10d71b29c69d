using System.Runtime.CompilerServices;

namespace TinyLlama.Compute.Cuda;

/// <summary>
/// An NVIDIA GPU. Activations and their gradients are BF16; statistics, masters, moments and gradients of weights are F32,
/// sums over many F64. Everything is queued on one stream; the same inputs give the same bits, unless attention's backward is
/// allowed atomics.
/// </summary>
public sealed unsafe class CudaBackend : Backend
{
    // An allowance for what is loaded or taken when it is first used: products' kernels and their scratch.
    private const long LazyBytes = 256L << 20;

    // An allowance for what a GPU takes before the first arena: context, kernels, the products' workspace.
    private const long OwnBytes = 768L << 20;

    private readonly CudaDevice _device;
    private readonly MatMul _products;
    private readonly long? _plannedBytes;
    private readonly bool _deterministic;
    private readonly nint _attentionPartials;

    private CudaBackend(CudaDevice device, bool deterministic)
    {
        (_device, _products, _deterministic) = (device, new MatMul(device), deterministic);
        _attentionPartials = device.Allocate("partial sums of attention", Cuda.Attention.PartialsBytes);
    }

    // Whoever plans calls no operation.
    private CudaBackend(long plannedBytes, bool deterministic) =>
        (_device, _products, _plannedBytes, _deterministic) = (null!, null!, plannedBytes, deterministic);

    /// <inheritdoc/>
    public override string Description => _plannedBytes is long bytes ? $"cuda, planned for {bytes / (double)(1L << 30):F1} GiB" : $"{_device.Gpu}";

    /// <inheritdoc/>
    public override string Arithmetic =>
        $"cuda {_device.Gpu.Name}, sm_{_device.Gpu.Capability}, NVRTC {KernelImages.CompilerVersion}, cuBLASLt {CublasLt.cublasLtGetVersion()}{(_deterministic ? "" : ", atomics")}";

    /// <summary>Gets the GPU; null of a backend that only plans.</summary>
    public Gpu? Gpu => _device?.Gpu;

    /// <summary>Gets the device; not of a backend that only plans.</summary>
    internal CudaDevice Device => _device;

    /// <inheritdoc/>
    public override DType ActivationType => DType.BF16;

    /// <inheritdoc/>
    public override DType CacheType => DType.BF16;

    /// <inheritdoc/>
    public override bool HasBackwardForm => false;

    /// <inheritdoc/>
    /// <remarks>256 MiB: 4,096 tokens of a vocabulary of 32,000 in BF16.</remarks>
    public override int LogitsBytes => 256 << 20;

    /// <inheritdoc/>
    /// <remarks>So many hold nearly all probability of most texts, and are 3 KiB of a row of 125 with a vocabulary of 32,000.</remarks>
    public override int TopLogitsCount => 256;

    /// <inheritdoc/>
    public override long AvailableBytes => Math.Max(0, (_plannedBytes - OwnBytes ?? _device.Memory.Free) - LazyBytes);

    /// <summary>Gets the bytes of the GPU's memory that this backend holds; not of a backend that only plans.</summary>
    public long HeldBytes => _device.HeldBytes;

    /// <summary>A backend for a GPU of this machine.</summary>
    /// <param name="ordinal">Which, from 0.</param>
    /// <param name="deterministic">As of <see cref="Device.Open"/>.</param>
    /// <exception cref="DeviceException">There is no such GPU, it is too old, or a library is missing.</exception>
    public static CudaBackend Create(int ordinal = 0, bool deterministic = true) => new(new CudaDevice(ordinal), deterministic);

    /// <summary>A backend that can only plan, as <see cref="Arena.Plan"/> does: for a GPU that is not here. No operation may be called.</summary>
    /// <param name="memoryBytes">The size of the GPU's memory.</param>
    /// <param name="deterministic">As of <see cref="Device.Open"/>.</param>
    public static CudaBackend Plan(long memoryBytes, bool deterministic = true) => new(memoryBytes, deterministic);

    /// <inheritdoc/>
    public override void RequireModel(int channels, int hidden, int headDim)
    {
        if (!Cuda.Attention.HasKernels(headDim))
        {
            throw new DeviceException($"a GPU computes attention with heads of 16, 32, … 128 channels, and this model's have {headDim}: use --device cpu");
        }

        if (channels % Operands.Eight != 0 || hidden % Operands.Eight != 0)
        {
            throw new DeviceException(
                $"a GPU computes with multiples of {Operands.Eight} channels, and this model has {channels}, {hidden} in its feed-forward: use --device cpu");
        }
    }

    /// <inheritdoc/>
    public override Arena Allocate(string name, long byteCount)
    {
        nint address = _device.Allocate(name, byteCount);
        return Arena.Over(name, byteCount, address, () => _device.Free(address));
    }

    /// <inheritdoc/>
    public override Tensor TakePacked(Arena arena, int outputs, int inputs, DType type) => Cuda.MatMul.TakePacked(arena, outputs, inputs, type);

    /// <inheritdoc/>
    public override bool ReadsInPlace(DType type, int inputs, StoredRows rows) => false;

    /// <inheritdoc/>
    public override bool ReadsTable(DType type) => false;

    /// <inheritdoc/>
    public override void WriteRows(Weight weight, int firstRow, ReadOnlySpan<byte> rows) =>
        _products.WriteRows(weight, firstRow, rows);

    /// <inheritdoc/>
    public override void Pack(Weight weight) => _products.Pack(weight);

    /// <inheritdoc/>
    public override void Write<T>(Tensor destination, ReadOnlySpan<T> source)
    {
        RequireElements<T>(destination, source.Length);
        fixed (T* first = source)
        {
            _device.Write(destination.Address, first, (long)source.Length * sizeof(T));
        }
    }

    /// <inheritdoc/>
    public override void Read<T>(Span<T> destination, Tensor source)
    {
        RequireElements<T>(source, destination.Length);
        fixed (T* first = destination)
        {
            _device.Read(first, source.Address, (long)destination.Length * sizeof(T));
        }
    }

    /// <inheritdoc/>
    /// <remarks>The first time they run as they are, so that what is taken at first use is there; then a CUDA graph replays them.</remarks>
    public override void Repeat(Recording recording, Action operations)
    {
        if (!recording.HasRun)
        {
            operations();
            recording.HasRun = true;
            return;
        }

        recording.Replayed ??= _device.Capture(operations);
        ((CudaGraph)recording.Replayed).Launch();
    }

    /// <inheritdoc/>
    public override void Zero(Tensor destination) => Cuda.Copy.Zero(_device, destination);

    /// <inheritdoc/>
    public override void Add(Tensor destination, Tensor addend) => Cuda.Copy.Add(_device, destination, addend);

    /// <inheritdoc/>
    public override void Copy(Tensor destination, Tensor source) => Cuda.Copy.Convert(_device, destination, source);

    /// <inheritdoc/>
    public override void GatherRows(Tensor destination, Tensor source, Tensor rows) =>
        Cuda.Embedding.Gather(_device, destination, source, rows);

    /// <inheritdoc/>
    public override void Sum(Tensor total, Tensor values) =>
        Reductions.Sum(_device, total, values);

    /// <inheritdoc/>
    public override void Embedding(Tensor output, Tensor table, Tensor tokens) =>
        Cuda.Embedding.Forward(_device, output, table, tokens);

    /// <inheritdoc/>
    public override void EmbeddingBackward(Tensor dTable, Tensor dOutput, Tensor tokens) =>
        Cuda.Embedding.Backward(_device, dTable, dOutput, tokens);

    /// <inheritdoc/>
    public override void RmsNorm(Tensor output, Tensor r, Tensor input, Tensor weight, float epsilon) =>
        Cuda.RmsNorm.Forward(_device, output, r, input, weight, epsilon);

    /// <inheritdoc/>
    public override void AddRmsNorm(Tensor sum, Tensor output, Tensor r, Tensor input, Tensor branch, Tensor weight, float epsilon) =>
        Cuda.RmsNorm.AddForward(_device, sum, output, r, input, branch, weight, epsilon);

    /// <inheritdoc/>
    public override void RmsNormBackward(Tensor dInput, Tensor dWeight, Tensor dOutput, Tensor input, Tensor weight, Tensor r) =>
        Cuda.RmsNorm.Backward(_device, dInput, dWeight, dOutput, input, weight, r);

    /// <inheritdoc/>
    public override void MatMul(Tensor output, Tensor input, Weight weight, bool accumulate = false) =>
        _products.Forward(output, input, weight, accumulate);

    /// <inheritdoc/>
    public override void MatMulBackwardInput(Tensor dInput, Tensor dOutput, Weight weight, bool accumulate = false) =>
        _products.BackwardInput(dInput, dOutput, weight, accumulate);

    /// <inheritdoc/>
    public override void MatMulBackwardWeight(Tensor dWeight, Tensor dOutput, Tensor input) =>
        _products.BackwardWeight(dWeight, dOutput, input);

    /// <inheritdoc/>
    public override void Rope(Tensor heads, Tensor positions, Tensor table, bool inverse = false) =>
        Cuda.Rope.Rotate(_device, heads, positions, table, inverse);

    /// <inheritdoc/>
    public override void Attention(
        Tensor output, Tensor logSumExp, Tensor query, Tensor keys, Tensor values, TokenLayout layout, int headDim) =>
        Cuda.Attention.Forward(_device, _attentionPartials, output, logSumExp, query, keys, values, layout, headDim);

    /// <inheritdoc/>
    public override void AttentionBackward(
        Tensor dQuery, Tensor dKeys, Tensor dValues, Tensor scratch, Tensor dOutput, Tensor output, Tensor logSumExp,
        Tensor query, Tensor keys, Tensor values, TokenLayout layout, int headDim) =>
        Cuda.Attention.Backward(
            _device, _deterministic, dQuery, dKeys, dValues, scratch, dOutput, output, logSumExp, query, keys, values, layout, headDim);

    /// <inheritdoc/>
    public override int AttentionScratchColumns(int heads, int headDim) => Cuda.Attention.ScratchColumns(heads, headDim, _deterministic);

    /// <inheritdoc/>
    public override Tensor TakeCache(Arena arena, int blocks, int keyHeads, int headDim, DType type) =>
        KeyValueCache.Take(arena, blocks, keyHeads, headDim, type);

    /// <inheritdoc/>
    public override void AppendToCache(
        Tensor cacheKeys, Tensor cacheValues, Tensor keys, Tensor values, TokenLayout layout, int headDim) =>
        KeyValueCache.Append(_device, cacheKeys, cacheValues, keys, values, layout, headDim);

    /// <inheritdoc/>
    public override void SwiGlu(Tensor output, Tensor gateUp) =>
        Cuda.SwiGlu.Forward(_device, output, gateUp);

    /// <inheritdoc/>
    public override void SwiGluBackward(Tensor dGateUp, Tensor dOutput, Tensor gateUp) =>
        Cuda.SwiGlu.Backward(_device, dGateUp, dOutput, gateUp);

    /// <inheritdoc/>
    public override void CrossEntropy(Tensor losses, Tensor logits, Tensor targets, Tensor scale = default) =>
        Cuda.CrossEntropy.Forward(_device, losses, logits, targets, scale);

    /// <inheritdoc/>
    public override void TopLogits(Tensor top, Tensor logits, Tensor inverseTemperatures, int count) =>
        Cuda.TopLogits.Run(_device, top, logits, inverseTemperatures, count);

    /// <inheritdoc/>
    public override void SumOfSquares(Tensor total, Tensor partials, ReadOnlySpan<Tensor> values) =>
        Reductions.SumOfSquares(_device, total, partials, values);

    /// <inheritdoc/>
    public override void AdamW(
        Tensor values, Tensor first, Tensor second, Tensor gradient, Tensor step, Tensor sumOfSquares, AdamWSettings settings) =>
        Cuda.AdamW.Step(_device, values, first, second, gradient, step, sumOfSquares, settings);

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (disposing && _device is not null)
        {
            _products.Dispose();
            _device.Free(_attentionPartials);
            _device.Dispose();
        }
    }

    private static void RequireElements<T>(Tensor tensor, int count)
        where T : unmanaged =>
        Shape.Require(
            tensor.IsContiguous && tensor.Count == count && Unsafe.SizeOf<T>() == tensor.Type.ByteCount(),
            "as many elements as the contiguous tensor has, of their size");
}
