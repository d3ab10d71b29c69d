using System.Runtime.InteropServices;
using TinyLlama.Compute.Cuda;

namespace TinyLlama.Compute.Collectives;

/// <summary>
/// NCCL on this machine: the file that TINYLLAMA_NCCL names, else the loader's own search for libnccl.so.2, then where NVIDIA's
/// other libraries are looked for. Only GPUs of several ranks need it.
/// </summary>
public sealed unsafe class NcclLibrary
{
    private const int LeastVersion = 21_800;

    private static readonly Lazy<NcclLibrary> s_found = new(() => new NcclLibrary());

    private NcclLibrary()
    {
        (Handle, string path) = CudaLibraries.Find("TINYLLAMA_NCCL", "libnccl.so.2");
        if (Handle == 0)
        {
            Fault = $"NCCL, by which GPUs of several ranks talk, is not on this machine (libnccl.so.2; looked in {path}): install it or name the file in TINYLLAMA_NCCL";
            return;
        }

        int version = 0;
        if (NativeLibrary.TryGetExport(Handle, "ncclGetVersion", out nint function))
        {
            _ = ((delegate* unmanaged<int*, int>)function)(&version);
        }

        (Version, Description) = (version, $"{path}, {Text(version)}");
        Fault = version < LeastVersion ? $"{path} is NCCL {Text(version)}, and {Text(LeastVersion)} is needed: install a newer one or name its file in TINYLLAMA_NCCL" : null;
    }

    /// <summary>Gets what this machine has; looked for once.</summary>
    public static NcclLibrary Found => s_found.Value;

    /// <summary>Gets what is missing or too old and what to do, in one line; null where GPUs of several ranks can talk.</summary>
    public string? Fault { get; }

    /// <summary>Gets the file and its version, in words; null where there is none.</summary>
    public string? Description { get; }

    /// <summary>Gets the version as NCCL gives it, 10,000 · major + 100 · minor + patch; 0 where there is none.</summary>
    public int Version { get; }

    /// <summary>Gets the loader's handle, or 0.</summary>
    internal nint Handle { get; }

    /// <summary>A version as people write it.</summary>
    internal static string Text(int version) => $"{version / 10_000}.{version % 10_000 / 100}.{version % 100}";
}
