using System.Runtime.InteropServices;

namespace TinyLlama.Compute.Cpu;

/// <summary>Memory that kernels use inside one operation: allocated once, so that no operation allocates.</summary>
internal sealed unsafe class Scratch : IDisposable
{
    private float* _memory;

    /// <summary>Takes address space; the system backs a page when a kernel first touches it.</summary>
    public Scratch()
    {
        _memory = (float*)NativeMemory.AlignedAlloc(SharedCount * sizeof(float), Arena.Alignment);
    }

    /// <summary>Gets the part that an operation uses as a whole.</summary>
    public float* Shared => _memory;

    private static nuint SharedCount => (nuint)RmsNorm.Partials * RmsNorm.MaxChannels;

    /// <inheritdoc/>
    public void Dispose()
    {
        NativeMemory.AlignedFree(_memory);
        _memory = null;
    }
}
