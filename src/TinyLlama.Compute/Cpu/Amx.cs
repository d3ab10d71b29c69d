using System.Runtime.InteropServices;
using System.Runtime.Intrinsics.X86;
using TinyLlama.Compute.Native;
using static Iced.Intel.AssemblerRegisters;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// The tile registers of AMX: eight of 16 rows × 64 bytes, which one instruction multiplies and adds up. .NET has no intrinsics
/// for them, so that whatever uses them is emitted at run time.
/// </summary>
/// <remarks>
/// Intel, "Intel 64 and IA-32 Architectures Software Developer's Manual", volume 1, chapter 18. Linux gives a process
/// the registers when it asks; a thread has to configure them before it uses them and should release them
/// afterwards, as their 8 KiB are saved whenever it loses its core.
/// </remarks>
internal static unsafe partial class Amx
{
    /// <summary>The rows of a tile register.</summary>
    public const int TileRows = 16;

    /// <summary>The dwords of a row.</summary>
    public const int RowDwords = 16;

    private static readonly State s_state = Load();

    /// <summary>Gets a value indicating whether the processor has the instructions, those of bf16 among them, and the system is Linux.</summary>
    public static bool IsSupported => Avx512F.X64.IsSupported && OperatingSystem.IsLinux() && HasInstructions();

    /// <summary>Gets why they cannot be used here, or null. The first use of it asks the system.</summary>
    public static string? Fault => s_state.Fault;

    /// <summary>Gives this thread tiles with zeros. Until <see cref="Release"/> nothing else may configure them.</summary>
    /// <param name="sizes">What <see cref="Sizes"/> made.</param>
    public static void Configure(byte* sizes) =>
        ((delegate* unmanaged[SuppressGCTransition]<byte*, void>)s_state.Configure)(sizes);

    /// <summary>Ends the use of tiles by this thread.</summary>
    public static void Release() =>
        ((delegate* unmanaged[SuppressGCTransition]<void>)s_state.Release)();

    /// <summary>The sizes of the eight tiles, for the life of the process.</summary>
    /// <param name="tile">The rows of a tile and the bytes of each.</param>
    public static byte* Sizes(Func<int, (int Rows, int Bytes)> tile)
    {
        // Palette 1; from byte 16 the bytes of a row of each tile, from byte 48 their rows.
        const int Bytes = 64;
        byte* sizes = (byte*)NativeMemory.AlignedAlloc(Bytes, Bytes);
        new Span<byte>(sizes, Bytes).Clear();
        sizes[0] = 1;
        for (int i = 0; i < 8; i++)
        {
            (int rows, int bytes) = tile(i);
            ((ushort*)(sizes + 16))[i] = (ushort)bytes;
            sizes[48 + i] = (byte)rows;
        }

        return sizes;
    }

    private static bool HasInstructions()
    {
        const int Bf16 = 1 << 22, Tile = 1 << 24;
        return (X86Base.CpuId(7, 0).Edx & (Bf16 | Tile)) == (Bf16 | Tile);
    }

    private static State Load()
    {
        if (!IsSupported)
        {
            return new State { Fault = "no AMX here, or not Linux on x64" };
        }

        // Linux, Documentation/arch/x86/xstate.rst.
        const int ArchPrctl = 158, RequestPermission = 0x1023, TileData = 18;
        if (SystemCall(ArchPrctl, RequestPermission, TileData) != 0)
        {
            return new State { Fault = $"the system gives no tiles of AMX: {Marshal.GetPInvokeErrorMessage(Marshal.GetLastPInvokeError())}" };
        }

        try
        {
            return new State
            {
                Configure = ExecutableMemory.Map(ExecutableMemory.Assemble(code =>
                {
                    code.ldtilecfg(__[rdi]);
                    code.ret();
                })),
                Release = ExecutableMemory.Map(ExecutableMemory.Assemble(code =>
                {
                    code.tilerelease();
                    code.ret();
                })),
            };
        }
        catch (DeviceException e)
        {
            return new State { Fault = $"the code for AMX cannot be loaded, {e.Message}" };
        }
    }

    private struct State
    {
        public string? Fault;
        public nint Configure;
        public nint Release;
    }

    [LibraryImport("libc", EntryPoint = "syscall", SetLastError = true)]
    [DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]
    private static partial nint SystemCall(nint number, nint first, nint second);
}
