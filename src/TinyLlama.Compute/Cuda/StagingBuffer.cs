namespace TinyLlama.Compute.Cuda;

/// <summary>
/// Host memory that the GPU reads by itself, as a ring of two halves: what is written passes through it, so that the
/// caller's memory is free at once and nobody waits but where a half is full whose last copies are still under way.
/// </summary>
internal sealed unsafe class StagingBuffer
{
    private const int HalfBytes = 4 << 20;
    private const int Alignment = 64;

    private readonly CudaDevice _device;
    private readonly byte* _memory;
    private readonly nint[] _copied = new nint[2];
    private int _half;
    private int _used;

    /// <summary>Takes the memory.</summary>
    public StagingBuffer(CudaDevice device)
    {
        _device = device;
        void* memory;
        device.Check(CudaDriver.cuMemHostAlloc(&memory, 2 * HalfBytes, 0), "memory of the host for copies");
        _memory = (byte*)memory;
        for (int half = 0; half < _copied.Length; half++)
        {
            nint copied;
            device.Check(CudaDriver.cuEventCreate(&copied, CudaDriver.EventWithoutTime), "an event for copies");
            _copied[half] = copied;
        }
    }

    /// <summary>Queues a copy to the device.</summary>
    public void Write(nint destination, byte* source, long bytes)
    {
        while (bytes > 0)
        {
            if (_used == HalfBytes)
            {
                Turn();
            }

            int count = (int)Math.Min(bytes, HalfBytes - _used);
            byte* staged = _memory + (_half * HalfBytes) + _used;
            Buffer.MemoryCopy(source, staged, count, count);
            _device.Check(CudaDriver.cuMemcpyHtoDAsync_v2(destination, staged, (nuint)count, _device.Stream), "a copy to the GPU");
            destination += count;
            source += count;
            bytes -= count;
            _used = Math.Min(HalfBytes, (_used + count + Alignment - 1) & -Alignment);
        }
    }

    /// <summary>Gives the memory back; no error, as a device that failed has told so before.</summary>
    public void Release()
    {
        _ = CudaDriver.cuStreamSynchronize(_device.Stream);
        _ = CudaDriver.cuMemFreeHost(_memory);
        foreach (nint copied in _copied)
        {
            _ = CudaDriver.cuEventDestroy_v2(copied);
        }
    }

    // To the other half, once its copies are done; an event that was never recorded is.
    private void Turn()
    {
        _device.Check(CudaDriver.cuEventRecord(_copied[_half], _device.Stream), "an event for copies");
        (_half, _used) = (_half ^ 1, 0);
        _device.Check(CudaDriver.cuEventSynchronize(_copied[_half]), "the operations before a copy to the GPU");
    }
}
