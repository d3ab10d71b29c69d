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

    /// <summary>The most groups at once, and the bytes from a panel's to the next's: what four panels have stays in the first cache.</summary>
    public const int MostGroups = 8, PanelBytes = MostGroups * WeightBytes;

    /// <summary>Bytes that code needs for integers that wait.</summary>
    public const int WaitingBytes = 2 * Tiles * TileBytes;

    /// <summary>Bytes of a tile of sums.</summary>
    public const int TileBytes = Rows * Rows * sizeof(float);

    /// <summary>Where in a group the first of what follows its bytes lies.</summary>
    public const int BytesOfGroup = RoundedInputs.Group * Rows;

    private static readonly byte* s_sizes = Amx.Sizes(TileSize);

    private static readonly Code s_code = Load();

    /// <summary>Gets why the code cannot be used here, or null. The first use of it emits, loads and checks the code.</summary>
    public static string? Fault => s_code.Fault;

    /// <summary>Makes this thread ready; until <see cref="Amx.Release"/> nothing else may configure tiles.</summary>
    public static void Configure() => Amx.Configure(s_sizes);

    /// <summary>sums += inputs · weightsᵀ, for one block of inputs and four panels, or two and two.</summary>
    /// <param name="sums">Four tiles of 16 rows by 16 outputs, row after row; those of a block follow each other.</param>
    /// <param name="inputs">The first group of the block; the others follow.</param>
    /// <param name="nextBlock">The bytes from it to the second block, or zero: there is one.</param>
    /// <param name="weights">The first group of the first panel; the others follow, panels every <see cref="PanelBytes"/>.</param>
    /// <param name="groups">The number of groups, at least one.</param>
    /// <param name="waiting">Room for <see cref="WaitingBytes"/>.</param>
    /// <param name="hasOffsets">Whether weights have offsets.</param>
    public static void Multiply(float* sums, byte* inputs, nint nextBlock, byte* weights, nint groups, byte* waiting, bool hasOffsets) =>
        Call(s_code.Of(nextBlock == 0 ? 1 : 2, hasOffsets), sums, inputs, weights, groups, waiting, nextBlock);

    /// <summary>Rows and bytes of a row of a tile register: sums in 0 to 3, inputs in 4 and 5, weights in 6 and 7.</summary>
    internal static (int Rows, int Bytes) TileSize(int tile) =>
        (tile < 6 ? Rows : RoundedInputs.Group / sizeof(int), tile is 4 or 5 ? RoundedInputs.Group : 64);

    /// <summary>The machine code of <see cref="Multiply"/>; position-independent, without data.</summary>
    /// <param name="blocks">One or two.</param>
    /// <param name="hasOffsets">Whether weights have offsets.</param>
    internal static byte[] Emit(int blocks, bool hasOffsets) => Amx.Assemble(code =>
    {
        // On entry: rdi sums, rsi inputs, rdx weights, rcx groups, r8 waiting, r9 the distance of the second block, then the block itself.
        // Integers of a group wait at r8, those of the next at rax. Scales of panels in zmm0 to 3, offsets in 4 to 7.
        int panels = Tiles / blocks;
        Label loop = code.CreateLabel(), last = code.CreateLabel();
        code.mov(r10, RoundedInputs.Group);
        code.mov(r11, Amx.RowDwords * sizeof(int));
        code.lea(rax, __[r8 + (Tiles * TileBytes)]);
        code.add(r9, rsi);
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
        code.add(r9, InputBytes);
        code.add(rdx, WeightBytes);
        code.xchg(r8, rax);
        code.jmp(loop);
        code.Label(ref last);
        LoadScales();
        for (row = 0; row < Tiles * Rows; row++)
        {
            AddScaled(row);
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
                Do(() => LoadInputs(tmm5, r9, group));
                Do(() => code.tdpbssd(tmm2, tmm5, tmm6));
                Do(() => code.tdpbssd(tmm3, tmm5, tmm7));
            }

            for (int tile = 0; tile < Tiles; tile++)
            {
                Do(() => code.tilestored(__[waiting + r11 + (tile * TileBytes)], Sums(tile)));
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
            code.tileloadd(tile, __[rdx + r11 + ((panel * PanelBytes) + (group * WeightBytes))]);

        void LoadScales()
        {
            for (int panel = 0; panel < panels; panel++)
            {
                code.vmovups(Register512(panel), __zmmword_ptr[rdx + ((panel * PanelBytes) + BytesOfGroup)]);
                if (hasOffsets)
                {
                    code.vmovups(Register512(Tiles + panel), __zmmword_ptr[rdx + ((panel * PanelBytes) + BytesOfGroup + 64)]);
                }
            }
        }

        void AddScaled(int row)
        {
            (int tile, int inTile) = int.DivRem(row, Rows);
            int panel = tile % panels;
            AssemblerRegister64 block = tile < panels ? rsi : r9;
            int inputs = BytesOfGroup + (sizeof(float) * inTile);
            int first = 8 + (row % 8 * 3);
            (AssemblerRegisterZMM sum, AssemblerRegisterZMM products, AssemblerRegisterZMM scale) =
                (Register512(first), Register512(first + 1), Register512(first + 2));
            code.vmovups(sum, __zmmword_ptr[rdi + (64 * row)]);
            code.vcvtdq2ps(products, __zmmword_ptr[r8 + (64 * row)]);
            code.vmulps(scale, Register512(panel), __dword_bcst[block + inputs]);
            if (hasOffsets)
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
            Code code = new() { OneBlock = Map(1, false), OneBlockOffsets = Map(1, true), TwoBlocks = Map(2, false), TwoBlocksOffsets = Map(2, true) };
            return IsRight(code) ? code : new Code { Fault = "the code for bytes on AMX gives wrong sums on this processor" };
        }
        catch (DeviceException e)
        {
            return new Code { Fault = $"the code for bytes on AMX cannot be loaded, {e.Message}" };
        }
    }

    private static nint Map(int blocks, bool hasOffsets) => ExecutableMemory.Map(Emit(blocks, hasOffsets));

    private static void Call(nint code, float* sums, byte* inputs, byte* weights, nint groups, byte* waiting, nint nextBlock) =>
        ((delegate* unmanaged[SuppressGCTransition]<float*, byte*, byte*, nint, byte*, nint, void>)code)(
            sums, inputs, weights, groups, waiting, nextBlock);

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
            foreach (bool hasOffsets in (ReadOnlySpan<bool>)[false, true])
            {
                same &= Same(code.Of(1, hasOffsets), 1, inputs, weights, waiting, hasOffsets);
                same &= Same(code.Of(2, hasOffsets), 2, inputs, weights, waiting, hasOffsets);
            }

            Amx.Release();
            return same;
        }

        static bool Same(nint code, int blocks, byte* inputs, byte* weights, byte* waiting, bool hasOffsets)
        {
            float[] actual = new float[Tiles * Rows * Rows];
            Array.Fill(actual, 7);
            fixed (float* sums = actual)
            {
                Call(code, sums, inputs, weights, Groups, waiting, NextBlock);
            }

            bool same = true;
            for (int i = 0; i < actual.Length; i++)
            {
                (int tile, int row, int output) = (i / (Rows * Rows), i / Rows % Rows, i % Rows);
                (int block, int panel) = int.DivRem(tile, Tiles / blocks);
                same &= actual[i] == Expected(inputs + (block * NextBlock), weights + (panel * PanelBytes), row, output, hasOffsets);
            }

            return same;
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
        public nint OneBlock;
        public nint OneBlockOffsets;
        public nint TwoBlocks;
        public nint TwoBlocksOffsets;

        public readonly nint Of(int blocks, bool hasOffsets) =>
            blocks == 1 ? (hasOffsets ? OneBlockOffsets : OneBlock) : hasOffsets ? TwoBlocksOffsets : TwoBlocks;
    }
}
