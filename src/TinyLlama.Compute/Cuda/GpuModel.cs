namespace TinyLlama.Compute.Cuda;

/// <summary>A kind of GPU, by NVIDIA's data sheets.</summary>
/// <param name="Name">What plans call it.</param>
/// <param name="Part">The part of a device's name that tells it.</param>
/// <param name="MemoryBytes">Its memory, as nvidia-smi shows it.</param>
/// <param name="PeakFlops">Dense products of bf16, summed in fp32, in FLOP/s.</param>
/// <param name="MemoryRate">Bytes a second between it and its memory.</param>
/// <param name="LinkRate">Bytes a second to the other GPUs of its node, in one direction: NVLink, or PCI Express where NVLink joins no more than two.</param>
public sealed record GpuModel(string Name, string Part, long MemoryBytes, double PeakFlops, double MemoryRate, double LinkRate)
{
    /// <summary>Gets those that are known; of two whose part fits a name, the first is meant.</summary>
    public static IReadOnlyList<GpuModel> All { get; } =
    [
        Of("b200", "B200", 183_359, 2250, 8000, 900),
        Of("h200", "H200", 143_771, 989, 4800, 450),
        Of("h100-pcie", "H100 PCIe", 81_559, 756, 2000, 64),
        Of("h100-nvl", "H100 NVL", 95_830, 835, 3900, 64),
        Of("h100-80g", "H100", 81_559, 989, 3350, 450),
        Of("a100-40g", "A100", 40_536, 312, 1555, 300),
        Of("a100-80g", "A100", 81_920, 312, 2039, 300),
        Of("l40s", "L40S", 46_068, 362, 864, 32),
        Of("4090", "RTX 4090", 24_564, 165, 1008, 32),
        Of("3090", "RTX 3090", 24_576, 71, 936, 32),
    ];

    private static GpuModel Of(string name, string part, long mebibytes, double teraFlops, double memory, double link) =>
        new(name, part, mebibytes << 20, teraFlops * 1e12, memory * 1e9, link * 1e9);
}
