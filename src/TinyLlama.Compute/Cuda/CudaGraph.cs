namespace TinyLlama.Compute.Cuda;

/// <summary>Operations of a stream that the driver queues as one: a CUDA graph.</summary>
/// <param name="device">The device; dispose of this before it.</param>
/// <param name="executable">The driver's instance, a CUgraphExec.</param>
internal sealed class CudaGraph(CudaDevice device, nint executable) : IDisposable
{
    private bool _disposed;

    /// <summary>Queues them all.</summary>
    /// <exception cref="DeviceException">The GPU failed, at this or at an earlier operation.</exception>
    public void Launch()
    {
        device.MakeCurrent();
        device.Check(CudaDriver.cuGraphLaunch(executable, device.Stream), "a graph of operations");
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        if (!_disposed)
        {
            _disposed = true;
            _ = CudaDriver.cuGraphExecDestroy(executable);
        }
    }
}
