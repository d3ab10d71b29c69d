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

    /// <summary>Maps code and tries it.</summary>
    /// <typeparam name="T">The address of the code, or those of its parts.</typeparam>
    /// <param name="name">What the code is for, in messages.</param>
    /// <param name="unsupported">Why this machine has no such instructions, or null.</param>
    /// <param name="map">Assembles and maps it; called where nothing is missing.</param>
    /// <param name="isRight">Whether it computes here what it should.</param>
    /// <returns>The code, or in one line why it cannot be used.</returns>
    public static (T? Code, string? Fault) Load<T>(string name, string? unsupported, Func<T> map, Predicate<T> isRight)
    {
        if (unsupported is not null)
        {
            return (default, unsupported);
        }

        try
        {
            T code = map();
            return isRight(code) ? (code, null) : (default, $"the code for {name} gives wrong results on this processor");
        }
        catch (DeviceException e)
        {
            return (default, $"the code for {name} cannot be loaded, {e.Message}");
        }
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
