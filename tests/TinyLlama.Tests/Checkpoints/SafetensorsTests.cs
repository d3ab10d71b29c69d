using System.Buffers.Binary;
using System.Runtime.InteropServices;
using System.Text;
using TinyLlama.Checkpoints;
using TinyLlama.Compute;
using TinyLlama.Compute.Cpu;
using TinyLlama.Data;
using TinyLlama.Tests.Common;

namespace TinyLlama.Tests.Checkpoints;

public sealed class SafetensorsTests : IDisposable
{
    private readonly CpuBackend _backend = CpuBackend.Create(threads: 1);
    private readonly Arena _arena;
    private readonly TemporaryFolder _folder = new();

    public SafetensorsTests() => _arena = _backend.Allocate("test", 1 << 22);

    public static TheoryData<string> GoldenFiles =>
    [
        "model", "model.f64", "forward", "grads", "ops", "weights_step1", "weights_step3", "adamw_state_step1", "adamw_state_step3",
    ];

    public void Dispose()
    {
        _arena.Dispose();
        _backend.Dispose();
        _folder.Dispose();
    }

    [Theory]
    [MemberData(nameof(GoldenFiles))]
    public void Every_golden_file_opens_and_covers_its_bytes(string name)
    {
        string path = SharedFiles.Require($"goldens/llama-tiny/{name}.safetensors");
        using SafetensorsFile file = SafetensorsFile.Open(path);
        Assert.NotEmpty(file.Entries);
        byte[] bytes = File.ReadAllBytes(path);
        foreach (SafetensorsEntry entry in file.Entries)
        {
            ReadOnlySpan<byte> expected = bytes.AsSpan((int)entry.Offset, (int)entry.ByteCount);
            Assert.True(expected.SequenceEqual(file.Bytes(entry, 0, (int)entry.ByteCount)), entry.Name);
        }
    }

    [Fact]
    public void The_golden_model_read_as_F32_equals_its_F64_twin()
    {
        using SafetensorsFile singles = SafetensorsFile.Open(SharedFiles.Require("goldens/llama-tiny/model.safetensors"));
        using SafetensorsFile doubles = SafetensorsFile.Open(SharedFiles.Require("goldens/llama-tiny/model.f64.safetensors"));
        Assert.Equal(21, singles.Entries.Count);
        foreach (SafetensorsEntry entry in singles.Entries)
        {
            Assert.Equal("F64", doubles.Entry(entry.Name).Type);
            Assert.Equal(Read(singles, entry.Name), Read(doubles, entry.Name));
        }
    }

    [Fact]
    public void Conversion_to_BF16_equals_the_golden_rounding()
    {
        using SafetensorsFile file = SafetensorsFile.Open(SharedFiles.Require("goldens/llama-tiny/ops.safetensors"));
        SafetensorsEntry input = file.Entry("bf16.f32_in");
        SafetensorsEntry expected = file.Entry("bf16.rne_out");
        Tensor tensor = _arena.Take(1, (int)input.Count, DType.BF16);
        file.CopyTo(_backend, tensor, input.Name);
        ushort[] actual = tensor.HostSpan<ushort>().ToArray();
        float[] source = Read(file, input.Name);
        for (int i = 0; i < actual.Length; i++)
        {
            ushort golden = BinaryPrimitives.ReadUInt16LittleEndian(file.Bytes(expected, 2 * i, 2));
            if (float.IsNaN(source[i]))
            {
                // Any NaN will do; its payload is not specified.
                Assert.True(IsNaN(golden) && IsNaN(actual[i]));
            }
            else
            {
                Assert.Equal(golden, actual[i]);
            }
        }

        static bool IsNaN(ushort bits) => float.IsNaN(BitConverter.UInt32BitsToSingle((uint)bits << 16));
    }

    [Theory]
    [InlineData(DType.F32)]
    [InlineData(DType.BF16)]
    [InlineData(DType.F16)]
    [InlineData(DType.F64)]
    [InlineData(DType.I32)]
    public void Every_type_comes_back_bit_for_bit(DType type)
    {
        // More than one piece, and not a multiple of one.
        Tensor matrix = Random(3, 40_001, type, seed: 1);
        Tensor vector = Random(1, 7, type, seed: 2);
        string path = _folder["a.safetensors"];
        Safetensors.Write(path, _backend, [new("matrix", matrix, false), new("vector", vector, true)]);

        using SafetensorsFile file = SafetensorsFile.Open(path);
        Assert.Equal([3L, 40_001L], file.Entry("matrix").Shape);
        Assert.Equal([7L], file.Entry("vector").Shape);
        Assert.Equal(type, file.Entry("matrix").ElementType);
        foreach ((string name, Tensor original) in new[] { ("matrix", matrix), ("vector", vector) })
        {
            Tensor copy = _arena.Take(original.Rows, original.Columns, type);
            file.CopyTo(_backend, copy, name);
            Assert.True(Bits(original).SequenceEqual(Bits(copy)), name);
        }
    }

    [Theory]
    [InlineData(DType.BF16)]
    [InlineData(DType.F16)]
    public void A_narrow_type_widens_exactly_and_narrows_back_to_the_same_bits(DType type)
    {
        Tensor every = _arena.Take(256, 256, type);
        for (int bits = 0; bits < 1 << 16; bits++)
        {
            every.HostSpan<ushort>()[bits] = (ushort)bits;
        }

        Safetensors.Write(_folder["narrow"], _backend, [new("x", every, false)]);
        Tensor wide = _arena.Take(256, 256);
        using (SafetensorsFile file = SafetensorsFile.Open(_folder["narrow"]))
        {
            file.CopyTo(_backend, wide, "x");
        }

        Safetensors.Write(_folder["back"], _backend, [new("x", wide, false)], storeAs: type);
        using SafetensorsFile back = SafetensorsFile.Open(_folder["back"]);
        Tensor again = _arena.Take(256, 256, type);
        back.CopyTo(_backend, again, "x");
        for (int bits = 0; bits < 1 << 16; bits++)
        {
            if (!float.IsNaN(wide.HostSpan<float>()[bits]))
            {
                Assert.Equal(bits, again.HostSpan<ushort>()[bits]);
            }
        }
    }

    [Fact]
    public void Wide_elements_come_first_so_that_all_are_aligned()
    {
        Tensor narrow = Random(1, 3, DType.BF16, seed: 3);
        Tensor wide = Random(2, 2, DType.F64, seed: 4);
        Safetensors.Write(_folder["a"], _backend, [new("narrow", narrow, true), new("wide", wide, false)]);
        using SafetensorsFile file = SafetensorsFile.Open(_folder["a"]);
        Assert.Equal(["wide", "narrow"], file.Entries.Select(static entry => entry.Name));
        Assert.Equal(0, file.Entry("wide").Offset % 8);
    }

    [Fact]
    public void Metadata_and_strange_names_survive()
    {
        Tensor x = Random(1, 1, DType.F32, seed: 5);
        var metadata = new Dictionary<string, string> { ["format"] = "pt", ["ключ \"1\""] = "line\nline" };
        Safetensors.Write(_folder["a"], _backend, [new("a \"quoted\" ∂ name", x, true)], metadata);
        using SafetensorsFile file = SafetensorsFile.Open(_folder["a"]);
        Assert.Equal(metadata, file.Metadata);
        Assert.True(file.Contains("a \"quoted\" ∂ name"));
    }

    [Fact]
    public void A_wrong_shape_is_refused_with_both_shapes()
    {
        Safetensors.Write(_folder["a"], _backend, [new("x", Random(3, 4, DType.F32, seed: 6), false)]);
        using SafetensorsFile file = SafetensorsFile.Open(_folder["a"]);
        Tensor transposed = _arena.Take(4, 3);
        string message = Assert.Throws<UserErrorException>(() => file.CopyTo(_backend, transposed, "x")).Message;
        Assert.Contains("'x' has the shape [3, 4], [4, 3] is needed", message, StringComparison.Ordinal);
        message = Assert.Throws<UserErrorException>(() => file.CopyTo(_backend, transposed, "y")).Message;
        Assert.Contains("'y'", message, StringComparison.Ordinal);
    }

    [Fact]
    public void An_integer_tensor_is_not_taken_for_weights()
    {
        Safetensors.Write(_folder["a"], _backend, [new("x", Random(3, 4, DType.I32, seed: 7), false)]);
        using SafetensorsFile file = SafetensorsFile.Open(_folder["a"]);
        Tensor floats = _arena.Take(3, 4);
        Assert.Throws<UserErrorException>(() => file.CopyTo(_backend, floats, "x"));
    }

    [Fact]
    public void The_same_name_twice_is_not_written()
    {
        Tensor x = Random(1, 1, DType.F32, seed: 8);
        Assert.Throws<ArgumentException>(() => Safetensors.Write(new MemoryStream(), _backend, [new("x", x, true), new("x", x, true)]));
    }

    [Theory]
    [InlineData("")]
    [InlineData("[]")]
    [InlineData("null")]
    [InlineData("{\"x\":1}")]
    [InlineData("{\"x\":{}}")]
    [InlineData("{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}} {}")]
    [InlineData("{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"x\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[8,8]}}")]
    [InlineData("{\"x\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}")]
    [InlineData("{\"x\":{\"dtype\":\"F31\",\"shape\":[2],\"data_offsets\":[0,8]}}")]
    [InlineData("{\"x\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}")]
    [InlineData("{\"x\":{\"dtype\":\"F32\",\"shape\":[-1,-2],\"data_offsets\":[0,8]}}")]
    [InlineData("{\"x\":{\"dtype\":\"F32\",\"shape\":[2.5],\"data_offsets\":[0,8]}}")]
    [InlineData("{\"x\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,8]}}")]
    [InlineData("{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0]}}")]
    [InlineData("{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8,16]}}")]
    [InlineData("{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}")]
    [InlineData("{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[-8,0]}}")]
    [InlineData("{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]}}")]
    [InlineData("{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}")]
    [InlineData("{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}")]
    [InlineData("{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,9223372036854775807]}}")]
    [InlineData("{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,99999999999999999999]}}")]
    [InlineData("{\"x\":{\"dtype\":\"F32\",\"shape\":[4611686018427387906],\"data_offsets\":[0,8]}}")]
    [InlineData("{\"x\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296,2],\"data_offsets\":[0,8]}}")]
    [InlineData("{\"x\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,2],\"data_offsets\":[0,8]}}")]
    [InlineData("{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"y\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}")]
    [InlineData("{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"y\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}")]
    [InlineData("{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8],\"z\":1}}")]
    [InlineData("{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"__metadata__\":{\"a\":1}}")]
    [InlineData("{\"\\ud800\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}")]
    public void A_hostile_header_is_refused(string header)
    {
        File.WriteAllBytes(_folder["a"], [.. Length(Encoding.UTF8.GetByteCount(header)), .. Encoding.UTF8.GetBytes(header), .. new byte[8]]);
        RequireRefusal(_folder["a"]);
    }

    [Theory]
    [InlineData(0x8000_0000L)]
    [InlineData(long.MaxValue)]
    [InlineData(-1L)]
    [InlineData(-8L)]
    [InlineData(100_000_001L)]
    [InlineData(1_000_000L)]
    public void A_header_length_beyond_the_file_is_refused_without_an_allocation_of_it(long claimed)
    {
        File.WriteAllBytes(_folder["a"], [.. Length(claimed), .. "{}"u8]);
        RequireRefusal(_folder["a"]);
    }

    [Fact]
    public void A_file_cut_at_any_byte_is_refused()
    {
        byte[] whole = SmallFile();
        for (int length = 0; length < whole.Length; length++)
        {
            File.WriteAllBytes(_folder["cut"], whole.AsSpan(0, length));
            RequireRefusal(_folder["cut"]);
        }
    }

    [Fact]
    public void A_flipped_bit_is_refused_or_harmless()
    {
        byte[] whole = SmallFile();
        for (int bit = 0; bit < whole.Length * 8; bit++)
        {
            byte[] damaged = [.. whole];
            damaged[bit / 8] ^= (byte)(1 << (bit % 8));
            File.WriteAllBytes(_folder["flipped"], damaged);
            long before = GC.GetAllocatedBytesForCurrentThread();
            try
            {
                using SafetensorsFile file = SafetensorsFile.Open(_folder["flipped"]);
                foreach (SafetensorsEntry entry in file.Entries)
                {
                    Assert.True(entry.Offset >= 8 && entry.Offset + entry.ByteCount <= whole.Length);
                }
            }
            catch (UserErrorException)
            {
                // The damage was seen.
            }

            Assert.True(GC.GetAllocatedBytesForCurrentThread() - before < 200_000);
        }
    }

    [Fact]
    public void A_folder_or_nothing_at_the_path_is_a_user_error()
    {
        RequireRefusal(_folder.Path);
        RequireRefusal(_folder["missing"]);
    }

    private static void RequireRefusal(string path)
    {
        long before = GC.GetAllocatedBytesForCurrentThread();
        string message = Assert.Throws<UserErrorException>(() => SafetensorsFile.Open(path).Dispose()).Message;
        Assert.True(GC.GetAllocatedBytesForCurrentThread() - before < 200_000);
        Assert.StartsWith(path, message, StringComparison.Ordinal);
        Assert.DoesNotContain('\n', message);
    }

    private static byte[] Length(long length)
    {
        byte[] bytes = new byte[8];
        BinaryPrimitives.WriteInt64LittleEndian(bytes, length);
        return bytes;
    }

    private byte[] SmallFile()
    {
        var stream = new MemoryStream();
        Tensor matrix = Random(2, 3, DType.F32, seed: 9);
        Safetensors.Write(stream, _backend, [new("m", matrix, false), new("v", matrix.RowRange(0, 1), true)], storeAs: DType.BF16);
        return stream.ToArray();
    }

    private static float[] Read(SafetensorsFile file, string name)
    {
        float[] values = new float[file.Entry(name).Count];
        file.Read(values, name);
        return values;
    }

    private static ReadOnlySpan<byte> Bits(Tensor tensor) => tensor.Type.ByteCount() switch
    {
        2 => MemoryMarshal.AsBytes(tensor.HostSpan<ushort>()),
        4 => MemoryMarshal.AsBytes(tensor.HostSpan<uint>()),
        _ => MemoryMarshal.AsBytes(tensor.HostSpan<ulong>()),
    };

    private Tensor Random(int rows, int columns, DType type, int seed)
    {
        Tensor tensor = _arena.Take(rows, columns, type);
        var random = new Random(seed);
        switch (type.ByteCount())
        {
            case 2:
                random.NextBytes(MemoryMarshal.AsBytes(tensor.HostSpan<ushort>()));
                break;
            case 4:
                random.NextBytes(MemoryMarshal.AsBytes(tensor.HostSpan<uint>()));
                break;
            default:
                random.NextBytes(MemoryMarshal.AsBytes(tensor.HostSpan<ulong>()));
                break;
        }

        return tensor;
    }
}
