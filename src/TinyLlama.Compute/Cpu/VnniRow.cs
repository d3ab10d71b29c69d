using Iced.Intel;
using static Iced.Intel.AssemblerRegisters;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// The part of <see cref="VnniBytes"/> that multiplies one row of inputs by four panels of K-quants: a text that is written alone waits
/// for memory, and for all that keeps a core from asking for more of it.
/// </summary>
/// <remarks>
/// Four panels take turns a few groups at a time, not block after block as there: these are groups whose bits lie in the same bytes, which
/// are loaded once. Each part fetches the same part of a later block, and sums stay in registers. The bits are those of the other part.
/// </remarks>
internal static class VnniRow
{
    private const int Lanes = 16;
    private const int Panels = QuantizedMatMul.PanelsTogether;

    // Dwords of a group; the products of the first half of them and of the second are summed by themselves.
    private const int Dwords = RoundedInputs.Group / sizeof(int);

    /// <summary>Whether there is such code for a type: where blocks are so long that panels in turns of blocks are read badly.</summary>
    public static bool Has(DType type) => type is DType.Q4_K or DType.Q5_K or DType.Q6_K;

    /// <summary>Emits what goes on after itself, with all registers as they were but rax, if it is called with more rows or fewer panels.</summary>
    /// <param name="code">At the entry of <see cref="VnniBytes.Multiply"/>.</param>
    /// <param name="type">The type of weights.</param>
    public static void Emit(Assembler code, DType type)
    {
        // On entry: rdi sums, rsi weights, rdx panelBytes, rcx panels, r8 rounded, r9 blocks, on the stack rows, next. Three panels' bytes
        // in r15, what is fetched from r14. Of Q6_K, products of a group's halves begin with the sums of its inputs, in 12 to 19.
        bool isQ6 = type == DType.Q6_K;
        AssemblerRegisterZMM[] sums = Registers(0, Panels), units = Registers(4, Panels), offsetUnits = Registers(8, Panels);
        AssemblerRegisterZMM[] products = isQ6 ? Registers(4, 8) : Registers(12, 4), beginnings = Registers(12, 8), temporary = Registers(20, 4);
        AssemblerRegisterZMM higherBits = zmm24;
        AssemblerRegisterZMM nibbles = zmm26, mask = zmm27, sixBits = zmm28, fourBits = zmm29, twoBits = zmm30;
        int blockBytes = type.BlockBytes() * Lanes;
        int ahead = QuantizedMatMul.BlocksAhead(blockBytes);
        int groups = type.BlockElements() / RoundedInputs.Group;
        int together = isQ6 ? 4 : 2;
        int partBytes = blockBytes * together / groups;
        Label otherwise = code.CreateLabel(), block = code.CreateLabel(), fetched = code.CreateLabel();
        code.cmp(rcx, Panels);
        code.jne(otherwise);
        code.mov(rax, __[rsp + sizeof(long)]);
        code.cmp(rax, 1);
        code.jne(otherwise);
        code.push(r14);
        code.push(r15);
        Constant(nibbles, 0x0F0F0F0F);
        Constant(mask, type == DType.Q5_K ? 0x10101010u : 0x30303030);
        Constant(sixBits, 0x3F);
        Constant(fourBits, 0x0F);
        Constant(twoBits, 0x30);
        code.lea(r15, __[rdx + (rdx * 2)]);
        for (int panel = 0; panel < Panels; panel++)
        {
            code.vmovups(sums[panel], SumsOf(panel));
        }

        code.Label(ref block);
        code.lea(r14, __[rsi + (ahead * blockBytes)]);
        code.cmp(r9, ahead);
        code.ja(fetched);
        code.add(r14, __[rsp + (4 * sizeof(long))]);
        code.Label(ref fetched);
        for (int panel = 0; panel < Panels && !isQ6; panel++)
        {
            LoadUnits(panel);
        }

        for (int first = 0; first < groups; first += together)
        {
            BeginProducts(first);
            for (int panel = 0; panel < Panels; panel++)
            {
                AddProducts(panel, first);
                for (int group = first; group < first + together; group++)
                {
                    AddGroup(panel, group, products[2 * (group - first)], products[(2 * (group - first)) + 1]);
                }
            }
        }

        code.add(r8, groups * RoundedInputs.GroupBytes);
        code.add(rsi, blockBytes);
        code.dec(r9);
        code.jne(block);
        for (int panel = 0; panel < Panels; panel++)
        {
            code.vmovups(SumsOf(panel), sums[panel]);
        }

        code.pop(r15);
        code.pop(r14);
        code.vzeroupper();
        code.ret();
        code.Label(ref otherwise);

        void Constant(AssemblerRegisterZMM register, uint dword)
        {
            code.mov(rax, (long)dword);
            code.vpbroadcastd(register, eax);
        }

        AssemblerMemoryOperand SumsOf(int panel) => __zmmword_ptr[rdi + (panel * Lanes * sizeof(float))];

        AssemblerMemoryOperand Input(int group, int bytesBefore) => __dword_bcst[r8 + ((group * RoundedInputs.GroupBytes) + bytesBefore)];

        // Dword plane i after some bytes of each lane.
        AssemblerMemoryOperand Plane(int panel, int bytesBefore, int i) => __zmmword_ptr[OfPanel(rsi, panel) + ((bytesBefore + (4 * i)) * Lanes)];

        // A scale and a minimum of each lane, in half precision.
        void LoadUnits(int panel)
        {
            (AssemblerRegisterZMM pairs, AssemblerRegisterZMM zero) = (temporary[0], temporary[1]);
            code.vmovups(pairs, Plane(panel, 0, 0));
            code.vpsrld(offsetUnits[panel], pairs, 16);
            code.vpmovdw(Lower(units[panel]), pairs);
            code.vpmovdw(Lower(offsetUnits[panel]), offsetUnits[panel]);
            code.vcvtph2ps(units[panel], Lower(units[panel]));
            code.vcvtph2ps(offsetUnits[panel], Lower(offsetUnits[panel]));
            code.vpxord(zero, zero, zero);
            code.vsubps(offsetUnits[panel], zero, offsetUnits[panel]);
        }

        // Bytes are unsigned: what those of Q6_K have too much, times the sums of the inputs, is what integers begin with. Sums of halves,
        // times -16, are int16: twice that, as int32.
        void BeginProducts(int first)
        {
            for (int i = 0; i < products.Length && isQ6; i += 2)
            {
                (AssemblerRegisterZMM low, AssemblerRegisterZMM high) = (beginnings[i], beginnings[i + 1]);
                code.vpbroadcastd(high, __dword_ptr[r8 + (((first + (i / 2)) * RoundedInputs.GroupBytes) + RoundedInputs.Group + 4)]);
                code.vpslld(low, high, 16);
                code.vpsrad(low, low, 15);
                code.vpsrad(high, high, 16);
                code.vpaddd(high, high, high);
            }
        }

        // Those of groups whose nibbles share bytes.
        void AddProducts(int panel, int first)
        {
            for (int i = 0; i < products.Length; i++)
            {
                if (isQ6)
                {
                    code.vmovups(products[i], beginnings[i]);
                }
                else
                {
                    code.vpxord(products[i], products[i], products[i]);
                }
            }

            int fetchedBytes = 0;
            for (int i = 0; i < Dwords; i++)
            {
                for (; fetchedBytes < partBytes * (i + 1) / Dwords; fetchedBytes += 64)
                {
                    code.prefetcht1(__byte_ptr[OfPanel(r14, panel) + ((first / together * partBytes) + fetchedBytes)]);
                }

                LoadBytes(panel, first, i);
                for (int j = 0; j < together; j++)
                {
                    AssemblerRegisterZMM bytes = temporary[1];
                    Unpack(bytes, first + j, j);
                    code.vpdpbusd(products[(2 * j) + (i / (Dwords / 2))], bytes, Input(first + j, 4 * i));
                }
            }
        }

        // Dword i of all of them: one or two planes of nibbles, and one of higher bits.
        void LoadBytes(int panel, int first, int i)
        {
            switch (type)
            {
                case DType.Q4_K:
                    code.vmovups(temporary[2], Plane(panel, 16 + (first / 2 * 32), i));
                    break;
                case DType.Q5_K:
                    code.vmovups(temporary[2], Plane(panel, 48 + (first / 2 * 32), i));
                    code.vmovups(higherBits, Plane(panel, 16, i));
                    break;
                default:
                    code.vmovups(temporary[2], Plane(panel, 2 + (first / 4 * 64), i));
                    code.vmovups(temporary[3], Plane(panel, 2 + (first / 4 * 64) + 32, i));
                    code.vmovups(higherBits, Plane(panel, 2 + 128 + (first / 4 * 32), i));
                    break;
            }
        }

        void Unpack(AssemblerRegisterZMM bytes, int group, int j)
        {
            AssemblerRegisterZMM plane = temporary[isQ6 ? 2 + (j % 2) : 2], shifted = temporary[0];
            if (j < together / 2)
            {
                code.vpandd(bytes, nibbles, plane);
            }
            else
            {
                code.vpsrld(bytes, plane, 4);
                code.vpandd(bytes, bytes, nibbles);
            }

            if (type == DType.Q4_K)
            {
                return;
            }

            int left = isQ6 ? 4 - (2 * j) : 4 - group;
            if (left > 0)
            {
                code.vpslld(shifted, higherBits, (byte)left);
            }
            else if (left < 0)
            {
                code.vpsrld(shifted, higherBits, (byte)-left);
            }

            // bytes | (shifted & mask)
            code.vpternlogd(bytes, left == 0 ? higherBits : shifted, mask, 0xF8);
        }

        void AddGroup(int panel, int group, AssemblerRegisterZMM low, AssemblerRegisterZMM high)
        {
            const int Scale = RoundedInputs.Group, ScaledSum = Scale + 8;
            (AssemblerRegisterZMM scale, AssemblerRegisterZMM second) = (temporary[1], temporary[2]);
            if (isQ6)
            {
                // Below 2^24 in amount, so exact, as integers would be.
                code.vcvtdq2ps(low, low);
                code.vcvtdq2ps(high, high);
                WholeScale(scale, panel, 2 * group);
                code.vmulps(low, low, scale);
                WholeScale(second, panel, (2 * group) + 1);
                code.vfmadd231ps(low, high, second);
                code.vcvtph2ps(scale, __ymmword_ptr[OfPanel(rsi, panel) + 0]);
                code.vmulps(scale, scale, Input(group, Scale));
            }
            else
            {
                SixBits(second, panel, group, kind: 1);
                code.vmulps(second, second, offsetUnits[panel]);
                code.vfmadd231ps(sums[panel], second, Input(group, ScaledSum));
                code.vpaddd(low, low, high);
                code.vcvtdq2ps(low, low);
                SixBits(scale, panel, group, kind: 0);
                code.vmulps(scale, scale, units[panel]);
                code.vmulps(scale, scale, Input(group, Scale));
            }

            code.vfmadd231ps(sums[panel], low, scale);
        }

        void WholeScale(AssemblerRegisterZMM scale, int panel, int number)
        {
            code.vpslld(scale, Plane(panel, 2 + 192, number / 4), (byte)(24 - (8 * (number % 4))));
            code.vpsrad(scale, scale, 24);
            code.vcvtdq2ps(scale, scale);
        }

        // A group's scale (0) or minimum (1): of groups 0 to 3 the low bits of their own bytes; of 4 to 7 four of the last four bytes' bits,
        // and the high bits of the others.
        void SixBits(AssemblerRegisterZMM scale, int panel, int group, int kind)
        {
            AssemblerRegisterZMM high = temporary[0];
            if (group < 4)
            {
                code.vpsrld(scale, Plane(panel, 4, kind), (byte)(8 * group));
                code.vpandd(scale, scale, sixBits);
            }
            else
            {
                code.vpsrld(scale, Plane(panel, 4, 2), (byte)((8 * (group - 4)) + (4 * kind)));
                code.vpandd(scale, scale, fourBits);
                code.vpsrld(high, Plane(panel, 4, kind), (byte)((8 * (group - 4)) + 2));
                code.vpternlogd(scale, high, twoBits, 0xF8);
            }

            code.vcvtdq2ps(scale, scale);
        }
    }

    private static AssemblerMemoryOperand OfPanel(AssemblerRegister64 first, int panel) => panel switch
    {
        0 => first + 0,
        1 => first + rdx,
        2 => first + (rdx * 2),
        _ => first + r15,
    };

    private static AssemblerRegisterZMM[] Registers(int first, int count) =>
        [.. Enumerable.Range(first, count).Select(static number => new AssemblerRegisterZMM(Register.ZMM0 + number))];

    private static AssemblerRegisterYMM Lower(AssemblerRegisterZMM register) => new(register.Value - Register.ZMM0 + Register.YMM0);
}
