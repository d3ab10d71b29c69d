using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics.X86;
using Iced.Intel;
using TinyLlama.Compute.Native;
using static Iced.Intel.AssemblerRegisters;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// Products of rounded inputs and quantized weights by vpdpbusd, which adds four products of bytes to each of 16 lanes. .NET has no
/// intrinsic for it on 512-bit registers, so that kernels of the formats that matter most are emitted when first asked for.
/// </summary>
/// <remarks>
/// Weights are read as panels have them (<see cref="WeightPanels"/>, of Q8_0 <see cref="Q8MatMul"/>) and unpacked to registers, group
/// after group; each group is multiplied by all rows. One row by four panels is <see cref="VnniRow"/>'s where it has code. Integers are
/// exact and groups add up as in <see cref="QuantizedMatMul"/>, so the bits are those of its kernels.
/// </remarks>
internal static unsafe class VnniBytes
{
    // Lanes are outputs.
    private const int Lanes = 16;

    // Panels from which memory is fetched in turns.
    private const int Panels = QuantizedMatMul.PanelsTogether;

    private const int RowBytes = Lanes * sizeof(float);

    private static readonly DType[] s_types = [DType.Q4_0, DType.Q8_0, DType.Q4_K, DType.Q5_K, DType.Q6_K];

    // Emitted, loaded and checked when first asked for, as a start should not wait for what it does not use.
    private static readonly Lazy<(nint Address, string? Fault)>[] s_codes = [.. s_types.Select(static type => new Lazy<(nint, string?)>(() => Load(type)))];

    /// <summary>Gets a value indicating whether the processor has the instruction and the system the calling convention.</summary>
    public static bool IsSupported =>
        Avx512F.X64.IsSupported && OperatingSystem.IsLinux() && (X86Base.CpuId(7, 0).Ecx & 1 << 11) != 0;

    /// <summary>Gets the types of weights that there is code for.</summary>
    public static IReadOnlyList<DType> Types => s_types;

    /// <summary>The code for a type of weights, or zero where there is none or it cannot be used.</summary>
    public static nint Of(DType type) => Array.IndexOf(s_types, type) is >= 0 and int index ? s_codes[index].Value.Address : 0;

    /// <summary>Why the code for one of <see cref="Types"/> cannot be used here, or null.</summary>
    public static string? FaultOf(DType type) => s_codes[Array.IndexOf(s_types, type)].Value.Fault;

    /// <summary>sums += inputs · weightsᵀ, for rows of a block and up to four panels.</summary>
    /// <param name="code">What <see cref="Of"/> gave.</param>
    /// <param name="sums">16 outputs a row, row after row, panel after panel.</param>
    /// <param name="weights">The first block of the first panel; the others follow.</param>
    /// <param name="panelBytes">The bytes from it to the next panel.</param>
    /// <param name="panels">The number of panels, at least one.</param>
    /// <param name="rounded">Rows of <see cref="RoundedInputs"/>, a group of each after the other.</param>
    /// <param name="blocks">The number of blocks of a row, at least one.</param>
    /// <param name="rows">The number of rows, at least one.</param>
    /// <param name="next">What is read next: the bytes to it from the end of the first panel. It is fetched, as far as bytes are fetched ahead.</param>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Multiply(
        nint code, float* sums, byte* weights, nint panelBytes, nint panels, byte* rounded, nint blocks, nint rows, nint next) =>
        ((delegate* unmanaged[SuppressGCTransition]<float*, byte*, nint, nint, byte*, nint, nint, nint, void>)code)(
            sums, weights, panelBytes, panels, rounded, blocks, rows, next);

    /// <summary>The machine code of <see cref="Multiply"/>; position-independent, without data.</summary>
    internal static byte[] Emit(DType type) => ExecutableMemory.Assemble(code =>
    {
        // On entry: rdi sums, rsi weights, rdx panelBytes, rcx panels, r8 rounded, r9 blocks, on the stack rows, next.
        // A block's panels at r12, r13 of them left; a panel's sums at r11; a row's group at rax, its sums at r10, rbx rows left; what
        // is fetched at r14, three panels' bytes in r15. Bytes of a group in zmm0 to 7, its scale and offset in 8 and 9, or the whole
        // scales of its halves in 9 and 10; those of a block from 11; constants from 17.
        AssemblerRegister64[] saved = [rbx, r12, r13, r14, r15];
        AssemblerRegisterZMM scale = zmm8, offset = zmm9, firstHalf = zmm9, secondHalf = zmm10, unit = zmm11, offsetUnit = zmm12;
        AssemblerRegisterZMM nibbles = zmm17, fifthBit = zmm18, sixBits = zmm19, highBits = zmm20, lowByte = zmm21, signs = zmm22;
        int blockBytes = type.BlockBytes() * Lanes;
        int ahead = QuantizedMatMul.BlocksAhead(blockBytes);
        int groups = type.BlockElements() / RoundedInputs.Group;
        bool hasOffsets = type is DType.Q4_K or DType.Q5_K;
        Label block = code.CreateLabel(), panel = code.CreateLabel();
        if (VnniRow.Has(type))
        {
            VnniRow.Emit(code, type);
        }

        foreach (AssemblerRegister64 register in saved)
        {
            code.push(register);
        }

        Constant(nibbles, 0x0F0F0F0F);
        Constant(fifthBit, 0x10101010);
        Constant(sixBits, 0x3F3F3F3F);
        Constant(highBits, 0x30303030);
        Constant(lowByte, 0xFF);
        Constant(signs, 0x80808080);
        code.lea(r15, __[rdx + (rdx * 2)]);
        code.Label(ref block);
        code.mov(r12, rsi);
        code.mov(r11, rdi);
        code.mov(r13, rcx);
        code.lea(r14, __[rsi + (ahead * blockBytes)]);
        code.cmp(r9, ahead);
        code.ja(panel);
        code.add(r14, __[rsp + (sizeof(long) * (saved.Length + 2))]);
        code.Label(ref panel);
        code.mov(rax, r8);
        LoadUnits();
        for (int group = 0; group < groups; group++)
        {
            Fetch(group);
            LoadBytes(group);
            LoadScales(group);
            code.mov(r10, r11);
            code.mov(rbx, __[rsp + (sizeof(long) * (saved.Length + 1))]);
            Label row = code.CreateLabel();
            code.Label(ref row);
            AddProducts();
            code.add(rax, RoundedInputs.GroupBytes);
            code.add(r10, RowBytes);
            code.dec(rbx);
            code.jne(row);
        }

        code.add(r14, groups * PieceBytes(blockBytes, groups));
        code.mov(r11, r10);
        code.add(r12, rdx);
        code.dec(r13);
        code.jne(panel);
        code.mov(r8, rax);
        code.add(rsi, blockBytes);
        code.dec(r9);
        code.jne(block);
        foreach (AssemblerRegister64 register in saved.Reverse())
        {
            code.pop(register);
        }

        code.vzeroupper();
        code.ret();

        void Constant(AssemblerRegisterZMM register, uint dword)
        {
            code.mov(rax, (long)dword);
            code.vpbroadcastd(register, eax);
        }

        // What is read next lies in all panels: a few bytes of each for each group.
        void Fetch(int group)
        {
            int piece = PieceBytes(blockBytes, groups);
            for (int line = 0; line < piece; line += 64)
            {
                int at = (group * piece) + line;
                code.prefetcht1(__byte_ptr[r14 + at]);
                code.prefetcht1(__byte_ptr[r14 + rdx + at]);
                code.prefetcht1(__byte_ptr[r14 + (rdx * 2) + at]);
                code.prefetcht1(__byte_ptr[r14 + r15 + at]);
            }
        }

        AssemblerMemoryOperand Plane(int bytesBefore, int i) => __zmmword_ptr[r12 + ((bytesBefore + (4 * i)) * Lanes)];

        void LoadUnits()
        {
            if (!hasOffsets)
            {
                code.vcvtph2ps(unit, __ymmword_ptr[r12]);
                return;
            }

            // Pairs of a scale and a minimum. Scales and minima of groups in 6 bits, four a register: those of groups 0 to 3 lie in the
            // low bits of their own bytes, those of 4 to 7 in the last four bytes and the high bits of the others.
            code.vmovups(zmm13, Plane(0, 0));
            code.vpsrld(zmm14, zmm13, 16);
            code.vpmovdw(ymm13, zmm13);
            code.vpmovdw(ymm14, zmm14);
            code.vcvtph2ps(unit, ymm13);
            code.vcvtph2ps(offsetUnit, ymm14);
            code.vpxord(zmm13, zmm13, zmm13);
            code.vsubps(offsetUnit, zmm13, offsetUnit);
            for (int kind = 0; kind < 2; kind++)
            {
                (AssemblerRegisterZMM low, AssemblerRegisterZMM high) = kind == 0 ? (zmm13, zmm14) : (zmm15, zmm16);
                code.vpandd(low, sixBits, Plane(4, kind));
                code.vpsrld(high, Plane(4, kind), 2);
                code.vpandd(high, high, highBits);
                code.vpsrld(zmm24, Plane(4, 2), (byte)(4 * kind));
                code.vpandd(zmm24, zmm24, nibbles);
                code.vpord(high, high, zmm24);
            }
        }

        void LoadBytes(int group)
        {
            for (int i = 0; i < 8; i++)
            {
                AssemblerRegisterZMM bytes = Register512(i);
                switch (type)
                {
                    case DType.Q4_0:
                        LoadNibbles(bytes, Plane(2, i % 4), i >= 4);
                        break;
                    case DType.Q8_0:
                        code.vpxord(bytes, signs, Plane(2, i));
                        break;
                    case DType.Q4_K:
                        LoadNibbles(bytes, Plane(16 + (group / 2 * 32), i), group % 2 == 1);
                        break;
                    case DType.Q5_K:
                        LoadNibbles(bytes, Plane(48 + (group / 2 * 32), i), group % 2 == 1);
                        OrBits(bytes, Plane(16, i), 4 - group, fifthBit);
                        break;
                    default:
                        // Of 128 elements, groups 0 and 2 share bytes, as do 1 and 3.
                        LoadNibbles(bytes, Plane(2 + (((group / 4 * 2) + (group % 2)) * 32), i), group % 4 >= 2);
                        OrBits(bytes, Plane(2 + 128 + (group / 4 * 32), i), 4 - (group % 4 * 2), highBits);
                        break;
                }
            }
        }

        void LoadNibbles(AssemblerRegisterZMM bytes, AssemblerMemoryOperand plane, bool areHigh)
        {
            if (areHigh)
            {
                code.vpsrld(bytes, plane, 4);
                code.vpandd(bytes, bytes, nibbles);
            }
            else
            {
                code.vpandd(bytes, nibbles, plane);
            }
        }

        void OrBits(AssemblerRegisterZMM bytes, AssemblerMemoryOperand plane, int left, AssemblerRegisterZMM mask)
        {
            if (left >= 0)
            {
                code.vpslld(zmm24, plane, (byte)left);
            }
            else
            {
                code.vpsrld(zmm24, plane, (byte)-left);
            }

            // bytes | (zmm24 & mask)
            code.vpternlogd(bytes, zmm24, mask, 0xF8);
        }

        void LoadScales(int group)
        {
            switch (type)
            {
                case DType.Q4_K or DType.Q5_K:
                    Scaled(scale, unit, group < 4 ? zmm13 : zmm14);
                    Scaled(offset, offsetUnit, group < 4 ? zmm15 : zmm16);
                    break;
                case DType.Q6_K:
                    Whole(firstHalf, 2 * group);
                    Whole(secondHalf, (2 * group) + 1);
                    break;
            }

            void Scaled(AssemblerRegisterZMM destination, AssemblerRegisterZMM times, AssemblerRegisterZMM four)
            {
                code.vpsrld(destination, four, (byte)(8 * (group % 4)));
                code.vpandd(destination, destination, lowByte);
                code.vcvtdq2ps(destination, destination);
                code.vmulps(destination, destination, times);
            }

            void Whole(AssemblerRegisterZMM destination, int number)
            {
                code.vpslld(destination, Plane(2 + 192, number / 4), (byte)(24 - (8 * (number % 4))));
                code.vpsrad(destination, destination, 24);
                code.vcvtdq2ps(destination, destination);
            }
        }

        // Bytes are unsigned: what they have too much, times the sum of the inputs, is what integers begin with.
        void AddProducts()
        {
            const int Scale = RoundedInputs.Group, Sums = Scale + 4, ScaledSum = Scale + 8, EightSums = Scale + 12;
            AssemblerRegisterZMM products = zmm25, second = zmm26, sum = zmm27, both = zmm28;
            switch (type)
            {
                case DType.Q4_0:
                    code.vpbroadcastd(products, __dword_ptr[rax + EightSums]);
                    break;
                case DType.Q8_0:
                    code.vpbroadcastd(products, __dword_ptr[rax + EightSums]);
                    code.vpslld(products, products, 4);
                    break;
                case DType.Q6_K:
                    // Sums of halves, times -16, as int16: twice that, as int32.
                    code.vpbroadcastd(second, __dword_ptr[rax + Sums]);
                    code.vpslld(products, second, 16);
                    code.vpsrad(products, products, 15);
                    code.vpsrad(second, second, 16);
                    code.vpaddd(second, second, second);
                    break;
                default:
                    code.vpxord(products, products, products);
                    break;
            }

            // Two sums, as each product waits for the one before: of the halves, which Q6_K scales by themselves.
            if (type != DType.Q6_K)
            {
                code.vpxord(second, second, second);
            }

            for (int i = 0; i < 4; i++)
            {
                code.vpdpbusd(products, Register512(i), __dword_bcst[rax + (4 * i)]);
                code.vpdpbusd(second, Register512(4 + i), __dword_bcst[rax + (4 * (4 + i))]);
            }

            code.vmulps(both, hasOffsets ? scale : unit, __dword_bcst[rax + Scale]);
            if (type == DType.Q6_K)
            {
                // Below 2^24 in amount, so exact, as integers would be.
                code.vcvtdq2ps(products, products);
                code.vcvtdq2ps(second, second);
                code.vmulps(products, products, firstHalf);
                code.vfmadd231ps(products, second, secondHalf);
            }
            else
            {
                code.vpaddd(products, products, second);
                code.vcvtdq2ps(products, products);
            }

            code.vmovups(sum, __zmmword_ptr[r10]);
            if (hasOffsets)
            {
                code.vfmadd231ps(sum, offset, __dword_bcst[rax + ScaledSum]);
            }

            code.vfmadd231ps(sum, products, both);
            code.vmovups(__zmmword_ptr[r10], sum);
        }
    });

    // Bytes of each panel that are fetched for a group of one.
    private static int PieceBytes(int blockBytes, int groups) => blockBytes / groups / Panels;

    private static AssemblerRegisterZMM Register512(int number) => new(Register.ZMM0 + number);

    private static (nint Address, string? Fault) Load(DType type) => ExecutableMemory.Load(
        $"{type}", IsSupported ? null : "no AVX512-VNNI here, or not Linux on x64", () => ExecutableMemory.Map(Emit(type)), code => IsRight(code, type));

    // More rows and fewer panels, and what VnniRow has code for.
    private static bool IsRight(nint code, DType type) => IsRight(code, type, rows: 2, Panels - 1) && IsRight(code, type, rows: 1, Panels);

    // Whole numbers so small that every order of adding them gives the same bits.
    private static bool IsRight(nint code, DType type, int rows, int panelCount)
    {
        const int Blocks = 2;
        int outputs = panelCount * Lanes;
        int columns = Blocks * type.BlockElements();
        int groups = columns / RoundedInputs.Group;
        int panelBytes = (int)type.RowBytes(columns) * Lanes;
        byte[] panels = new byte[panelCount * panelBytes], inputs = new byte[rows * groups * RoundedInputs.GroupBytes];
        float[] sums = new float[outputs * rows], row = new float[columns];
        bool same = true;
        fixed (byte* weights = panels, rounded = inputs)
        fixed (float* actual = sums, decoded = row)
        {
            FillWeights(type, weights, panels.Length);
            FillInputs(rounded, rows * groups);
            Multiply(code, actual, weights, panelBytes, panelCount, rounded, Blocks, rows, next: 0);
            Tensor stored = new((nint)weights, outputs, columns, columns, type);
            for (int i = 0; i < sums.Length; i++)
            {
                (int panel, int ofRow, int lane) = (i / (rows * Lanes), i / Lanes % rows, i % Lanes);
                WeightPanels.DecodeRow(decoded, stored, Lanes, (panel * Lanes) + lane);
                same &= actual[i] == Expected(decoded, rounded + (ofRow * RoundedInputs.GroupBytes), groups, rows);
            }
        }

        return same;

        // Scales in half precision, which begin a block, are 1 or 2.
        static void FillWeights(DType type, byte* weights, int count)
        {
            int blockBytes = type.BlockBytes() * Lanes;
            int halves = type is DType.Q4_K or DType.Q5_K ? 2 * Lanes : Lanes;
            for (int i = 0; i < count; i++)
            {
                weights[i] = (byte)(i * (37 + (i / 251)));
            }

            for (int start = 0; start < count; start += blockBytes)
            {
                for (int i = 0; i < halves; i++)
                {
                    ((Half*)(weights + start))[i] = (Half)(1 + (i % 3 % 2));
                }
            }
        }

        static void FillInputs(byte* rounded, int groups)
        {
            for (int group = 0; group < groups; group++, rounded += RoundedInputs.GroupBytes)
            {
                int first = 0, second = 0;
                for (int i = 0; i < RoundedInputs.Group; i++)
                {
                    sbyte value = (sbyte)(((i * (5 + group)) % 7) - 3);
                    rounded[i] = (byte)value;
                    (first, second) = i < RoundedInputs.Group / 2 ? (first + value, second) : (first, second + value);
                }

                RoundedInputs.WriteScale(rounded + RoundedInputs.Group, 1 + (group % 2), first, second);
            }
        }

        static float Expected(float* weights, byte* rounded, int groups, int rows)
        {
            float sum = 0;
            for (int i = 0; i < groups * RoundedInputs.Group; i++)
            {
                (int group, int element) = int.DivRem(i, RoundedInputs.Group);
                byte* place = rounded + (group * rows * RoundedInputs.GroupBytes);
                sum += weights[i] * (sbyte)place[element] * *(float*)(place + RoundedInputs.Group);
            }

            return sum;
        }
    }
}
