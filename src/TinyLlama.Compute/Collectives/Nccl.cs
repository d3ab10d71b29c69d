using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using TinyLlama.Compute.Native;

namespace TinyLlama.Compute.Collectives;

/// <summary>
/// NCCL's functions, under the names that libnccl exports. Those that return int return an ncclResult_t: 0 is success. The
/// declarations hold from 2.18 on, the first with <see cref="ncclCommSplit"/>.
/// </summary>
internal static unsafe partial class Nccl
{
    /// <summary>ncclInProgress: a call on a communicator that does not block goes on by itself.</summary>
    public const int InProgress = 7;

    /// <summary>ncclUint8: what moves are bytes.</summary>
    public const int Byte = 1;

    private const string Library = SystemLibraries.Nccl;

    static Nccl() => SystemLibraries.Resolve();

    [LibraryImport(Library)]
    public static partial int ncclGetVersion(int* version);

    [LibraryImport(Library)]
    public static partial int ncclGetUniqueId(UniqueId* id);

    /// <summary>Joins a communicator; <paramref name="id"/> goes by value, 128 bytes on the stack.</summary>
    [LibraryImport(Library)]
    public static partial int ncclCommInitRankConfig(nint* communicator, int ranks, UniqueId id, int rank, Config* config);

    [LibraryImport(Library)]
    public static partial int ncclCommSplit(nint communicator, int color, int key, nint* part, Config* config);

    [LibraryImport(Library)]
    public static partial int ncclCommFinalize(nint communicator);

    [LibraryImport(Library)]
    public static partial int ncclCommDestroy(nint communicator);

    [LibraryImport(Library)]
    public static partial int ncclCommAbort(nint communicator);

    [LibraryImport(Library)]
    public static partial int ncclCommGetAsyncError(nint communicator, int* error);

    [LibraryImport(Library)]
    public static partial byte* ncclGetErrorString(int result);

    [LibraryImport(Library)]
    public static partial byte* ncclGetLastError(nint communicator);

    [LibraryImport(Library)]
    public static partial int ncclGroupStart();

    [LibraryImport(Library)]
    public static partial int ncclGroupEnd();

    [LibraryImport(Library)]
    public static partial int ncclAllGather(nint source, nint destination, nuint countOfOne, int type, nint communicator, nint stream);

    [LibraryImport(Library)]
    public static partial int ncclBroadcast(nint source, nint destination, nuint count, int type, int root, nint communicator, nint stream);

    [LibraryImport(Library)]
    public static partial int ncclSend(nint source, nuint count, int type, int peer, nint communicator, nint stream);

    [LibraryImport(Library)]
    public static partial int ncclRecv(nint destination, nuint count, int type, int peer, nint communicator, nint stream);

    /// <summary>ncclUniqueId: how the ranks of a communicator find each other.</summary>
    [InlineArray(128)]
    public struct UniqueId
    {
        private byte _byte;
    }

    /// <summary>ncclConfig_t as of 2.17; its size and version tell newer libraries which fields there are.</summary>
    [StructLayout(LayoutKind.Sequential)]
    public struct Config
    {
        public nuint Size;
        public uint Magic;
        public uint Version;
        public int Blocking;
        public int ClusterSize;
        public int LeastBlocks;
        public int MostBlocks;
        public byte* NetworkName;
        public int SplitShares;

        /// <summary>Gets one of which every call returns at once.</summary>
        public static Config NonBlocking => new()
        {
            Size = (nuint)sizeof(Config),
            Magic = 0xcafebeef,
            Version = 21_700,
            Blocking = 0,
            ClusterSize = Undefined,
            LeastBlocks = Undefined,
            MostBlocks = Undefined,
            SplitShares = Undefined,
        };

        // NCCL_CONFIG_UNDEF_INT.
        private const int Undefined = int.MinValue;
    }
}
