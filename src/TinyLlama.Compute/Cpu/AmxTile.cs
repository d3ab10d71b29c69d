using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using Iced.Intel;
using TinyLlama.Compute.Native;
using static Iced.Intel.AssemblerRegisters;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// A tile of bf16 products on AMX: four tile registers of sums, 32 × 32, and 16 steps of pairs at once by four tdpbf16ps, emitted when it
/// is first asked for. Panels are those of <see cref="Avx512Bf16Tile"/>.
/// </summary>
/// <remarks>
/// The instruction adds up the products of the first of each pair and those of the second, 16 steps each, adds both, then that to the sum:
/// other roundings than vdpbf16ps. It reads subnormal numbers as zero, and gives zero for them.
/// </remarks>
internal readonly unsafe struct AmxTile : IPackingTile
{
    private const int Chunk = Amx.RowDwords;

    private static readonly byte* s_sizes = Amx.Sizes(_ => (Amx.TileRows, Amx.RowDwords * sizeof(float)));

    private static readonly (nint Address, string? Fault) s_code = ExecutableMemory.Load(
        "AMX", Amx.Fault, static () => ExecutableMemory.Map(Emit()), IsRight);

    /// <summary>Gets why the code cannot be used here, or null. The first use of it emits, loads and checks the code.</summary>
    public static string? Fault => s_code.Fault;

    /// <inheritdoc/>
    public static DType Type => DType.BF16;

    /// <inheritdoc/>
    public static int LeftDwords => 1;

    /// <inheritdoc/>
    public static int Rows => 32;

    /// <inheritdoc/>
    public static int Columns => 32;

    /// <inheritdoc/>
    public static int StepUnit => Chunk;

    /// <inheritdoc/>
    /// <remarks>Packed rows are in chunks of 16 steps, each row after row, as tile registers load them.</remarks>
    public static int PackedRow => Chunk;

    /// <inheritdoc/>
    public static bool InAttention => true;

    /// <inheritdoc/>
    public static void Begin()
    {
        // The first use of the code checks it, on this thread, with tiles that it releases.
        if (s_code.Fault is string fault)
        {
            throw new InvalidOperationException(fault);
        }

        Amx.Configure(s_sizes);
    }

    /// <inheritdoc/>
    public static void End() => Amx.Release();

    /// <inheritdoc/>
    public static int FetchedOfStep => ITile.Line;

    /// <inheritdoc/>
    public static void Multiply(
        float* sums, nint sumsRow, float* left, nint leftRow, nint leftStep, float* panel, nint steps, float* ahead, bool accumulate) =>
        Multiply(s_code.Address, sums, sumsRow, left, leftRow, leftStep, panel, steps, ahead, accumulate);

    /// <summary>The same by code as <see cref="Emit"/> makes it.</summary>
    [SkipLocalsInit]
    internal static void Multiply(
        nint code, float* sums, nint sumsRow, float* left, nint leftRow, nint leftStep, float* panel, nint steps, float* ahead, bool accumulate)
    {
        Tile<Lanes512>.Prefetch(sums, sumsRow, Rows);
        float* whole = stackalloc float[Rows * Columns];
        float* rest = stackalloc float[2 * 32 * Chunk];
        Product product = new()
        {
            Sums = sums,
            SumsRow = sumsRow * sizeof(float),
            Left = left,
            LeftRow = leftRow * sizeof(float),
            LeftChunk = leftStep * Chunk * sizeof(float),
            Panel = panel,
            Chunks = steps / Chunk,
            Ahead = ahead,
            Whole = accumulate ? whole : null,
        };
        int more = (int)(steps % Chunk);
        if (more > 0)
        {
            // The steps of the last chunk, filled up with zeros: behind them lies what belongs to others.
            nint done = steps - more;
            left += leftStep * done;
            nint row = leftStep == 1 ? leftRow : more;
            new Span<float>(rest, 2 * 32 * Chunk).Clear();
            for (int r = 0; r < Rows; r++)
            {
                new Span<float>(left + (r * row), more).CopyTo(new Span<float>(rest + (r * Chunk), more));
            }

            product.RestLeft = rest;
            product.RestPanel = rest + (32 * Chunk);
            new Span<float>(panel + (done * Columns), more * Columns).CopyTo(new Span<float>(product.RestPanel, more * Columns));
        }

        ((delegate* unmanaged[SuppressGCTransition]<Product*, void>)code)(&product);
    }

    /// <inheritdoc/>
    public static void MultiplyRow(float* sums, float* left, float* panels, nint nextPanel, nint steps, bool accumulate) =>
        Avx512Bf16Tile.MultiplyRow<AmxTile>(sums, left, panels, nextPanel, steps, accumulate);

    /// <inheritdoc/>
    public static void Pack(float* panel, float* source, nint column, nint step, int columns, nint depth) =>
        Bf16Tile<Lanes512>.Pack(panel, source, column, step, columns, depth);

    /// <inheritdoc/>
    /// <remarks>What is left of a chunk is packed as one of fewer steps.</remarks>
    [SkipLocalsInit]
    public static void PackRows(float* tile, float* source, nint step, int rows, nint depth)
    {
        // Pairs are put together a step after the other, as a panel's are, and then turned.
        float* pairs = stackalloc float[Chunk * 32];
        float* turned = stackalloc float[Chunk * 32];
        for (nint k = 0; k < depth; k += 2 * Chunk, source += 2 * Chunk * step, tile += Rows * Chunk)
        {
            nint count = Math.Min(2 * Chunk, depth - k);
            Bf16Tile<Lanes512>.Pack(pairs, source, column: 1, step, rows, count);
            if (count > 2 * (Chunk - 1))
            {
                Turn(tile, pairs);
                continue;
            }

            int steps = (int)((count + 1) / 2);
            Turn(turned, pairs);
            for (int row = 0; row < Rows; row++)
            {
                new Span<float>(turned + (row * Chunk), steps).CopyTo(new Span<float>(tile + (row * steps), steps));
            }
        }
    }

    /// <inheritdoc/>
    public static void CopyRow(float* row, float* source, nint depth) =>
        Bf16Tile<Lanes512>.CopyPairs(row, source, depth);

    /// <summary>The machine code of a <see cref="Product"/>; position-independent, without data.</summary>
    internal static byte[] Emit() => ExecutableMemory.Assemble(code =>
    {
        Label loop = code.CreateLabel(), rest = code.CreateLabel(), store = code.CreateLabel();
        Label add = code.CreateLabel(), rows = code.CreateLabel();

        // rdx and rax: rows 0 and 16 of the left operand, rcx from one row to the next; r9: the panel, r11 from one step to the next.
        code.mov(rdx, Field(nameof(Product.Left)));
        code.mov(rcx, Field(nameof(Product.LeftRow)));
        code.mov(rsi, Field(nameof(Product.LeftChunk)));
        code.mov(r9, Field(nameof(Product.Panel)));
        code.mov(r10, Field(nameof(Product.Chunks)));
        code.mov(r8, Field(nameof(Product.Ahead)));
        code.mov(rax, rcx);
        code.shl(rax, 4);
        code.add(rax, rdx);
        code.mov(r11, 128);
        code.tilezero(tmm0);
        code.tilezero(tmm1);
        code.tilezero(tmm2);
        code.tilezero(tmm3);
        code.add(r10, 0);
        code.je(rest);
        code.Label(ref loop);
        Multiply(linesOfProduct: 4);
        code.add(rdx, rsi);
        code.add(rax, rsi);
        code.add(r9, 16 * 128);
        code.dec(r10);
        code.jne(loop);

        code.Label(ref rest);
        code.mov(rdx, Field(nameof(Product.RestLeft)));
        code.add(rdx, 0);
        code.je(store);
        code.mov(r9, Field(nameof(Product.RestPanel)));
        code.mov(rcx, 64);
        code.lea(rax, __[rdx + (16 * 64)]);
        Multiply(linesOfProduct: 0);

        code.Label(ref store);
        code.mov(rdx, Field(nameof(Product.Sums)));
        code.mov(rcx, Field(nameof(Product.SumsRow)));
        code.mov(rax, Field(nameof(Product.Whole)));
        code.add(rax, 0);
        code.jne(add);
        Store(rdx, rcx, rsi);
        code.vzeroupper();
        code.ret();

        code.Label(ref add);
        code.mov(r11, 128);
        Store(rax, r11, rsi);
        code.mov(rax, Field(nameof(Product.Whole)));
        code.mov(r10, 32);
        code.Label(ref rows);
        code.vmovups(zmm0, __zmmword_ptr[rax]);
        code.vmovups(zmm1, __zmmword_ptr[rax + 64]);
        code.vaddps(zmm0, zmm0, __zmmword_ptr[rdx]);
        code.vaddps(zmm1, zmm1, __zmmword_ptr[rdx + 64]);
        code.vmovups(__zmmword_ptr[rdx], zmm0);
        code.vmovups(__zmmword_ptr[rdx + 64], zmm1);
        code.add(rax, 128);
        code.add(rdx, rcx);
        code.dec(r10);
        code.jne(rows);
        code.vzeroupper();
        code.ret();

        void Multiply(int linesOfProduct)
        {
            code.tileloadd(tmm4, __[rdx + rcx]);
            code.tileloadd(tmm6, __[r9 + r11]);
            code.tdpbf16ps(tmm0, tmm4, tmm6);
            Fetch();
            code.tileloadd(tmm7, __[r9 + r11 + 64]);
            code.tdpbf16ps(tmm1, tmm4, tmm7);
            Fetch();
            code.tileloadd(tmm5, __[rax + rcx]);
            code.tdpbf16ps(tmm2, tmm5, tmm6);
            Fetch();
            code.tdpbf16ps(tmm3, tmm5, tmm7);
            Fetch();

            void Fetch()
            {
                for (int line = 0; line < linesOfProduct; line++)
                {
                    code.prefetcht1(__byte_ptr[r8 + (line * 64)]);
                }

                if (linesOfProduct > 0)
                {
                    code.add(r8, linesOfProduct * 64);
                }
            }
        }

        void Store(AssemblerRegister64 sums, AssemblerRegister64 row, AssemblerRegister64 spare)
        {
            code.tilestored(__[sums + row], tmm0);
            code.tilestored(__[sums + row + 64], tmm1);
            code.mov(spare, row);
            code.shl(spare, 4);
            code.add(spare, sums);
            code.tilestored(__[spare + row], tmm2);
            code.tilestored(__[spare + row + 64], tmm3);
        }
    });

    private static AssemblerMemoryOperand Field(string name) => __qword_ptr[rdi + (int)Marshal.OffsetOf<Product>(name)];


    // 16 steps of 32 rows to 32 rows of 16 steps.
    private static void Turn(float* rows, float* steps)
    {
        for (int row = 0; row < Rows; row += 4, rows += 4 * Chunk)
        {
            Lanes512.LoadTurned((byte*)(steps + row), Columns * sizeof(float), out Lanes512 r0, out Lanes512 r1, out Lanes512 r2, out Lanes512 r3);
            r0.Store(rows);
            r1.Store(rows + Chunk);
            r2.Store(rows + (2 * Chunk));
            r3.Store(rows + (3 * Chunk));
        }
    }

    // Whole numbers so small that every order of adding them gives the same bits.
    private static bool IsRight(nint code)
    {
        const int Depth = 75, Steps = 38, SumsRow = 40;
        float[] numbers = [.. Enumerable.Range(0, 4096).Select(i => (float)((i * 37 % 17) - 8))];
        float[] columns = new float[Steps * 32], packed = new float[Steps * 32], rows = new float[(Steps + 3) * 32];
        bool same = true;
        fixed (float* from = numbers, p = columns, tiles = packed, r = rows)
        {
            Pack(p, from, column: 1, step: 32, columns: 32, Depth);
            PackRows(tiles, from + 100, step: 33, rows: 32, Depth);
            for (int row = 0; row < Rows; row++)
            {
                CopyRow(r + (row * (Steps + 3)), from + (row * Depth), Depth);
            }

            Amx.Configure(s_sizes);
            foreach (bool accumulate in (bool[])[false, true])
            {
                same &= Same((i, k) => numbers[100 + i + (k * 33)], tiles, PackedRow, Rows, p, accumulate);
                same &= Same((i, k) => numbers[(i * Depth) + k], r, Steps + 3, 1, p, accumulate);
            }

            Amx.Release();

            bool Same(Func<int, int, float> leftAt, float* left, nint leftRow, nint leftStep, float* panel, bool accumulate)
            {
                float[] actual = numbers[..(32 * SumsRow)];
                fixed (float* a = actual)
                {
                    Multiply(code, a, SumsRow, left, leftRow, leftStep, panel, Steps, panel, accumulate);
                }

                return Enumerable.Range(0, actual.Length).All(at =>
                {
                    (int i, int j) = Math.DivRem(at, SumsRow);
                    float expected = accumulate || j >= Columns ? numbers[at] : 0;
                    return actual[at] == expected + (j >= Columns ? 0 : Enumerable.Range(0, Depth).Sum(k => leftAt(i, k) * numbers[(k * 32) + j]));
                });
            }
        }

        return same;
    }

    /// <summary>What the code multiplies: the addresses, and bytes from one row, step or chunk to the next.</summary>
    [StructLayout(LayoutKind.Sequential)]
    internal struct Product
    {
        public float* Sums;
        public nint SumsRow;
        public float* Left;
        public nint LeftRow;
        public nint LeftChunk;
        public float* Panel;
        public nint Chunks;

        // What is fetched meanwhile: a line for each step of a chunk.
        public float* Ahead;

        // Where to add to the sums: room for a tile. Else null.
        public float* Whole;

        // One chunk more, or null: 32 rows of 16 steps, 16 steps of 32 columns.
        public float* RestLeft;
        public float* RestPanel;
    }
}
