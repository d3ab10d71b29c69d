using TinyLlama.Compute.Cuda;
using TinyLlama.Tests.Common;

namespace TinyLlama.Compute.Tests.Cuda;

/// <summary>Compiled kernels are kept, and a file that is damaged counts as none. By itself: it moves the folder for the process.</summary>
[Collection(nameof(CudaDeviceTests.Alone))]
public sealed class KernelImagesTests : IDisposable
{
    private const string Variable = "XDG_CACHE_HOME";

    private readonly string _folder = Directory.CreateTempSubdirectory("tinyllama-test-").FullName;
    private readonly string? _before;

    public KernelImagesTests()
    {
        CudaEmulator.Require();
        _before = Environment.GetEnvironmentVariable(Variable);
        Environment.SetEnvironmentVariable(Variable, _folder);
    }

    public void Dispose()
    {
        Environment.SetEnvironmentVariable(Variable, _before);
        Directory.Delete(_folder, recursive: true);
    }

    [Fact]
    public void A_source_is_compiled_once_for_each_architecture()
    {
        byte[] image = KernelImages.Get("Rope.cu", 90);
        string file = Assert.Single(Files());
        DateTime written = File.GetLastWriteTimeUtc(file);
        Assert.Equal(image, KernelImages.Get("Rope.cu", 90));
        Assert.Equal(written, File.GetLastWriteTimeUtc(file));
        Assert.Equal(image, KernelImages.Get("Rope.cu", 80));
        Assert.Equal(2, Files().Length);
    }

    [Theory]
    [InlineData(0)]
    [InlineData(20)]
    [InlineData(-1)]
    public void A_damaged_file_is_compiled_again(int length)
    {
        byte[] image = KernelImages.Get("Rope.cu", 90);
        string file = Assert.Single(Files());
        byte[] content = File.ReadAllBytes(file);
        byte[] damaged = length < 0 ? [.. content] : content[..length];
        if (length < 0)
        {
            damaged[^1] ^= 1;
        }

        File.WriteAllBytes(file, damaged);
        Assert.Equal(image, KernelImages.Get("Rope.cu", 90));
        Assert.Equal(content, File.ReadAllBytes(file));
    }

    [Fact]
    public void Where_nothing_can_be_written_it_is_compiled_each_time()
    {
        string file = Path.Combine(_folder, "file");
        File.WriteAllText(file, "");
        Environment.SetEnvironmentVariable(Variable, file);
        Assert.NotEmpty(KernelImages.Get("Rope.cu", 90));
    }

    private string[] Files() => Directory.GetFiles(_folder, "*", SearchOption.AllDirectories);
}
