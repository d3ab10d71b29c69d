using TinyLlama.Compute.Cpu;

namespace TinyLlama.Compute.Tests.Cpu;

/// <summary>Rounding to bfloat16 and widening in lanes, against the same of one number.</summary>
public sealed unsafe class BFloat16LanesTests
{
    private static readonly uint[] s_edges =
    [
        0, 0x8000_0000, 1, 0x8000_8000, 0x0000_7FFF, 0x3F80_7FFF, 0x3F80_8000, 0x3F80_8001, 0x3F81_7FFF, 0x3F81_8000, 0x7F7F_7FFF, 0x7F7F_FFFF,
        0x7F80_0000, 0xFF80_0000, 0x7F80_0001, 0xFF80_0001, 0x7FFF_FFFF, 0xFFFF_FFFF, 0x7FC0_0000, 0xFFC0_0000,
    ];

    [Theory]
    [InlineData(CpuPath.Vector512)]
    [InlineData(CpuPath.Vector256)]
    [InlineData(CpuPath.Vector128)]
    [InlineData(CpuPath.Scalar)]
    public void Lanes_round_and_widen_as_single_numbers(CpuPath path)
    {
        Action<uint[]> check = path switch
        {
            CpuPath.Vector512 => Check<Lanes512>,
            CpuPath.Vector256 => Check<Lanes256>,
            CpuPath.Vector128 => Check<Lanes128>,
            _ => Check<Lanes1>,
        };
        Random random = new(1);
        for (int run = 0; run < 500; run++)
        {
            check([.. Enumerable.Range(0, 32).Select(_ => random.Next(3) == 0 ? s_edges[random.Next(s_edges.Length)] : (uint)random.NextInt64(1L << 32))]);
        }
    }

    private static void Check<V>(uint[] bits)
        where V : struct, ILanes<V>
    {
        uint[] result = new uint[16];
        uint[] rounded = [.. bits.Select(value => (uint)Copy.ToBFloat16(BitConverter.UInt32BitsToSingle(value)))];
        fixed (uint* from = bits, to = result)
        {
            V a = V.Load((float*)from), b = V.Load((float*)from + V.Count);
            V pairs = V.Pairs(a, b);
            Is(pairs, lane => rounded[lane] | (rounded[lane + V.Count] << 16), to);
            Is(V.First(pairs), lane => rounded[lane] << 16, to);
            Is(V.Second(pairs), lane => rounded[lane + V.Count] << 16, to);
            Is(V.NeighbourPairs(a, b), lane => rounded[2 * lane] | (rounded[(2 * lane) + 1] << 16), to);
            Is(V.ToBFloat16(a), lane => rounded[lane] << 16, to);
        }
    }

    private static void Is<V>(V actual, Func<int, uint> expected, uint* result)
        where V : struct, ILanes<V>
    {
        actual.Store((float*)result);
        for (int lane = 0; lane < V.Count; lane++)
        {
            Assert.Equal(expected(lane), result[lane]);
        }
    }
}
