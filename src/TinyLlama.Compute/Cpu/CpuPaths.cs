using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.Arm;
using System.Runtime.Intrinsics.X86;

namespace TinyLlama.Compute.Cpu;

/// <summary>The widths that CPU kernels are compiled for.</summary>
public enum CpuPath
{
    /// <summary>
    /// 16 floats a register, and products in bf16 and with many rows of quantized weights by the tiles of AMX, in code emitted at run
    /// time: AMX with BF16, Linux on x64.
    /// </summary>
    Vector512Amx,

    /// <summary>16 floats a register, and products in bf16 by vdpbf16ps, in code emitted at run time: AVX-512 with BF16, Linux on x64.</summary>
    Vector512Bf16,

    /// <summary>
    /// 16 floats a register, and products with quantized weights by vpdpbusd, of one row in half precision with vcvtph2ps, in code emitted
    /// at run time, as the paths before it have it too: AVX-512 with VNNI, Linux on x64.
    /// </summary>
    Vector512Vnni,

    /// <summary>16 floats a register: AVX-512.</summary>
    Vector512,

    /// <summary>8 floats a register: AVX2 with FMA.</summary>
    Vector256,

    /// <summary>4 floats a register: any x64, ARM64.</summary>
    Vector128,

    /// <summary>One float at a time.</summary>
    Scalar,
}

/// <summary>Which path this machine runs, and why.</summary>
public static class CpuPaths
{
    /// <summary>Forces a path: <c>512amx</c>, <c>512bf16</c>, <c>512vnni</c>, <c>512</c> (which emits no code), <c>256</c>, <c>128</c> or <c>scalar</c>.</summary>
    public const string Variable = "TINYLLAMA_CPU";

    private const string Intrinsics = "instructions that .NET has";

    /// <summary>Gets a value indicating whether 128-bit fused multiply-add is one instruction here.</summary>
    internal static bool HasFma => Fma.IsSupported || AdvSimd.IsSupported;

    /// <summary>Gets the widest path whose instructions this machine has; asked for what kernels need, not for a width.</summary>
    public static CpuPath Best =>
        Amx.IsSupported ? CpuPath.Vector512Amx
        : Avx512Bf16Tile.IsSupported ? CpuPath.Vector512Bf16
        : VnniBytes.IsSupported ? CpuPath.Vector512Vnni
        : Avx512F.IsSupported ? CpuPath.Vector512
        : Avx2.IsSupported && Fma.IsSupported ? CpuPath.Vector256
        : Vector128.IsHardwareAccelerated ? CpuPath.Vector128
        : CpuPath.Scalar;

    /// <summary>
    /// Gets why the code for bf16 of the path to use cannot be used, in one line, or null; also where the path has none. Emits, loads
    /// and checks it when first asked.
    /// </summary>
    /// <exception cref="DeviceException">The variable names no path.</exception>
    public static string? Bf16Fault => Bf16FaultOf(Choose());

    /// <summary>Gets which instructions multiply by quantized weights on the path to use, in a few words.</summary>
    /// <exception cref="DeviceException">The variable names no path.</exception>
    public static string QuantizedProducts
    {
        get
        {
            CpuPath path = Choose();
            if (path > CpuPath.Vector512Vnni)
            {
                return Intrinsics;
            }

            string? fault = VnniBytes.Types.Select(VnniBytes.FaultOf).FirstOrDefault(static fault => fault is not null);
            string rows = fault is null ? "vpdpbusd, in code emitted at run time" : $"{Intrinsics}: {fault}";
            return path == CpuPath.Vector512Amx && AmxBytes.Fault is null ? $"tdpbssd on tiles of AMX for many rows, for few {rows}" : rows;
        }
    }

    /// <summary>Gets which instructions widen half precision for one row on the path to use, in a few words.</summary>
    /// <exception cref="DeviceException">The variable names no path.</exception>
    public static string HalfProducts => Choose() > CpuPath.Vector512Vnni ? Intrinsics
        : HalfTile.Fault is string fault ? $"{Intrinsics}: {fault}"
        : "vcvtph2ps, in code emitted at run time";

    /// <summary>Gets the type in which matrix products are fastest on the path to use: BF16 where it has instructions for it.</summary>
    /// <exception cref="DeviceException">The variable names no path.</exception>
    public static DType FastestProducts => Choose() <= CpuPath.Vector512Bf16 && Bf16Fault is null ? DType.BF16 : DType.F32;

    /// <summary>The path to use: the one that <see cref="Variable"/> names, else the best.</summary>
    /// <exception cref="DeviceException">The variable names no path.</exception>
    public static CpuPath Choose() => Environment.GetEnvironmentVariable(Variable) switch
    {
        null or "" => Best,
        "512amx" => Amx.IsSupported
            ? CpuPath.Vector512Amx
            : throw new DeviceException($"{Variable}=512amx needs a processor with AMX for BF16 and Linux on x64; use 512bf16, 512vnni, 512, 256, 128 or scalar"),
        "512bf16" => Avx512Bf16Tile.IsSupported
            ? CpuPath.Vector512Bf16
            : throw new DeviceException($"{Variable}=512bf16 needs a processor with AVX512-BF16 and Linux on x64; use 512vnni, 512, 256, 128 or scalar"),
        "512vnni" => VnniBytes.IsSupported
            ? CpuPath.Vector512Vnni
            : throw new DeviceException($"{Variable}=512vnni needs a processor with AVX512-VNNI and Linux on x64; use 512, 256, 128 or scalar"),
        "512" => CpuPath.Vector512,
        "256" => CpuPath.Vector256,
        "128" => CpuPath.Vector128,
        "scalar" => CpuPath.Scalar,
        string other => throw new DeviceException($"{Variable}={other} names no path; use 512amx, 512bf16, 512vnni, 512, 256, 128 or scalar"),
    };

    /// <summary>Why the code for bf16 of a path cannot be used, in one line, or null; also where the path has none.</summary>
    internal static string? Bf16FaultOf(CpuPath path) => path switch
    {
        CpuPath.Vector512Amx => AmxTile.Fault,
        CpuPath.Vector512Bf16 => Avx512Bf16Tile.Fault,
        _ => null,
    };
}
