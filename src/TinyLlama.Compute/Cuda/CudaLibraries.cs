using System.Runtime.InteropServices;
using TinyLlama.Compute.Native;

namespace TinyLlama.Compute.Cuda;

/// <summary>
/// NVIDIA's libraries on this machine: the driver, and NVRTC and cuBLASLt of one major version that the driver can run.
/// Where an environment variable (TINYLLAMA_CUDA_DRIVER, TINYLLAMA_NVRTC, TINYLLAMA_CUBLASLT) names a file, it is that file;
/// else the loader's own search, then the folders in which toolkits, containers and Python wheels install.
/// </summary>
internal sealed unsafe class CudaLibraries
{
    /// <summary>The newest major version of the toolkit first.</summary>
    private static readonly int[] s_majors = [13, 12];

    private static readonly Lazy<CudaLibraries> s_found = new(() => new CudaLibraries());

    private readonly Dictionary<string, (nint Handle, string Path)> _libraries = [];

    private CudaLibraries()
    {
        string[] folders = Folders();
        if (!Take(SystemLibraries.CudaDriver, "TINYLLAMA_CUDA_DRIVER", "libcuda.so.1", folders))
        {
            Fault = "there is no NVIDIA driver (libcuda.so.1) on this machine; install it, or use --device cpu";
            return;
        }

        DriverVersion = Version(_libraries[SystemLibraries.CudaDriver].Handle);
        foreach (int major in s_majors)
        {
            if (major * 1000 <= DriverVersion
                && Take(SystemLibraries.Nvrtc, "TINYLLAMA_NVRTC", $"libnvrtc.so.{major}", folders)
                && Take(SystemLibraries.CublasLt, "TINYLLAMA_CUBLASLT", $"libcublasLt.so.{major}", folders))
            {
                return;
            }

            _libraries.Remove(SystemLibraries.Nvrtc);
        }

        Fault = DriverVersion < s_majors[^1] * 1000
            ? $"the NVIDIA driver is for CUDA {Text(DriverVersion)} and CUDA {s_majors[^1]} is needed: install a newer driver, or use --device cpu"
            : $"NVRTC and cuBLASLt of one version, CUDA {string.Join(" or ", s_majors.Where(major => major * 1000 <= DriverVersion))}, are not on this machine "
              + $"(libnvrtc and libcublasLt; looked in {string.Join(", ", folders)}): install the CUDA toolkit or name the files in TINYLLAMA_NVRTC and TINYLLAMA_CUBLASLT, or use --device cpu";
    }

    /// <summary>Gets what this machine has; looked for once.</summary>
    public static CudaLibraries Found => s_found.Value;

    /// <summary>Gets what is missing and what to do, in one line; null where nothing is.</summary>
    public string? Fault { get; }

    /// <summary>Gets the version of CUDA that the driver is for, as 1000 · major + 10 · minor; 0 without a driver.</summary>
    public int DriverVersion { get; }

    /// <summary>Gets what was found, in words: a line a library.</summary>
    public IReadOnlyList<string> Description =>
        [.. _libraries.Select(library => $"{library.Key}: {library.Value.Path}")];

    /// <summary>The handle of a library by its name in <see cref="SystemLibraries"/>; 0 where it was not found.</summary>
    public nint Handle(string library) => _libraries.TryGetValue(library, out (nint Handle, string Path) found) ? found.Handle : 0;

    /// <summary>A version as people write it.</summary>
    public static string Text(int version) => $"{version / 1000}.{version % 1000 / 10}";

    private static int Version(nint driver)
    {
        int version = 0;
        if (NativeLibrary.TryGetExport(driver, "cuDriverGetVersion", out nint function))
        {
            _ = ((delegate* unmanaged<int*, int>)function)(&version);
        }

        return version;
    }

    /// <summary>A library that some uses need and others do not.</summary>
    /// <param name="variable">The environment variable that may name its file.</param>
    /// <param name="fileName">The name under which systems install it.</param>
    /// <returns>Its handle and path; 0 and where it was looked for.</returns>
    public static (nint Handle, string Path) Find(string variable, string fileName)
    {
        string[] folders = Folders();
        return Find(variable, fileName, folders, out nint handle) is { } path ? (handle, path) : (0, string.Join(", ", folders));
    }

    private static string? Find(string variable, string fileName, string[] folders, out nint handle)
    {
        string? named = Environment.GetEnvironmentVariable(variable);
        string[] candidates = string.IsNullOrEmpty(named) ? [fileName, .. folders.Select(folder => Path.Combine(folder, fileName))] : [named];
        foreach (string candidate in candidates)
        {
            if (NativeLibrary.TryLoad(candidate, out handle))
            {
                return candidate;
            }
        }

        handle = 0;
        return null;
    }

    private bool Take(string library, string variable, string fileName, string[] folders)
    {
        string? path = Find(variable, fileName, folders, out nint handle);
        if (path is not null)
        {
            _libraries[library] = (handle, path);
        }

        return path is not null;
    }

    // Where toolkits, containers, WSL and the wheels of an active Python environment put them.
    private static string[] Folders()
    {
        List<string> folders =
        [
            "/usr/local/cuda/lib64", "/usr/local/cuda-13/lib64", "/usr/local/cuda-12/lib64", "/usr/local/cuda/targets/x86_64-linux/lib",
            "/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/local/nvidia/lib64", "/usr/lib/wsl/lib",
        ];
        if (Environment.GetEnvironmentVariable("VIRTUAL_ENV") is { Length: > 0 } environment && Directory.Exists(environment))
        {
            foreach (string packages in Directory.EnumerateDirectories(Path.Combine(environment, "lib"), "python*"))
            {
                string nvidia = Path.Combine(packages, "site-packages", "nvidia");
                folders.AddRange([Path.Combine(nvidia, "cu13", "lib"), Path.Combine(nvidia, "cuda_nvrtc", "lib"), Path.Combine(nvidia, "cublas", "lib"), Path.Combine(nvidia, "nccl", "lib")]);
            }
        }

        return [.. folders.Where(Directory.Exists)];
    }
}
