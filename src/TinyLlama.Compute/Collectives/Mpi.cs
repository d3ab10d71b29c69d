using System.Runtime.InteropServices;

namespace TinyLlama.Compute.Collectives;

/// <summary>
/// The system's MPI library, whichever of three binary interfaces it has: Open MPI's (handles are addresses of exported
/// variables), MPICH's and its family's (Intel MPI, MVAPICH, Cray: numbers of 32 bits), or that of the MPI 5 standard
/// (small numbers as wide as pointers).
/// </summary>
/// <remarks>
/// A handle is an <see langword="nint"/> here: one of 32 bits travels in the low half of a register, and is written into
/// the low half of a zeroed one, on every little-endian machine of 64 bits.
/// </remarks>
internal sealed unsafe class Mpi
{
    private readonly delegate* unmanaged<int, byte*, int*, int> _errorString;
    private readonly delegate* unmanaged<byte*, int*, int> _libraryVersion;

    private Mpi(nint library)
    {
        if (NativeLibrary.TryGetExport(library, "ompi_mpi_comm_world", out nint world))
        {
            (World, Byte, ErrorsReturn) = (world, Export("ompi_mpi_byte"), Export("ompi_mpi_errors_return"));
            (InPlace, StatusIgnore, ThreadFunneled) = (1, 0, 1);
        }
        else if (NativeLibrary.TryGetExport(library, "MPI_Abi_get_version", out nint version) && IsStandard(version))
        {
            (World, Byte, ErrorsReturn) = (0x101, 0x247, 0x142);
            (InPlace, StatusIgnore, ThreadFunneled) = (1, 0, 1024);
        }
        else
        {
            (World, Byte, ErrorsReturn) = (0x44000000, 0x4c00010d, 0x54000001);
            (InPlace, StatusIgnore, ThreadFunneled) = (-1, 1, 1);
        }

        InitThread = (delegate* unmanaged<int*, byte***, int, int*, int>)Export("MPI_Init_thread");
        Leave = (delegate* unmanaged<int>)Export("MPI_Finalize");
        Abort = (delegate* unmanaged<nint, int, int>)Export("MPI_Abort");
        Rank = (delegate* unmanaged<nint, int*, int>)Export("MPI_Comm_rank");
        Size = (delegate* unmanaged<nint, int*, int>)Export("MPI_Comm_size");
        Split = (delegate* unmanaged<nint, int, int, nint*, int>)Export("MPI_Comm_split");
        SetErrorHandler = (delegate* unmanaged<nint, nint, int>)Export("MPI_Comm_set_errhandler");
        Broadcast = (delegate* unmanaged<void*, int, nint, int, nint, int>)Export("MPI_Bcast");
        AllGather = (delegate* unmanaged<void*, int, nint, void*, int, nint, nint, int>)Export("MPI_Allgather");
        AllToAll = (delegate* unmanaged<void*, int, nint, void*, int, nint, nint, int>)Export("MPI_Alltoall");
        Send = (delegate* unmanaged<void*, int, nint, int, int, nint, int>)Export("MPI_Send");
        Receive = (delegate* unmanaged<void*, int, nint, int, int, nint, nint, int>)Export("MPI_Recv");
        Contiguous = (delegate* unmanaged<int, nint, nint*, int>)Export("MPI_Type_contiguous");
        Resized = (delegate* unmanaged<nint, nint, nint, nint*, int>)Export("MPI_Type_create_resized");
        Commit = (delegate* unmanaged<nint*, int>)Export("MPI_Type_commit");
        Free = (delegate* unmanaged<nint*, int>)Export("MPI_Type_free");
        _errorString = (delegate* unmanaged<int, byte*, int*, int>)Export("MPI_Error_string");
        _libraryVersion = (delegate* unmanaged<byte*, int*, int>)Export("MPI_Get_library_version");

        nint Export(string name) => NativeLibrary.TryGetExport(library, name, out nint address) ? address
            : throw new DeviceException($"the MPI library has no {name}; set TINYLLAMA_MPI to the path of a libmpi of Open MPI, of MPICH or of the MPI 5 standard");
    }

    /// <summary>The communicator of all ranks.</summary>
    public readonly nint World;

    /// <summary>The datatype of a byte.</summary>
    public readonly nint Byte;

    /// <summary>The error handler that lets calls return.</summary>
    public readonly nint ErrorsReturn;

    /// <summary>What stands for a source that is in its place already.</summary>
    public readonly nint InPlace;

    /// <summary>What stands for a status that nobody reads.</summary>
    public readonly nint StatusIgnore;

    /// <summary>The level at which one thread makes all calls.</summary>
    public readonly int ThreadFunneled;

    /// <summary>MPI_Init_thread(argc, argv, required, provided).</summary>
    public readonly delegate* unmanaged<int*, byte***, int, int*, int> InitThread;

    /// <summary>MPI_Finalize().</summary>
    public readonly delegate* unmanaged<int> Leave;

    /// <summary>MPI_Abort(comm, code).</summary>
    public readonly delegate* unmanaged<nint, int, int> Abort;

    /// <summary>MPI_Comm_rank(comm, rank).</summary>
    public readonly delegate* unmanaged<nint, int*, int> Rank;

    /// <summary>MPI_Comm_size(comm, size).</summary>
    public readonly delegate* unmanaged<nint, int*, int> Size;

    /// <summary>MPI_Comm_split(comm, color, key, part).</summary>
    public readonly delegate* unmanaged<nint, int, int, nint*, int> Split;

    /// <summary>MPI_Comm_set_errhandler(comm, handler).</summary>
    public readonly delegate* unmanaged<nint, nint, int> SetErrorHandler;

    /// <summary>MPI_Bcast(buffer, count, type, root, comm).</summary>
    public readonly delegate* unmanaged<void*, int, nint, int, nint, int> Broadcast;

    /// <summary>MPI_Allgather(source, count, type, destination, count, type, comm).</summary>
    public readonly delegate* unmanaged<void*, int, nint, void*, int, nint, nint, int> AllGather;

    /// <summary>MPI_Alltoall(source, count, type, destination, count, type, comm).</summary>
    public readonly delegate* unmanaged<void*, int, nint, void*, int, nint, nint, int> AllToAll;

    /// <summary>MPI_Send(buffer, count, type, to, tag, comm).</summary>
    public readonly delegate* unmanaged<void*, int, nint, int, int, nint, int> Send;

    /// <summary>MPI_Recv(buffer, count, type, from, tag, comm, status).</summary>
    public readonly delegate* unmanaged<void*, int, nint, int, int, nint, nint, int> Receive;

    /// <summary>MPI_Type_contiguous(count, type, new).</summary>
    public readonly delegate* unmanaged<int, nint, nint*, int> Contiguous;

    /// <summary>MPI_Type_create_resized(type, lower bound, extent, new).</summary>
    public readonly delegate* unmanaged<nint, nint, nint, nint*, int> Resized;

    /// <summary>MPI_Type_commit(type).</summary>
    public readonly delegate* unmanaged<nint*, int> Commit;

    /// <summary>MPI_Type_free(type).</summary>
    public readonly delegate* unmanaged<nint*, int> Free;

    /// <summary>Loads the first library that is there.</summary>
    /// <param name="names">File names, or one path.</param>
    /// <exception cref="DeviceException">None is, or what is there is no MPI library.</exception>
    public static Mpi Load(IReadOnlyList<string> names)
    {
        foreach (string name in names)
        {
            if (NativeLibrary.TryLoad(name, out nint library))
            {
                return new Mpi(library);
            }
        }

        throw new DeviceException(
            $"an MPI launcher has started this process and its library was not found ({string.Join(", ", names)}); install it, or set TINYLLAMA_MPI to its path");
    }

    /// <summary>The library's name and version, from the first line of what it says of itself.</summary>
    public string Version()
    {
        // MPI_MAX_LIBRARY_VERSION_STRING: 256 in Open MPI, 8192 in the others.
        byte* text = stackalloc byte[8192 + 1];
        int length = 0;
        _ = _libraryVersion(text, &length);
        string version = Marshal.PtrToStringUTF8((nint)text, length);
        int end = version.AsSpan().IndexOfAny(",\n\0");
        return string.Join(' ', version[..(end < 0 ? version.Length : end)].Split((char[]?)null, StringSplitOptions.RemoveEmptyEntries)).Replace(" Version:", string.Empty, StringComparison.Ordinal);
    }

    /// <summary>Throws if a call has failed.</summary>
    /// <param name="status">What it returned.</param>
    /// <param name="operation">What it was for.</param>
    /// <exception cref="CollectiveException">It has.</exception>
    public void Check(int status, string operation)
    {
        if (status != 0)
        {
            byte* text = stackalloc byte[8192 + 1];
            int length = 0;
            _ = _errorString(status, text, &length);
            throw new CollectiveException($"{operation}: {Marshal.PtrToStringUTF8((nint)text, length).ReplaceLineEndings(" ")}");
        }
    }

    // Libraries with an interface of their own may have the function too: it then says -1.
    private static bool IsStandard(nint function)
    {
        int major = -1;
        int minor = -1;
        return ((delegate* unmanaged<int*, int*, int>)function)(&major, &minor) == 0 && major >= 1;
    }
}
