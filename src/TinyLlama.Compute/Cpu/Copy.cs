using System.Runtime.InteropServices;

namespace TinyLlama.Compute.Cpu;

/// <summary>Copies and conversions between F32, BF16 and F16, rounded to nearest, ties to even.</summary>
/// <remarks>NaN stays NaN; too large becomes infinite; subnormal numbers are kept. Memory-bound.</remarks>
internal static unsafe class Copy
{
    /// <summary>destination = source, of one shape.</summary>
    public static void Convert(ThreadTeam team, Tensor destination, Tensor source)
    {
        destination.Require(source.Rows, source.Columns, destination.Type);
        source.Require(source.Rows, source.Columns, source.Type);
        bool same = destination.Type == source.Type;
        Shape.Require(same || (IsFloat(destination.Type) && IsFloat(source.Type)), "types that convert into each other");
        Rows rows = Rows.Of(source);
        Work work = new(rows, destination, source);
        team.Run(ref work, rows.Tasks);
    }

    /// <summary>destination = 0.</summary>
    public static void Zero(ThreadTeam team, Tensor destination)
    {
        destination.Require(destination.Rows, destination.Columns, destination.Type);
        Rows rows = Rows.Of(destination);
        ZeroWork work = new(rows, destination);
        team.Run(ref work, rows.Tasks);
    }

    /// <summary>The bfloat16 nearest to a float, ties to even.</summary>
    public static ushort ToBFloat16(float value)
    {
        uint bits = BitConverter.SingleToUInt32Bits(value);
        return float.IsNaN(value)
            ? (ushort)((bits >> 16) | 0x40) // Rounding could carry a NaN into an infinity: keep its top bits, quiet.
            : (ushort)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    }

    /// <summary>The float that a bfloat16 is.</summary>
    public static float FromBFloat16(ushort value) => BitConverter.UInt32BitsToSingle((uint)value << 16);

    private static bool IsFloat(DType type) => type is DType.F32 or DType.BF16 or DType.F16;

    private readonly struct Work(Rows rows, Tensor destination, Tensor source) : IWork
    {
        public void Run(int task, int thread)
        {
            (int to, int from) = (destination.Type.ByteCount(), source.Type.ByteCount());
            for (int n = rows.First(task); n < rows.End(task); n++)
            {
                byte* y = (byte*)destination.Address + ((nint)n * destination.Stride * to);
                byte* x = (byte*)source.Address + ((nint)n * source.Stride * from);
                if (destination.Type == source.Type)
                {
                    Buffer.MemoryCopy(x, y, (long)source.Columns * from, (long)source.Columns * from);
                    continue;
                }

                for (int i = 0; i < source.Columns; i++)
                {
                    Store(y, i, Load(x, i));
                }
            }
        }

        private float Load(byte* row, int i) => source.Type switch
        {
            DType.BF16 => FromBFloat16(((ushort*)row)[i]),
            DType.F16 => (float)((Half*)row)[i],
            _ => ((float*)row)[i],
        };

        private void Store(byte* row, int i, float value)
        {
            switch (destination.Type)
            {
                case DType.BF16:
                    ((ushort*)row)[i] = ToBFloat16(value);
                    break;
                case DType.F16:
                    ((Half*)row)[i] = (Half)value;
                    break;
                default:
                    ((float*)row)[i] = value;
                    break;
            }
        }
    }

    private readonly struct ZeroWork(Rows rows, Tensor destination) : IWork
    {
        public void Run(int task, int thread)
        {
            int size = destination.Type.ByteCount();
            for (int n = rows.First(task); n < rows.End(task); n++)
            {
                NativeMemory.Clear((byte*)destination.Address + ((nint)n * destination.Stride * size), (nuint)(destination.Columns * size));
            }
        }
    }
}
