using System.Diagnostics;
using System.Runtime.InteropServices;
using TinyLlama.Compute.Cuda;

namespace TinyLlama.Tests.Common;

/// <summary>
/// The library that stands for a GPU: tests/CudaEmulator. With <c>TINYLLAMA_TEST_DEVICE=cuda</c> none does, and tests run on
/// the GPU of this machine.
/// </summary>
internal static class CudaEmulator
{
    private static readonly Lazy<string?> s_fault = new(Install);

    /// <summary>Builds it and makes the product's CUDA libraries be it, once a process; skips the test where it cannot be built.</summary>
    public static void Require() => Assert.SkipWhen(s_fault.Value is not null, s_fault.Value ?? "");

    /// <summary>Skips a test of what the emulator alone can be told, such as to fail.</summary>
    public static void RequireEmulated()
    {
        Require();
        Assert.SkipWhen(IsReal, "only the emulator can be told what this test needs");
    }

    private static bool IsReal => Environment.GetEnvironmentVariable("TINYLLAMA_TEST_DEVICE") == "cuda";

    private static string? Install()
    {
        if (IsReal)
        {
            return null;
        }

        if (!OperatingSystem.IsLinux() || RuntimeInformation.ProcessArchitecture != Architecture.X64)
        {
            return "the CUDA emulator runs on Linux for x64 alone";
        }

        if (!Programs.Exists("g++"))
        {
            return "the CUDA emulator needs g++";
        }

        ProcessStartInfo start = new("bash", [Path.Combine(Checkout.Root, "tests", "CudaEmulator", "build.sh"), "plain"])
        {
            UseShellExecute = false,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        };
        using Process process = Process.Start(start)!;
        Task<string> errors = process.StandardError.ReadToEndAsync();
        string folder = process.StandardOutput.ReadToEnd().Trim();
        process.WaitForExit();
        if (process.ExitCode != 0)
        {
            throw new InvalidOperationException($"the CUDA emulator could not be built:\n{errors.Result}");
        }

        string library = Path.Combine(folder, "libcuda-emulator.so");
        foreach (string variable in (string[])["TINYLLAMA_CUDA_DRIVER", "TINYLLAMA_NVRTC", "TINYLLAMA_CUBLASLT", "TINYLLAMA_NCCL"])
        {
            Environment.SetEnvironmentVariable(variable, library);
        }

        if (!Gpu.Libraries.Any(found => found.EndsWith(library, StringComparison.Ordinal)))
        {
            throw new InvalidOperationException(
                "a test looked for GPUs before CudaEmulator.Require, and a process looks for NVIDIA's libraries once: require it first there, or start a process for that test");
        }

        // Where the product keeps compiled kernels.
        Environment.SetEnvironmentVariable("XDG_CACHE_HOME", Path.Combine(folder, "cache"));
        return null;
    }
}
