using TinyLlama.Compute.Cpu;

namespace TinyLlama.Compute.Tests.Cpu;

/// <summary>Halves widened in lanes, against the same of one number.</summary>
public sealed unsafe class HalvesTests
{
    private static readonly ushort[] s_halves =
        [.. Enumerable.Range(0, 1 << 16).Select(bits => (ushort)bits).Where(bits => Half.IsFinite(BitConverter.UInt16BitsToHalf(bits)))];

    [Theory]
    [InlineData(CpuPath.Vector512)]
    [InlineData(CpuPath.Vector256)]
    [InlineData(CpuPath.Vector128)]
    [InlineData(CpuPath.Scalar)]
    public void Halves_keep_their_values_and_numbers_become_the_nearest_halves(CpuPath path)
    {
        Action check = path switch
        {
            CpuPath.Vector512 => Check<Lanes512>,
            CpuPath.Vector256 => Check<Lanes256>,
            CpuPath.Vector128 => Check<Lanes128>,
            _ => Check<Lanes1>,
        };
        check();
    }

    private static void Check<V>()
        where V : struct, ILanes<V>
    {
        CheckWidened<V>(s_halves);
        CheckRounded<V>(Numbers());
    }

    // All halves, what lies in the middle between two, and the floats around both.
    private static float[] Numbers()
    {
        List<float> values = [];
        for (int bits = 0; bits < 0x7C00; bits++)
        {
            float half = (float)BitConverter.UInt16BitsToHalf((ushort)bits);
            float next = bits == 0x7BFF ? 65536 : (float)BitConverter.UInt16BitsToHalf((ushort)(bits + 1));
            float middle = (half + next) / 2;
            foreach (float value in (ReadOnlySpan<float>)[half, middle, float.BitDecrement(middle), float.BitIncrement(middle)])
            {
                values.Add(value);
                values.Add(-value);
            }
        }

        values.AddRange([1e-8f, 1e-30f, float.Epsilon, -1e-30f, 70_000, -1e30f, float.MaxValue, float.PositiveInfinity, float.NegativeInfinity]);
        while (values.Count % 16 != 0)
        {
            values.Add(-0f);
        }

        return [.. values];
    }

    private static void CheckRounded<V>(float[] values)
        where V : struct, ILanes<V>
    {
        int[] actual = new int[values.Length];
        fixed (float* source = values)
        fixed (int* rounded = actual)
        {
            for (int i = 0; i < values.Length; i += V.Count)
            {
                Halves<V>.Round(V.Load(source + i)).Store((float*)rounded + i);
            }
        }

        Assert.Equal(values.Select(value => (int)BitConverter.HalfToUInt16Bits((Half)Math.Clamp(value, -65504, 65504))), actual);
    }

    private static void CheckWidened<V>(ushort[] halves)
        where V : struct, ILanes<V>
    {
        int[] expected = [.. halves.Select(bits => BitConverter.SingleToInt32Bits((float)BitConverter.UInt16BitsToHalf(bits)))];
        int[] loaded = new int[halves.Length], low = new int[halves.Length], high = new int[halves.Length];
        fixed (ushort* source = halves)
        fixed (int* toLoaded = loaded, toLow = low, toHigh = high)
        {
            for (int i = 0; i < halves.Length; i += V.Count)
            {
                // Another half beside each.
                uint[] dwords = [.. Enumerable.Range(i, V.Count).Select(at => halves[at] | ((uint)halves[halves.Length - 1 - at] << 16))];
                uint[] turned = [.. dwords.Select(dword => (dword >> 16) | (dword << 16))];
                Halves<V>.Load((byte*)(source + i)).Store((float*)toLoaded + i);
                fixed (uint* p = dwords, q = turned)
                {
                    Halves<V>.FromLow(V.LoadDwords((byte*)p)).Store((float*)toLow + i);
                    Halves<V>.FromHigh(V.LoadDwords((byte*)q)).Store((float*)toHigh + i);
                }
            }
        }

        Assert.Equal(expected, loaded);
        Assert.Equal(expected, low);
        Assert.Equal(expected, high);
    }
}
