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

    /// <summary>
    /// Bytes of a group of a block of inputs: 32 of each row, then for each row a scale, two int16 and a scaled sum
    /// (<see cref="RoundedInputs"/>).
    /// </summary>
    public const int InputBytes = BytesOfGroup + (3 * Rows * sizeof(float));

    /// <summary>Bytes of a group of weights: eight registers of four signed bytes of each output, one of scales, one of offsets.</summary>
    public const int WeightBytes = BytesOfGroup + (2 * Rows * sizeof(float));

    /// <summary>The most groups at once where weights are unpacked, and the bytes from a panel's to the next's: those of four stay in the first cache.</summary>
    public const int MostGroups = 8, PanelBytes = MostGroups * WeightBytes;

    /// <summary>Bytes that code needs for integers that wait.</summary>
    public const int WaitingBytes = 2 * Tiles * TileBytes;

    /// <summary>Bytes of a tile of sums.</summary>
    public const int TileBytes = Rows * Rows * sizeof(float);

    /// <summary>Where in a group the first of what follows its bytes lies.</summary>
    public const int BytesOfGroup = RoundedInputs.Group * Rows;

    private static readonly Kind[] s_kinds = [Kind.Unpacked, Kind.UnpackedWithOffsets, Kind.Stored];

    private static readonly byte* s_sizes = Amx.Sizes(TileSize);

    private static readonly Code s_code = Load();

    /// <summary>What weights are.</summary>
    public enum Kind
    {
        /// <summary>Groups of <see cref="WeightBytes"/>.</summary>
        Unpacked,

        /// <summary>The same with offsets.</summary>
        UnpackedWithOffsets,

        /// <summary>Groups of Q8_0 as panels have them: scales in half precision, then the bytes.</summary>
        Stored,
    }

    /// <summary>Gets why the code cannot be used here, or null. The first use of it emits, loads and checks the code.</summary>
    public static string? Fault => s_code.Fault;

    /// <summary>Makes this thread ready; until <see cref="Amx.Release"/> nothing else may configure tiles.</summary>
    public static void Configure() => Amx.Configure(s_sizes);

    /// <summary>sums += inputs · weightsᵀ, for one block of inputs and four panels, or two and two.</summary>
    /// <param name="kind">What weights are.</param>
    /// <param name="sums">Four tiles of 16 rows by 16 outputs, row after row; those of a block follow each other.</param>
    /// <param name="inputs">The first group of the block; the others follow.</param>
    /// <param name="nextBlock">The bytes from it to the second block, or zero: there is one.</param>
    /// <param name="weights">The first group of the first panel; the others follow.</param>
    /// <param name="nextPanel">The bytes from it to the next panel.</param>
    /// <param name="groups">The number of groups, at least one.</param>
    /// <param name="waiting">Room for <see cref="WaitingBytes"/>.</param>
    public static void Multiply(Kind kind, float* sums, byte* inputs, nint nextBlock, byte* weights, nint nextPanel, nint groups, byte* waiting) =>
        Call(s_code.Of(nextBlock == 0 ? 1 : 2, kind), sums, inputs, nextBlock, weights, nextPanel, groups, waiting);

    /// <summary>Rows and bytes of a row of a tile register: sums in 0 to 3, inputs in 4 and 5, weights in 6 and 7.</summary>
    internal static (int Rows, int Bytes) TileSize(int tile) =>
        (tile < 6 ? Rows : RoundedInputs.Group / sizeof(int), tile is 4 or 5 ? RoundedInputs.Group : 64);

    /// <summary>The machine code of <see cref="Multiply"/>; position-independent, without data.</summary>
    /// <param name="blocks">One or two.</param>
    /// <param name="kind">What weights are.</param>
    internal static byte[] Emit(int blocks, Kind kind) => Amx.Assemble(code =>
    {
        // On entry: rdi sums, rsi inputs, rdx weights, rcx groups, r8 waiting, r9 the distance of panels, on the stack that of the second block.
        // Integers of a group wait at r8, those of the next at rax. Scales of panels in zmm0 to 3, offsets in 4 to 7.
        int panelCount = Tiles / blocks;
        AssemblerRegister64 secondBlock = r11;
        AssemblerRegister64[] panels = blocks == 1 ? [rdx, r9, r11, rbx] : [rdx, r9];
        int groupBytes = kind == Kind.Stored ? Q8MatMul.BlockBytes * Rows : WeightBytes;
        int bytesAt = kind == Kind.Stored ? sizeof(ushort) * Rows : 0;
        Label loop = code.CreateLabel(), last = code.CreateLabel();
        if (blocks == 1)
        {
            code.push(rbx);
            code.lea(r11, __[rdx + (r9 * 2)]);
            code.lea(rbx, __[r11 + r9]);
        }
        else
        {
            code.mov(r11, __[rsp + 8]);
            code.add(r11, rsi);
        }

        code.add(r9, rdx);
        code.mov(r10, RoundedInputs.Group);
        code.lea(rax, __[r8 + (Tiles * TileBytes)]);
        MultiplyTiles(r8, group: 0, static () => { });
        code.Label(ref loop);
        code.dec(rcx);
        code.je(last);
        LoadScales();
        int row = 0;
        MultiplyTiles(rax, group: 1, () =>
        {
            for (int i = 0; i < Tiles; i++, row++)
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

        code.xchg(r8, rax);
        code.jmp(loop);
        code.Label(ref last);
        LoadScales();
        for (row = 0; row < Tiles * Rows; row++)
        {
            AddScaled(row);
        }

        if (blocks == 1)
        {
            code.pop(rbx);
        }

        code.vzeroupper();
        code.ret();

        // 16 steps, and what is done between them: of each of the four tiles that wait, a row.
        void MultiplyTiles(AssemblerRegister64 waiting, int group, Action between)
        {
            for (int tile = 0; tile < Tiles; tile++)
            {
                Do(() => code.tilezero(Sums(tile)));
            }

            Do(() => LoadInputs(tmm4, rsi, group));
            Do(() => LoadWeights(tmm6, 0, group));
            Do(() => code.tdpbssd(tmm0, tmm4, tmm6));
            Do(() => LoadWeights(tmm7, 1, group));
            Do(() => code.tdpbssd(tmm1, tmm4, tmm7));
            if (blocks == 1)
            {
                Do(() => LoadWeights(tmm6, 2, group));
                Do(() => code.tdpbssd(tmm2, tmm4, tmm6));
                LoadWeights(tmm7, 3, group);
                Do(() => code.tdpbssd(tmm3, tmm4, tmm7));
            }
            else
            {
                Do(() => LoadInputs(tmm5, secondBlock, group));
                Do(() => code.tdpbssd(tmm2, tmm5, tmm6));
                Do(() => code.tdpbssd(tmm3, tmm5, tmm7));
            }

            for (int tile = 0; tile < Tiles; tile++)
            {
                Do(() => code.tilestored(__[waiting + (r10 * 2) + (tile * TileBytes)], Sums(tile)));
            }

            void Do(Action step)
            {
                step();
                between();
            }
        }

        void LoadInputs(AssemblerRegisterTMM tile, AssemblerRegister64 block, int group) =>
            code.tileloadd(tile, __[block + r10 + (group * InputBytes)]);

        void LoadWeights(AssemblerRegisterTMM tile, int panel, int group) =>
            code.tileloadd(tile, __[panels[panel] + (r10 * 2) + ((group * groupBytes) + bytesAt)]);

        void LoadScales()
        {
            for (int panel = 0; panel < panelCount; panel++)
            {
                if (kind == Kind.Stored)
                {
                    code.vcvtph2ps(Register512(panel), __ymmword_ptr[panels[panel]]);
                    continue;
                }

                code.vmovups(Register512(panel), __zmmword_ptr[panels[panel] + BytesOfGroup]);
                if (kind == Kind.UnpackedWithOffsets)
                {
                    code.vmovups(Register512(Tiles + panel), __zmmword_ptr[panels[panel] + (BytesOfGroup + 64)]);
                }
            }
        }

        void AddScaled(int row)
        {
            (int tile, int inTile) = int.DivRem(row, Rows);
            int panel = tile % panelCount;
            AssemblerRegister64 block = tile < panelCount ? rsi : secondBlock;
            int inputs = BytesOfGroup + (sizeof(float) * inTile);
            int first = 8 + (row % 8 * 3);
            (AssemblerRegisterZMM sum, AssemblerRegisterZMM products, AssemblerRegisterZMM scale) =
                (Register512(first), Register512(first + 1), Register512(first + 2));
            code.vmovups(sum, __zmmword_ptr[rdi + (64 * row)]);
            code.vcvtdq2ps(products, __zmmword_ptr[r8 + (64 * row)]);
            code.vmulps(scale, Register512(panel), __dword_bcst[block + inputs]);
            if (kind == Kind.UnpackedWithOffsets)
            {
                code.vfmadd231ps(sum, Register512(Tiles + panel), __dword_bcst[block + (inputs + (2 * 64))]);
            }

            code.vfmadd231ps(sum, products, scale);
            code.vmovups(__zmmword_ptr[rdi + (64 * row)], sum);
        }
    });

    private static AssemblerRegisterTMM Sums(int tile) => new(Register.TMM0 + tile);

    private static AssemblerRegisterZMM Register512(int number) => new(Register.ZMM0 + number);

    private static Code Load()
    {
        const int Int8 = 1 << 25;
        if (Amx.Fault is string none)
        {
            return new Code { Fault = none };
        }

        if ((X86Base.CpuId(7, 0).Edx & Int8) == 0)
        {
            return new Code { Fault = "no AMX for bytes here" };
        }

        try
        {
            Code code = new() { Addresses = [.. s_kinds.SelectMany(kind => new[] { Map(1, kind), Map(2, kind) })] };
            return IsRight(code) ? code : new Code { Fault = "the code for bytes on AMX gives wrong sums on this processor" };
        }
        catch (DeviceException e)
        {
            return new Code { Fault = $"the code for bytes on AMX cannot be loaded, {e.Message}" };
        }
    }

    private static nint Map(int blocks, Kind kind) => ExecutableMemory.Map(Emit(blocks, kind));

    private static void Call(
        nint code, float* sums, byte* inputs, nint nextBlock, byte* weights, nint nextPanel, nint groups, byte* waiting) =>
        ((delegate* unmanaged[SuppressGCTransition]<float*, byte*, byte*, nint, byte*, nint, nint, void>)code)(
            sums, inputs, weights, groups, waiting, nextPanel, nextBlock);

    // Whole numbers so small that every order of adding them gives the same bits.
    private static bool IsRight(Code code)
    {
        const int Groups = 3;
        const int NextBlock = Groups * InputBytes;
        byte[] rounded = new byte[2 * NextBlock], panels = new byte[Tiles * PanelBytes], room = new byte[WaitingBytes];
        fixed (byte* inputs = rounded, weights = panels, waiting = room)
        {
            for (int group = 0; group < Groups; group++)
            {
                for (int block = 0; block < 2; block++)
                {
                    Fill((sbyte*)inputs + (block * NextBlock) + (group * InputBytes), 3, 37 + (2 * block));
                }

                for (int panel = 0; panel < Tiles; panel++)
                {
                    Fill((sbyte*)weights + (panel * PanelBytes) + (group * WeightBytes), 2, 41 + (2 * panel));
                }
            }

            Configure();
            bool same = true;
            foreach (Kind kind in s_kinds)
            {
                same &= Same(code, 1, kind, inputs, weights, waiting) && Same(code, 2, kind, inputs, weights, waiting);
            }

            Amx.Release();
            return same;
        }

        static bool Same(Code code, int blocks, Kind kind, byte* inputs, byte* weights, byte* waiting)
        {
            float[] actual = new float[Tiles * Rows * Rows];
            byte[] stored = Stored(weights);
            Array.Fill(actual, 7);
            fixed (float* sums = actual)
            fixed (byte* bytes = stored)
            {
                Call(
                    code.Of(blocks, kind), sums, inputs, NextBlock, kind == Kind.Stored ? bytes : weights,
                    kind == Kind.Stored ? stored.Length / Tiles : PanelBytes, Groups, waiting);
            }

            bool same = true;
            for (int i = 0; i < actual.Length; i++)
            {
                (int tile, int row, int output) = (i / (Rows * Rows), i / Rows % Rows, i % Rows);
                (int block, int panel) = int.DivRem(tile, Tiles / blocks);
                same &= actual[i] == Expected(inputs + (block * NextBlock), weights + (panel * PanelBytes), row, output, kind == Kind.UnpackedWithOffsets);
            }

            return same;
        }

        // The same weights as panels of Q8_0 have them.
        static byte[] Stored(byte* weights)
        {
            byte[] panels = new byte[Tiles * Groups * Q8MatMul.BlockBytes * Rows];
            Span<byte> place = panels;
            for (int panel = 0; panel < Tiles; panel++)
            {
                for (int group = 0; group < Groups; group++)
                {
                    byte* source = weights + (panel * PanelBytes) + (group * WeightBytes);
                    for (int output = 0; output < Rows; output++, place = place[sizeof(ushort)..])
                    {
                        BitConverter.TryWriteBytes(place, (Half)((float*)(source + BytesOfGroup))[output]);
                    }

                    new ReadOnlySpan<byte>(source, BytesOfGroup).CopyTo(place);
                    place = place[BytesOfGroup..];
                }
            }

            return panels;
        }

        static void Fill(sbyte* group, int planes, int step)
        {
            for (int i = 0; i < BytesOfGroup; i++)
            {
                group[i] = (sbyte)((i * step % 255) - 127);
            }

            for (int i = 0; i < planes * Rows; i++)
            {
                ((float*)(group + BytesOfGroup))[i] = (i * step % 5) - 2;
            }
        }

        static float Expected(byte* inputs, byte* weights, int row, int output, bool hasOffsets)
        {
            float sum = 7;
            for (int group = 0; group < Groups; group++, inputs += InputBytes, weights += WeightBytes)
            {
                int products = 0;
                for (int i = 0; i < RoundedInputs.Group; i++)
                {
                    products += (sbyte)inputs[(row * RoundedInputs.Group) + i] * (sbyte)weights[(i / 4 * 64) + (output * 4) + (i % 4)];
                }

                float* row0 = (float*)(inputs + BytesOfGroup) + row;
                float* output0 = (float*)(weights + BytesOfGroup) + output;
                sum += (products * row0[0] * output0[0]) + (hasOffsets ? row0[2 * Rows] * output0[Rows] : 0);
            }

            return sum;
        }
    }

    private struct Code
    {
        public string? Fault;
        public nint[] Addresses;

        public readonly nint Of(int blocks, Kind kind) => Addresses[(2 * (int)kind) + blocks - 1];
    }
}
