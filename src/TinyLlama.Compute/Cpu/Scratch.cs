using TinyLlama.Compute.Native;

namespace TinyLlama.Compute.Cpu;

/// <summary>Memory that kernels use inside one operation: allocated once, so that no operation allocates.</summary>
internal sealed unsafe class Scratch : IDisposable
{
    private readonly long _byteCount;
    private float* _memory;

    /// <summary>Takes address space; the system backs a page when a kernel first touches it.</summary>
    /// <param name="threads">Threads that need a part of their own.</param>
    public Scratch(int threads)
    {
        _byteCount = sizeof(float) * (SharedCount + ((long)threads * ThreadCount));
        _memory = (float*)PageMemory.Map("scratch of kernels", _byteCount);
    }

    /// <summary>Gets the part that an operation uses as a whole.</summary>
    public float* Shared => _memory;

    private static int SharedCount => Math.Max(RmsNorm.Partials * RmsNorm.MaxChannels, MatMul.SharedCount);

    // A multiple of a page, so that no two threads write to the same cache line.
    private static int ThreadCount =>
        (Math.Max(Math.Max(MatMul.ThreadCount, Attention.ScratchCount), Math.Max(Q8MatMul.ThreadBytes, TiledMatMul.ThreadBytes) / sizeof(float)) + 1023) & -1024;

    /// <summary>The part that one thread uses in one task, enough for any operation.</summary>
    public float* Of(int thread) => _memory + SharedCount + ((nint)thread * ThreadCount);

    /// <inheritdoc/>
    public void Dispose()
    {
        if (_memory != null)
        {
            PageMemory.Release((nint)_memory, _byteCount);
            _memory = null;
        }
    }
}
