using System.Globalization;
using System.Runtime.InteropServices;

namespace TinyLlama.Compute.Native;

/// <summary>
/// Zeroed memory from the operating system. On Linux, mapped at multiples of 2 MiB and backed by huge pages where the
/// system has them: streams of weights then miss the translation buffer less.
/// </summary>
internal static unsafe partial class PageMemory
{
    private const nuint HugePage = 2 << 20;

    private static long s_bytes;

    /// <summary>Maps memory; <see cref="Release"/> gives it back.</summary>
    /// <param name="name">What it is for, for the message.</param>
    /// <param name="byteCount">Its size.</param>
    /// <returns>Its address, a multiple of 4096.</returns>
    /// <exception cref="DeviceException">The machine has not that much memory left.</exception>
    public static nint Map(string name, long byteCount)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(byteCount);

        // The system promises more than it has and kills who takes it at its word, so ask first. What was mapped but
        // not yet touched still counts as free there.
        long available = AvailableBytes() - Math.Max(0, Interlocked.Read(ref s_bytes) - Environment.WorkingSet);
        if (byteCount > available)
        {
            throw NotEnough(name, byteCount, available);
        }

        nint address = OperatingSystem.IsLinux() ? MapLinux((nuint)byteCount) : AllocateZeroed((nuint)byteCount);
        if (address == 0)
        {
            throw NotEnough(name, byteCount, available);
        }

        Interlocked.Add(ref s_bytes, byteCount);
        return address;
    }

    /// <summary>Gives back what <see cref="Map"/> returned.</summary>
    public static void Release(nint address, long byteCount)
    {
        if (OperatingSystem.IsLinux())
        {
            _ = Unmap(address, LinuxLength((nuint)byteCount));
        }
        else
        {
            NativeMemory.AlignedFree((void*)address);
        }

        Interlocked.Add(ref s_bytes, -byteCount);
    }

    /// <summary>Drops whole pages of a mapped file from memory where the system can; they are read again when they are touched.</summary>
    /// <param name="address">The first byte.</param>
    /// <param name="byteCount">How many.</param>
    public static void DropFilePages(nint address, long byteCount)
    {
        if (OperatingSystem.IsLinux())
        {
            // Advice: what the system keeps, it keeps.
            nint page = Environment.SystemPageSize;
            nint first = (address + page - 1) & -page;
            nint end = (address + (nint)byteCount) & -page;
            _ = first < end ? Advise(first, (nuint)(end - first), AdviseNotNeeded) : 0;
        }
    }

    private static DeviceException NotEnough(string name, long byteCount, long available) => new(string.Create(
        CultureInfo.InvariantCulture,
        $"'{name}' needs {byteCount / 1048576.0:N0} MiB of memory and {Math.Max(0, available) / 1048576.0:N0} MiB are free; use a smaller model, batch or context"));

    // Total memory, or the container's limit, is all that .NET knows; Linux also says what is free.
    private static long AvailableBytes()
    {
        long total = GC.GetGCMemoryInfo().TotalAvailableMemoryBytes;
        if (!OperatingSystem.IsLinux())
        {
            return total;
        }

        foreach (string line in File.ReadLines("/proc/meminfo"))
        {
            // MemAvailable:   12345678 kB
            if (line.StartsWith("MemAvailable:", StringComparison.Ordinal))
            {
                ReadOnlySpan<char> number = line.AsSpan("MemAvailable:".Length, line.Length - "MemAvailable:".Length - " kB".Length);
                return Math.Min(total, long.Parse(number, NumberStyles.AllowLeadingWhite, CultureInfo.InvariantCulture) * 1024);
            }
        }

        return total;
    }

    private static nint AllocateZeroed(nuint byteCount)
    {
        try
        {
            void* memory = NativeMemory.AlignedAlloc(Math.Max(byteCount, 1), 4096);
            NativeMemory.Clear(memory, byteCount);
            return (nint)memory;
        }
        catch (OutOfMemoryException)
        {
            return 0;
        }
    }

    private static nuint LinuxLength(nuint byteCount)
    {
        nuint page = byteCount < HugePage ? (nuint)Environment.SystemPageSize : HugePage;
        return (Math.Max(byteCount, 1) + page - 1) & ~(page - 1);
    }

    private static nint MapLinux(nuint byteCount)
    {
        nuint length = LinuxLength(byteCount);
        if (byteCount < HugePage)
        {
            return MapPages(length);
        }

        // Aligned by mapping one huge page more and giving back the ends.
        nint mapped = MapPages(length + HugePage);
        if (mapped == 0)
        {
            return 0;
        }

        nint address = (nint)(((nuint)mapped + HugePage - 1) & ~(HugePage - 1));
        nuint before = (nuint)(address - mapped);
        _ = before == 0 ? 0 : Unmap(mapped, before);
        _ = Unmap(address + (nint)length, HugePage - before);

        // Advice: where the system has no huge pages, small ones do.
        _ = Advise(address, length, AdviseHugePage);
        return address;
    }

    private static nint MapPages(nuint length)
    {
        nint address = MapMemory(0, length, ReadWrite, PrivateAnonymous, -1, 0);
        return address == -1 ? 0 : address;
    }

    // Linux's numbers: the same on x64 and ARM64.
    private const int ReadWrite = 1 | 2;
    private const int PrivateAnonymous = 0x02 | 0x20;
    private const int AdviseNotNeeded = 4;
    private const int AdviseHugePage = 14;

    [LibraryImport("libc", EntryPoint = "mmap", SetLastError = true)]
    [DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]
    private static partial nint MapMemory(nint address, nuint length, int protection, int flags, int file, nint offset);

    [LibraryImport("libc", EntryPoint = "munmap")]
    [DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]
    private static partial int Unmap(nint address, nuint length);

    [LibraryImport("libc", EntryPoint = "madvise")]
    [DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]
    private static partial int Advise(nint address, nuint length, int advice);
}
