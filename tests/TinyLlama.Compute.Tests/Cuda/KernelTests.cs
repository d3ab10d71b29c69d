using System.Globalization;
using System.Text;
using TinyLlama.Compute.Cuda;
using TinyLlama.Tests.Common;

namespace TinyLlama.Compute.Tests.Cuda;

/// <summary>What the compiler made of each source by itself. Where the emulator stands for a GPU, there are no registers.</summary>
public sealed unsafe class KernelTests : IDisposable
{
    /// <summary>CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: of registers that were spilled, and of arrays.</summary>
    public const int LocalBytes = 3;

    /// <summary>CU_FUNC_ATTRIBUTE_NUM_REGS: of a thread.</summary>
    public const int Registers = 4;

    private readonly ITestOutputHelper _output;
    private readonly int _device;

    public KernelTests(ITestOutputHelper output)
    {
        CudaEmulator.Require();
        _output = output;
        _ = Gpu.Get(0);
        int device;
        nint context;
        Check(CudaDriver.cuDeviceGet(&device, 0));
        Check(CudaDriver.cuDevicePrimaryCtxRetain(&context, device));
        Check(CudaDriver.cuCtxSetCurrent(context));
        _device = device;
    }

    public static TheoryData<string> Sources => [.. KernelImages.Sources];

    public void Dispose() => Check(CudaDriver.cuDevicePrimaryCtxRelease_v2(_device));

    [Theory]
    [MemberData(nameof(Sources))]
    public void It_compiles_and_no_kernel_uses_local_memory(string source)
    {
        List<string> spilled = [];
        nint module;
        fixed (byte* image = KernelImages.Get(source, Gpu.Get(0).Capability))
        {
            Check(CudaDriver.cuModuleLoadData(&module, image));
        }

        foreach (string kernel in Kernels(source))
        {
            nint function;
            fixed (byte* name = Encoding.UTF8.GetBytes(kernel + '\0'))
            {
                Check(CudaDriver.cuModuleGetFunction(&function, module, name));
            }

            int registers, shared, local;
            Check(CudaDriver.cuFuncGetAttribute(&registers, Registers, function));
            Check(CudaDriver.cuFuncGetAttribute(&shared, CudaDriver.FunctionSharedBytes, function));
            Check(CudaDriver.cuFuncGetAttribute(&local, LocalBytes, function));
            _output.WriteLine(string.Create(CultureInfo.InvariantCulture, $"{kernel,-36} {registers,9} {shared,7} {local,6}"));
            if (local > 0)
            {
                spilled.Add(kernel);
            }
        }

        Check(CudaDriver.cuModuleUnload(module));
        Assert.Empty(spilled);
    }

    private static void Check(int result) => Assert.Equal("", result == 0 ? "" : Gpu.ErrorName(result));

    // The names in lines such as: KERNEL(256) void name(
    private static string[] Kernels(string source)
    {
        const string Return = ") void ";
        using Stream stream = typeof(KernelImages).Assembly.GetManifestResourceStream("Kernels/" + source)!;
        using StreamReader reader = new(stream);
        return
        [
            .. reader.ReadToEnd().Split('\n')
                .Where(line => line.StartsWith("KERNEL(", StringComparison.Ordinal))
                .Select(line => line[(line.IndexOf(Return, StringComparison.Ordinal) + Return.Length)..].Split('(')[0]),
        ];
    }
}
