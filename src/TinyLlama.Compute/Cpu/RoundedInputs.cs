using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// Inputs of a product with a quantized weight, rounded to signed bytes: groups of 32 elements that share a scale. A group is
/// its bytes, or the same as int16, then four dwords: the scale, the sums of both halves, times -16, as int16, the scaled sum of all,
/// and -8 times their sum.
/// </summary>
internal static unsafe class RoundedInputs
{
    /// <summary>Elements of a group.</summary>
    public const int Group = 32;

    /// <summary>Bytes of a group.</summary>
    public const int GroupBytes = Group + DwordBytes;

    /// <summary>Bytes of the int16 of a group: the even bytes of all dwords, then the odd ones.</summary>
    public const int WordsBytes = Group * sizeof(short);

    /// <summary>Bytes of a group in int16.</summary>
    public const int WordGroupBytes = WordsBytes + DwordBytes;

    /// <summary>Elements that rounded rows may have in all, so that they fit <see cref="Scratch.Shared"/>.</summary>
    public const int MaxElements = MatMul.SharedCount * sizeof(float) / WordGroupBytes * Group;

    // Groups of a block of rows whose memory stays in the first cache.
    private const int GroupsOfTask = 16;

    private const int DwordBytes = 4 * sizeof(float);

    private const float SmallestNormal = 1.17549435e-38f;

    // Adding 1.5 · 2²³ rounds to the nearest whole number, ties to even, and leaves it in the low bits.
    private const float Shift = 12_582_912f;

    /// <summary>Rounds rows; they lie in blocks of so many, in a block group after group of all its rows.</summary>
    public static void Round<V>(ThreadTeam team, byte* rounded, Tensor input, int blockRows, bool inWords)
        where V : struct, ILanes<V>
    {
        Rows rows = Rows.Of(input);
        RoundWork<V> work = new() { Rounded = rounded, Input = input, Rows = rows, BlockRows = blockRows, InWords = inWords };
        team.Run(ref work, rows.Tasks);
    }

    /// <summary>Rounds rows for <see cref="AmxBytes"/>; rows that the last block lacks are zero.</summary>
    public static void RoundTiles(ThreadTeam team, byte* rounded, Tensor input)
    {
        int groups = input.Columns / Group;
        int parts = (groups + GroupsOfTask - 1) / GroupsOfTask;
        TileWork work = new() { Rounded = rounded, Input = input, Parts = parts };
        team.Run(ref work, (input.Rows + AmxBytes.Rows - 1) / AmxBytes.Rows * parts);
    }

    /// <summary>The four dwords behind the bytes of a group.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    internal static void WriteScale(byte* dwords, float scale, int firstSum, int secondSum)
    {
        ((float*)dwords)[0] = scale;
        ((short*)dwords)[2] = (short)(-16 * firstSum);
        ((short*)dwords)[3] = (short)(-16 * secondSum);
        ((float*)dwords)[2] = scale * (firstSum + secondSum);
        ((int*)dwords)[3] = -8 * (firstSum + secondSum);
    }

    // 32 bytes; returns their scale and the sums of both halves.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static (float Scale, int FirstSum, int SecondSum) RoundGroup<V>(byte* destination, float* x)
        where V : struct, ILanes<V>
    {
        V largest = V.Create(0);
        V smallest = V.Create(0);
        for (int i = 0; i < Group; i += V.Count)
        {
            V value = V.Load(x + i);
            largest = V.Max(largest, value);
            smallest = V.Min(smallest, value);
        }

        // What is smaller than any normal number counts as zero: its inverse might be infinite.
        float scale = V.Max(largest, V.Create(0) - smallest).Max() / 127;
        V inverse = V.Create(scale >= SmallestNormal ? 1 / scale : 0);
        V shift = V.Create(Shift);
        V first = V.Create(0);
        V second = V.Create(0);
        for (int i = 0; i < Group; i += V.Count)
        {
            V shifted = V.Fma(V.Load(x + i), inverse, shift);
            shifted.StoreLowBytes((sbyte*)destination + i);
            if (i < Group / 2)
            {
                first += shifted - shift;
            }
            else
            {
                second += shifted - shift;
            }
        }

        // Neither sum reaches 2048 in amount, so that both fit a float. What is not a number stays none: the scale carries it.
        float sums = V.Fma(second, V.Create(4096), first).Sum();
        scale += sums - sums;
        int secondSum = ((int)sums + 2048) >> 12;
        return (scale, (int)sums - (secondSum << 12), secondSum);
    }

    private struct RoundWork<V> : IWork
        where V : struct, ILanes<V>
    {
        public byte* Rounded;
        public Tensor Input;
        public Rows Rows;
        public int BlockRows;
        public bool InWords;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public readonly void Run(int task, int thread)
        {
            int groups = Input.Columns / Group;
            int bytes = InWords ? WordGroupBytes : GroupBytes;
            for (int row = Rows.First(task); row < Rows.End(task); row++)
            {
                int inBlock = row % BlockRows;
                int first = row - inBlock;
                int blockRows = Math.Min(BlockRows, Input.Rows - first);
                byte* destination = Rounded + ((((nint)first * groups) + inBlock) * bytes);
                float* source = Input.F32(row);
                for (int group = 0; group < groups; group++)
                {
                    (float scale, int firstSum, int secondSum) = RoundGroup<V>(destination, source);
                    if (InWords)
                    {
                        Widen(destination);
                    }

                    WriteScale(destination + bytes - DwordBytes, scale, firstSum, secondSum);
                    source += Group;
                    destination += blockRows * bytes;
                }
            }
        }

        // 32 bytes become the even and the odd words of their dwords.
        private static void Widen(byte* group)
        {
            for (int i = Group - Vector128<byte>.Count; i >= 0; i -= Vector128<byte>.Count)
            {
                Vector128<short> bytes = Vector128.Load((short*)(group + i));
                ((bytes << 8) >> 8).Store((short*)(group + i));
                (bytes >> 8).Store((short*)(group + Group + i));
            }
        }
    }

    // Rows side by side: what is found across the lanes of each of 16 rows is one register for all. The bits are those of RoundGroup.
    private struct TileWork : IWork
    {
        public byte* Rounded;
        public Tensor Input;
        public int Parts;

        public readonly void Run(int task, int thread)
        {
            int groups = Input.Columns / Group;
            (int block, int part) = Math.DivRem(task, Parts);
            int first = part * GroupsOfTask;
            int end = Math.Min(groups, first + GroupsOfTask);
            int rows = Math.Min(AmxBytes.Rows, Input.Rows - (block * AmxBytes.Rows));
            byte* destination = Rounded + ((((nint)block * groups) + first) * AmxBytes.InputBytes);
            float* source = Input.F32(block * AmxBytes.Rows) + (first * Group);
            for (int group = first; group < end; group++, destination += AmxBytes.InputBytes, source += Group)
            {
                RoundRows(destination, source, Input.Stride, rows);
            }
        }

        [SkipLocalsInit]
        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private static void RoundRows(byte* destination, float* source, nint stride, int rows)
        {
            const int Quarter = 4;
            float* quarters = stackalloc float[AmxBytes.Rows * Quarter];
            float* inverses = stackalloc float[AmxBytes.Rows];
            for (int row = 0; row < rows; row++)
            {
                float* x = source + (row * stride);
                var largest = Vector512.MaxNative(Vector512.Abs(Vector512.Load(x)), Vector512.Abs(Vector512.Load(x + Vector512<float>.Count)));
                var half = Vector256.MaxNative(largest.GetLower(), largest.GetUpper());
                Vector128.MaxNative(half.GetLower(), half.GetUpper()).Store(quarters + (row * Quarter));
            }

            new Span<float>(quarters + (rows * Quarter), (AmxBytes.Rows - rows) * Quarter).Clear();
            Transpose(quarters, out Vector512<float> a, out Vector512<float> b, out Vector512<float> c, out Vector512<float> d);
            Vector512<float> scale = Vector512.MaxNative(Vector512.MaxNative(a, b), Vector512.MaxNative(c, d)) / Vector512.Create(127f);
            var isNormal = Vector512.GreaterThanOrEqual(scale, Vector512.Create(SmallestNormal));
            (isNormal & (Vector512<float>.One / scale)).Store(inverses);

            Vector512<float> shift = Vector512.Create(Shift);
            for (int row = 0; row < rows; row++)
            {
                float* x = source + (row * stride);
                sbyte* bytes = (sbyte*)destination + (row * Group);
                Vector512<float> inverse = Vector512.Create(inverses[row]);
                Vector512<float> first = Vector512.FusedMultiplyAdd(Vector512.Load(x), inverse, shift);
                Vector512<float> second = Vector512.FusedMultiplyAdd(Vector512.Load(x + Vector512<float>.Count), inverse, shift);
                new Lanes512(first).StoreLowBytes(bytes);
                new Lanes512(second).StoreLowBytes(bytes + Vector512<float>.Count);
                Vector512<float> sum = first - shift + (second - shift);
                Vector256<float> half = sum.GetLower() + sum.GetUpper();
                (half.GetLower() + half.GetUpper()).Store(quarters + (row * Quarter));
            }

            new Span<byte>(destination + (rows * Group), (AmxBytes.Rows - rows) * Group).Clear();
            new Span<float>(quarters + (rows * Quarter), (AmxBytes.Rows - rows) * Quarter).Clear();
            Transpose(quarters, out a, out b, out c, out d);
            Vector512<float> sums = a + b + (c + d);
            scale += sums - sums;
            scale.Store((float*)(destination + AmxBytes.BytesOfGroup));
            (scale * sums).Store((float*)(destination + AmxBytes.BytesOfGroup) + AmxBytes.Rows);
        }

        // Four numbers of each of 16 rows become four registers of one of each row.
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        private static void Transpose(float* rows, out Vector512<float> a, out Vector512<float> b, out Vector512<float> c, out Vector512<float> d)
        {
            const int Count = 16;
            Vector512<float> first = Vector512.Load(rows), second = Vector512.Load(rows + Count);
            Vector512<float> third = Vector512.Load(rows + (2 * Count)), fourth = Vector512.Load(rows + (3 * Count));
            Vector512<int> evens = Vector512.Create(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
            Vector512<int> odds = evens + Vector512.Create(2);
            Vector512<float> lowPair = Avx512F.PermuteVar16x32x2(first, evens, second), highPair = Avx512F.PermuteVar16x32x2(third, evens, fourth);
            a = Vector512.Create(lowPair.GetLower(), highPair.GetLower());
            b = Vector512.Create(lowPair.GetUpper(), highPair.GetUpper());
            lowPair = Avx512F.PermuteVar16x32x2(first, odds, second);
            highPair = Avx512F.PermuteVar16x32x2(third, odds, fourth);
            c = Vector512.Create(lowPair.GetLower(), highPair.GetLower());
            d = Vector512.Create(lowPair.GetUpper(), highPair.GetUpper());
        }
    }
}
