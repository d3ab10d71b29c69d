using System.Runtime.InteropServices;
using Iced.Intel;

namespace TinyLlama.Compute.Native;

/// <summary>Machine code in memory, on Linux: written first, then made executable; never both at once.</summary>
internal static unsafe partial class ExecutableMemory
{
    /// <summary>Assembles code that lies anywhere.</summary>
    public static byte[] Assemble(Action<Assembler> emit)
    {
        Assembler code = new(64);
        emit(code);
        using MemoryStream bytes = new();
        code.Assemble(new StreamCodeWriter(bytes), rip: 0);
        return bytes.ToArray();
    }

    /// <summary>Maps code for the life of the process.</summary>
    /// <returns>The address of its first byte.</returns>
    /// <exception cref="DeviceException">The system does not allow it, as some policies do.</exception>
    public static nint Map(ReadOnlySpan<byte> code)
    {
        nuint length = (nuint)code.Length;
        nint address = MapMemory(0, length, Read | Write, PrivateAnonymous, -1, 0);
        if (address == -1)
        {
            throw Refused();
        }

        code.CopyTo(new Span<byte>((void*)address, code.Length));
        if (Protect(address, length, Read | Execute) != 0)
        {
            DeviceException refused = Refused();
            _ = Unmap(address, length);
            throw refused;
        }

        return address;
    }

    private static DeviceException Refused() =>
        new($"the system allows no executable memory: {Marshal.GetPInvokeErrorMessage(Marshal.GetLastPInvokeError())}");

    // Linux's numbers.
    private const int Read = 1;
    private const int Write = 2;
    private const int Execute = 4;
    private const int PrivateAnonymous = 0x02 | 0x20;

    [LibraryImport("libc", EntryPoint = "mmap", SetLastError = true)]
    [DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]
    private static partial nint MapMemory(nint address, nuint length, int protection, int flags, int file, nint offset);

    [LibraryImport("libc", EntryPoint = "mprotect", SetLastError = true)]
    [DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]
    private static partial int Protect(nint address, nuint length, int protection);

    [LibraryImport("libc", EntryPoint = "munmap")]
    [DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]
    private static partial int Unmap(nint address, nuint length);
}
