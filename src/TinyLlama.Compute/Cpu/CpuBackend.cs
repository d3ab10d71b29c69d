namespace TinyLlama.Compute.Cpu;

/// <summary>The kernels of products with a weight.</summary>
internal enum ProductKernel
{
    /// <summary><see cref="MatMul"/> of packed floats.</summary>
    Packed,

    /// <summary><see cref="MatMul"/> of pairs of 16-bit floats.</summary>
    Pairs,

    /// <summary>The same of bfloat16, by the tile of panels that may be compact: <see cref="CompactTile"/>.</summary>
    Compact,

    /// <summary>The same of one row of half precision, by the code of <see cref="HalfTile"/>.</summary>
    Halves,

    /// <summary><see cref="QuantizedMatMul"/>.</summary>
    Quantized,

    /// <summary><see cref="Q8MatMul"/>.</summary>
    Q8,

    /// <summary><see cref="QuantizedMatMul"/> by the code of <see cref="VnniBytes"/>.</summary>
    Vnni,

    /// <summary><see cref="TiledMatMul"/>.</summary>
    Tiles,
}

/// <summary>The CPU: checks the shapes of each operation once, then runs its kernel at the width chosen at start.</summary>
public abstract class CpuBackend : Backend
{
    private protected CpuBackend(CpuPath path, int threads, DType products, CpuPath emitted)
    {
        (Path, Products, Emitted, Scratch, Team) = (path, products, emitted, new Scratch(threads), new ThreadTeam(threads));
    }

    /// <summary>Gets the width of the kernels.</summary>
    public CpuPath Path { get; }

    /// <summary>Gets the type that operands of matrix products are rounded to: F32 or BF16. Sums are fp32.</summary>
    public DType Products { get; }

    /// <summary>Gets the number of threads.</summary>
    public int Threads => Team.Threads;

    /// <inheritdoc/>
    public override string Description => $"cpu, {Kernels}, {Threads} threads";

    /// <inheritdoc/>
    public override string Arithmetic => $"cpu {Kernels}";

    /// <inheritdoc/>
    public override DType ActivationType => DType.F32;

    /// <inheritdoc/>
    public override DType CacheType => DType.F16;

    /// <inheritdoc/>
    public override bool HasBackwardForm => true;

    /// <inheritdoc/>
    /// <remarks>16 MiB: they stay in the cache between the head and its backward.</remarks>
    public override int LogitsBytes => 16 << 20;

    /// <inheritdoc/>
    public override long AvailableBytes => GC.GetGCMemoryInfo().TotalAvailableMemoryBytes;

    private string Kernels => Products == DType.F32 ? $"{Path}" : $"{Path} with products in bf16";

    internal ThreadTeam Team { get; }

    /// <summary>Gets the path whose emitted code multiplies by quantized weights, where it has any that can be used.</summary>
    private protected CpuPath Emitted { get; }

    private protected Scratch Scratch { get; }

    /// <summary>A backend for this machine.</summary>
    /// <param name="threads">Threads to use; 0 for one a core.</param>
    /// <param name="path">The width of the kernels; by default what <see cref="CpuPaths.Choose"/> says.</param>
    /// <param name="products">The type that operands of matrix products are rounded to: F32 or BF16.</param>
    /// <remarks>
    /// <see cref="CpuPath.Vector512Amx"/> and <see cref="CpuPath.Vector512Bf16"/> differ from <see cref="CpuPath.Vector512"/> in products
    /// of BF16 alone; where their code is not asked for or cannot be used (<see cref="CpuPaths.Bf16Fault"/>), the backend is and says Vector512.
    /// <see cref="CpuPath.Vector512Vnni"/> multiplies rows by quantized weights, and one row by half precision, with code of its own, which
    /// changes no bit; so do both, that of AMX many rows by its tiles. Its backend, too, says Vector512.
    /// </remarks>
    /// <exception cref="DeviceException">The environment names a path that does not exist.</exception>
    public static CpuBackend Create(int threads = 0, CpuPath? path = null, DType products = DType.F32)
    {
        Shape.Require(products is DType.F32 or DType.BF16, "products in F32 or BF16");
        threads = threads > 0 ? threads : Environment.ProcessorCount;
        bool bf16 = products == DType.BF16;
        CpuPath chosen = path ?? CpuPaths.Choose();
        return chosen switch
        {
            CpuPath.Vector512Amx when bf16 && CpuPaths.Bf16FaultOf(chosen) is null => new CpuBackend<Lanes512, AmxTile>(chosen, threads, chosen),
            CpuPath.Vector512Bf16 when bf16 && CpuPaths.Bf16FaultOf(chosen) is null => new CpuBackend<Lanes512, Avx512Bf16Tile>(chosen, threads, chosen),
            CpuPath.Vector512Amx or CpuPath.Vector512Bf16 or CpuPath.Vector512Vnni or CpuPath.Vector512 => On<Lanes512>(CpuPath.Vector512),
            CpuPath.Vector256 => On<Lanes256>(CpuPath.Vector256),
            CpuPath.Vector128 => On<Lanes128>(CpuPath.Vector128),
            CpuPath.Scalar => On<Lanes1>(CpuPath.Scalar),
            _ => throw new ArgumentOutOfRangeException(nameof(path), path, "no such path"),
        };

        CpuBackend On<V>(CpuPath width)
            where V : struct, ILanes<V> =>
            bf16 ? new CpuBackend<V, Bf16Tile<V>>(width, threads, chosen) : new CpuBackend<V, Tile<V>>(width, threads, chosen);
    }

    /// <inheritdoc/>
    public override void RequireModel(int channels, int hidden, int headDim)
    {
        // Any.
    }

    /// <inheritdoc/>
    public override Arena Allocate(string name, long byteCount) => Arena.OnHost(name, byteCount);

    /// <inheritdoc/>
    public override void Write<T>(Tensor destination, ReadOnlySpan<T> source)
    {
        Shape.Require(destination.Count == source.Length, "as many elements as the tensor has");
        source.CopyTo(destination.HostSpan<T>());
    }

    /// <inheritdoc/>
    public override void Read<T>(Span<T> destination, Tensor source)
    {
        Shape.Require(source.Count == destination.Length, "as many elements as the tensor has");
        source.HostSpan<T>().CopyTo(destination);
    }

    /// <summary>The kernel that multiplies rows by a weight. What is emitted when first asked for is asked for last.</summary>
    /// <param name="type">The weight's type.</param>
    /// <param name="inputs">The weight's inputs.</param>
    /// <param name="rows">The number of rows.</param>
    /// <param name="inPlace">Whether the weight is read where a file has it.</param>
    internal ProductKernel KernelOf(DType type, int inputs, int rows, bool inPlace)
    {
        if (!type.IsQuantized())
        {
            return !ArePairs(type, inputs) ? ProductKernel.Packed
                : MayBeCompact(type) ? ProductKernel.Compact
                : type == DType.F16 && rows == 1 && Emitted <= CpuPath.Vector512Vnni && HalfTile.Fault is null ? ProductKernel.Halves
                : ProductKernel.Pairs;
        }

        bool isRows = type == DType.Q8_0 && inPlace;
        bool tiles = Emitted == CpuPath.Vector512Amx && rows >= TiledMatMul.LeastRows && AmxBytes.Fault is null;
        bool areMany = tiles && rows >= TiledMatMul.LeastRowsBesideVnni;
        return Emitted <= CpuPath.Vector512Vnni && !isRows && !areMany && VnniBytes.Of(type) != 0 ? ProductKernel.Vnni
            : tiles ? ProductKernel.Tiles
            : type == DType.Q8_0 ? ProductKernel.Q8
            : ProductKernel.Quantized;
    }

    // Whether rows of so many are kept as pairs of 16 bits.
    private protected static bool ArePairs(DType type, int inputs) => (type is DType.BF16 or DType.F16) && int.IsEvenInteger(inputs);

    // Whether panels of pairs of such numbers may be compact.
    private protected bool MayBeCompact(DType type) => type == DType.BF16 && Path <= CpuPath.Vector512;

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (disposing)
        {
            Team.Dispose();
            Scratch.Dispose();
        }
    }
}

/// <summary>The kernels, specialized to one register width.</summary>
/// <typeparam name="V">The register.</typeparam>
/// <typeparam name="T">The tile of matrix products.</typeparam>
internal sealed unsafe class CpuBackend<V, T>(CpuPath path, int threads, CpuPath emitted = CpuPath.Scalar) : CpuBackend(path, threads, T.Type, emitted)
    where V : struct, ILanes<V>
    where T : struct, IPackingTile
{
    /// <inheritdoc/>
    public override Tensor TakePacked(Arena arena, int outputs, int inputs, DType type) =>
        type.IsQuantized() ? WeightPanels.Take(arena, outputs, inputs, type, V.Count)
        : ArePairs(type, inputs) ? Cpu.MatMul.TakePairs<V>(arena, outputs, inputs)
        : Cpu.MatMul.TakePacked<T>(arena, outputs, inputs);

    /// <inheritdoc/>
    public override bool ReadsInPlace(DType type, int inputs, StoredRows rows) =>
        type == DType.Q8_0 ? Q8MatMul.Reads<V>(rows)
        : type.IsQuantized() ? QuantizedMatMul.Reads<V>(type, inputs, rows)
        : ArePairs(type, inputs) && Cpu.MatMul.ReadsPairs<V>(rows);

    /// <inheritdoc/>
    public override bool ReadsTable(DType type) => type == DType.Q8_0 || !type.IsQuantized();

    /// <inheritdoc/>
    public override void WriteRows(Weight weight, int firstRow, ReadOnlySpan<byte> rows)
    {
        Shape.Require(weight.Values.IsEmpty && firstRow % PackedRows == 0, "a frozen weight and a first row that packs begin with");
        if (weight.Type == DType.Q8_0)
        {
            Q8MatMul.Write(weight, firstRow, rows);
        }
        else if (weight.Type.IsQuantized())
        {
            WeightPanels.Write<V>(Team, weight.PackedForward, firstRow, rows);
        }
        else if (ArePairs(weight.Type, weight.Inputs))
        {
            if (MayBeCompact(weight.Type))
            {
                Cpu.MatMul.PackPairs<Lanes512, CompactTile>(Team, Scratch, weight, firstRow, rows);
            }
            else
            {
                Cpu.MatMul.PackPairs<V, PairTile<V, Float16Pairs<V>>>(Team, Scratch, weight, firstRow, rows);
            }
        }
        else
        {
            Cpu.MatMul.PackRows<T>(Team, weight, firstRow, rows);
        }
    }

    /// <inheritdoc/>
    public override void Pack(Weight weight)
    {
        if (weight.AwaitsPacking)
        {
            if (weight.Type.IsQuantized())
            {
                WeightPanels.Pack<V>(Team, weight);
            }
            else if (MayBeCompact(weight.Type))
            {
                Cpu.MatMul.PackPairs<Lanes512, CompactTile>(Team, Scratch, weight);
            }
            else
            {
                Cpu.MatMul.PackPairs<V, PairTile<V, Float16Pairs<V>>>(Team, Scratch, weight);
            }

            weight.LeaveRows();
            return;
        }

        RequireF32(weight.Values, weight.Values, weight.Values);
        Cpu.MatMul.Pack<T>(Team, weight);
    }

    /// <inheritdoc/>
    public override void MatMul(Tensor output, Tensor input, Weight weight, bool accumulate = false)
    {
        Shape.Require(
            output.Rows == input.Rows && output.Columns == weight.Outputs && input.Columns == weight.Inputs,
            "output (N, O), input (N, I) and weight (O, I)");
        RequireF32(output, input, output);
        switch (KernelOf(weight.Type, weight.Inputs, input.Rows, weight.Rows.Length > 0))
        {
            case ProductKernel.Tiles:
                TiledMatMul.Forward(Team, Scratch, output, input, weight, accumulate);
                break;
            case ProductKernel.Vnni:
                QuantizedMatMul.Forward<Lanes512>(Team, Scratch, output, input, weight, accumulate, VnniBytes.Of(weight.Type));
                break;
            case ProductKernel.Q8:
                Q8MatMul.Forward<V>(Team, Scratch, output, input, weight, accumulate);
                break;
            case ProductKernel.Quantized:
                QuantizedMatMul.Forward<V>(Team, Scratch, output, input, weight, accumulate);
                break;
            case ProductKernel.Compact:
                Cpu.MatMul.ForwardPairs<Lanes512, CompactTile>(Team, Scratch, output, input, weight, accumulate);
                break;
            case ProductKernel.Pairs when weight.Type == DType.BF16:
                Cpu.MatMul.ForwardPairs<V, PairTile<V, BFloat16Pairs<V>>>(Team, Scratch, output, input, weight, accumulate);
                break;
            case ProductKernel.Halves:
                Cpu.MatMul.ForwardPairs<Lanes512, HalfTile>(Team, Scratch, output, input, weight, accumulate);
                break;
            case ProductKernel.Pairs:
                Cpu.MatMul.ForwardPairs<V, PairTile<V, Float16Pairs<V>>>(Team, Scratch, output, input, weight, accumulate);
                break;
            default:
                Cpu.MatMul.Forward<T>(Team, Scratch, output, input, weight, accumulate);
                break;
        }
    }

    /// <inheritdoc/>
    public override void MatMulBackwardInput(Tensor dInput, Tensor dOutput, Weight weight, bool accumulate = false)
    {
        Shape.Require(
            dInput.Rows == dOutput.Rows && dInput.Columns == weight.Inputs && dOutput.Columns == weight.Outputs && !weight.Values.IsEmpty,
            "dInput (N, I), dOutput (N, O) and a weight (O, I) that is not frozen");
        RequireF32(dInput, dOutput, weight.Values);
        Cpu.MatMul.BackwardInput<T>(Team, Scratch, dInput, dOutput, weight, accumulate);
    }

    /// <inheritdoc/>
    public override void MatMulBackwardWeight(Tensor dWeight, Tensor dOutput, Tensor input)
    {
        Shape.Require(
            dWeight.Rows == dOutput.Columns && dWeight.Columns == input.Columns && dOutput.Rows == input.Rows,
            "dWeight (O, I), dOutput (N, O) and input (N, I)");
        RequireF32(dWeight, dOutput, input);
        Cpu.MatMul.BackwardWeight<T>(Team, Scratch, dWeight, dOutput, input);
    }

    /// <inheritdoc/>
    public override void Zero(Tensor destination) =>
        Cpu.Copy.Zero(Team, destination);

    /// <inheritdoc/>
    public override void Add(Tensor destination, Tensor addend) => TreeSum.Add(Team, destination, addend);

    /// <inheritdoc/>
    public override void Copy(Tensor destination, Tensor source) =>
        Cpu.Copy.Convert(Team, destination, source);

    /// <inheritdoc/>
    public override void GatherRows(Tensor destination, Tensor source, Tensor rows) =>
        Cpu.Embedding.Gather(Team, destination, source, rows);

    /// <inheritdoc/>
    public override void Sum(Tensor total, Tensor values) =>
        Reductions.Sum(total, values);

    /// <inheritdoc/>
    public override void Embedding(Tensor output, Tensor table, Tensor tokens) =>
        Cpu.Embedding.Widen(Team, output, table, tokens, V.Count);

    /// <inheritdoc/>
    public override void EmbeddingBackward(Tensor dTable, Tensor dOutput, Tensor tokens) =>
        Cpu.Embedding.Scatter<V>(Team, dTable, dOutput, tokens);

    /// <inheritdoc/>
    public override void RmsNorm(Tensor output, Tensor r, Tensor input, Tensor weight, float epsilon) =>
        Cpu.RmsNorm.Forward<V>(Team, output, r, input, weight, epsilon);

    /// <inheritdoc/>
    public override void AddRmsNorm(Tensor sum, Tensor output, Tensor r, Tensor input, Tensor branch, Tensor weight, float epsilon) =>
        Cpu.RmsNorm.AddForward<V>(Team, sum, output, r, input, branch, weight, epsilon);

    /// <inheritdoc/>
    public override void RmsNormBackward(Tensor dInput, Tensor dWeight, Tensor dOutput, Tensor input, Tensor weight, Tensor r) =>
        Cpu.RmsNorm.Backward<V>(Team, Scratch.Shared, dInput, dWeight, dOutput, input, weight, r);

    /// <inheritdoc/>
    public override void Rope(Tensor heads, Tensor positions, Tensor table, bool inverse = false) =>
        Cpu.Rope.Rotate<V>(Team, heads, positions, table, inverse);

    /// <inheritdoc/>
    public override void Attention(
        Tensor output, Tensor logSumExp, Tensor query, Tensor keys, Tensor values, TokenLayout layout, int headDim)
    {
        // A cache holds panels of floats.
        if (T.InAttention && layout.BlockTable.IsEmpty)
        {
            Cpu.Attention.Forward<V, T>(Team, Scratch, output, logSumExp, query, keys, values, layout, headDim);
        }
        else
        {
            Cpu.Attention.Forward<V, Tile<V>>(Team, Scratch, output, logSumExp, query, keys, values, layout, headDim);
        }
    }

    /// <inheritdoc/>
    public override void AttentionBackward(
        Tensor dQuery, Tensor dKeys, Tensor dValues, Tensor scratch, Tensor dOutput, Tensor output, Tensor logSumExp,
        Tensor query, Tensor keys, Tensor values, TokenLayout layout, int headDim)
    {
        if (T.InAttention)
        {
            Cpu.Attention.Backward<V, T>(
                Team, Scratch, dQuery, dKeys, dValues, scratch, dOutput, output, logSumExp, query, keys, values, layout, headDim);
        }
        else
        {
            Cpu.Attention.Backward<V, Tile<V>>(
                Team, Scratch, dQuery, dKeys, dValues, scratch, dOutput, output, logSumExp, query, keys, values, layout, headDim);
        }
    }

    /// <inheritdoc/>
    public override int AttentionScratchColumns(int heads, int headDim) => heads;

    /// <inheritdoc/>
    public override Tensor TakeCache(Arena arena, int blocks, int keyHeads, int headDim, DType type) =>
        KeyValueCache.Take(arena, blocks, keyHeads, headDim, type);

    /// <inheritdoc/>
    public override void AppendToCache(
        Tensor cacheKeys, Tensor cacheValues, Tensor keys, Tensor values, TokenLayout layout, int headDim) =>
        KeyValueCache.Append<V>(Team, cacheKeys, cacheValues, keys, values, layout, headDim);

    /// <inheritdoc/>
    public override void SwiGlu(Tensor output, Tensor gateUp) =>
        Cpu.SwiGlu.Forward<V>(Team, output, gateUp);

    /// <inheritdoc/>
    public override void SwiGluBackward(Tensor dGateUp, Tensor dOutput, Tensor gateUp) =>
        Cpu.SwiGlu.Backward<V>(Team, dGateUp, dOutput, gateUp);

    /// <inheritdoc/>
    public override void CrossEntropy(Tensor losses, Tensor logits, Tensor targets, Tensor scale = default) =>
        Cpu.CrossEntropy.Forward<V>(Team, losses, logits, targets, scale);

    /// <inheritdoc/>
    public override void SumOfSquares(Tensor total, Tensor partials, ReadOnlySpan<Tensor> values) =>
        Reductions.SumOfSquares<V>(Team, total, partials, values);

    /// <inheritdoc/>
    public override void AdamW(
        Tensor values, Tensor first, Tensor second, Tensor gradient, Tensor step, Tensor sumOfSquares, AdamWSettings settings) =>
        Cpu.AdamW.Step<V>(Team, values, first, second, gradient, step, sumOfSquares, settings);

    private static void RequireF32(Tensor first, Tensor second, Tensor third) =>
        Shape.Require((first.Type, second.Type, third.Type) == (DType.F32, DType.F32, DType.F32), "tensors of F32");
}
