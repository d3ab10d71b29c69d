using System.Globalization;
using System.Text;
using TinyLlama.Compute.Cuda;

namespace TinyLlama.Compute.Tests.Cuda;

/// <summary>What the compiler made of the kernels. Where the emulator stands for a GPU, there are no registers.</summary>
public sealed unsafe class KernelTests(ITestOutputHelper output) : CudaTests
{
    /// <summary>CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: of registers that were spilled, and of arrays.</summary>
    public const int LocalBytes = 3;

    /// <summary>CU_FUNC_ATTRIBUTE_NUM_REGS: of a thread.</summary>
    public const int Registers = 4;

    [Fact]
    public void No_kernel_uses_local_memory()
    {
        using CudaDevice device = new(0);
        List<string> spilled = [];
        output.WriteLine(string.Create(CultureInfo.InvariantCulture, $"{"kernel",-36} {"registers",9} {"shared",7} {"local",6}"));
        foreach (string source in KernelImages.Sources)
        {
            nint module;
            fixed (byte* image = KernelImages.Get(source, device.Gpu.Capability))
            {
                device.Check(CudaDriver.cuModuleLoadData(&module, image), source);
            }

            foreach (string kernel in Kernels(source))
            {
                nint function;
                fixed (byte* name = Encoding.UTF8.GetBytes(kernel + '\0'))
                {
                    device.Check(CudaDriver.cuModuleGetFunction(&function, module, name), kernel);
                }

                int registers, shared, local;
                device.Check(CudaDriver.cuFuncGetAttribute(&registers, Registers, function), kernel);
                device.Check(CudaDriver.cuFuncGetAttribute(&shared, CudaDriver.FunctionSharedBytes, function), kernel);
                device.Check(CudaDriver.cuFuncGetAttribute(&local, LocalBytes, function), kernel);
                output.WriteLine(string.Create(CultureInfo.InvariantCulture, $"{kernel,-36} {registers,9} {shared,7} {local,6}"));
                if (local > 0)
                {
                    spilled.Add(kernel);
                }
            }

            device.Check(CudaDriver.cuModuleUnload(module), source);
        }

        Assert.Empty(spilled);
    }

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
