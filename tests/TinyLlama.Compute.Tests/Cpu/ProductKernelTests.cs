using TinyLlama.Compute.Cpu;

namespace TinyLlama.Compute.Tests.Cpu;

/// <summary>Which kernel a product gets: all give the same bits, so that nothing else tells whether the fast one was taken.</summary>
public sealed class ProductKernelTests
{
    [Theory]
    [InlineData(DType.F32, 64, false, ProductKernel.Packed)]
    [InlineData(DType.BF16, 64, false, ProductKernel.Pairs)]
    [InlineData(DType.F16, 64, true, ProductKernel.Pairs)]
    [InlineData(DType.BF16, 63, false, ProductKernel.Packed)]
    [InlineData(DType.Q8_0, 64, false, ProductKernel.Q8)]
    [InlineData(DType.Q8_0, 64, true, ProductKernel.Q8)]
    [InlineData(DType.Q4_0, 64, true, ProductKernel.Quantized)]
    [InlineData(DType.Q6_K, 256, false, ProductKernel.Quantized)]
    internal void Without_emitted_code_the_type_alone_decides(DType type, int inputs, bool inPlace, ProductKernel expected)
    {
        using CpuBackend backend = CpuBackend.Create(1, CpuPath.Scalar);
        Assert.All([1, 8, 64], rows => Assert.Equal(expected, backend.KernelOf(type, inputs, rows, inPlace)));
    }

    [Theory]
    [InlineData(DType.Q4_0, true, ProductKernel.Vnni)]
    [InlineData(DType.Q4_0, false, ProductKernel.Vnni)]
    [InlineData(DType.Q8_0, false, ProductKernel.Vnni)]
    [InlineData(DType.Q8_0, true, ProductKernel.Q8)]
    [InlineData(DType.Q4_K, false, ProductKernel.Vnni)]
    [InlineData(DType.Q5_K, false, ProductKernel.Vnni)]
    [InlineData(DType.Q6_K, false, ProductKernel.Vnni)]
    [InlineData(DType.Q4_1, false, ProductKernel.Quantized)]
    [InlineData(DType.BF16, false, ProductKernel.Compact)]
    internal void With_VNNI_what_it_has_code_for_is_multiplied_by_it(DType type, bool inPlace, ProductKernel expected)
    {
        Assert.SkipUnless(VnniBytes.IsSupported, "no AVX512-VNNI here");
        using CpuBackend backend = CpuBackend.Create(1, CpuPath.Vector512Vnni);
        Assert.All([1, 8, 64], rows => Assert.Equal(expected, backend.KernelOf(type, 256, rows, inPlace)));
    }

    [Theory]
    [InlineData(1, 256, ProductKernel.Halves)]
    [InlineData(1, 255, ProductKernel.Packed)]
    [InlineData(2, 256, ProductKernel.Pairs)]
    internal void With_emitted_code_one_row_of_half_precision_is_multiplied_by_it(int rows, int inputs, ProductKernel expected)
    {
        Assert.SkipUnless(VnniBytes.IsSupported, "no AVX512-VNNI here");
        using CpuBackend backend = CpuBackend.Create(1, CpuPath.Vector512Vnni);
        Assert.All([false, true], inPlace => Assert.Equal(expected, backend.KernelOf(DType.F16, inputs, rows, inPlace)));
    }

    [Theory]
    [InlineData(DType.Q4_0, false, 8, ProductKernel.Vnni)]
    [InlineData(DType.Q4_0, false, 9, ProductKernel.Tiles)]
    [InlineData(DType.Q8_0, true, 5, ProductKernel.Q8)]
    [InlineData(DType.Q8_0, true, 6, ProductKernel.Tiles)]
    [InlineData(DType.Q6_K, false, 1, ProductKernel.Vnni)]
    [InlineData(DType.Q6_K, false, 64, ProductKernel.Tiles)]
    [InlineData(DType.Q4_1, false, 5, ProductKernel.Quantized)]
    [InlineData(DType.Q4_1, false, 6, ProductKernel.Tiles)]
    internal void With_AMX_many_rows_are_multiplied_by_tiles_and_few_as_without(DType type, bool inPlace, int rows, ProductKernel expected)
    {
        Assert.SkipUnless(AmxBytes.Fault is null, $"no tiles of AMX here: {AmxBytes.Fault}");
        using CpuBackend backend = CpuBackend.Create(1, CpuPath.Vector512Amx);
        Assert.Equal(expected, backend.KernelOf(type, 256, rows, inPlace));
    }
}
