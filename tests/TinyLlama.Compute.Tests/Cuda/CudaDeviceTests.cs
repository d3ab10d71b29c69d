using System.Runtime.InteropServices;
using TinyLlama.Compute.Cuda;
using TinyLlama.Tests.Common;

namespace TinyLlama.Compute.Tests.Cuda;

/// <summary>What a launch, a copy and an allocation refuse, as one line. By itself: it changes the environment of the process.</summary>
[Collection(nameof(Alone))]
public sealed unsafe class CudaDeviceTests : IDisposable
{
    private readonly CudaDevice _device = Open();

    public void Dispose() => _device.Dispose();

    [Fact]
    public void A_GPU_that_does_not_exist_is_refused() =>
        Assert.Equal(
            "there is no cuda:7: this machine has 1 NVIDIA GPU, counted from 0", Assert.Throws<DeviceException>(() => new CudaDevice(7)).Message);

    [Fact]
    public void A_GPU_older_than_Ampere_is_refused_with_the_reason() =>
        With("TINYLLAMA_CUDA_CAPABILITY", "75", () =>
            Assert.Contains(
                "sm_75, 4.0 GiB has tensor c", Assert.Throws<DeviceException>(() => new CudaDevice(0)).Message,
                StringComparison.Ordinal));

    [Fact]
    public void A_GPU_that_the_compiler_does_not_know_is_refused() =>
        With("TINYLLAMA_CUDA_CAPABILITY", "120", () =>
            Assert.Contains("does not know this GPU (compute capability 12.0)", Assert.Throws<DeviceException>(() => new CudaDevice(0)).Message, StringComparison.Ordinal));

    [Fact]
    public void Too_little_memory_is_told_in_numbers()
    {
        string message = Assert.Throws<DeviceException>(() => _device.Allocate("activations", 1L << 40)).Message;
        Assert.StartsWith("'activations' needs 1024.00 GiB and cuda:0 (CUDA emulator) has ", message, StringComparison.Ordinal);
        Assert.DoesNotContain('\n', message);
    }

    [Fact]
    public void Memory_is_zero_and_comes_back()
    {
        long before = _device.Memory.Free;
        nint address = _device.Allocate("test", 1000);
        byte[] content = new byte[1000];
        fixed (byte* first = content)
        {
            _device.Read(first, address, content.Length);
        }

        Assert.All(content, value => Assert.Equal(0, value));
        Assert.Equal(before - 1000, _device.Memory.Free);
        _device.Free(address);
        Assert.Equal(before, _device.Memory.Free);
    }

    [Fact]
    public void What_it_holds_is_its_own_whatever_others_take_and_give_back()
    {
        using var other = new CudaDevice(0);
        nint ofOther = other.Allocate("test", 5000);
        long before = _device.HeldBytes;
        nint address = _device.Allocate("test", 1000);
        other.Free(ofOther);
        Assert.Equal(before + 1000, _device.HeldBytes);
        _device.Free(address);
        Assert.Equal(before, _device.HeldBytes);
        Assert.Equal(CudaDevice.ScratchBytes, before);
    }

    [Fact]
    public void A_kernel_that_does_not_exist_is_named() =>
        Assert.Equal(
            "cuda:0 (CUDA emulator): no_such_kernel: CUDA_ERROR_NOT_FOUND",
            Assert.Throws<DeviceException>(() => _device.Launch("no_such_kernel", (1, 1, 1), 32, 0)).Message);

    [Theory]
    [InlineData(2048, 0, "CUDA_ERROR_LAUNCH_FAILED")]
    [InlineData(100, 0, "CUDA_ERROR_LAUNCH_FAILED")]
    [InlineData(256, (227 << 10) + 1, "CUDA_ERROR_INVALID_VALUE")]
    public void A_launch_beyond_the_limits_fails(int threads, int sharedBytes, string error)
    {
        Tensor memory = new(_device.Scratch, 1, 8, 8, DType.F32);
        Assert.EndsWith(
            $"swiglu: {error}",
            Assert.Throws<DeviceException>(() => _device.Launch("swiglu", (1, 1, 1), threads, sharedBytes, memory, 8L, memory, 16L, 1, 8)).Message,
            StringComparison.Ordinal);
    }

    [Fact]
    public void A_launch_with_another_number_of_arguments_fails() =>
        Assert.Throws<DeviceException>(() => _device.Launch("swiglu", (1, 1, 1), 32, 0, new Tensor(_device.Scratch, 1, 8, 8, DType.F32), 8L));

    [Fact]
    public void A_number_where_a_pointer_belongs_fails() =>
        Assert.Throws<DeviceException>(() => _device.Launch("swiglu", (1, 1, 1), 32, 0, 12345, 8L, 12345, 16L, 1, 8));

    [Fact]
    public void A_copy_outside_an_allocation_fails()
    {
        nint address = _device.Allocate("test", 100);
        byte* bytes = stackalloc byte[101];
        Assert.Throws<DeviceException>(() => Write(address, 101));
        Write(address, 100);
        _device.Free(address);

        void Write(nint to, int count)
        {
            fixed (byte* first = new byte[count])
            {
                _device.Write(to, first, count);
            }
        }
    }

    [Fact]
    public void What_is_written_arrives_in_order_though_more_than_the_staging_buffer_holds()
    {
        const int Count = 13_000_001;
        byte[] source = new byte[Count], arrived = new byte[Count];
        new Random(1).NextBytes(source);
        nint address = _device.Allocate("test", Count);
        fixed (byte* from = source, to = arrived)
        {
            int done = 0;
            foreach (int piece in (int[])[1, 63, 4 << 20, 5, 8 << 20, 100_000])
            {
                _device.Write(address + done, from + done, piece);
                done += piece;
            }

            _device.Write(address + done, from + done, Count - done);
            _device.Write(address, from + 7, 1000);
            _device.Read(to, address, Count);
        }

        source.AsSpan(7, 1000).CopyTo(source);
        Assert.Equal(source, arrived);
        _device.Free(address);
    }

    [Fact]
    public void After_a_failed_launch_everything_fails() =>
        With("TINYLLAMA_CUDA_FAIL", "cuLaunchKernel 0 719", () =>
        {
            Tensor memory = new(_device.Scratch, 1, 8, 8, DType.F32);
            Assert.Throws<DeviceException>(() => _device.Launch("swiglu", (1, 1, 1), 32, 0, memory, 8L, memory, 16L, 1, 8));
            Assert.Throws<DeviceException>(() =>
            {
                int value;
                _device.Read(&value, _device.Scratch, sizeof(int));
            });
        });

    private static CudaDevice Open()
    {
        CudaEmulator.Require();
        return new CudaDevice(0);
    }

    // The environment that native code sees; .NET's own is a copy.
    internal static void With(string name, string value, Action action)
    {
        _ = setenv(name, value, 1);
        try
        {
            action();
        }
        finally
        {
            _ = unsetenv(name);
        }
    }

    [DllImport("libc")]
    private static extern int setenv(string name, string value, int overwrite);

    [DllImport("libc")]
    private static extern int unsetenv(string name);

    [CollectionDefinition(nameof(Alone), DisableParallelization = true)]
    public sealed class Alone;
}
