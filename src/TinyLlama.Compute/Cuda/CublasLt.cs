using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using TinyLlama.Compute.Native;

namespace TinyLlama.Compute.Cuda;

/// <summary>cuBLASLt's functions. Those that return int return a cublasStatus_t: 0 is success.</summary>
internal static unsafe partial class CublasLt
{
    /// <summary>cudaDataType_t.</summary>
    public const int Real32F = 0, Real16BF = 14;

    /// <summary>cublasComputeType_t: sums in fp32.</summary>
    public const int Compute32F = 68;

    /// <summary>cublasOperation_t.</summary>
    public const int AsIs = 0, Transposed = 1;

    /// <summary>cublasLtMatmulDescAttributes_t; both of int.</summary>
    public const int DescriptorTransposeA = 3, DescriptorTransposeB = 4;

    /// <summary>cublasLtMatmulPreferenceAttributes_t: a ulong of bytes.</summary>
    public const int PreferenceMaxWorkspace = 1;

    /// <summary>cublasLtMatmulPreferenceAttributes_t: what the addresses are a multiple of, uints of bytes.</summary>
    public const int PreferenceAlignmentA = 5, PreferenceAlignmentB = 6, PreferenceAlignmentC = 7, PreferenceAlignmentD = 8;

    private const string Library = SystemLibraries.CublasLt;

    static CublasLt() => SystemLibraries.Resolve();

    [LibraryImport(Library)]
    public static partial nuint cublasLtGetVersion();

    [LibraryImport(Library)]
    public static partial byte* cublasLtGetStatusName(int status);

    [LibraryImport(Library)]
    public static partial int cublasLtCreate(nint* handle);

    [LibraryImport(Library)]
    public static partial int cublasLtDestroy(nint handle);

    [LibraryImport(Library)]
    public static partial int cublasLtMatmulDescCreate(nint* descriptor, int computeType, int scaleType);

    [LibraryImport(Library)]
    public static partial int cublasLtMatmulDescSetAttribute(nint descriptor, int attribute, void* value, nuint byteCount);

    [LibraryImport(Library)]
    public static partial int cublasLtMatmulDescDestroy(nint descriptor);

    /// <summary>A matrix in order of columns: element (i, j) lies at i + j · <paramref name="leadingDimension"/>.</summary>
    [LibraryImport(Library)]
    public static partial int cublasLtMatrixLayoutCreate(nint* layout, int type, ulong rows, ulong columns, long leadingDimension);

    [LibraryImport(Library)]
    public static partial int cublasLtMatrixLayoutDestroy(nint layout);

    [LibraryImport(Library)]
    public static partial int cublasLtMatmulPreferenceCreate(nint* preference);

    [LibraryImport(Library)]
    public static partial int cublasLtMatmulPreferenceSetAttribute(nint preference, int attribute, void* value, nuint byteCount);

    [LibraryImport(Library)]
    public static partial int cublasLtMatmulPreferenceDestroy(nint preference);

    /// <summary>The algorithms for a product, the likely fastest first; status 15 where there is none.</summary>
    [LibraryImport(Library)]
    public static partial int cublasLtMatmulAlgoGetHeuristic(
        nint handle, nint descriptor, nint a, nint b, nint c, nint d, nint preference, int requested, Heuristic* results, int* returned);

    /// <summary>D = α · op(A) · op(B) + β · C; α and β are host floats, C may be D.</summary>
    [LibraryImport(Library)]
    public static partial int cublasLtMatmul(
        nint handle, nint descriptor, float* alpha, nint a, nint layoutA, nint b, nint layoutB, float* beta, nint c, nint layoutC,
        nint d, nint layoutD, Algorithm* algorithm, nint workspace, nuint workspaceByteCount, nint stream);

    /// <summary>cublasLtMatmulAlgo_t: 64 bytes that say how a product is computed; of a kind of product, not of its addresses.</summary>
    [InlineArray(8)]
    public struct Algorithm
    {
        private ulong _data;
    }

    /// <summary>cublasLtMatmulHeuristicResult_t.</summary>
    [StructLayout(LayoutKind.Sequential)]
    public struct Heuristic
    {
        public Algorithm Algorithm;
        public nuint WorkspaceByteCount;
        public int State;
        public float WavesCount;
        public Reserved Reserved;
    }

    /// <summary>int[4] that later versions may use.</summary>
    [InlineArray(4)]
    public struct Reserved
    {
        private int _data;
    }
}
