using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Text;
using TinyLlama.Tests.Common;

namespace TinyLlama.Tests.Checkpoints;

/// <summary>llama.cpp's quantizer, in the library that node-llama-cpp brings along.</summary>
internal sealed unsafe class LlamaCppLibrary
{
    private readonly nint _base;
    private readonly nint _ggml;
    private readonly nint _llama;

    private LlamaCppLibrary(string folder)
    {
        _base = NativeLibrary.Load(Path.Combine(folder, "libggml-base.so"));
        _ggml = NativeLibrary.Load(Find(folder, "libggml.*.so"));
        _llama = NativeLibrary.Load(Find(folder, "libllama.*.so"));
        ((delegate* unmanaged<delegate* unmanaged<int, byte*, void*, void>, void*, void>)NativeLibrary.GetExport(_llama, "llama_log_set"))(&Ignore, null);
        fixed (byte* path = Encoding.UTF8.GetBytes(folder + "\0"))
        {
            ((delegate* unmanaged<byte*, void>)NativeLibrary.GetExport(_ggml, "ggml_backend_load_all_from_path"))(path);
        }
    }

    /// <summary>Loads it; skips the calling test where it is not there.</summary>
    public static LlamaCppLibrary Load()
    {
        NodePackages.Require("node-llama-cpp");
        Assert.SkipUnless(
            OperatingSystem.IsLinux() && RuntimeInformation.ProcessArchitecture == Architecture.X64, "needs llama.cpp for Linux on x64");
        return new LlamaCppLibrary(Path.Combine(NodePackages.Require("@node-llama-cpp/linux-x64"), "bins", "linux-x64"));
    }

    /// <summary>Quantizes a file.</summary>
    /// <param name="source">A GGUF file of F32.</param>
    /// <param name="destination">The file to write.</param>
    /// <param name="fileType">llama.cpp's number of the mix.</param>
    public void Quantize(string source, string destination, int fileType)
    {
        var defaults = (delegate* unmanaged<Parameters>)NativeLibrary.GetExport(_llama, "llama_model_quantize_default_params");
        var quantize = (delegate* unmanaged<byte*, byte*, Parameters*, uint>)NativeLibrary.GetExport(_llama, "llama_model_quantize");
        Parameters parameters = defaults();
        parameters.Threads = 1;
        parameters.FileType = fileType;
        fixed (byte* from = Encoding.UTF8.GetBytes(source + "\0"), to = Encoding.UTF8.GetBytes(destination + "\0"))
        {
            Assert.Equal(0u, quantize(from, to, &parameters));
        }
    }


    private static string Find(string folder, string pattern) => Directory.GetFiles(folder, pattern).Single();

    [UnmanagedCallersOnly]
    private static void Ignore(int level, byte* text, void* data)
    {
    }

    // The first two fields of llama_model_quantize_params, and room for the others, which keep their defaults.
    private struct Parameters
    {
        public int Threads;
        public int FileType;
        public Rest Others;
    }

    [InlineArray(256)]
    private struct Rest
    {
        private byte _first;
    }
}
