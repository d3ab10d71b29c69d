using System.Runtime.InteropServices;
using TinyLlama.Tests.Common;

namespace TinyLlama.Compute.Tests;

/// <summary>The reference quantizers of ggml, in the library that node-llama-cpp brings along.</summary>
internal static unsafe class Ggml
{
    /// <summary>Widens blocks to singles.</summary>
    public static float[] Dequantize(DType type, byte[] blocks)
    {
        float[] values = new float[blocks.Length / type.BlockBytes() * type.BlockElements()];
        var function = (delegate* unmanaged<byte*, float*, long, void>)Function($"dequantize_row_{Name(type)}");
        fixed (byte* source = blocks)
        fixed (float* destination = values)
        {
            function(source, destination, values.Length);
        }

        return values;
    }

    /// <summary>Rounds singles to blocks.</summary>
    public static byte[] Quantize(DType type, float[] values)
    {
        byte[] blocks = new byte[type.RowBytes(values.Length)];
        var function = (delegate* unmanaged<float*, byte*, long, void>)Function($"quantize_row_{Name(type)}_ref");
        fixed (float* source = values)
        fixed (byte* destination = blocks)
        {
            function(source, destination, values.Length);
        }

        return blocks;
    }

    private static string Name(DType type) => type.ToString().Replace('Q', 'q');

    private static nint Function(string name)
    {
        NodePackages.Require("node-llama-cpp");
        Assert.SkipUnless(
            OperatingSystem.IsLinux() && RuntimeInformation.ProcessArchitecture == Architecture.X64, "needs ggml for Linux on x64");
        string folder = NodePackages.Require("@node-llama-cpp/linux-x64");
        return NativeLibrary.GetExport(NativeLibrary.Load(Path.Combine(folder, "bins", "linux-x64", "libggml-base.so")), name);
    }
}
