using System.CommandLine;
using System.Globalization;
using System.Runtime.InteropServices;
using System.Text.Json.Nodes;
using TinyLlama.Compute.Collectives;
using TinyLlama.Compute.Cpu;
using TinyLlama.Compute.Cuda;
using TinyLlama.Compute.Native;

namespace TinyLlama.Cli;

/// <summary><c>tinyllama env</c>: what this machine is and which path the kernels take on it.</summary>
internal static class EnvCommand
{
    /// <summary>The verb.</summary>
    public static Command Create()
    {
        var json = CommonOptions.Json();
        var command = new Command("env", "Show this machine and which kernels run on it") { json };
        command.SetAction(parse =>
        {
            TextWriter output = parse.InvocationConfiguration.Output;
            using CpuBackend backend = CpuBackend.Create();
            CpuCeiling ceiling = CpuCeiling.Measure(backend);
            if (parse.GetValue(json))
            {
                output.WriteLine(ToJson(ceiling).ToJsonString(JsonOutput.Options));
            }
            else
            {
                Write(output, ceiling);
            }

            return ExitCode.Success;
        });
        return command;
    }

    private static void Write(TextWriter output, CpuCeiling ceiling)
    {
        void Row(string name, FormattableString value) =>
            output.WriteLine($"{name,-10} {value.ToString(CultureInfo.InvariantCulture)}");

        Row("version", $"{Program.Version}");
        Row("system", $"{RuntimeInformation.OSDescription}, {RuntimeInformation.OSArchitecture}");
        Row("runtime", $"{RuntimeInformation.FrameworkDescription}");
        Row("processor", $"{ProcessorName()}");
        Row("cores", $"{Environment.ProcessorCount}");
        Row("memory", $"{MemoryBytes / (double)(1 << 30):0.0} GiB");
        Row("libzstd", $"{LibZstd() ?? "not found: .zst files cannot be read"}");
        Row("kernels", $"{ceiling.Path}: {Why(ceiling.Path)}");
        foreach (CpuPath path in Enum.GetValues<CpuPath>())
        {
            Row("", $"{path}: {Claim(path)}");
        }

        Row("bf16", $"matrix products in bf16 use {Bf16Products()}");
        Row("quantized", $"products with quantized weights use {CpuPaths.QuantizedProducts}");
        Row("f16", $"products of one row with weights in half precision use {CpuPaths.HalfProducts}");
        if (Gpu.MachineFault is { } fault)
        {
            Row("cuda", $"{fault}");
        }

        foreach (string line in Gpu.Libraries.Concat(Gpu.All().Select(gpu => gpu.Fault ?? gpu.ToString())))
        {
            Row("cuda", $"{line}");
        }

        Row("nccl", $"{NcclLibrary.Found.Fault ?? NcclLibrary.Found.Description}");
        Row("peak", $"{ceiling.AllThreads:0} GFLOP/s of fp32 multiply-adds on {ceiling.Threads} threads, {ceiling.OneThread:0} on one");
        Row("", $"{ceiling.AllThreadsRead:0.0} GB/s read from memory on {ceiling.Threads} threads, {ceiling.OneThreadRead:0.0} on one");
        Row("", $"measured now, while whatever else runs here was running");
    }

    private static JsonObject ToJson(CpuCeiling ceiling) => new()
    {
        ["version"] = Program.Version,
        ["system"] = RuntimeInformation.OSDescription,
        ["architecture"] = RuntimeInformation.OSArchitecture.ToString(),
        ["runtime"] = RuntimeInformation.FrameworkDescription,
        ["processor"] = ProcessorName(),
        ["cores"] = Environment.ProcessorCount,
        ["memory_bytes"] = MemoryBytes,
        ["libzstd"] = LibZstd(),
        ["path"] = ceiling.Path.ToString(),
        ["path_why"] = Why(ceiling.Path),
        ["paths"] = new JsonObject(
            Enum.GetValues<CpuPath>().Select(path => KeyValuePair.Create(path.ToString(), (JsonNode?)Claim(path)))),
        ["bf16_products"] = Bf16Products(),
        ["quantized_products"] = CpuPaths.QuantizedProducts,
        ["half_products"] = CpuPaths.HalfProducts,
        ["cuda_fault"] = Gpu.MachineFault,
        ["cuda_libraries"] = new JsonArray([.. Gpu.Libraries.Select(library => (JsonNode?)library)]),
        ["nccl"] = NcclLibrary.Found.Description,
        ["nccl_fault"] = NcclLibrary.Found.Fault,
        ["gpus"] = new JsonArray([.. Gpu.All().Select(gpu => new JsonObject
        {
            ["name"] = gpu.Name,
            ["compute_capability"] = gpu.Capability / 10.0,
            ["memory_bytes"] = gpu.MemoryBytes,
            ["fault"] = gpu.Fault,
        })]),
        ["threads"] = ceiling.Threads,
        ["all_threads_gflops"] = ceiling.AllThreads,
        ["one_thread_gflops"] = ceiling.OneThread,
        ["all_threads_read_gigabytes_per_second"] = ceiling.AllThreadsRead,
        ["one_thread_read_gigabytes_per_second"] = ceiling.OneThreadRead,
    };

    private static long MemoryBytes => GC.GetGCMemoryInfo().TotalAvailableMemoryBytes;

    /// <summary>Its version, or null where the system has none.</summary>
    private static string? LibZstd()
    {
        try
        {
            // Two decimal digits each for the minor and the patch number.
            int version = ZstdStream.LibraryVersion;
            return $"{version / 10_000}.{version / 100 % 100}.{version % 100}";
        }
        catch (DllNotFoundException)
        {
            return null;
        }
    }

    private static string Claim(CpuPath path) => path < CpuPaths.Best
        ? "unproved here: the processor lacks it"
        : path == CpuPaths.Best ? "the widest that this processor has" : "runs here";

    private static string Why(CpuPath chosen)
    {
        string? forced = Environment.GetEnvironmentVariable(CpuPaths.Variable);
        string best = CpuPaths.Best switch
        {
            CpuPath.Vector512Amx => "the processor has AMX with BF16",
            CpuPath.Vector512Bf16 => "the processor has AVX-512 with BF16",
            CpuPath.Vector512Vnni => "the processor has AVX-512 with VNNI",
            CpuPath.Vector512 => "the processor has AVX-512",
            CpuPath.Vector256 => "the processor has AVX2 and FMA, no AVX-512",
            CpuPath.Vector128 => "128-bit registers are the widest that the runtime uses here",
            _ => "the runtime uses no vector registers here",
        };
        return string.IsNullOrEmpty(forced)
            ? best
            : $"{CpuPaths.Variable}={forced} asks for it; without it {CpuPaths.Best}: {best}";
    }

    private static string Bf16Products() => CpuPaths.Bf16Fault is string fault
        ? $"instructions of fp32: {fault}"
        : CpuPaths.Choose() switch
        {
            CpuPath.Vector512Amx => "tdpbf16ps on tiles of AMX, in code emitted at run time",
            CpuPath.Vector512Bf16 => "vdpbf16ps, in code emitted at run time",
            _ => "instructions of fp32, at its speed at best",
        };

    private static string ProcessorName()
    {
        const string Source = "/proc/cpuinfo";
        if (File.Exists(Source))
        {
            string? line = File.ReadLines(Source).FirstOrDefault(line => line.StartsWith("model name", StringComparison.Ordinal));
            if (line?.IndexOf(':') is int colon and >= 0)
            {
                return line[(colon + 1)..].Trim();
            }
        }

        return Environment.GetEnvironmentVariable("PROCESSOR_IDENTIFIER") ?? RuntimeInformation.ProcessArchitecture.ToString();
    }
}
