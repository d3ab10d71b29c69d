using System.Reflection;
using System.Runtime.ExceptionServices;
using System.Runtime.InteropServices;
using System.Security.Cryptography;
using System.Text;

namespace TinyLlama.Compute.Cuda;

/// <summary>
/// The kernels as machine code for one architecture. Their sources are resources of this assembly; NVRTC compiles each file
/// once a machine, and the result is kept under $XDG_CACHE_HOME (~/.cache), in tinyllama/kernels.
/// </summary>
internal static unsafe class KernelImages
{
    private const string Folder = "Kernels/";

    private static readonly Assembly s_assembly = typeof(KernelImages).Assembly;

    // What the sources include.
    private static readonly string[] s_headers = [.. Names(".cuh")];

    /// <summary>Gets the names of the sources, in order.</summary>
    public static IReadOnlyList<string> Sources { get; } = [.. Names(".cu")];

    /// <summary>Gets the version of NVRTC, as "12.8".</summary>
    public static string CompilerVersion
    {
        get
        {
            int major, minor;
            Check(Nvrtc.nvrtcVersion(&major, &minor), "its version");
            return $"{major}.{minor}";
        }
    }

    /// <summary>The machine code of all <see cref="Sources"/>, in their order; compiled side by side, as it may take many seconds.</summary>
    /// <param name="capability">The compute capability of the GPU, as 90.</param>
    /// <exception cref="DeviceException">NVRTC does not know the GPU.</exception>
    public static byte[][] GetAll(int capability)
    {
        try
        {
            return [.. Sources.AsParallel().AsOrdered().Select(source => Get(source, capability))];
        }
        catch (AggregateException e)
        {
            ExceptionDispatchInfo.Throw(e.InnerExceptions[0]);
            throw;
        }
    }

    /// <summary>The machine code of a source, from the disk where it was compiled before.</summary>
    /// <param name="source">One of <see cref="Sources"/>.</param>
    /// <param name="capability">The compute capability of the GPU, as 90.</param>
    /// <exception cref="DeviceException">NVRTC does not know the GPU.</exception>
    public static byte[] Get(string source, int capability)
    {
        byte[] text = Text(source);
        byte[][] headers = Array.ConvertAll(s_headers, Text);
        string[] options = [$"--gpu-architecture=sm_{Architecture(capability)}", "-std=c++17", "--extra-device-vectorization"];
        string path = Path.Combine(CacheFolder(), Key(text, headers, [.. options, CompilerVersion]));
        if (ReadCached(path) is { } cached)
        {
            return cached;
        }

        byte[] image = Compile(source, text, headers, options);
        WriteCached(path, image);
        return image;
    }

    // The newest architecture of the GPU's generation that NVRTC knows: its code runs on all later ones of that generation.
    private static int Architecture(int capability)
    {
        int count;
        Check(Nvrtc.nvrtcGetNumSupportedArchs(&count), "its architectures");
        int[] known = new int[count];
        fixed (int* first = known)
        {
            Check(Nvrtc.nvrtcGetSupportedArchs(first), "its architectures");
        }

        int best = known.Where(architecture => architecture <= capability && architecture / 10 == capability / 10).DefaultIfEmpty(0).Max();
        return best > 0 ? best : throw new DeviceException(
            $"NVRTC {CompilerVersion} does not know this GPU (compute capability {capability / 10}.{capability % 10}): install a newer CUDA toolkit, or use --device cpu");
    }

    private static byte[] Text(string name)
    {
        using Stream stream = s_assembly.GetManifestResourceStream(Folder + name)!;
        byte[] text = new byte[stream.Length];
        stream.ReadExactly(text);
        return text;
    }

    private static string CacheFolder()
    {
        string? cache = Environment.GetEnvironmentVariable("XDG_CACHE_HOME");
        string root = string.IsNullOrEmpty(cache) ? Path.Combine(Environment.GetFolderPath(Environment.SpecialFolder.UserProfile), ".cache") : cache;
        return Path.Combine(root, "tinyllama", "kernels");
    }

    private static IEnumerable<string> Names(string ending) =>
        from name in s_assembly.GetManifestResourceNames()
        where name.StartsWith(Folder, StringComparison.Ordinal) && name.EndsWith(ending, StringComparison.Ordinal)
        orderby name
        select name[Folder.Length..];

    private static string Key(byte[] text, byte[][] headers, string[] options)
    {
        using IncrementalHash hash = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);
        Array.ForEach(headers, hash.AppendData);
        hash.AppendData(text);
        hash.AppendData(Encoding.UTF8.GetBytes(string.Join(' ', options)));
        return Convert.ToHexStringLower(hash.GetHashAndReset()) + ".cubin";
    }

    // A file is the SHA-256 of the code, then the code; one that is damaged counts as none.
    private static byte[]? ReadCached(string path)
    {
        try
        {
            byte[] content = File.ReadAllBytes(path);
            int head = SHA256.HashSizeInBytes;
            return content.Length > head && SHA256.HashData(content.AsSpan(head)).AsSpan().SequenceEqual(content.AsSpan(0, head)) ? content[head..] : null;
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            return null;
        }
    }

    // Where the disk cannot be written to, the next run compiles again.
    private static void WriteCached(string path, byte[] image)
    {
        string beside = $"{path}.{Environment.ProcessId}";
        try
        {
            Directory.CreateDirectory(Path.GetDirectoryName(path)!);
            File.WriteAllBytes(beside, [.. SHA256.HashData(image), .. image]);
            File.Move(beside, path, overwrite: true);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
        }
    }

    private static byte[] Compile(string source, byte[] text, byte[][] headers, string[] options)
    {
        nint program = 0;
        byte[][] texts = [.. headers.Select(Terminated), .. s_headers.Select(Utf8)];
        GCHandle[] pins = Array.ConvertAll(texts, bytes => GCHandle.Alloc(bytes, GCHandleType.Pinned));
        byte** pointers = stackalloc byte*[pins.Length];
        for (int i = 0; i < pins.Length; i++)
        {
            pointers[i] = (byte*)pins[i].AddrOfPinnedObject();
        }

        fixed (byte* body = Terminated(text), name = Utf8(source))
        {
            int result = Nvrtc.nvrtcCreateProgram(&program, body, name, headers.Length, pointers, pointers + headers.Length);
            Array.ForEach(pins, pin => pin.Free());
            Check(result, source);
        }

        try
        {
            fixed (byte* first = Utf8(options[0]), second = Utf8(options[1]), third = Utf8(options[2]))
            {
                byte** arguments = stackalloc byte*[] { first, second, third };
                if (Nvrtc.nvrtcCompileProgram(program, 3, arguments) != 0)
                {
                    throw new InvalidOperationException($"NVRTC {CompilerVersion} could not compile {source}: {Log(program)}");
                }
            }

            nuint size;
            Check(Nvrtc.nvrtcGetCUBINSize(program, &size), source);
            byte[] image = new byte[size];
            fixed (byte* first = image)
            {
                Check(Nvrtc.nvrtcGetCUBIN(program, first), source);
            }

            return image;
        }
        finally
        {
            _ = Nvrtc.nvrtcDestroyProgram(&program);
        }
    }

    private static string Log(nint program)
    {
        nuint size;
        Check(Nvrtc.nvrtcGetProgramLogSize(program, &size), "its log");
        byte[] log = new byte[size];
        fixed (byte* first = log)
        {
            Check(Nvrtc.nvrtcGetProgramLog(program, first), "its log");
        }

        return Encoding.UTF8.GetString(log).TrimEnd('\0', '\n');
    }

    private static byte[] Utf8(string text) => Terminated(Encoding.UTF8.GetBytes(text));

    private static byte[] Terminated(byte[] text) => [.. text, 0];

    private static void Check(int result, string what)
    {
        if (result != 0)
        {
            throw new InvalidOperationException($"NVRTC failed with error {result} ({what})");
        }
    }
}
