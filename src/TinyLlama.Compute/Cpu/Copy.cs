using System.Runtime.InteropServices;

namespace TinyLlama.Compute.Cpu;

/// <summary>Copies and conversions between F32, BF16 and F16, rounded to nearest, ties to even.</summary>
/// <remarks>NaN stays NaN; too large becomes infinite; subnormal numbers are kept. Memory-bound.</remarks>
internal static unsafe class Copy
{
    /// <summary>destination = source, of one shape; whole rows of a quantized type.</summary>
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

    /// <summary>Elements of any floating-point or quantized type as singles.</summary>
    /// <param name="destination">Receives them.</param>
    /// <param name="source">Their bytes; whole blocks of a quantized type.</param>
    /// <param name="type">Their type.</param>
    /// <param name="count">Their number.</param>
    public static void Widen(float* destination, byte* source, DType type, int count)
    {
        switch (type)
        {
            case DType.F32:
                Buffer.MemoryCopy(source, destination, (long)count * sizeof(float), (long)count * sizeof(float));
                break;
            case DType.BF16:
                Convert<Single, BFloat16>(destination, source, count);
                break;
            case DType.F16:
                Convert<Single, Float16>(destination, source, count);
                break;
            default:
                for (int done = 0; done < count; done += type.BlockElements())
                {
                    QuantizedBlocks.Decode(
                        type, new ReadOnlySpan<byte>(source, type.BlockBytes()), new Span<float>(destination + done, type.BlockElements()));
                    source += type.BlockBytes();
                }

                break;
        }
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

    private static void Convert<TTo, TFrom>(void* destination, void* source, int count)
        where TTo : struct, IElement
        where TFrom : struct, IElement
    {
        for (int i = 0; i < count; i++)
        {
            TTo.Store(destination, i, TFrom.Load(source, i));
        }
    }

    private static bool IsFloat(DType type) => type is DType.F32 or DType.BF16 or DType.F16;

    /// <summary>A type that converts to and from single precision.</summary>
    private interface IElement
    {
        static abstract float Load(void* row, int i);

        static abstract void Store(void* row, int i, float value);
    }

    private readonly struct Single : IElement
    {
        public static float Load(void* row, int i) => ((float*)row)[i];

        public static void Store(void* row, int i, float value) => ((float*)row)[i] = value;
    }

    private readonly struct BFloat16 : IElement
    {
        public static float Load(void* row, int i) => FromBFloat16(((ushort*)row)[i]);

        public static void Store(void* row, int i, float value) => ((ushort*)row)[i] = ToBFloat16(value);
    }

    private readonly struct Float16 : IElement
    {
        public static float Load(void* row, int i) => (float)((Half*)row)[i];

        public static void Store(void* row, int i, float value) => ((Half*)row)[i] = (Half)value;
    }

    private readonly struct Work(Rows rows, Tensor destination, Tensor source) : IWork
    {
        public void Run(int task, int thread)
        {
            for (int n = rows.First(task); n < rows.End(task); n++)
            {
                byte* y = (byte*)destination.RowRange(n, 1).Address;
                byte* x = (byte*)source.RowRange(n, 1).Address;
                if (destination.Type == source.Type)
                {
                    long bytes = source.Type.RowBytes(source.Columns);
                    Buffer.MemoryCopy(x, y, bytes, bytes);
                    continue;
                }

                switch (source.Type)
                {
                    case DType.BF16:
                        From<BFloat16>(y, x);
                        break;
                    case DType.F16:
                        From<Float16>(y, x);
                        break;
                    default:
                        From<Single>(y, x);
                        break;
                }
            }
        }

        private void From<TFrom>(void* y, void* x)
            where TFrom : struct, IElement
        {
            switch (destination.Type)
            {
                case DType.BF16:
                    Convert<BFloat16, TFrom>(y, x, source.Columns);
                    break;
                case DType.F16:
                    Convert<Float16, TFrom>(y, x, source.Columns);
                    break;
                default:
                    Convert<Single, TFrom>(y, x, source.Columns);
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
