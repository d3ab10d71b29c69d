using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.Arm;
using System.Runtime.Intrinsics.X86;

namespace TinyLlama.Compute.Cpu;

/// <summary>Rows as files keep them, as many as there are lanes: a lane is a row.</summary>
internal unsafe partial interface ILanes<TSelf>
{
    /// <summary>Turns four dwords of each row: register i has dword i of every row.</summary>
    /// <param name="rows">The first dword of the first row; at any byte.</param>
    /// <param name="rowBytes">Bytes from one row to the next.</param>
    /// <param name="w0">Receives dword 0.</param>
    /// <param name="w1">Receives dword 1.</param>
    /// <param name="w2">Receives dword 2.</param>
    /// <param name="w3">Receives dword 3.</param>
    static abstract void LoadTurned(byte* rows, nint rowBytes, out TSelf w0, out TSelf w1, out TSelf w2, out TSelf w3);

    /// <summary>One word of 16 bits of each row.</summary>
    static abstract TSelf LoadWords(byte* rows, nint rowBytes);

    /// <summary>For each row Σ row[i] · x[i] of 32 signed bytes, in int32. x are -127 … 127.</summary>
    static abstract TSelf ByteProducts(byte* rows, nint rowBytes, byte* x);
}

internal unsafe partial struct Lanes512
{
    private Lanes512(Lanes256 lower, Lanes256 upper)
        : this(Vector512.Create(lower.Value, upper.Value))
    {
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void LoadTurned(byte* rows, nint rowBytes, out Lanes512 w0, out Lanes512 w1, out Lanes512 w2, out Lanes512 w3)
    {
        Lanes256.LoadTurned(rows, rowBytes, out Lanes256 low0, out Lanes256 low1, out Lanes256 low2, out Lanes256 low3);
        Lanes256.LoadTurned(rows + (8 * rowBytes), rowBytes, out Lanes256 high0, out Lanes256 high1, out Lanes256 high2, out Lanes256 high3);
        (w0, w1, w2, w3) = (new(low0, high0), new(low1, high1), new(low2, high2), new(low3, high3));
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 LoadWords(byte* rows, nint rowBytes) =>
        new(Lanes256.LoadWords(rows, rowBytes), Lanes256.LoadWords(rows + (8 * rowBytes), rowBytes));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes512 ByteProducts(byte* rows, nint rowBytes, byte* x) =>
        new(Lanes256.ByteProducts(rows, rowBytes, x), Lanes256.ByteProducts(rows + (8 * rowBytes), rowBytes, x));
}

internal unsafe partial struct Lanes256
{
    private Lanes256(Lanes128 lower, Lanes128 upper)
        : this(Vector256.Create(lower.Value, upper.Value))
    {
    }

    /// <summary>Gets the register.</summary>
    public readonly Vector256<float> Value => _value;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void LoadTurned(byte* rows, nint rowBytes, out Lanes256 w0, out Lanes256 w1, out Lanes256 w2, out Lanes256 w3)
    {
        if (Avx.IsSupported)
        {
            // Two rounds of pairs: of rows, then of pairs of rows.
            Vector256<float> r0 = Rows(rows, 4 * rowBytes);
            Vector256<float> r1 = Rows(rows + rowBytes, 4 * rowBytes);
            Vector256<float> r2 = Rows(rows + (2 * rowBytes), 4 * rowBytes);
            Vector256<float> r3 = Rows(rows + (3 * rowBytes), 4 * rowBytes);
            Vector256<double> low = Avx.UnpackLow(r0, r1).AsDouble(), high = Avx.UnpackHigh(r0, r1).AsDouble();
            Vector256<double> low2 = Avx.UnpackLow(r2, r3).AsDouble(), high2 = Avx.UnpackHigh(r2, r3).AsDouble();
            (w0, w1) = (new(Avx.UnpackLow(low, low2).AsSingle()), new(Avx.UnpackHigh(low, low2).AsSingle()));
            (w2, w3) = (new(Avx.UnpackLow(high, high2).AsSingle()), new(Avx.UnpackHigh(high, high2).AsSingle()));
            return;
        }

        Lanes128.LoadTurned(rows, rowBytes, out Lanes128 low0, out Lanes128 low1, out Lanes128 lower2, out Lanes128 low3);
        Lanes128.LoadTurned(rows + (4 * rowBytes), rowBytes, out Lanes128 high0, out Lanes128 high1, out Lanes128 upper2, out Lanes128 high3);
        (w0, w1, w2, w3) = (new(low0, high0), new(low1, high1), new(lower2, upper2), new(low3, high3));
    }

    // By general registers: their ports are idle where vectors multiply.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 LoadWords(byte* rows, nint rowBytes)
    {
        Vector128<ushort> words = Vector128.Create(FourWords(rows, rowBytes), FourWords(rows + (4 * rowBytes), rowBytes)).AsUInt16();
        return new(Avx2.IsSupported
            ? Avx2.ConvertToVector256Int32(words).AsSingle()
            : Vector256.Create(Vector128.WidenLower(words), Vector128.WidenUpper(words)).AsSingle());
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes256 ByteProducts(byte* rows, nint rowBytes, byte* x)
    {
        if (!Avx2.IsSupported)
        {
            return new(Lanes128.ByteProducts(rows, rowBytes, x), Lanes128.ByteProducts(rows + (4 * rowBytes), rowBytes, x));
        }

        Vector256<sbyte> inputs = Vector256.Load((sbyte*)x);
        Vector256<int> first = FourRows(rows, rowBytes, inputs), last = FourRows(rows + (4 * rowBytes), rowBytes, inputs);
        return new((Avx2.Permute2x128(first, last, 0x20) + Avx2.Permute2x128(first, last, 0x31)).AsSingle());
    }

    // Each half of the register has, for each of four rows, the sum of that half.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector256<int> FourRows(byte* rows, nint rowBytes, Vector256<sbyte> x)
    {
        Vector256<int> r0 = Row(rows, x), r1 = Row(rows + rowBytes, x);
        Vector256<int> r2 = Row(rows + (2 * rowBytes), x), r3 = Row(rows + (3 * rowBytes), x);
        Vector256<long> pairs = (Avx2.UnpackLow(r0, r1) + Avx2.UnpackHigh(r0, r1)).AsInt64();
        Vector256<long> pairs2 = (Avx2.UnpackLow(r2, r3) + Avx2.UnpackHigh(r2, r3)).AsInt64();
        return Avx2.UnpackLow(pairs, pairs2).AsInt32() + Avx2.UnpackHigh(pairs, pairs2).AsInt32();
    }

    // Sums of four neighbours.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector256<int> Row(byte* row, Vector256<sbyte> x)
    {
        Vector256<sbyte> w = Vector256.Load((sbyte*)row);
        return Avx2.MultiplyAddAdjacent(Avx2.MultiplyAddAdjacent(Avx2.Abs(w), Avx2.Sign(x, w)), Vector256<short>.One);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static ulong FourWords(byte* p, nint rowBytes)
    {
        ulong low = *(ushort*)p | ((ulong)*(ushort*)(p + rowBytes) << 16);
        ulong high = *(ushort*)(p + (2 * rowBytes)) | ((ulong)*(ushort*)(p + (3 * rowBytes)) << 16);
        return low | (high << 32);
    }

    // Four dwords of a row and of the fourth after it.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector256<float> Rows(byte* row, nint toFourth) =>
        Avx.Blend(Vector128.Load((float*)row).ToVector256Unsafe(), Avx.BroadcastVector128ToVector256((float*)(row + toFourth)), 0xF0);
}

internal readonly unsafe partial struct Lanes128
{
    /// <summary>Gets the register.</summary>
    public Vector128<float> Value => _value;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void LoadTurned(byte* rows, nint rowBytes, out Lanes128 w0, out Lanes128 w1, out Lanes128 w2, out Lanes128 w3)
    {
        Vector128<float> r0 = Vector128.Load((float*)rows), r1 = Vector128.Load((float*)(rows + rowBytes));
        Vector128<float> r2 = Vector128.Load((float*)(rows + (2 * rowBytes))), r3 = Vector128.Load((float*)(rows + (3 * rowBytes)));
        Vector128<float> even = ZipLow(r0, r2), odd = ZipLow(r1, r3);
        (w0, w1) = (new(ZipLow(even, odd)), new(ZipHigh(even, odd)));
        (even, odd) = (ZipHigh(r0, r2), ZipHigh(r1, r3));
        (w2, w3) = (new(ZipLow(even, odd)), new(ZipHigh(even, odd)));
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 LoadWords(byte* rows, nint rowBytes) => new(Vector128.Create(
        *(ushort*)rows, (uint)*(ushort*)(rows + rowBytes), *(ushort*)(rows + (2 * rowBytes)), *(ushort*)(rows + (3 * rowBytes))).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 ByteProducts(byte* rows, nint rowBytes, byte* x)
    {
        Vector128<int> r0 = Row(rows, x), r1 = Row(rows + rowBytes, x), r2 = Row(rows + (2 * rowBytes), x), r3 = Row(rows + (3 * rowBytes), x);
        return new((
            Ssse3.IsSupported ? Ssse3.HorizontalAdd(Ssse3.HorizontalAdd(r0, r1), Ssse3.HorizontalAdd(r2, r3))
            : AdvSimd.Arm64.IsSupported ? AdvSimd.Arm64.AddPairwise(AdvSimd.Arm64.AddPairwise(r0, r1), AdvSimd.Arm64.AddPairwise(r2, r3))
            : Vector128.Create(Vector128.Sum(r0), Vector128.Sum(r1), Vector128.Sum(r2), Vector128.Sum(r3))).AsSingle());
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector128<int> Row(byte* row, byte* x)
    {
        (Lanes128 low, Lanes128 high) = (LoadDwords(row), LoadDwords(row + 16));
        return AddNeighbours(WordProducts(Magnitudes(low), WithSigns(LoadDwords(x), low)))._value.AsInt32()
            + AddNeighbours(WordProducts(Magnitudes(high), WithSigns(LoadDwords(x + 16), high)))._value.AsInt32();
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector128<float> ZipLow(Vector128<float> a, Vector128<float> b) =>
        Sse.IsSupported ? Sse.UnpackLow(a, b)
        : AdvSimd.Arm64.IsSupported ? AdvSimd.Arm64.ZipLow(a, b)
        : Vector128.Create(a[0], b[0], a[1], b[1]);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector128<float> ZipHigh(Vector128<float> a, Vector128<float> b) =>
        Sse.IsSupported ? Sse.UnpackHigh(a, b)
        : AdvSimd.Arm64.IsSupported ? AdvSimd.Arm64.ZipHigh(a, b)
        : Vector128.Create(a[2], b[2], a[3], b[3]);
}

internal readonly unsafe partial struct Lanes1
{
    public static void LoadTurned(byte* rows, nint rowBytes, out Lanes1 w0, out Lanes1 w1, out Lanes1 w2, out Lanes1 w3) =>
        (w0, w1, w2, w3) = (LoadDwords(rows), LoadDwords(rows + 4), LoadDwords(rows + 8), LoadDwords(rows + 12));

    public static Lanes1 LoadWords(byte* rows, nint rowBytes) => LoadWords(rows);

    public static Lanes1 ByteProducts(byte* rows, nint rowBytes, byte* x)
    {
        int sum = 0;
        for (int i = 0; i < 32; i++)
        {
            sum += (sbyte)rows[i] * (sbyte)x[i];
        }

        return FromBits((uint)sum);
    }
}
