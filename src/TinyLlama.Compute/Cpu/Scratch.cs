using System.Runtime.InteropServices;

namespace TinyLlama.Compute.Cpu;

/// <summary>Memory that kernels use inside one operation: allocated once, so that no operation allocates.</summary>
internal sealed unsafe class Scratch : IDisposable
{
    private float* _memory;

    /// <summary>Takes address space; the system backs a page when a kernel first touches it.</summary>
    /// <param name="threads">Threads that need a part of their own.</param>
    public Scratch(int threads)
    {
        nuint count = (nuint)SharedCount + ((nuint)threads * Attention.ScratchCount);
        _memory = (float*)NativeMemory.AlignedAlloc(count * sizeof(float), Arena.Alignment);
    }

    /// <summary>Gets the part that an operation uses as a whole.</summary>
    public float* Shared => _memory;

    private static int SharedCount => RmsNorm.Partials * RmsNorm.MaxChannels;

    /// <summary>The part of one thread, <see cref="Attention.ScratchCount"/> floats.</summary>
    public float* Of(int thread) => _memory + SharedCount + ((nint)thread * Attention.ScratchCount);

    /// <inheritdoc/>
    public void Dispose()
    {
        NativeMemory.AlignedFree(_memory);
        _memory = null;
    }
}
