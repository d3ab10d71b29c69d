using System.Diagnostics.CodeAnalysis;
using System.Text;

namespace TinyLlama.Compute.Cuda;

/// <summary>
/// One GPU: its primary context, one stream on which everything runs in order, and the kernels. Any thread may use it, one
/// at a time.
/// </summary>
internal sealed unsafe class CudaDevice : IDisposable
{
    /// <summary>Bytes of <see cref="Scratch"/>: what cuBLASLt's kernels for Hopper ask for.</summary>
    public const int ScratchBytes = 32 << 20;

    // A device, not its context: when a GPU is opened again the driver may give it the handle of the context that is gone.
    [ThreadStatic]
    private static CudaDevice? s_current;

    private readonly int _device;
    private readonly nint _context;
    private readonly nint _stream;
    private readonly StagingBuffer _staging;
    private readonly List<nint> _modules = [];
    private readonly Dictionary<string, nint> _kernels = [];
    private readonly Dictionary<nint, long> _held = [];
    private bool _disposed;

    /// <summary>Opens a GPU and loads all kernels; the first time on a machine it compiles them.</summary>
    /// <param name="ordinal">Which, from 0.</param>
    /// <exception cref="DeviceException">There is no such GPU, or it or its libraries are too old.</exception>
    public CudaDevice(int ordinal)
    {
        Gpu = Gpu.Get(ordinal);
        int device;
        Check(CudaDriver.cuDeviceGet(&device, ordinal), "the GPU could not be used");
        _device = device;
        Multiprocessors = Attribute(CudaDriver.Multiprocessors);
        SharedBytes = Attribute(CudaDriver.SharedBytesOptIn);
        nint context, stream;
        Check(CudaDriver.cuDevicePrimaryCtxRetain(&context, device), "the GPU could not be used");
        _context = context;
        Check(CudaDriver.cuCtxSetCurrent(context), "the GPU could not be used");
        s_current = this;
        Check(CudaDriver.cuStreamCreate(&stream, CudaDriver.NonBlocking), "the GPU could not be used");
        _stream = stream;
        foreach ((string source, byte[] code) in KernelImages.Sources.Zip(KernelImages.GetAll(Gpu.Capability)))
        {
            nint module;
            fixed (byte* image = code)
            {
                int result = CudaDriver.cuModuleLoadData(&module, image);
                if (result != 0)
                {
                    throw new DeviceException(
                        $"the driver of {Gpu}, for CUDA {CudaLibraries.Text(CudaLibraries.Found.DriverVersion)}, cannot load {source} as NVRTC {KernelImages.CompilerVersion} compiled it ({Gpu.ErrorName(result)}): install a newer driver, or use --device cpu");
                }
            }

            _modules.Add(module);
        }

        Scratch = Allocate("scratch", ScratchBytes);
        _staging = new StagingBuffer(this);
    }

    /// <summary>Gets which GPU it is.</summary>
    public Gpu Gpu { get; }

    /// <summary>Gets the number of its multiprocessors.</summary>
    public int Multiprocessors { get; }

    /// <summary>Gets the most shared memory of a block, in bytes.</summary>
    public int SharedBytes { get; }

    /// <summary>Gets the stream.</summary>
    public nint Stream => _stream;

    /// <summary>Gets memory that an operation may use until its last kernel ends; one after the other they all do.</summary>
    public nint Scratch { get; }

    /// <summary>Gets the size of its memory in bytes, and how much of it is free.</summary>
    public (long Free, long Total) Memory
    {
        get
        {
            MakeCurrent();
            nuint free, total;
            Check(CudaDriver.cuMemGetInfo_v2(&free, &total), "its memory");
            return ((long)free, (long)total);
        }
    }

    /// <summary>Gets the bytes of its memory that were allocated here and are not given back; others' use of the GPU does not count.</summary>
    public long HeldBytes => _held.Values.Sum();

    /// <summary>Makes its context that of the calling thread, as every call to a library that runs on it needs.</summary>
    public void MakeCurrent()
    {
        if (s_current != this)
        {
            Check(CudaDriver.cuCtxSetCurrent(_context), "the GPU could not be used");
            s_current = this;
        }
    }

    /// <summary>Allocates zeroed memory.</summary>
    /// <param name="name">What it is for.</param>
    /// <param name="bytes">Its size.</param>
    /// <exception cref="DeviceException">There is not that much.</exception>
    public nint Allocate(string name, long bytes)
    {
        MakeCurrent();
        nint address;
        int result = CudaDriver.cuMemAlloc_v2(&address, (nuint)Math.Max(1, bytes));
        if (result == CudaDriver.OutOfMemory)
        {
            (long free, long total) = Memory;
            throw new DeviceException(
                $"'{name}' needs {Gibibytes(bytes)} and cuda:{Gpu.Ordinal} ({Gpu.Name}) has {Gibibytes(free)} of {Gibibytes(total)} free: use a smaller micro-batch, more recomputation or a smaller cache");
        }

        Check(result, name);
        _held.Add(address, bytes);
        Check(CudaDriver.cuMemsetD8Async(address, 0, (nuint)bytes, _stream), name);
        return address;
    }

    /// <summary>Gives memory back, after what is queued. No error: a GPU that failed has told so before.</summary>
    public void Free(nint address)
    {
        _ = CudaDriver.cuCtxSetCurrent(_context);
        s_current = this;
        _held.Remove(address);
        _ = CudaDriver.cuMemFree_v2(address);
    }

    /// <summary>Copies from the host, in order with everything else; the host memory is free on return.</summary>
    public void Write(nint destination, void* source, long bytes)
    {
        MakeCurrent();
        _staging.Write(destination, (byte*)source, bytes);
    }

    /// <summary>Waits for everything queued, then copies to the host.</summary>
    public void Read(void* destination, nint source, long bytes)
    {
        MakeCurrent();
        Check(CudaDriver.cuMemcpyDtoHAsync_v2(destination, source, (nuint)bytes, _stream), "a copy from the GPU");
        Check(CudaDriver.cuStreamSynchronize(_stream), "the operations before a copy from the GPU");
    }

    /// <summary>Copies rows of bytes on the device.</summary>
    /// <param name="destination">The first byte of the first row.</param>
    /// <param name="destinationPitch">Bytes from one row to the next.</param>
    /// <param name="source">As the destination.</param>
    /// <param name="sourcePitch">As the destination.</param>
    /// <param name="width">Bytes of a row.</param>
    /// <param name="rows">Number of rows.</param>
    public void Copy(nint destination, long destinationPitch, nint source, long sourcePitch, long width, int rows)
    {
        MakeCurrent();
        CudaDriver.Copy2D copy = new()
        {
            SourceType = CudaDriver.Copy2D.Device,
            Source = source,
            SourcePitch = (nuint)sourcePitch,
            DestinationType = CudaDriver.Copy2D.Device,
            Destination = destination,
            DestinationPitch = (nuint)destinationPitch,
            Width = (nuint)width,
            Height = (nuint)rows,
        };
        Check(CudaDriver.cuMemcpy2DAsync_v2(&copy, _stream), "a copy on the GPU");
    }

    /// <summary>Sets rows of bytes to zero; arguments as in <see cref="Copy"/>.</summary>
    public void Zero(nint destination, long pitch, long width, int rows)
    {
        MakeCurrent();
        Check(CudaDriver.cuMemsetD2D8Async(destination, (nuint)pitch, 0, (nuint)width, (nuint)rows, _stream), "zeroing on the GPU");
    }

    /// <summary>Queues a kernel; nothing where the grid is empty. Allocates nothing but at the first launch of a kernel.</summary>
    /// <param name="kernel">Its name in the sources.</param>
    /// <param name="grid">Blocks.</param>
    /// <param name="threads">Threads of a block.</param>
    /// <param name="sharedBytes">Dynamic shared memory of a block.</param>
    /// <param name="arguments">In the order of its parameters.</param>
    /// <exception cref="DeviceException">The GPU failed, at this or at an earlier operation.</exception>
    public void Launch(string kernel, (int X, int Y, int Z) grid, int threads, int sharedBytes, params ReadOnlySpan<KernelArgument> arguments) =>
        LaunchOn(_stream, kernel, grid, threads, sharedBytes, arguments);

    /// <summary><see cref="Launch"/> on another stream.</summary>
    public void LaunchOn(
        nint stream, string kernel, (int X, int Y, int Z) grid, int threads, int sharedBytes, params ReadOnlySpan<KernelArgument> arguments)
    {
        if (grid.X == 0 || grid.Y == 0 || grid.Z == 0)
        {
            return;
        }

        MakeCurrent();
        nint function = _kernels.TryGetValue(kernel, out nint known) ? known : Load(kernel);
        fixed (KernelArgument* first = arguments)
        {
            // A null after the last, so that whoever looks on (the emulator of the tests) can count them.
            void** pointers = stackalloc void*[arguments.Length + 1];
            for (int i = 0; i < arguments.Length; i++)
            {
                pointers[i] = first + i;
            }

            pointers[arguments.Length] = null;
            int result = CudaDriver.cuLaunchKernel(
                function, (uint)grid.X, (uint)grid.Y, (uint)grid.Z, (uint)threads, 1, 1, (uint)sharedBytes, stream, pointers, null);
            Check(result, kernel);
        }
    }

    /// <summary>Records operations instead of running them. They must neither wait, nor allocate, nor copy from or to the host.</summary>
    /// <exception cref="DeviceException">The GPU failed, or an operation did what it must not.</exception>
    public CudaGraph Capture(Action operations)
    {
        const string What = "recording operations";
        MakeCurrent();
        Check(CudaDriver.cuStreamBeginCapture_v2(_stream, CudaDriver.CaptureThreadLocal), What);
        nint graph, executable;
        int ended;
        try
        {
            operations();
        }
        finally
        {
            ended = CudaDriver.cuStreamEndCapture(_stream, &graph);
        }

        Check(ended, What);
        int instantiated = CudaDriver.cuGraphInstantiateWithFlags(&executable, graph, 0);
        _ = CudaDriver.cuGraphDestroy(graph);
        Check(instantiated, What);
        return new CudaGraph(this, executable);
    }

    /// <summary>Throws the driver's error as one line.</summary>
    /// <param name="result">What the driver returned.</param>
    /// <param name="what">The kernel, or what was tried.</param>
    public void Check(int result, string what)
    {
        if (result != 0)
        {
            Fail(result, what);
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        if (!_disposed)
        {
            _disposed = true;
            _ = CudaDriver.cuCtxSetCurrent(_context);
            _staging.Release();
            _ = CudaDriver.cuMemFree_v2(Scratch);
            _modules.ForEach(module => _ = CudaDriver.cuModuleUnload(module));
            _ = CudaDriver.cuStreamDestroy_v2(_stream);
            _ = CudaDriver.cuDevicePrimaryCtxRelease_v2(_device);
            s_current = null;
        }
    }

    private static string Gibibytes(long bytes) => $"{bytes / (double)(1L << 30):F2} GiB";

    private int Attribute(int attribute)
    {
        int value;
        Check(CudaDriver.cuDeviceGetAttribute(&value, attribute, _device), "an attribute of the GPU");
        return value;
    }

    // Finds a kernel and lets it ask for all the shared memory there is.
    private nint Load(string kernel)
    {
        nint function = 0;
        fixed (byte* name = Encoding.UTF8.GetBytes(kernel + '\0'))
        {
            int result = CudaDriver.NotFound;
            for (int i = 0; i < _modules.Count && result == CudaDriver.NotFound; i++)
            {
                result = CudaDriver.cuModuleGetFunction(&function, _modules[i], name);
            }

            Check(result, kernel);
        }

        int known;
        Check(CudaDriver.cuFuncGetAttribute(&known, CudaDriver.FunctionSharedBytes, function), kernel);
        Check(CudaDriver.cuFuncSetAttribute(function, CudaDriver.FunctionDynamicSharedBytes, SharedBytes - known), kernel);
        _kernels.Add(kernel, function);
        return function;
    }

    [DoesNotReturn]
    private void Fail(int result, string what) =>
        throw new DeviceException($"cuda:{Gpu.Ordinal} ({Gpu.Name}): {what}: {Gpu.ErrorName(result)}");
}
