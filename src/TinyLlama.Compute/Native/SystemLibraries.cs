using System.Reflection;
using System.Runtime.InteropServices;
using TinyLlama.Compute.Collectives;
using TinyLlama.Compute.Cuda;

namespace TinyLlama.Compute.Native;

/// <summary>The names under which systems install the libraries that are bound here.</summary>
internal static class SystemLibraries
{
    /// <summary>libzstd.</summary>
    public const string Zstd = "zstd";

    /// <summary>NVIDIA's driver.</summary>
    public const string CudaDriver = "cuda";

    /// <summary>NVIDIA's run-time compiler.</summary>
    public const string Nvrtc = "nvrtc";

    /// <summary>NVIDIA's matrix products.</summary>
    public const string CublasLt = "cublasLt";

    /// <summary>NVIDIA's collectives.</summary>
    public const string Nccl = "nccl";

    static SystemLibraries() => NativeLibrary.SetDllImportResolver(typeof(SystemLibraries).Assembly, Find);

    /// <summary>Makes the names resolve; each binding calls it before its first call. An assembly has one resolver.</summary>
    public static void Resolve()
    {
    }

    /// <summary>Distributions install the versioned name alone; the plain one comes with the development package.</summary>
    private static nint Find(string library, Assembly assembly, DllImportSearchPath? search)
    {
        if (library is CudaDriver or Nvrtc or CublasLt)
        {
            return CudaLibraries.Found.Handle(library);
        }

        if (library == Nccl)
        {
            return NcclLibrary.Found.Handle;
        }

        string[] names = library switch
        {
            Zstd => ["libzstd.so.1", "libzstd.1.dylib", "libzstd"],
            _ => [],
        };
        foreach (string name in names)
        {
            if (NativeLibrary.TryLoad(name, assembly, search, out nint handle))
            {
                return handle;
            }
        }

        // The usual search for names that are not listed; its error where there is no such library.
        return 0;
    }
}
