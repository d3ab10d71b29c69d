using TinyLlama.Compute.Cpu;
using TinyLlama.Compute.Native;

namespace TinyLlama.Compute.Tests;

// Alone, because one test takes all the memory there is.
[Collection(nameof(PageMemoryTests))]
[CollectionDefinition(nameof(PageMemoryTests), DisableParallelization = true)]
public sealed unsafe class PageMemoryTests
{
    [Theory]
    [InlineData(0, 1)]
    [InlineData(1, 4096)]
    [InlineData(100_000, 4096)]
    [InlineData((2 << 20) - 1, 4096)]
    [InlineData(2 << 20, 2 << 20)]
    [InlineData((5 << 20) + 77, 2 << 20)]
    public void Memory_is_zero_writable_to_its_last_byte_and_aligned(long byteCount, int alignment)
    {
        Assert.SkipUnless(alignment < 2 << 20 || OperatingSystem.IsLinux(), "huge pages are asked for on Linux only");
        for (int round = 0; round < 3; round++)
        {
            nint address = PageMemory.Map("test", byteCount);
            Assert.Equal(0, address % alignment);
            Span<byte> memory = new((void*)address, (int)byteCount);
            Assert.Equal(-1, memory.IndexOfAnyExcept((byte)0));
            memory.Fill(1);
            PageMemory.Release(address, byteCount);
        }
    }

    [Theory]
    [InlineData(1L << 50)]
    [InlineData(long.MaxValue)]
    public void More_memory_than_there_is_is_refused_with_both_sizes(long byteCount)
    {
        using CpuBackend backend = CpuBackend.Create(1);
        DeviceException refusal = Assert.Throws<DeviceException>(() => backend.Allocate("optimizer state", byteCount));
        Assert.Matches("^'optimizer state' needs [0-9,]+ MiB of memory and [0-9,]+ MiB are free; ", refusal.Message);
    }

    [Fact]
    public void Memory_that_is_promised_but_not_yet_touched_is_not_free()
    {
        using CpuBackend backend = CpuBackend.Create(1);
        List<Arena> arenas = [];
        try
        {
            // Untouched, all of them could be mapped.
            Assert.Throws<DeviceException>(() =>
            {
                for (int i = 0; i < 64 * 1024; i++)
                {
                    arenas.Add(backend.Allocate("step", 1L << 30));
                }
            });
        }
        finally
        {
            arenas.ForEach(arena => arena.Dispose());
        }
    }
}
