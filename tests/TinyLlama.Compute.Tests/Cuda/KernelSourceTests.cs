using System.Diagnostics;
using TinyLlama.Tests.Common;

namespace TinyLlama.Compute.Tests.Cuda;

/// <summary>The kernels as text: another compiler takes them too, and PTX is in one file.</summary>
public sealed class KernelSourceTests
{
    private static readonly string s_folder = Path.Combine(Checkout.Root, "src", "TinyLlama.Compute", "Cuda", "Kernels");

    public static TheoryData<string, string> Compilations =>
        [.. Directory.GetFiles(s_folder, "*.cu").Order(StringComparer.Ordinal).SelectMany(path => ((string[])["sm_80", "sm_90"]).Select(sm => (Path.GetFileName(path), sm)))];

    [Theory]
    [MemberData(nameof(Compilations))]
    public void Clang_compiles_it_to_PTX_without_calls_and_without_local_memory(string source, string architecture)
    {
        Programs.Require("clang-19");
        string ptx = Path.GetTempFileName();
        try
        {
            string script = Path.Combine(Checkout.Root, "tests", "CudaEmulator", "ptx.sh");
            ProcessStartInfo start = new("bash", [script, Path.Combine(s_folder, source), architecture, ptx])
            {
                RedirectStandardError = true,
                UseShellExecute = false,
            };
            using Process process = Process.Start(start)!;
            string errors = process.StandardError.ReadToEnd();
            process.WaitForExit();
            Assert.True(process.ExitCode == 0, errors);
            string text = File.ReadAllText(ptx);
            Assert.Contains($".target {architecture}", text, StringComparison.Ordinal);
            Assert.Contains(".visible .entry", text, StringComparison.Ordinal);
            Assert.DoesNotContain(".local", text, StringComparison.Ordinal);
            Assert.DoesNotContain("call", text, StringComparison.Ordinal);
        }
        finally
        {
            File.Delete(ptx);
        }
    }

    [Fact]
    public void Only_the_prelude_has_PTX()
    {
        Assert.All(
            Directory.GetFiles(s_folder, "*.cu"),
            path => Assert.DoesNotContain("asm", File.ReadAllText(path).Split([' ', '(', ';', '\n']), StringComparer.Ordinal));
    }
}
