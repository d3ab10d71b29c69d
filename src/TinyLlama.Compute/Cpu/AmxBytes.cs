using System.Runtime.Intrinsics.X86;
using Iced.Intel;
using TinyLlama.Compute.Native;
using static Iced.Intel.AssemblerRegisters;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// Products of rounded inputs and quantized weights on AMX: a group of 16 rows by one of 16 outputs is one tdpbssd, whose integers
/// 16-lane registers scale and add up. Four such tiles at once: two blocks of rows by two panels, or one by four. Emitted when it is first
/// asked for.
/// </summary>
/// <remarks>
/// Integers are exact and groups add up as in <see cref="QuantizedMatMul"/>, so the bits are those of its kernels. Integers wait in memory
/// while tiles multiply the next group. Where the other hyperthread of a core is busy, instructions that write tile registers hardly overlap
/// (measured: some 15 cycles each): so there are as few as possible, three for a tile, with other work between them.
/// </remarks>
internal static unsafe class AmxBytes
{
    /// <summary>Rows of a block of inputs.</summary>
    public const int Rows = Amx.TileRows;

    /// <summary>Tiles of sums at once: blocks by panels.</summary>
    public const int Tiles = 4;

    /// <summary>Bytes of a group of a block of inputs: 32 of each row, then scales of the rows, then scaled sums.</summary>
    public const int InputBytes = BytesOfGroup + (2 * Rows * sizeof(float));

    /// <summary>The most bytes of a group of weights.</summary>
    public const int MostWeightBytes = BytesOfGroup + (3 * Rows * sizeof(float));

    /// <summary>Bytes that code needs for integers that wait: those of the halves of two groups. Those of two whole groups leave room for bytes.</summary>
    public const int WaitingBytes = 4 * Tiles * TileBytes;

    /// <summary>Bytes of a tile of sums.</summary>
    public const int TileBytes = Rows * Rows * sizeof(float);

    /// <summary>Where in a group the first of what follows its bytes lies.</summary>
    public const int BytesOfGroup = RoundedInputs.Group * Rows;

    // Of Q4_0: bytes of a block, registers that a group is read in.
    private const int NibbleBlockBytes = 18;
    private const int Planes = 4;

    // Of the instructions that multiply four tiles, those between which others have their place.
    private const int Steps = 16;

    // Half precision of 16 outputs, in front of the bytes of a group.
    private const int HalfScalesBytes = Rows * sizeof(ushort);

    // GF2P8AFFINEQB: bit i of a byte is the parity of the bits that byte 7 - i of the matrix selects, turned over where the constant has bit
    // i. Nibbles 8 too large become signed bytes: their last bit, turned over, is that of the sign. One matrix reads low bits, one high ones.
    private const ulong LowNibbles = 0x0102040808080808;
    private const ulong HighNibbles = 0x1020408080808080;
    private const byte NibbleSigns = 0xF8;

    private static readonly Kind[] s_kinds = Enum.GetValues<Kind>();

    private static readonly byte* s_sizes = Amx.Sizes(static tile => TileSize(Kind.Unpacked, tile));

    private static readonly byte* s_sizesOfHalves = Amx.Sizes(static tile => TileSize(Kind.Halves, tile));

    private static readonly (nint[]? Addresses, string? Fault) s_code = ExecutableMemory.Load("bytes on AMX", Missing(), Map, IsRight);

    /// <summary>What groups of weights are.</summary>
    public enum Kind
    {
        /// <summary>Eight registers of four signed bytes of each output, then one of scales.</summary>
        Unpacked,

        /// <summary>The same, then one of offsets.</summary>
        Offsets,

        /// <summary>Eight such registers, one of units, two of whole scales, of 16 elements each: signed bytes as fp32.</summary>
        Halves,

        /// <summary>Q8_0 as panels have it: scales in half precision, then eight such registers.</summary>
        Stored,

        /// <summary>Q4_0 as panels have it: scales in half precision, then four registers, of the first four and of the last four in the high bits.</summary>
        Nibbles,
    }

    /// <summary>
    /// What is fetched to the second cache meanwhile, as few rows would else wait for memory: for each group <see cref="LinesAhead"/> of as
    /// many panels as are multiplied.
    /// </summary>
    /// <param name="First">Where the first of the panels is read next, or zero: nothing is fetched. Any address, as nothing is loaded.</param>
    /// <param name="NextPanel">The bytes from it to the next panel.</param>
    /// <param name="GroupBytes">Bytes of a group.</param>
    public readonly record struct Ahead(nint First, nint NextPanel, nint GroupBytes);

    /// <summary>Gets why the code cannot be used here, or null. The first use of it emits, loads and checks the code.</summary>
    public static string? Fault => s_code.Fault;

    /// <summary>Bytes of a group of weights.</summary>
    public static int WeightBytes(Kind kind) => kind switch
    {
        Kind.Unpacked => BytesOfGroup + (Rows * sizeof(float)),
        Kind.Offsets => BytesOfGroup + (2 * Rows * sizeof(float)),
        Kind.Halves => MostWeightBytes,
        Kind.Stored => Q8MatMul.BlockBytes * Rows,
        _ => NibbleBlockBytes * Rows,
    };

    /// <summary>Lines of 64 bytes that are fetched of a panel for a group: those of one, or as many as the largest group that is unpacked takes.</summary>
    public static int LinesAhead(Kind kind) => IsStored(kind) ? (WeightBytes(kind) + 63) / 64 : 7;

    /// <summary>Makes this thread ready for a kind; until <see cref="Amx.Release"/> nothing else may configure tiles.</summary>
    public static void Configure(Kind kind) => Amx.Configure(kind == Kind.Halves ? s_sizesOfHalves : s_sizes);

    /// <summary>sums += inputs · weightsᵀ, for one block of inputs and four panels, or two and two.</summary>
    /// <param name="kind">What weights are.</param>
    /// <param name="sums">Four tiles of 16 rows by 16 outputs, row after row; those of a block follow each other.</param>
    /// <param name="inputs">The first group of the block; the others follow.</param>
    /// <param name="nextBlock">The bytes from it to the second block, or zero: there is one.</param>
    /// <param name="weights">The first group of the first panel; the others follow.</param>
    /// <param name="nextPanel">The bytes from it to the next panel.</param>
    /// <param name="groups">The number of groups, at least one.</param>
    /// <param name="waiting">Room for <see cref="WaitingBytes"/>.</param>
    /// <param name="ahead">What is fetched.</param>
    public static void Multiply(Kind kind, float* sums, byte* inputs, nint nextBlock, byte* weights, nint nextPanel, nint groups, byte* waiting, Ahead ahead) =>
        Call(Of(s_code.Addresses!, nextBlock == 0 ? 1 : 2, kind, ahead.First != 0), sums, inputs, nextBlock, weights, nextPanel, groups, waiting, ahead);

    /// <summary>Rows and bytes of a row of a tile register: sums in 0 to 3, inputs in 4 and 5, weights in 6 and 7, of all elements that share a scale.</summary>
    internal static (int Rows, int Bytes) TileSize(Kind kind, int tile)
    {
        int elements = RoundedInputs.Group / Parts(kind);
        return (tile < 6 ? Rows : elements / sizeof(int), tile is 4 or 5 ? elements : 64);
    }

    /// <summary>The machine code of <see cref="Multiply"/>; position-independent, without data.</summary>
    /// <param name="blocks">One or two.</param>
    /// <param name="kind">What weights are.</param>
    /// <param name="fetches">Whether anything is fetched ahead.</param>
    internal static byte[] Emit(int blocks, Kind kind, bool fetches) => ExecutableMemory.Assemble(code =>
    {
        // On entry: rdi sums, rsi inputs, rdx weights, rcx groups, r8 waiting, r9 the distance of panels; on the stack that of the second
        // block, and what is ahead: its first panel, the distance of its panels, the bytes of a group. They go to r12, r13 and r15, the
        // third of the panels ahead to r14. Integers of a group wait at r8, those of the next at rax; behind them lie the bytes that they are
        // the products of, if nibbles were unpacked. Scales of panels in zmm0 to 3, offsets in 4 to 7; or units and the scales of the two
        // halves.
        int panelCount = Tiles / blocks;
        AssemblerRegister64 secondBlock = r11;
        AssemblerRegister64[] saved = [rbx, r12, r13, r14, r15];
        AssemblerRegister64[] panels = blocks == 1 ? [rdx, r9, r11, rbx] : [rdx, r9];
        AssemblerRegisterZMM lowNibbles = zmm8, highNibbles = zmm9;
        int groupBytes = WeightBytes(kind);
        int parts = Parts(kind);
        bool unpacks = kind == Kind.Nibbles;
        int integersBytes = parts * Tiles * TileBytes;
        Label loop = code.CreateLabel(), beforeLast = code.CreateLabel(), last = code.CreateLabel();
        foreach (AssemblerRegister64 register in saved)
        {
            code.push(register);
        }

        int onStack = sizeof(long) * (saved.Length + 1);
        if (blocks == 1)
        {
            code.lea(r11, __[rdx + (r9 * 2)]);
            code.lea(rbx, __[r11 + r9]);
        }
        else
        {
            code.mov(r11, __[rsp + onStack]);
            code.add(r11, rsi);
        }

        if (fetches)
        {
            code.mov(r12, __[rsp + (onStack + sizeof(long))]);
            code.mov(r13, __[rsp + (onStack + (2 * sizeof(long)))]);
            code.mov(r15, __[rsp + (onStack + (3 * sizeof(long)))]);
            code.lea(r14, __[r12 + (r13 * 2)]);
        }

        code.add(r9, rdx);
        if (unpacks)
        {
            Constant(lowNibbles, LowNibbles);
            Constant(highNibbles, HighNibbles);
        }

        code.mov(r10, RoundedInputs.Group);
        code.lea(rax, __[r8 + (integersBytes + (unpacks ? panelCount * BytesOfGroup : 0))]);
        UnpackGroup(r8, group: 0);
        MultiplyGroup(r8, group: 0, static () => { });
        code.dec(rcx);
        code.je(last);
        if (unpacks)
        {
            UnpackGroup(rax, group: 1);
            code.dec(rcx);
            code.je(beforeLast);
        }

        code.Label(ref loop);
        MultiplyNext(unpacks);
        code.dec(rcx);
        code.jne(loop);
        if (unpacks)
        {
            code.Label(ref beforeLast);
            MultiplyNext(unpacksNext: false);
        }

        code.Label(ref last);
        LoadScales();
        int row = 0, line = 0, piece = 0;
        while (row < Tiles * Rows)
        {
            Fetch();
            AddScaled(row++);
        }

        foreach (AssemblerRegister64 register in saved.Reverse())
        {
            code.pop(register);
        }

        code.vzeroupper();
        code.ret();

        void Constant(AssemblerRegisterZMM register, ulong value)
        {
            code.mov(rax, value);
            code.vpbroadcastq(register, rax);
        }

        // The next group while the integers of this one are scaled, and the one after it unpacked where those of this one were.
        void MultiplyNext(bool unpacksNext)
        {
            LoadScales();
            (row, line, piece) = (0, 0, 0);
            int steps = parts * Steps;
            MultiplyGroup(rax, group: 1, () =>
            {
                int step = row * steps / (Tiles * Rows);
                for (int end = (step + 1) * panelCount * LinesAhead(kind) / steps; line < end;)
                {
                    Fetch();
                }

                for (int end = (step + 1) * panelCount * Planes / steps; unpacksNext && piece < end; piece++)
                {
                    Unpack(r8, group: 2, piece / Planes, piece % Planes);
                }

                for (int end = (step + 1) * Tiles * Rows / steps; row < end; row++)
                {
                    AddScaled(row);
                }
            });
            code.add(rsi, InputBytes);
            if (blocks == 2)
            {
                code.add(secondBlock, InputBytes);
            }

            foreach (AssemblerRegister64 panel in panels)
            {
                code.add(panel, groupBytes);
            }

            if (fetches)
            {
                code.add(r12, r15);
                code.add(r14, r15);
            }

            code.xchg(r8, rax);
        }

        // Of one panel after the other a line, so that few are under way at a time.
        void Fetch()
        {
            if (fetches && line < panelCount * LinesAhead(kind))
            {
                AssemblerRegister64 pair = line % panelCount < 2 ? r12 : r14;
                int at = line / panelCount * 64;
                code.prefetcht1(line % 2 == 0 ? __byte_ptr[pair + at] : __byte_ptr[pair + r13 + at]);
            }

            line++;
        }

        // Signed bytes, behind the integers.
        void Unpack(AssemblerRegister64 waiting, int group, int panel, int plane)
        {
            int destination = integersBytes + (panel * BytesOfGroup) + (plane * 64);
            code.vmovups(zmm10, __zmmword_ptr[panels[panel] + ((group * groupBytes) + HalfScalesBytes + (plane * 64))]);
            code.vgf2p8affineqb(zmm11, zmm10, lowNibbles, NibbleSigns);
            code.vmovups(__zmmword_ptr[waiting + destination], zmm11);
            code.vgf2p8affineqb(zmm10, zmm10, highNibbles, NibbleSigns);
            code.vmovups(__zmmword_ptr[waiting + (destination + (Planes * 64))], zmm10);
        }

        void UnpackGroup(AssemblerRegister64 waiting, int group)
        {
            for (int i = 0; unpacks && i < panelCount * Planes; i++)
            {
                Unpack(waiting, group, i / Planes, i % Planes);
            }
        }

        void MultiplyGroup(AssemblerRegister64 waiting, int group, Action between)
        {
            for (int part = 0; part < parts; part++)
            {
                MultiplyTiles(waiting, group, part, between);
            }
        }

        // Steps, and what is done between them: of the four tiles that wait, some rows.
        void MultiplyTiles(AssemblerRegister64 waiting, int group, int part, Action between)
        {
            for (int tile = 0; tile < Tiles; tile++)
            {
                Do(() => code.tilezero(Sums(tile)));
            }

            Do(() => LoadInputs(tmm4, rsi, group, part));
            Do(() => LoadWeights(tmm6, waiting, 0, group, part));
            Do(() => code.tdpbssd(tmm0, tmm4, tmm6));
            Do(() => LoadWeights(tmm7, waiting, 1, group, part));
            Do(() => code.tdpbssd(tmm1, tmm4, tmm7));
            if (blocks == 1)
            {
                Do(() => LoadWeights(tmm6, waiting, 2, group, part));
                Do(() => code.tdpbssd(tmm2, tmm4, tmm6));
                LoadWeights(tmm7, waiting, 3, group, part);
                Do(() => code.tdpbssd(tmm3, tmm4, tmm7));
            }
            else
            {
                Do(() => LoadInputs(tmm5, secondBlock, group, part));
                Do(() => code.tdpbssd(tmm2, tmm5, tmm6));
                Do(() => code.tdpbssd(tmm3, tmm5, tmm7));
            }

            for (int tile = 0; tile < Tiles; tile++)
            {
                Do(() => code.tilestored(__[waiting + (r10 * 2) + (((part * Tiles) + tile) * TileBytes)], Sums(tile)));
            }

            void Do(Action step)
            {
                step();
                between();
            }
        }

        void LoadInputs(AssemblerRegisterTMM tile, AssemblerRegister64 block, int group, int part) =>
            code.tileloadd(tile, __[block + r10 + ((group * InputBytes) + (part * RoundedInputs.Group / parts))]);

        void LoadWeights(AssemblerRegisterTMM tile, AssemblerRegister64 waiting, int panel, int group, int part) =>
            code.tileloadd(tile, unpacks
                ? __[waiting + (r10 * 2) + (integersBytes + (panel * BytesOfGroup))]
                : __[panels[panel] + (r10 * 2) + ((group * groupBytes) + BytesAt(kind) + (part * BytesOfGroup / parts))]);

        void LoadScales()
        {
            for (int panel = 0; panel < panelCount; panel++)
            {
                if (IsStored(kind))
                {
                    code.vcvtph2ps(Register512(panel), __ymmword_ptr[panels[panel]]);
                    continue;
                }

                for (int plane = 0; plane < (kind == Kind.Unpacked ? 1 : parts + 1); plane++)
                {
                    code.vmovups(Register512((plane * Tiles) + panel), __zmmword_ptr[panels[panel] + (BytesOfGroup + (plane * 64))]);
                }
            }
        }

        void AddScaled(int row)
        {
            (int tile, int inTile) = int.DivRem(row, Rows);
            int panel = tile % panelCount;
            AssemblerRegister64 block = tile < panelCount ? rsi : secondBlock;
            int inputs = BytesOfGroup + (sizeof(float) * inTile);
            int first = 12 + (row % 5 * 4);
            (AssemblerRegisterZMM sum, AssemblerRegisterZMM products, AssemblerRegisterZMM scale, AssemblerRegisterZMM second) =
                (Register512(first), Register512(first + 1), Register512(first + 2), Register512(first + 3));
            code.vmovups(sum, __zmmword_ptr[rdi + (64 * row)]);
            code.vcvtdq2ps(products, __zmmword_ptr[r8 + (64 * row)]);
            code.vmulps(scale, Register512(panel), __dword_bcst[block + inputs]);
            if (kind == Kind.Offsets)
            {
                code.vfmadd231ps(sum, Register512(Tiles + panel), __dword_bcst[block + (inputs + 64)]);
            }
            else if (kind == Kind.Halves)
            {
                // Below 2^24 in amount, so exact, as integers would be.
                code.vcvtdq2ps(second, __zmmword_ptr[r8 + ((Tiles * TileBytes) + (64 * row))]);
                code.vmulps(products, products, Register512(Tiles + panel));
                code.vfmadd231ps(products, second, Register512((2 * Tiles) + panel));
            }

            code.vfmadd231ps(sum, products, scale);
            code.vmovups(__zmmword_ptr[rdi + (64 * row)], sum);
        }
    });

    // Whether panels have it so.
    private static bool IsStored(Kind kind) => kind is Kind.Stored or Kind.Nibbles;

    // Products of a group that are scaled by themselves.
    private static int Parts(Kind kind) => kind == Kind.Halves ? 2 : 1;

    // Where in a group of weights its bytes are.
    private static int BytesAt(Kind kind) => IsStored(kind) ? HalfScalesBytes : 0;

    private static AssemblerRegisterTMM Sums(int tile) => new(Register.TMM0 + tile);

    private static AssemblerRegisterZMM Register512(int number) => new(Register.ZMM0 + number);

    private static string? Missing()
    {
        const int Int8 = 1 << 25, Gfni = 1 << 8;
        if (Amx.Fault is string none)
        {
            return none;
        }

        (_, _, int ecx, int edx) = X86Base.CpuId(7, 0);
        return (edx & Int8) == 0 || (ecx & Gfni) == 0 ? "no AMX for bytes, or no GFNI here" : null;
    }

    // The code of every kind, of one block of rows and of two, without and with what is fetched ahead.
    private static nint[] Map() =>
        [.. from kind in s_kinds from blocks in (int[])[1, 2] from fetches in (bool[])[false, true] select ExecutableMemory.Map(Emit(blocks, kind, fetches))];

    private static nint Of(nint[] codes, int blocks, Kind kind, bool fetches) => codes[(4 * (int)kind) + (2 * (blocks - 1)) + (fetches ? 1 : 0)];

    private static void Call(
        nint code, float* sums, byte* inputs, nint nextBlock, byte* weights, nint nextPanel, nint groups, byte* waiting, Ahead ahead) =>
        ((delegate* unmanaged[SuppressGCTransition]<float*, byte*, byte*, nint, byte*, nint, nint, nint, nint, nint, void>)code)(
            sums, inputs, weights, groups, waiting, nextPanel, nextBlock, ahead.First, ahead.NextPanel, ahead.GroupBytes);

    // Whole numbers so small that every order of adding them gives the same bits.
    private static bool IsRight(nint[] codes)
    {
        const int Groups = 3;
        const int NextBlock = Groups * InputBytes;
        byte[] rounded = new byte[2 * NextBlock], panels = new byte[Tiles * Groups * MostWeightBytes], room = new byte[WaitingBytes];
        float[] actual = new float[Tiles * Rows * Rows];
        bool same = true;
        fixed (byte* inputs = rounded, weights = panels, waiting = room)
        fixed (float* sums = actual)
        {
            for (int group = 0; group < 2 * Groups; group++)
            {
                byte* place = inputs + (group * InputBytes);
                FillBytes(place, BytesOfGroup, group);
                FillScales((float*)(place + BytesOfGroup), InputBytes, group);
            }

            foreach (Kind kind in s_kinds)
            {
                int weightBytes = WeightBytes(kind);
                for (int group = 0; group < Tiles * Groups; group++)
                {
                    byte* place = weights + (group * weightBytes);
                    FillBytes(place + BytesAt(kind), kind == Kind.Nibbles ? Planes * 64 : BytesOfGroup, group);
                    if (IsStored(kind))
                    {
                        FillHalves((Half*)place, group);
                    }
                    else
                    {
                        FillScales((float*)(place + BytesOfGroup), weightBytes, group);
                    }
                }

                Configure(kind);
                foreach ((int blocks, bool fetches) in (ReadOnlySpan<(int, bool)>)[(1, false), (1, true), (2, false), (2, true)])
                {
                    Array.Fill(actual, 7);
                    Call(Of(codes, blocks, kind, fetches), sums, inputs, NextBlock, weights, Groups * weightBytes, Groups, waiting, default);
                    for (int i = 0; i < actual.Length; i++)
                    {
                        (int tile, int row, int output) = (i / (Rows * Rows), i / Rows % Rows, i % Rows);
                        (int block, int panel) = int.DivRem(tile, Tiles / blocks);
                        same &= actual[i] == Expected(kind, inputs + (block * NextBlock), weights + (panel * Groups * weightBytes), row, output);
                    }
                }

                Amx.Release();
            }
        }

        return same;

        static void FillBytes(byte* bytes, int count, int group)
        {
            for (int i = 0; i < count; i++)
            {
                bytes[i] = (byte)((i * (37 + (2 * group)) % 255) - 127);
            }
        }

        static void FillScales(float* scales, int groupBytes, int group)
        {
            for (int i = 0; i < (groupBytes - BytesOfGroup) / sizeof(float); i++)
            {
                scales[i] = (i * (7 + group) % 5) - 2;
            }
        }

        static void FillHalves(Half* scales, int group)
        {
            for (int i = 0; i < Rows; i++)
            {
                scales[i] = (Half)((i * (7 + group) % 5) - 2);
            }
        }

        static float Expected(Kind kind, byte* inputs, byte* weights, int row, int output)
        {
            float sum = 7;
            for (int group = 0; group < Groups; group++, inputs += InputBytes, weights += WeightBytes(kind))
            {
                float* ofRow = (float*)(inputs + BytesOfGroup) + row;
                float* ofOutput = (float*)(weights + BytesOfGroup) + output;
                int first = Products(kind, inputs, weights + BytesAt(kind), row, output, 0);
                int second = Products(kind, inputs, weights + BytesAt(kind), row, output, RoundedInputs.Group / 2);
                sum += kind switch
                {
                    Kind.Unpacked => (first + second) * ofRow[0] * ofOutput[0],
                    Kind.Offsets => ((first + second) * ofRow[0] * ofOutput[0]) + (ofRow[Rows] * ofOutput[Rows]),
                    Kind.Halves => ((first * ofOutput[Rows]) + (second * ofOutput[2 * Rows])) * ofRow[0] * ofOutput[0],
                    _ => (first + second) * ofRow[0] * (float)((Half*)weights)[output],
                };
            }

            return sum;
        }

        static int Products(Kind kind, byte* inputs, byte* weights, int row, int output, int start)
        {
            int products = 0;
            for (int i = start; i < start + (RoundedInputs.Group / 2); i++)
            {
                int place = (i / 4 * 64) + (output * 4) + (i % 4);
                int weight = kind == Kind.Nibbles
                    ? ((weights[place % (Planes * 64)] >> (start == 0 ? 0 : 4)) & 0xF) - 8
                    : (sbyte)weights[place];
                products += (sbyte)inputs[(row * RoundedInputs.Group) + i] * weight;
            }

            return products;
        }
    }
}
