using System.Runtime.Intrinsics.X86;
using Iced.Intel;
using TinyLlama.Compute.Native;
using static Iced.Intel.AssemblerRegisters;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// Products of rounded inputs and quantized weights on AMX: a group of 16 rows by one of 16 outputs is one tdpbssd, whose integers
/// 16-lane registers scale and add up. Emitted when it is first asked for.
/// </summary>
/// <remarks>
/// Integers are exact and groups add up as in <see cref="QuantizedMatMul"/>, so the bits are those of its kernels. Integers wait in memory
/// while tiles multiply the next group, sums stay in registers.
/// </remarks>
internal static unsafe class AmxBytes
{
    /// <summary>Rows of a block of inputs.</summary>
    public const int Rows = Amx.TileRows;

    /// <summary>
    /// Bytes of a group of a block of inputs: 32 of each row, then for each row a scale, two int16 and a scaled sum
    /// (<see cref="RoundedInputs"/>).
    /// </summary>
    public const int InputBytes = BytesOfGroup + (3 * Rows * sizeof(float));

    /// <summary>Bytes of a group of weights: eight registers of four signed bytes of each output, one of scales, one of offsets.</summary>
    public const int WeightBytes = BytesOfGroup + (2 * Rows * sizeof(float));

    /// <summary>Bytes that code needs for integers that wait.</summary>
    public const int WaitingBytes = 2 * TileBytes;

    /// <summary>Where in a group the first of what follows its bytes lies.</summary>
    public const int BytesOfGroup = RoundedInputs.Group * Rows;

    private const int TileBytes = Rows * Rows * sizeof(int);

    private static readonly byte* s_sizes = Amx.Sizes(TileSize);

    private static readonly Code s_code = Load();

    /// <summary>Gets why the code cannot be used here, or null. The first use of it emits, loads and checks the code.</summary>
    public static string? Fault => s_code.Fault;

    /// <summary>Makes this thread ready; until <see cref="Amx.Release"/> nothing else may configure tiles.</summary>
    public static void Configure() => Amx.Configure(s_sizes);

    /// <summary>sums (16, 16) += inputs · weightsᵀ.</summary>
    /// <param name="sums">Row after row.</param>
    /// <param name="inputs">The first group of the block; the others follow.</param>
    /// <param name="weights">The first group; the others follow.</param>
    /// <param name="groups">The number of groups, at least one.</param>
    /// <param name="waiting">Room for <see cref="WaitingBytes"/>.</param>
    /// <param name="hasOffsets">Whether weights have offsets.</param>
    public static void Multiply(float* sums, byte* inputs, byte* weights, nint groups, byte* waiting, bool hasOffsets) =>
        Call(hasOffsets ? s_code.WithOffsets : s_code.WithoutOffsets, sums, inputs, weights, groups, waiting);

    /// <summary>Rows and bytes of a row of a tile register: sums in 0 and 1, inputs in 4 and 5, weights in 6 and 7.</summary>
    internal static (int Rows, int Bytes) TileSize(int tile) =>
        (tile < 6 ? Rows : RoundedInputs.Group / sizeof(int), tile is 4 or 5 ? RoundedInputs.Group : 64);

    /// <summary>The machine code of <see cref="Multiply"/>; position-independent, without data.</summary>
    internal static byte[] Emit(bool hasOffsets) => Amx.Assemble(code =>
    {
        // On entry: rdi sums, rsi inputs, rdx weights, rcx groups, r8 waiting. Sums of rows in zmm0 to 15, scales and offsets of outputs in 16 and 17.
        Label loop = code.CreateLabel(), firstIsLast = code.CreateLabel(), secondIsLast = code.CreateLabel(), store = code.CreateLabel();
        code.mov(r10, RoundedInputs.Group);
        code.mov(r11, Amx.RowDwords * sizeof(int));
        for (int row = 0; row < Rows; row++)
        {
            code.vmovups(Register512(row), __zmmword_ptr[rdi + (64 * row)]);
        }

        // Two groups a turn; tiles are one group ahead.
        MultiplyTiles(0);
        code.Label(ref loop);
        code.dec(rcx);
        code.je(firstIsLast);
        MultiplyTiles(1);
        AddScaled(0);
        code.dec(rcx);
        code.je(secondIsLast);
        MultiplyTiles(2);
        AddScaled(1);
        code.add(rsi, 2 * InputBytes);
        code.add(rdx, 2 * WeightBytes);
        code.jmp(loop);
        code.Label(ref secondIsLast);
        AddScaled(1);
        code.jmp(store);
        code.Label(ref firstIsLast);
        AddScaled(0);
        code.Label(ref store);
        for (int row = 0; row < Rows; row++)
        {
            code.vmovups(__zmmword_ptr[rdi + (64 * row)], Register512(row));
        }

        code.vzeroupper();
        code.ret();

        void MultiplyTiles(int group)
        {
            (AssemblerRegisterTMM sums, AssemblerRegisterTMM inputs, AssemblerRegisterTMM weights) =
                int.IsEvenInteger(group) ? (tmm0, tmm4, tmm6) : (tmm1, tmm5, tmm7);
            code.tilezero(sums);
            code.tileloadd(inputs, __[rsi + r10 + (group * InputBytes)]);
            code.tileloadd(weights, __[rdx + r11 + (group * WeightBytes)]);
            code.tdpbssd(sums, inputs, weights);
            code.tilestored(__[r8 + r11 + (group % 2 * TileBytes)], sums);
        }

        void AddScaled(int group)
        {
            int inputs = (group * InputBytes) + BytesOfGroup;
            int weights = (group * WeightBytes) + BytesOfGroup;
            code.vmovups(zmm16, __zmmword_ptr[rdx + weights]);
            if (hasOffsets)
            {
                code.vmovups(zmm17, __zmmword_ptr[rdx + (weights + 64)]);
            }

            for (int row = 0; row < Rows; row++)
            {
                (AssemblerRegisterZMM products, AssemblerRegisterZMM scale) = (Register512(18 + (row % 7)), Register512(25 + (row % 7)));
                code.vcvtdq2ps(products, __zmmword_ptr[r8 + ((group * TileBytes) + (64 * row))]);
                code.vmulps(scale, zmm16, __dword_bcst[rsi + (inputs + (sizeof(float) * row))]);
                if (hasOffsets)
                {
                    code.vfmadd231ps(Register512(row), zmm17, __dword_bcst[rsi + (inputs + (2 * 64) + (sizeof(float) * row))]);
                }

                code.vfmadd231ps(Register512(row), products, scale);
            }
        }
    });

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
            Code code = new()
            {
                WithoutOffsets = ExecutableMemory.Map(Emit(hasOffsets: false)),
                WithOffsets = ExecutableMemory.Map(Emit(hasOffsets: true)),
            };
            return IsRight(code) ? code : new Code { Fault = "the code for bytes on AMX gives wrong sums on this processor" };
        }
        catch (DeviceException e)
        {
            return new Code { Fault = $"the code for bytes on AMX cannot be loaded, {e.Message}" };
        }
    }

    private static void Call(nint code, float* sums, byte* inputs, byte* weights, nint groups, byte* waiting) =>
        ((delegate* unmanaged[SuppressGCTransition]<float*, byte*, byte*, nint, byte*, void>)code)(sums, inputs, weights, groups, waiting);

    // Whole numbers so small that every order of adding them gives the same bits.
    private static bool IsRight(Code code)
    {
        const int Groups = 3;
        byte[] rounded = new byte[Groups * InputBytes], panel = new byte[Groups * WeightBytes], room = new byte[WaitingBytes];
        fixed (byte* inputs = rounded, weights = panel, waiting = room)
        {
            for (int group = 0; group < Groups; group++)
            {
                Fill((sbyte*)inputs + (group * InputBytes), 3);
                Fill((sbyte*)weights + (group * WeightBytes), 2);
            }

            Configure();
            bool same = Same(code.WithoutOffsets, inputs, weights, waiting, hasOffsets: false)
                && Same(code.WithOffsets, inputs, weights, waiting, hasOffsets: true);
            Amx.Release();
            return same;
        }

        static bool Same(nint code, byte* inputs, byte* weights, byte* waiting, bool hasOffsets)
        {
            Span<float> actual = stackalloc float[Rows * Rows];
            actual.Fill(7);
            fixed (float* sums = actual)
            {
                Call(code, sums, inputs, weights, Groups, waiting);
            }

            bool same = true;
            for (int i = 0; i < actual.Length; i++)
            {
                same &= actual[i] == Expected(inputs, weights, i / Rows, i % Rows, hasOffsets);
            }

            return same;
        }

        static void Fill(sbyte* group, int planes)
        {
            for (int i = 0; i < BytesOfGroup; i++)
            {
                group[i] = (sbyte)((i * 37 % 255) - 127);
            }

            for (int i = 0; i < planes * Rows; i++)
            {
                ((float*)(group + BytesOfGroup))[i] = (i % 5) - 2;
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
        public nint WithoutOffsets;
        public nint WithOffsets;
    }
}
