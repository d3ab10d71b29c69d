using System.Runtime.InteropServices;

namespace TinyLlama.Compute.Cuda;

/// <summary>Products of matrices in BF16 by cuBLASLt, with sums in fp32.</summary>
/// <remarks>
/// cuBLASLt reads matrices column by column, so it sees each tensor transposed and is asked for resultᵀ. What a product
/// needs is made at the first one of its shape and kept. The algorithm is the one that cuBLASLt proposes first, which
/// follows from the library's version, the GPU and the shape: addresses are declared to be multiples of
/// <see cref="AddressAlignment"/> bytes and no more, whatever they are. So a run repeated gives the same bits, but a row
/// has not always the bits that it has in a product of another number of rows.
/// </remarks>
internal sealed unsafe class MatrixProducts : IDisposable
{
    /// <summary>What the address of every operand and result is a multiple of, in bytes: the widest load of a thread.</summary>
    public const int AddressAlignment = 16;

    /// <summary>The memory that algorithms may use: what those of Hopper want.</summary>
    public const int WorkspaceByteCount = 32 << 20;

    private readonly CudaDevice _device;
    private readonly nint _workspace;
    private readonly nint _handle;
    private readonly nint _preference;
    private readonly Dictionary<Product, Plan> _plans = [];

    /// <summary>Opens cuBLASLt on a device and takes its workspace.</summary>
    /// <param name="device">The device; dispose of this before it.</param>
    /// <exception cref="DeviceException">The memory is not there.</exception>
    public MatrixProducts(CudaDevice device)
    {
        _device = device;
        _workspace = device.Allocate("workspace of matrix products", WorkspaceByteCount);
        nint handle, preference;
        Check(CublasLt.cublasLtCreate(&handle), "cublasLtCreate");
        _handle = handle;
        Check(CublasLt.cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
        _preference = preference;
        Prefer<ulong>(CublasLt.PreferenceMaxWorkspace, WorkspaceByteCount);
        Prefer<uint>(CublasLt.PreferenceAlignmentA, AddressAlignment);
        Prefer<uint>(CublasLt.PreferenceAlignmentB, AddressAlignment);
        Prefer<uint>(CublasLt.PreferenceAlignmentC, AddressAlignment);
        Prefer<uint>(CublasLt.PreferenceAlignmentD, AddressAlignment);
    }

    /// <summary>output = or += input · matrixᵀ. output (N, O) of BF16 or F32, input (N, I), matrix (O, I).</summary>
    public void Forward(Tensor output, Tensor input, Tensor matrix, bool accumulate) =>
        Multiply(output, (matrix, CublasLt.Transposed), (input, CublasLt.AsIs), input.Columns, accumulate);

    /// <summary>dInput = or += dOutput · matrix. dInput (N, I) of BF16 or F32, dOutput (N, O), matrix (O, I).</summary>
    public void BackwardInput(Tensor dInput, Tensor dOutput, Tensor matrix, bool accumulate) =>
        Multiply(dInput, (matrix, CublasLt.AsIs), (dOutput, CublasLt.AsIs), dOutput.Columns, accumulate);

    /// <summary>dWeight += dOutputᵀ · input. dWeight (O, I) of F32 or BF16, dOutput (N, O), input (N, I).</summary>
    public void BackwardWeight(Tensor dWeight, Tensor dOutput, Tensor input) =>
        Multiply(dWeight, (input, CublasLt.AsIs), (dOutput, CublasLt.Transposed), input.Rows, accumulate: true);

    /// <inheritdoc/>
    public void Dispose()
    {
        foreach (Plan plan in _plans.Values)
        {
            plan.Dispose();
        }

        _ = CublasLt.cublasLtMatmulPreferenceDestroy(_preference);
        _ = CublasLt.cublasLtDestroy(_handle);
        _device.Free(_workspace);
    }

    // resultᵀ = op(left) · op(right), of matrices as cuBLASLt sees them.
    private void Multiply(
        Tensor result, (Tensor Tensor, int Operation) left, (Tensor Tensor, int Operation) right, int depth, bool accumulate)
    {
        _device.MakeCurrent();
        var product = new Product(
            result.Type, result.Columns, result.Rows, depth, left.Operation, right.Operation,
            left.Tensor.Stride, right.Tensor.Stride, result.Stride);
        if (!_plans.TryGetValue(product, out Plan? plan))
        {
            plan = new Plan(_handle, _preference, product, left.Tensor, right.Tensor, result);
            _plans.Add(product, plan);
        }

        float alpha = 1;
        float beta = accumulate ? 1 : 0;
        fixed (CublasLt.Algorithm* algorithm = &plan.Algorithm)
        {
            int status = CublasLt.cublasLtMatmul(
                _handle, plan.Descriptor, &alpha, left.Tensor.Address, plan.Left, right.Tensor.Address, plan.Right,
                &beta, result.Address, plan.Result, result.Address, plan.Result,
                algorithm, _workspace, WorkspaceByteCount, _device.Stream);
            if (status != 0)
            {
                Check(status, "cublasLtMatmul", product);
            }
        }
    }

    private static void Check(int status, string function, Product? product = null)
    {
        if (status != 0)
        {
            string name = Marshal.PtrToStringUTF8((nint)CublasLt.cublasLtGetStatusName(status)) ?? $"status {status}";
            throw new DeviceException(product is null ? $"{function}: {name}" : $"{function} of {product}: {name}");
        }
    }

    private void Prefer<T>(int attribute, T value)
        where T : unmanaged =>
        Check(CublasLt.cublasLtMatmulPreferenceSetAttribute(_preference, attribute, &value, (nuint)sizeof(T)), "cublasLtMatmulPreferenceSetAttribute");

    /// <summary>What a plan is for: resultᵀ (M, N) in columns, and the sums' length K.</summary>
    private readonly record struct Product(
        DType Type, int M, int N, int K, int OperationA, int OperationB, int StrideA, int StrideB, int Stride)
    {
        public override string ToString() => $"{M} x {N} x {K} to {Type}";
    }

    /// <summary>The descriptors of a product and its algorithm.</summary>
    private sealed class Plan : IDisposable
    {
        public readonly CublasLt.Algorithm Algorithm;

        public Plan(nint handle, nint preference, Product product, Tensor left, Tensor right, Tensor result)
        {
            nint descriptor;
            Check(CublasLt.cublasLtMatmulDescCreate(&descriptor, CublasLt.Compute32F, CublasLt.Real32F), "cublasLtMatmulDescCreate");
            Descriptor = descriptor;
            Operate(CublasLt.DescriptorTransposeA, product.OperationA);
            Operate(CublasLt.DescriptorTransposeB, product.OperationB);
            Left = Layout(left);
            Right = Layout(right);
            Result = Layout(result);

            CublasLt.Heuristic proposal;
            int count;
            int status = CublasLt.cublasLtMatmulAlgoGetHeuristic(
                handle, Descriptor, Left, Right, Result, Result, preference, 1, &proposal, &count);
            Check(status, "cublasLtMatmulAlgoGetHeuristic", product);
            if (count == 0 || proposal.State != 0)
            {
                throw new DeviceException($"cuBLASLt has no algorithm for a product of {product}");
            }

            Algorithm = proposal.Algorithm;
        }

        public nint Descriptor { get; }

        public nint Left { get; }

        public nint Right { get; }

        public nint Result { get; }

        public void Dispose()
        {
            _ = CublasLt.cublasLtMatrixLayoutDestroy(Left);
            _ = CublasLt.cublasLtMatrixLayoutDestroy(Right);
            _ = CublasLt.cublasLtMatrixLayoutDestroy(Result);
            _ = CublasLt.cublasLtMatmulDescDestroy(Descriptor);
        }

        // A tensor (rows, columns) in order of columns: (columns, rows), its stride the leading dimension.
        private static nint Layout(Tensor tensor)
        {
            nint layout;
            int type = tensor.Type == DType.BF16 ? CublasLt.Real16BF : CublasLt.Real32F;
            Check(CublasLt.cublasLtMatrixLayoutCreate(&layout, type, (ulong)tensor.Columns, (ulong)tensor.Rows, tensor.Stride), "cublasLtMatrixLayoutCreate");
            return layout;
        }

        private void Operate(int attribute, int operation) =>
            Check(CublasLt.cublasLtMatmulDescSetAttribute(Descriptor, attribute, &operation, sizeof(int)), "cublasLtMatmulDescSetAttribute");
    }
}
