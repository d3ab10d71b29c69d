using System.Buffers.Binary;
using System.Runtime.InteropServices;
using TinyLlama.Compute.Cpu;
using TinyLlama.Tests.Common;

namespace TinyLlama.Compute.Tests.Cpu;

public abstract class CopyTests(CpuPath path) : OperationTests(path)
{
    [Fact]
    public void Rounding_to_bfloat16_equals_the_golden_values()
    {
        GoldenFile golden = GoldenFile.Open(SharedFiles.Require("goldens/llama-tiny/ops.safetensors"));
        float[] x = golden.ReadSingles("bf16.f32_in");
        Tensor rounded = Device.Take(1, x.Length, DType.BF16), back = Device.Take(1, x.Length);
        Device.Backend.Copy(rounded, Device.Put(1, x.Length, x));
        Device.Backend.Copy(back, rounded);
        SameBits(golden.ReadSingles("bf16.rne_out"), Device.Get(back), "rounded");
    }

    [Fact]
    public void All_16_bit_values_survive_the_way_to_single_precision_and_back()
    {
        foreach (DType type in (DType[])[DType.BF16, DType.F16])
        {
            ushort[] all = [.. Enumerable.Range(0, 65536).Select(i => (ushort)i)];
            Tensor source = Device.Take(64, 1024, type), wide = Device.Take(64, 1024), back = Device.Take(64, 1024, type);
            Device.Backend.Write<ushort>(source, all);
            Device.Backend.Copy(wide, source);
            Device.Backend.Copy(back, wide);
            ushort[] result = new ushort[all.Length];
            Device.Backend.Read<ushort>(result, back);
            float[] values = Device.Get(wide);
            for (int i = 0; i < all.Length; i++)
            {
                double expected = type == DType.F16
                    ? (double)BitConverter.UInt16BitsToHalf(all[i])
                    : BitConverter.Int32BitsToSingle(all[i] << 16);
                if (double.IsNaN(expected) ? !float.IsNaN(values[i]) : expected != values[i] || all[i] != result[i])
                {
                    Assert.Fail($"{type} {all[i]:x4} became {values[i]:R} and {result[i]:x4}");
                }
            }
        }
    }

    [Theory]
    [InlineData(DType.BF16)]
    [InlineData(DType.F16)]
    public void Rounds_to_the_nearest_and_ties_to_even(DType type)
    {
        // Between two neighbours a and b of the target type lies their mean: it goes to the even one, what is beside it to the nearer.
        uint step = type == DType.BF16 ? 0x1_0000u : 0x2000u;
        List<float> x = [], expected = [];
        foreach (uint start in (uint[])[0x3F80_0000, 0x3F80_0000 + step, 0xC2F6_0000, 0x4000_0000])
        {
            uint a = start & ~(step - 1), b = a + step, middle = a + (step / 2);
            uint even = (a / step) % 2 == 0 ? a : b;
            foreach ((uint from, uint to) in ((uint, uint)[])[(a, a), (middle - 1, a), (middle, even), (middle + 1, b), (b, b)])
            {
                x.Add(BitConverter.UInt32BitsToSingle(from));
                expected.Add(BitConverter.UInt32BitsToSingle(to));
            }
        }

        x.AddRange([float.MaxValue, float.NegativeInfinity]);
        expected.AddRange([float.PositiveInfinity, float.NegativeInfinity]);
        Tensor narrow = Device.Take(1, x.Count, type), back = Device.Take(1, x.Count);
        Device.Backend.Copy(narrow, Device.Put(1, x.Count, CollectionsMarshal.AsSpan(x)));
        Device.Backend.Copy(back, narrow);
        SameBits(CollectionsMarshal.AsSpan(expected), Device.Get(back), "rounded");
    }

    [Theory]
    [InlineData(0x7F80_0001u)]
    [InlineData(0xFFFF_FFFFu)]
    [InlineData(0x7FC0_0000u)]
    public void A_number_that_is_none_stays_so(uint bits)
    {
        byte[] element = new byte[4];
        BinaryPrimitives.WriteUInt32LittleEndian(element, bits);
        Tensor source = Device.Take(1, 1);
        Device.Backend.Write<float>(source, MemoryMarshal.Cast<byte, float>(element));
        foreach (DType type in (DType[])[DType.BF16, DType.F16, DType.F32])
        {
            Tensor narrow = Device.Take(1, 1, type), back = Device.Take(1, 1);
            Device.Backend.Copy(narrow, source);
            Device.Backend.Copy(back, narrow);
            Assert.True(float.IsNaN(Device.Get(back)[0]));
        }
    }

    [Fact]
    public void Column_ranges_are_copied_and_zeroed_without_their_surroundings()
    {
        Tensor wide = Device.Put(3, 10, Enumerable.Repeat(1f, 30).ToArray());
        Device.Backend.Zero(wide.ColumnRange(2, 3));
        Device.Backend.Copy(wide.ColumnRange(6, 2), Device.Put(3, 2, (ReadOnlySpan<float>)[2, 3, 4, 5, 6, 7]));
        SameBits([1, 1, 0, 0, 0, 1, 2, 3, 1, 1, 1, 1, 0, 0, 0, 1, 4, 5, 1, 1, 1, 1, 0, 0, 0, 1, 6, 7, 1, 1], Device.Get(wide), "wide");
    }

    [Fact]
    public void Types_that_hold_no_fractions_are_refused()
    {
        Tensor whole = Device.Take(1, 2, DType.I32), real = Device.Take(1, 2);
        Assert.Throws<ArgumentException>(() => Device.Backend.Copy(real, whole));
    }

    [Fact]
    public void Allocates_nothing()
    {
        Tensor a = Device.Take(2, 9), b = Device.Take(2, 9, DType.BF16);
        AllocatesNothing(() =>
        {
            Device.Backend.Copy(b, a);
            Device.Backend.Zero(a);
        });
    }
}

public sealed class CopyOn512() : CopyTests(CpuPath.Vector512);

public sealed class CopyOn256() : CopyTests(CpuPath.Vector256);

public sealed class CopyOn128() : CopyTests(CpuPath.Vector128);

public sealed class CopyOnScalar() : CopyTests(CpuPath.Scalar);
