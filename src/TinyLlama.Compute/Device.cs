using System.Globalization;
using TinyLlama.Compute.Cpu;
using TinyLlama.Compute.Cuda;

namespace TinyLlama.Compute;

/// <summary>A kind of device.</summary>
public enum DeviceKind
{
    /// <summary>The processor.</summary>
    Cpu,

    /// <summary>A GPU of NVIDIA.</summary>
    Cuda,

    /// <summary>The first GPU where one can be used, else the processor.</summary>
    Auto,
}

/// <summary>What to compute on, as people name it: <c>cpu</c>, <c>cuda</c> (the first GPU), <c>cuda:1</c> (the second), <c>auto</c>.</summary>
/// <param name="Kind">The kind.</param>
/// <param name="Ordinal">Which GPU, from 0 in the driver's order.</param>
public readonly record struct Device(DeviceKind Kind, int Ordinal = 0)
{
    private const string Cuda = "cuda";

    /// <summary>Reads a name.</summary>
    /// <returns>False where it is none.</returns>
    public static bool TryParse(string text, out Device device)
    {
        int ordinal = 0;
        bool isGpu = text == Cuda
            || (text.StartsWith(Cuda + ":", StringComparison.Ordinal)
                && int.TryParse(text.AsSpan(Cuda.Length + 1), NumberStyles.None, CultureInfo.InvariantCulture, out ordinal));
        device = new Device(isGpu ? DeviceKind.Cuda : text == "auto" ? DeviceKind.Auto : DeviceKind.Cpu, ordinal);
        return isGpu || text is "auto" or "cpu";
    }

    /// <summary>Makes the device ready.</summary>
    /// <param name="threads">Threads of the CPU; 0 for one a core.</param>
    /// <param name="products">What the CPU rounds operands of matrix products to: F32 or BF16. A GPU's are BF16.</param>
    /// <param name="deterministic">Whether the same inputs give the same bits every time. Where not, a GPU adds up some gradients of training in whatever order is fastest; a CPU never does.</param>
    /// <param name="warn">Is told, in one line, that <see cref="DeviceKind.Auto"/> found no GPU.</param>
    /// <exception cref="DeviceException">There is no such device, or it cannot be used; says why.</exception>
    public Backend Open(int threads = 0, DType products = DType.F32, bool deterministic = true, Action<string>? warn = null)
    {
        Gpu? gpu = Kind switch
        {
            DeviceKind.Cuda => Gpu.Get(Ordinal),
            DeviceKind.Auto => Gpu.All().FirstOrDefault(gpu => gpu.Fault is null),
            _ => null,
        };
        if (gpu is null && Kind == DeviceKind.Auto)
        {
            warn?.Invoke("no GPU can be used, so the CPU computes; 'tinyllama env' says why");
        }

        return gpu is null ? CpuBackend.Create(threads, products: products) : CudaBackend.Create(gpu.Ordinal, deterministic);
    }

    /// <inheritdoc/>
    public override string ToString() => Kind switch
    {
        DeviceKind.Cpu => "cpu",
        DeviceKind.Auto => "auto",
        _ when Ordinal == 0 => Cuda,
        _ => string.Create(CultureInfo.InvariantCulture, $"{Cuda}:{Ordinal}"),
    };
}
