using System.Globalization;
using System.Runtime.InteropServices;
using TinyLlama.Compute.Native;

namespace TinyLlama.Compute.Tests.Native;

public sealed unsafe class ExecutableMemoryTests
{
    [Fact]
    public void Code_runs_and_can_no_longer_be_written()
    {
        Assert.SkipUnless(OperatingSystem.IsLinux() && RuntimeInformation.ProcessArchitecture == Architecture.X64, "Linux on x64 only");

        // mov eax, 42; ret
        nint address = ExecutableMemory.Map([0xB8, 42, 0, 0, 0, 0xC3]);
        Assert.Equal(42, ((delegate* unmanaged<int>)address)());

        // 7f0123456000-7f0123457000 r-xp …
        string page = File.ReadLines("/proc/self/maps").Single(line =>
        {
            long[] ends = [.. line[..line.IndexOf(' ', StringComparison.Ordinal)].Split('-')
                .Select(end => long.Parse(end, NumberStyles.HexNumber, CultureInfo.InvariantCulture))];
            return ends[0] <= address && address < ends[1];
        });
        Assert.Contains(" r-xp ", page, StringComparison.Ordinal);
    }
}
