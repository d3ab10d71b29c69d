using System.Diagnostics;
using System.Globalization;
using System.Reflection;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using TinyLlama.Compute.Cuda;
using TinyLlama.Compute.Native;

namespace TinyLlama.Compute.Tests.Cuda;

/// <summary>What is declared of NVIDIA's libraries beside their headers and what they export.</summary>
public sealed class HeaderTests : CudaTests
{
    // Every constant that is declared, under the headers' names.
    private static readonly (string Name, long Value)[] s_constants =
    [
        ("CUDA_ERROR_OUT_OF_MEMORY", CudaDriver.OutOfMemory),
        ("CUDA_ERROR_NOT_FOUND", CudaDriver.NotFound),
        ("CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT", CudaDriver.Multiprocessors),
        ("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR", CudaDriver.CapabilityMajor),
        ("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR", CudaDriver.CapabilityMinor),
        ("CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN", CudaDriver.SharedBytesOptIn),
        ("CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES", CudaDriver.FunctionSharedBytes),
        ("CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES", KernelTests.LocalBytes),
        ("CU_FUNC_ATTRIBUTE_NUM_REGS", KernelTests.Registers),
        ("CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES", CudaDriver.FunctionDynamicSharedBytes),
        ("CU_STREAM_NON_BLOCKING", CudaDriver.NonBlocking),
        ("CU_EVENT_DISABLE_TIMING", CudaDriver.EventWithoutTime),
        ("CU_STREAM_CAPTURE_MODE_THREAD_LOCAL", CudaDriver.CaptureThreadLocal),
        ("CU_MEMORYTYPE_DEVICE", CudaDriver.Copy2D.Device),
        ("CUDA_R_32F", CublasLt.Real32F),
        ("CUDA_R_16BF", CublasLt.Real16BF),
        ("CUBLAS_COMPUTE_32F", CublasLt.Compute32F),
        ("CUBLAS_OP_N", CublasLt.AsIs),
        ("CUBLAS_OP_T", CublasLt.Transposed),
        ("CUBLASLT_MATMUL_DESC_TRANSA", CublasLt.DescriptorTransposeA),
        ("CUBLASLT_MATMUL_DESC_TRANSB", CublasLt.DescriptorTransposeB),
        ("CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES", CublasLt.PreferenceMaxWorkspace),
        ("CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES", CublasLt.PreferenceAlignmentA),
        ("CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES", CublasLt.PreferenceAlignmentB),
        ("CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES", CublasLt.PreferenceAlignmentC),
        ("CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES", CublasLt.PreferenceAlignmentD),
    ];

    // Every structure that is declared, its fields in their order, under the headers' names.
    private static readonly (string Name, Type Type, string[] Fields)[] s_structures =
    [
        ("CUDA_MEMCPY2D", typeof(CudaDriver.Copy2D),
        [
            "srcXInBytes", "srcY", "srcMemoryType", "srcHost", "srcDevice", "srcArray", "srcPitch",
            "dstXInBytes", "dstY", "dstMemoryType", "dstHost", "dstDevice", "dstArray", "dstPitch", "WidthInBytes", "Height",
        ]),
        ("cublasLtMatmulAlgo_t", typeof(CublasLt.Algorithm), ["data"]),
        ("cublasLtMatmulHeuristicResult_t", typeof(CublasLt.Heuristic), ["algo", "workspaceSize", "state", "wavesCount", "reserved"]),
    ];

    private static readonly (Type Type, string Library)[] s_bindings =
    [
        (typeof(CudaDriver), SystemLibraries.CudaDriver), (typeof(Nvrtc), SystemLibraries.Nvrtc), (typeof(CublasLt), SystemLibraries.CublasLt),
    ];

    [Fact]
    public void Constants_and_structures_are_those_of_the_headers()
    {
        string? folder = Folders().FirstOrDefault(folder => File.Exists(Path.Combine(folder, "cuda.h")) && File.Exists(Path.Combine(folder, "cublasLt.h")));
        Assert.SkipWhen(folder is null, "needs cuda.h and cublasLt.h in one folder: a CUDA toolkit");
        Assert.SkipUnless(File.Exists("/usr/bin/gcc"), "needs gcc");
        string source = string.Join('\n', (string[])["#include <stddef.h>", "#include <cuda.h>", "#include <cublasLt.h>", .. Assertions()]);

        ProcessStartInfo start = new("/usr/bin/gcc", ["-fsyntax-only", "-xc", "-std=c11", "-I" + folder, "-"])
        {
            UseShellExecute = false,
            RedirectStandardInput = true,
            RedirectStandardError = true,
        };
        using Process process = Process.Start(start)!;
        process.StandardInput.Write(source);
        process.StandardInput.Close();
        string errors = process.StandardError.ReadToEnd();
        process.WaitForExit();
        Assert.True(process.ExitCode == 0, errors);
    }

    [Fact]
    public void Nothing_that_is_declared_escapes_the_headers_check()
    {
        int constants = s_bindings.Select(binding => binding.Type).Append(typeof(CudaDriver.Copy2D))
            .Sum(type => type.GetFields(BindingFlags.Public | BindingFlags.Static).Count(field => field.IsLiteral));
        Assert.Equal(constants + 2, s_constants.Length);
        Assert.Equal(
            s_bindings.SelectMany(binding => binding.Type.GetNestedTypes()).Where(type => type != typeof(CublasLt.Reserved)).Order(ByName),
            s_structures.Select(structure => structure.Type).Order(ByName));
    }

    [Fact]
    public void Every_function_that_is_declared_is_exported()
    {
        foreach ((Type type, string library) in s_bindings)
        {
            foreach (MethodInfo method in type.GetMethods(BindingFlags.Public | BindingFlags.Static))
            {
                Assert.True(NativeLibrary.TryGetExport(CudaLibraries.Found.Handle(library), method.Name, out _), $"{library} has no {method.Name}");
            }
        }
    }

    private static Comparer<Type> ByName => Comparer<Type>.Create((left, right) => string.CompareOrdinal(left.FullName, right.FullName));

    private static IEnumerable<string> Assertions()
    {
        foreach ((string name, long value) in s_constants)
        {
            yield return Assertion(name, value);
        }

        foreach ((string name, Type type, string[] fields) in s_structures)
        {
            yield return Assertion($"sizeof({name})", Size(type));
            FieldInfo[] declared = type.GetFields(BindingFlags.Public | BindingFlags.NonPublic | BindingFlags.Instance);
            foreach ((string field, FieldInfo own) in fields.Zip(declared))
            {
                yield return Assertion($"offsetof({name}, {field})", (long)Marshal.OffsetOf(type, own.Name));
            }
        }
    }

    private static string Assertion(string expression, long value) =>
        string.Create(CultureInfo.InvariantCulture, $"_Static_assert({expression} == {value}, \"{expression} is not {value}\");");

    private static int Size(Type type) =>
        (int)typeof(Unsafe).GetMethod(nameof(Unsafe.SizeOf))!.MakeGenericMethod(type).Invoke(null, null)!;

    // Where a toolkit or the wheels of an active Python environment have their headers.
    private static string[] Folders()
    {
        List<string> folders = ["/usr/local/cuda/include", "/usr/include"];
        if (Environment.GetEnvironmentVariable("VIRTUAL_ENV") is { Length: > 0 } environment && Directory.Exists(environment))
        {
            folders.AddRange(Directory.EnumerateDirectories(Path.Combine(environment, "lib"), "python*")
                .Select(python => Path.Combine(python, "site-packages", "nvidia", "cu13", "include")));
        }

        return [.. folders];
    }
}
