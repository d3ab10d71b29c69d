namespace TinyLlama.Compute;

/// <summary>
/// The narrow waist: every operation a Llama needs, fused, forward and backward, once per device. Operations are queued
/// in order, write into buffers that the caller owns and never allocate. None returns a value or reads host memory:
/// tokens, targets, layouts, losses, norms and learning rates live in device buffers. <see cref="Read{T}"/> alone waits.
/// </summary>
/// <remarks>
/// Arguments: destinations, sources, shapes, scalars. Forward writes its output (=). Backward accumulates into gradients
/// of parameters (+=) and writes gradients of activations (=) unless its summary says otherwise.
/// Shapes: N = packed tokens, C = channels, D = head dim, H = hidden, V = vocabulary, O and I = outputs and inputs of a
/// weight, Hq and Hkv = query heads and key/value heads. Activations may be column ranges (<see cref="Tensor.Stride"/>).
/// Same inputs, same bits, for any number of threads; one arithmetic per row whatever N is.
/// </remarks>
public abstract class Backend : IDisposable
{
    /// <summary>Gets the device in words, as <c>tinyllama env</c> shows it.</summary>
    public abstract string Description { get; }

    /// <summary>
    /// Gets what the bits of a result depend on besides the input: the device and the instruction path, not the threads.
    /// Checkpoints keep it, because a run that goes on with another one is no longer bit for bit the unbroken run.
    /// </summary>
    public abstract string Arithmetic { get; }

    /// <summary>Gets the type of activations and of their gradients: F32 or BF16. Statistics, losses and gradients of parameters are F32.</summary>
    public abstract DType ActivationType { get; }

    /// <summary>Gets the type that a cache keeps keys and values in where nobody asks for another (<see cref="TakeCache"/>).</summary>
    public abstract DType CacheType { get; }

    /// <summary>Gets a value indicating whether <see cref="MatMulBackwardInput"/> reads a packed form of its own; otherwise it reads that of <see cref="MatMul"/>.</summary>
    public abstract bool HasBackwardForm { get; }

    /// <summary>Gets the bytes of logits that are computed at a time, from whole tiles of rows: so many that the head's products run at full rate.</summary>
    public abstract int LogitsBytes { get; }

    /// <summary>
    /// Gets how many of the largest logits of a row (<see cref="TopLogits"/>) are read in place of the row, as long as they decide
    /// what is asked of it; 0 of a device whose memory is the host's.
    /// </summary>
    public virtual int TopLogitsCount => 0;

    /// <summary>Gets the bytes that arenas may take together.</summary>
    public abstract long AvailableBytes { get; }

    /// <summary>Refuses a model whose shape the device has no kernels for.</summary>
    /// <param name="channels">C.</param>
    /// <param name="hidden">H.</param>
    /// <param name="headDim">D.</param>
    /// <exception cref="DeviceException">Says what it has kernels for.</exception>
    public abstract void RequireModel(int channels, int hidden, int headDim);

    /// <summary>Allocates zeroed memory on the device.</summary>
    /// <param name="name">What the arena is for.</param>
    /// <param name="byteCount">Its size.</param>
    /// <exception cref="DeviceException">The device has not that much memory.</exception>
    public abstract Arena Allocate(string name, long byteCount);

    /// <summary>Allocates what a plan counted.</summary>
    /// <param name="plan">An arena without memory, over which the same objects were built.</param>
    /// <exception cref="DeviceException">The device has not that much memory.</exception>
    public Arena AllocateAs(Arena plan) => plan.UsedBytes == 0 ? plan : Allocate(plan.Name, plan.UsedBytes);

    /// <summary>
    /// Takes room for the packed form of an (outputs, inputs) matrix; see <see cref="Weight"/>. F32 is packed in the type of
    /// the device's products; 16 bits stay 16 where the inputs are even in number; quantized types stay as they are.
    /// </summary>
    public abstract Tensor TakePacked(Arena arena, int outputs, int inputs, DType type);

    /// <summary>
    /// Whether <see cref="MatMul"/> reads rows of that type where a mapped file has them, without a copy (<see cref="Weight.InPlace"/>);
    /// <see cref="Embedding"/> does where <see cref="ReadsTable"/> says so too.
    /// </summary>
    public abstract bool ReadsInPlace(DType type, int inputs, StoredRows rows);

    /// <summary>Whether <see cref="Embedding"/> reads a table of that type in rows as files keep them.</summary>
    public abstract bool ReadsTable(DType type);

    /// <summary>Fills rows of a frozen weight (<see cref="Weight.Frozen"/>) with what a file stores. The host memory is free on return.</summary>
    /// <param name="weight">The weight.</param>
    /// <param name="firstRow">A multiple of <see cref="PackedRows"/>.</param>
    /// <param name="rows">Whole rows in the weight's type: a multiple of <see cref="PackedRows"/> of them, but for the last.</param>
    public abstract void WriteRows(Weight weight, int firstRow, ReadOnlySpan<byte> rows);

    /// <summary>Fills the packed forms that the weight has room for from its values, or from rows in place, which it then leaves. Bits of products stay.</summary>
    public abstract void Pack(Weight weight);

    /// <summary>Copies host elements to a contiguous tensor of the same count. The host memory is free on return.</summary>
    public abstract void Write<T>(Tensor destination, ReadOnlySpan<T> source)
        where T : unmanaged;

    /// <summary>Waits for all queued operations, then copies a contiguous tensor to the host.</summary>
    public abstract void Read<T>(Span<T> destination, Tensor source)
        where T : unmanaged;

    /// <summary>
    /// Runs operations that are the same each time, on the same tensors, whatever these hold. A device may record them and
    /// queue the record at once from then on; so they must not read or write host memory.
    /// </summary>
    /// <param name="recording">What stands for these operations; dispose of it before the backend.</param>
    /// <param name="operations">Calls them.</param>
    public virtual void Repeat(Recording recording, Action operations) => operations();

    /// <summary>Sets every element to zero.</summary>
    public abstract void Zero(Tensor destination);

    /// <summary>destination = source, converted between F32, BF16 and F16 (round to nearest, ties to even). Same shape.</summary>
    public abstract void Copy(Tensor destination, Tensor source);

    /// <summary>destination += addend. Contiguous tensors of F32 or of <see cref="ActivationType"/>, of one shape.</summary>
    public abstract void Add(Tensor destination, Tensor addend);

    /// <summary>destination row n = source row rows[n]. destination (N, C), source (R, C), rows (N, 1) of I32.</summary>
    public abstract void GatherRows(Tensor destination, Tensor source, Tensor rows);

    /// <summary>total += the sum of all values. total (1, 1) of F64, values in F32; a fixed tree over fixed chunks.</summary>
    public abstract void Sum(Tensor total, Tensor values);

    /// <summary>output row n = table row tokens[n]. output (N, C), table (V, C) of a floating-point type or the packed form of a quantized weight, tokens (N, 1) of I32 in 0 … V-1.</summary>
    public abstract void Embedding(Tensor output, Tensor table, Tensor tokens);

    /// <summary>dTable row tokens[n] += dOutput row n, n ascending.</summary>
    public abstract void EmbeddingBackward(Tensor dTable, Tensor dOutput, Tensor tokens);

    /// <summary>output = input · r · weight with r = 1 / sqrt(mean(input²) + ε). input, output (N, C), weight (1, C), r (N, 1).</summary>
    public abstract void RmsNorm(Tensor output, Tensor r, Tensor input, Tensor weight, float epsilon);

    /// <summary>
    /// sum = input + branch, then output = RMSNorm(sum): one pass over the residual stream. Gives the bits of the
    /// addition followed by <see cref="RmsNorm"/>. sum may be input itself.
    /// </summary>
    public abstract void AddRmsNorm(Tensor sum, Tensor output, Tensor r, Tensor input, Tensor branch, Tensor weight, float epsilon);

    /// <summary>dInput += …, because it flows into the residual stream; dWeight += …. All as in <see cref="RmsNorm"/>.</summary>
    public abstract void RmsNormBackward(Tensor dInput, Tensor dWeight, Tensor dOutput, Tensor input, Tensor weight, Tensor r);

    /// <summary>output = input · weightᵀ, or += with <paramref name="accumulate"/>. input (N, I), output (N, O) of F32 or of <see cref="ActivationType"/>.</summary>
    public abstract void MatMul(Tensor output, Tensor input, Weight weight, bool accumulate = false);

    /// <summary>dInput = dOutput · weight, or += with <paramref name="accumulate"/>. dInput (N, I), dOutput (N, O).</summary>
    public abstract void MatMulBackwardInput(Tensor dInput, Tensor dOutput, Weight weight, bool accumulate = false);

    /// <summary>dWeight += dOutputᵀ · input. dWeight (O, I), dOutput (N, O), input (N, I).</summary>
    public abstract void MatMulBackwardWeight(Tensor dWeight, Tensor dOutput, Tensor input);

    /// <summary>
    /// Rotates pairs (i, i + D/2) of each head, in place, by the angle of the token's position; with
    /// <paramref name="inverse"/> by its opposite, which is the backward.
    /// </summary>
    /// <param name="heads">(N, any number of heads · D).</param>
    /// <param name="positions">(N, 1) of I32.</param>
    /// <param name="table">(positions, D) of F32: D/2 cosines, then D/2 sines.</param>
    /// <param name="inverse">Whether to rotate back.</param>
    public abstract void Rope(Tensor heads, Tensor positions, Tensor table, bool inverse = false);

    /// <summary>Causal grouped-query attention without the (T, T) matrix: softmax(query · keysᵀ / √D) · values.</summary>
    /// <param name="output">(N, Hq · D).</param>
    /// <param name="logSumExp">(N, Hq): log of the softmax denominator, which backward needs.</param>
    /// <param name="query">(N, Hq · D).</param>
    /// <param name="keys">(N, Hkv · D): rows of the batch; with a block table a cache (<see cref="TakeCache"/>). Query head h reads head h / (Hq / Hkv).</param>
    /// <param name="values">As keys.</param>
    /// <param name="layout">Which keys each query row sees.</param>
    /// <param name="headDim">D.</param>
    public abstract void Attention(
        Tensor output, Tensor logSumExp, Tensor query, Tensor keys, Tensor values, TokenLayout layout, int headDim);

    /// <summary>Writes dQuery, dKeys and dValues (=), recomputing the probabilities. Only for keys that are rows of the batch.</summary>
    /// <param name="dQuery">(N, Hq · D).</param>
    /// <param name="dKeys">(N, Hkv · D).</param>
    /// <param name="dValues">(N, Hkv · D).</param>
    /// <param name="scratch">(N, <see cref="AttentionScratchColumns"/>) of F32, without gaps between rows; what it holds is overwritten.</param>
    /// <param name="dOutput">(N, Hq · D).</param>
    /// <param name="output">What <see cref="Attention"/> wrote.</param>
    /// <param name="logSumExp">What <see cref="Attention"/> wrote.</param>
    /// <param name="query">As in <see cref="Attention"/>.</param>
    /// <param name="keys">As in <see cref="Attention"/>.</param>
    /// <param name="values">As in <see cref="Attention"/>.</param>
    /// <param name="layout">As in <see cref="Attention"/>.</param>
    /// <param name="headDim">D.</param>
    public abstract void AttentionBackward(
        Tensor dQuery, Tensor dKeys, Tensor dValues, Tensor scratch, Tensor dOutput, Tensor output, Tensor logSumExp,
        Tensor query, Tensor keys, Tensor values, TokenLayout layout, int headDim);

    /// <summary>The columns of the scratch that <see cref="AttentionBackward"/> needs: at least one for each query head, for the row sums of dOutput · output.</summary>
    /// <param name="heads">Hq.</param>
    /// <param name="headDim">D.</param>
    public abstract int AttentionScratchColumns(int heads, int headDim);

    /// <summary>
    /// Takes room for the keys, or the values, of a cache: (blocks, elements), a row for each block of
    /// <see cref="TokenLayout.KeyBlock"/> positions, in the order in which the device's attention reads them.
    /// </summary>
    /// <param name="arena">Its owner.</param>
    /// <param name="blocks">Number of blocks.</param>
    /// <param name="keyHeads">Hkv.</param>
    /// <param name="headDim">D.</param>
    /// <param name="type">What keys and values are rounded to, of those that the device offers: F32, F16, BF16; or Q8_0, whole multiples of the largest of 32 channels / 127.</param>
    /// <exception cref="DeviceException">The device does not offer the type.</exception>
    public abstract Tensor TakeCache(Arena arena, int blocks, int keyHeads, int headDim, DType type);

    /// <summary>Copies the batch's keys and values to the cache at their positions. keys and values (N, Hkv · D).</summary>
    public abstract void AppendToCache(
        Tensor cacheKeys, Tensor cacheValues, Tensor keys, Tensor values, TokenLayout layout, int headDim);

    /// <summary>output = silu(gate) · up. output (N, H), gateUp (N, 2H): gate in the first half, up in the second.</summary>
    public abstract void SwiGlu(Tensor output, Tensor gateUp);

    /// <summary>Writes dGateUp (N, 2H). dOutput (N, H).</summary>
    public abstract void SwiGluBackward(Tensor dGateUp, Tensor dOutput, Tensor gateUp);

    /// <summary>
    /// Writes the cross-entropy of each row in nats; with <paramref name="scale"/> also overwrites the logits with their
    /// gradient times it.
    /// </summary>
    /// <param name="losses">(N, 1) of F32; 0 where the target is negative, that is, ignored.</param>
    /// <param name="logits">(N, V) of F32 or of <see cref="ActivationType"/>.</param>
    /// <param name="targets">(N, 1) of I32.</param>
    /// <param name="scale">(1, 1) of F32, or empty to leave the logits as they are.</param>
    public abstract void CrossEntropy(Tensor losses, Tensor logits, Tensor targets, Tensor scale = default);

    /// <summary>
    /// Finds the largest logits of each row, of equal ones those in the first columns, and sums the weights of the others:
    /// <see cref="TopLogitsRow"/>. What is not a number counts as the largest. Only where there is a <see cref="TopLogitsCount"/>.
    /// </summary>
    /// <param name="top">(N, <see cref="TopLogitsRow.Width"/>) of F32.</param>
    /// <param name="logits">(N, V) of F32; V at most <see cref="TopLogitsRow.MostColumns"/>.</param>
    /// <param name="inverseTemperatures">(N, 1) of F32: what the logits of a row are multiplied by for the weights of the others.</param>
    /// <param name="count">The number of largest logits, 1 to V.</param>
    public virtual void TopLogits(Tensor top, Tensor logits, Tensor inverseTemperatures, int count) => throw new NotSupportedException();

    /// <summary>total = Σ of the squares of all values: the square of the global gradient norm.</summary>
    /// <param name="total">(1, 1) of F64.</param>
    /// <param name="partials">Scratch of F64, at least <see cref="SumOfSquaresPartials"/> elements.</param>
    /// <param name="values">Contiguous tensors of F32; fixed chunks of each, one tree over all chunks.</param>
    public abstract void SumOfSquares(Tensor total, Tensor partials, ReadOnlySpan<Tensor> values);

    /// <summary>
    /// One step of AdamW with clipping by global norm (Loshchilov and Hutter 2019), then gradient = 0. Changes nothing
    /// where the norm is not finite.
    /// </summary>
    /// <param name="values">The parameter; contiguous F32, as all tensors here.</param>
    /// <param name="first">First moment.</param>
    /// <param name="second">Second moment.</param>
    /// <param name="gradient">The gradient, unclipped.</param>
    /// <param name="step">(1, 3) of F32: learning rate, 1 - β₁ᵗ, 1 - β₂ᵗ.</param>
    /// <param name="sumOfSquares">(1, 1) of F64, from <see cref="SumOfSquares"/>.</param>
    /// <param name="settings">What stays the same in every step.</param>
    public abstract void AdamW(
        Tensor values, Tensor first, Tensor second, Tensor gradient, Tensor step, Tensor sumOfSquares, AdamWSettings settings);

    /// <summary>A multiple of the rows that any device packs together: where <see cref="WriteRows"/> may begin.</summary>
    public const int PackedRows = 64;

    /// <summary>Elements that <see cref="SumOfSquares"/> sums serially; part of the meaning of the result.</summary>
    public const int SumChunk = 65536;

    /// <summary>The number of partial sums that <see cref="SumOfSquares"/> needs for tensors of these counts.</summary>
    public static int SumOfSquaresPartials(ReadOnlySpan<Tensor> values)
    {
        long count = 0;
        foreach (Tensor tensor in values)
        {
            count += (tensor.Count + SumChunk - 1) / SumChunk;
        }

        return checked((int)count);
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        Dispose(disposing: true);
        GC.SuppressFinalize(this);
    }

    /// <summary>Gives back what the backend holds; its arenas are their owners' to dispose, before it.</summary>
    protected abstract void Dispose(bool disposing);
}

/// <summary>The constants of <see cref="Backend.AdamW"/>.</summary>
/// <param name="Beta1">Decay of the first moment.</param>
/// <param name="Beta2">Decay of the second moment.</param>
/// <param name="Epsilon">Added to the root of the second moment.</param>
/// <param name="WeightDecay">Decoupled: values shrink by learning rate · this.</param>
/// <param name="MaxNorm">Global norm to which gradients are clipped, by min(1, MaxNorm / (norm + 1e-6)); 0 for never.</param>
/// <param name="RateFactor">Multiple of the learning rate, for parameters that learn faster or slower than the others.</param>
public readonly record struct AdamWSettings(
    float Beta1, float Beta2, float Epsilon, float WeightDecay, float MaxNorm, float RateFactor = 1);
