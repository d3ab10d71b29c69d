using System.Globalization;
using System.Runtime.InteropServices;

namespace TinyLlama.Compute.Cuda;

/// <summary>An NVIDIA GPU of this machine.</summary>
/// <param name="Ordinal">Its number, from 0.</param>
/// <param name="Name">Its name, as its maker gives it.</param>
/// <param name="Capability">Its compute capability, as 90 for 9.0.</param>
/// <param name="MemoryBytes">The size of its memory.</param>
public sealed unsafe record Gpu(int Ordinal, string Name, int Capability, long MemoryBytes)
{
    /// <summary>The oldest GPUs whose instructions the kernels use: Ampere.</summary>
    public const int LeastCapability = 80;

    /// <summary>Gets why no GPU can be used on this machine and what to do, in one line; null where the driver and the libraries are there.</summary>
    public static string? MachineFault => CudaLibraries.Found.Fault ?? DriverFault();

    /// <summary>Gets NVIDIA's libraries that were found: a line each.</summary>
    public static IReadOnlyList<string> Libraries => CudaLibraries.Found.Description;

    /// <summary>Gets why the kernels cannot run on it, in one line, or null.</summary>
    public string? Fault => Capability >= LeastCapability
        ? null
        : $"{this} has tensor cores that know no bf16: compute capability 8.0 (Ampere, 2020) or newer is needed; use --device cpu";

    /// <summary>Gets the bf16 multiply-adds that it can do at best, in FLOP/s; null for a GPU of which that is not known here.</summary>
    public double? PeakFlops => GpuModel.All.FirstOrDefault(known => Name.Contains(known.Part, StringComparison.Ordinal))?.PeakFlops;

    /// <summary>The GPUs of this machine, in the driver's order; none where there is a <see cref="MachineFault"/>.</summary>
    public static IReadOnlyList<Gpu> All()
    {
        if (MachineFault is not null)
        {
            return [];
        }

        int count;
        Check(CudaDriver.cuDeviceGetCount(&count));
        return [.. Enumerable.Range(0, count).Select(Read)];
    }

    /// <summary>A GPU that the kernels can run on.</summary>
    /// <param name="ordinal">Its number, from 0.</param>
    /// <exception cref="DeviceException">There is no such GPU, or it or what belongs to it is too old or missing.</exception>
    public static Gpu Get(int ordinal)
    {
        if (MachineFault is { } missing)
        {
            throw new DeviceException(missing);
        }

        IReadOnlyList<Gpu> all = All();
        return ordinal >= all.Count
            ? throw new DeviceException($"there is no cuda:{ordinal}: this machine has {all.Count} NVIDIA GPU{(all.Count == 1 ? "" : "s")}, counted from 0")
            : all[ordinal].Fault is { } fault ? throw new DeviceException(fault) : all[ordinal];
    }

    /// <inheritdoc/>
    public override string ToString() => string.Create(
        CultureInfo.InvariantCulture, $"cuda:{Ordinal}, {Name}, sm_{Capability}, {MemoryBytes / (double)(1L << 30):F1} GiB");

    /// <summary>The driver's name of an error.</summary>
    internal static string ErrorName(int result)
    {
        byte* name;
        return CudaDriver.cuGetErrorName(result, &name) == 0 ? Marshal.PtrToStringUTF8((nint)name)! : $"error {result}";
    }

    private static string? DriverFault()
    {
        const int NoDevice = 100;
        return CudaDriver.cuInit(0) switch
        {
            0 => null,
            NoDevice => "the NVIDIA driver finds no GPU on this machine; use --device cpu",
            int result => $"the NVIDIA driver could not begin ({ErrorName(result)}): see what nvidia-smi says, or use --device cpu",
        };
    }

    private static Gpu Read(int ordinal)
    {
        const int NameBytes = 256;
        int device;
        nuint memory;
        byte* name = stackalloc byte[NameBytes];
        Check(CudaDriver.cuDeviceGet(&device, ordinal));
        Check(CudaDriver.cuDeviceGetName(name, NameBytes, device));
        Check(CudaDriver.cuDeviceTotalMem_v2(&memory, device));
        int capability = (10 * Attribute(device, CudaDriver.CapabilityMajor)) + Attribute(device, CudaDriver.CapabilityMinor);
        return new Gpu(ordinal, Marshal.PtrToStringUTF8((nint)name)!, capability, (long)memory);
    }

    private static int Attribute(int device, int attribute)
    {
        int value;
        Check(CudaDriver.cuDeviceGetAttribute(&value, attribute, device));
        return value;
    }

    private static void Check(int result)
    {
        if (result != 0)
        {
            throw new DeviceException($"the NVIDIA driver could not say which GPUs there are: {ErrorName(result)}");
        }
    }
}
