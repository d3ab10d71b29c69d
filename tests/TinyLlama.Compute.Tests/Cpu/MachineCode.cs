using System.Numerics;
using Iced.Intel;

namespace TinyLlama.Compute.Tests.Cpu;

/// <summary>
/// A processor that knows the few instructions of emitted kernels: registers, memory in regions with checked bounds, and
/// the calling convention of System V. Any other instruction, access or clobbered register fails the test.
/// </summary>
/// <param name="code">The code.</param>
/// <param name="tileSize">Rows and bytes of a row that a tile register is configured to have; by default all that it can.</param>
internal sealed class MachineCode(byte[] code, Func<int, (int Rows, int Bytes)>? tileSize = null)
{
    private const ulong StackTop = 0x7000_0000;
    private const int StackBytes = 64;
    private const ulong ReturnAddress = 0xDEAD_0000;
    private const int MostInstructions = 1_000_000;

    private static readonly Register[] s_arguments = [Register.RDI, Register.RSI, Register.RDX, Register.RCX, Register.R8, Register.R9];

    private static readonly Register[] s_preserved =
        [Register.RBX, Register.RBP, Register.R12, Register.R13, Register.R14, Register.R15];

    private readonly Dictionary<ulong, Instruction> _instructions = Decode(code).ToDictionary(instruction => instruction.IP);
    private readonly List<(ulong Start, uint[] Dwords, bool Writable)> _regions = [];
    private readonly Dictionary<Register, ulong> _registers = [];
    private readonly uint[][] _vectors = [.. Enumerable.Range(0, 32).Select(_ => Enumerable.Repeat(0x7FC0_1234u, 16).ToArray())];
    private readonly uint[][] _tiles = [.. Enumerable.Range(0, 8).Select(_ => Enumerable.Repeat(0x7FC0_1234u, 256).ToArray())];
    private bool _zero;
    private bool _below;
    private bool _upperCleared;

    /// <summary>The addresses of lines that were fetched ahead, in order.</summary>
    public List<ulong> Fetched { get; } = [];

    /// <summary>The instructions, the first at address 0.</summary>
    public static List<Instruction> Decode(byte[] code)
    {
        List<Instruction> instructions = [];
        var decoder = Decoder.Create(64, new ByteArrayCodeReader(code));
        while (decoder.IP < (ulong)code.Length)
        {
            Instruction instruction = decoder.Decode();
            Assert.False(instruction.IsInvalid, $"no instruction at {instruction.IP:x}");
            instructions.Add(instruction);
        }

        return instructions;
    }

    /// <summary>Adds memory; what lies before and after it belongs to nobody.</summary>
    /// <returns>Its address.</returns>
    public ulong Memory(uint[] dwords, bool writable = false)
    {
        ulong start = 0x10_0000 * (ulong)(_regions.Count + 1);
        _regions.Add((start, dwords, writable));
        return start;
    }

    /// <summary>Calls the code at address 0 and returns the first region.</summary>
    public uint[] Call(params ulong[] arguments)
    {
        ulong[] onStack = [ReturnAddress, .. arguments.Skip(s_arguments.Length)];
        _regions.Add((StackTop, [.. onStack.SelectMany(word => new[] { (uint)word, (uint)(word >> 32) })], false));
        _regions.Add((StackTop - StackBytes, new uint[StackBytes / 4], true));
        foreach (Register register in s_preserved)
        {
            _registers[register] = 0xABCD_0000 + (ulong)register;
        }

        _registers[Register.RSP] = StackTop;
        for (int i = 0; i < Math.Min(s_arguments.Length, arguments.Length); i++)
        {
            _registers[s_arguments[i]] = arguments[i];
        }

        ulong next = 0;
        for (int count = 0; next != ReturnAddress; count++)
        {
            Assert.True(count < MostInstructions, "the code does not end");
            Assert.True(_instructions.TryGetValue(next, out Instruction instruction), $"no instruction begins at {next:x}");
            next = Execute(instruction);
        }

        Assert.True(_upperCleared, "returns without vzeroupper");
        Assert.Equal(StackTop + 8, _registers[Register.RSP]);
        Assert.All(s_preserved, register => Assert.Equal(0xABCD_0000 + (ulong)register, _registers[register]));
        return _regions[0].Dwords;
    }

    // The address of the instruction after it.
    private ulong Execute(Instruction instruction)
    {
        Assert.False(instruction.HasOpMask, $"{instruction}: masks are not known");
        switch (instruction.Mnemonic)
        {
            case Mnemonic.Mov:
                Set(instruction, Whole(instruction, 1));
                break;
            case Mnemonic.Xchg:
                (_registers[instruction.Op0Register], _registers[instruction.Op1Register]) = (Whole(instruction, 1), Whole(instruction, 0));
                break;
            case Mnemonic.Push:
                ulong pushed = Whole(instruction, 0);
                _registers[Register.RSP] -= 8;
                Write(_registers[Register.RSP], [(uint)pushed, (uint)(pushed >> 32)]);
                break;
            case Mnemonic.Pop:
                Set(instruction, Word(_registers[Register.RSP]));
                _registers[Register.RSP] += 8;
                break;
            case Mnemonic.Lea:
                Set(instruction, Address(instruction, 1));
                break;
            case Mnemonic.Shl:
                SetWithFlag(instruction, Whole(instruction, 0) << (int)Whole(instruction, 1));
                break;
            case Mnemonic.Add:
                SetWithFlag(instruction, Whole(instruction, 0) + Whole(instruction, 1));
                break;
            case Mnemonic.Dec:
                SetWithFlag(instruction, Whole(instruction, 0) - 1);
                break;
            case Mnemonic.Cmp:
                Assert.True(instruction.Op0Kind == OpKind.Register || instruction.MemorySize == MemorySize.UInt32);
                ulong left = instruction.Op0Kind == OpKind.Register ? Whole(instruction, 0) : Read(Address(instruction, 0), 1)[0];
                (_zero, _below) = (left == instruction.GetImmediate(1), left < instruction.GetImmediate(1));
                break;
            case Mnemonic.Ja:
                return _zero || _below ? instruction.NextIP : instruction.NearBranchTarget;
            case Mnemonic.Je:
                return _zero ? instruction.NearBranchTarget : instruction.NextIP;
            case Mnemonic.Jmp:
                return instruction.NearBranchTarget;
            case Mnemonic.Jne:
                return _zero ? instruction.NextIP : instruction.NearBranchTarget;
            case Mnemonic.Ret:
                ulong stack = _registers[Register.RSP];
                _registers[Register.RSP] = stack + 8;
                return Word(stack);
            case Mnemonic.Prefetcht0 or Mnemonic.Prefetcht1:
                Fetched.Add(Address(instruction, 0));
                break;
            case Mnemonic.Vzeroupper:
                _upperCleared = true;
                break;
            case Mnemonic.Vpxord:
                Lanes(instruction, (_, a, b) => a ^ b);
                break;
            case Mnemonic.Vpandd:
                Lanes(instruction, (_, a, b) => a & b);
                break;
            case Mnemonic.Vpord:
                Lanes(instruction, (_, a, b) => a | b);
                break;
            case Mnemonic.Vpternlogd when instruction.GetImmediate(3) == 0xF8:
                Lanes(instruction, (bits, a, b) => bits | (a & b));
                break;
            case Mnemonic.Vpsrld:
                Shift(instruction, (a, count) => a >> count);
                break;
            case Mnemonic.Vpsrad:
                Shift(instruction, (a, count) => (uint)((int)a >> count));
                break;
            case Mnemonic.Vpslld:
                Shift(instruction, (a, count) => a << count);
                break;
            case Mnemonic.Vpaddd:
                Lanes(instruction, (_, a, b) => a + b);
                break;
            case Mnemonic.Vpdpbusd:
                Lanes(instruction, ByteProducts);
                break;
            case Mnemonic.Vpbroadcastd:
                uint dword = instruction.Op1Kind == OpKind.Memory
                    ? Read(Address(instruction, 1), 1)[0]
                    : (uint)General(instruction.Op1Register.GetFullRegister());
                Vector(instruction, 0).AsSpan().Fill(dword);
                break;
            case Mnemonic.Vpbroadcastq:
                ulong word = General(instruction.Op1Register);
                uint[] both = [(uint)word, (uint)(word >> 32)];
                for (int lane = 0; lane < 16; lane++)
                {
                    Vector(instruction, 0)[lane] = both[lane % 2];
                }

                break;
            case Mnemonic.Vgf2p8affineqb:
                AffineBytes(Vector(instruction, 0), Vector(instruction, 1), Vector(instruction, 2), (byte)instruction.GetImmediate(3));
                break;
            case Mnemonic.Vpmovdw:
                uint[] words = Vector(instruction, 1);
                uint[] narrow = new uint[16];
                for (int lane = 0; lane < 16; lane++)
                {
                    narrow[lane / 2] |= (words[lane] & 0xFFFF) << (lane % 2 * 16);
                }

                narrow.CopyTo(LowHalf(instruction, 0), 0);
                break;
            case Mnemonic.Vmovups when instruction.Op0Kind == OpKind.Memory:
                Write(Address(instruction, 0), Vector(instruction, 1));
                break;
            case Mnemonic.Vmovups:
                Source(instruction, 1).CopyTo(Vector(instruction, 0), 0);
                break;
            case Mnemonic.Vbroadcastss:
                Vector(instruction, 0).AsSpan().Fill(Read(Address(instruction, 1), 1)[0]);
                break;
            case Mnemonic.Vaddps:
                Lanes(instruction, (_, a, b) => Bits(Float(a) + Float(b)));
                break;
            case Mnemonic.Vsubps:
                Lanes(instruction, (_, a, b) => Bits(Float(a) - Float(b)));
                break;
            case Mnemonic.Vmulps:
                Lanes(instruction, (_, a, b) => Bits(Float(a) * Float(b)));
                break;
            case Mnemonic.Vfmadd231ps:
                Lanes(instruction, (sum, a, b) => Bits(MathF.FusedMultiplyAdd(Float(a), Float(b), Float(sum))));
                break;
            case Mnemonic.Vcvtdq2ps:
                Array.ConvertAll(Source(instruction, 1), static whole => Bits((int)whole)).CopyTo(Vector(instruction, 0), 0);
                break;
            case Mnemonic.Vcvtph2ps:
                uint[] pairs = instruction.Op1Kind == OpKind.Memory ? Read(Address(instruction, 1), 8) : LowHalf(instruction, 1)[..8];
                pairs.SelectMany(static pair => new[] { (ushort)pair, (ushort)(pair >> 16) })
                    .Select(static half => Bits((float)BitConverter.UInt16BitsToHalf(half))).ToArray().CopyTo(Vector(instruction, 0), 0);
                break;
            case Mnemonic.Vdpbf16ps:
                Lanes(instruction, (sum, a, b) => FusedProduct(FusedProduct(sum, a & 0xFFFF_0000, b & 0xFFFF_0000), a << 16, b << 16));
                break;
            case Mnemonic.Tilezero:
                Tile(instruction, 0).AsSpan().Clear();
                break;
            case Mnemonic.Tileloadd:
                Tile(instruction, 0).AsSpan().Clear();
                (int rows, int bytes) = Size(instruction, 0);
                for (int row = 0; row < rows; row++)
                {
                    Read(RowOf(instruction, 1, row), bytes / 4).CopyTo(Tile(instruction, 0), 16 * row);
                }

                break;
            case Mnemonic.Tilestored:
                (rows, bytes) = Size(instruction, 1);
                for (int row = 0; row < rows; row++)
                {
                    Write(RowOf(instruction, 0, row), Tile(instruction, 1)[(16 * row)..((16 * row) + (bytes / 4))]);
                }

                break;
            case Mnemonic.Tdpbf16ps:
                RequireSizes(instruction);
                TileProducts(Tile(instruction, 0), Tile(instruction, 1), Tile(instruction, 2));
                break;
            case Mnemonic.Tdpbssd:
                RequireSizes(instruction);
                TileByteProducts(Tile(instruction, 0), Tile(instruction, 1), Tile(instruction, 2));
                break;
            default:
                Assert.Fail($"{instruction} is not known");
                break;
        }

        return instruction.NextIP;
    }

    // Intel, "Instruction Set Reference", VDPBF16PS: subnormal operands are zero, each sum is rounded once, subnormal ones to zero.
    private static uint FusedProduct(uint sum, uint a, uint b)
    {
        return Flushed(Bits(MathF.FusedMultiplyAdd(Float(Flushed(a)), Float(Flushed(b)), Float(Flushed(sum)))));

        static uint Flushed(uint bits) => (bits & 0x7F80_0000) == 0 ? bits & 0x8000_0000 : bits;
    }

    // The same of TDPBF16PS: the first of each pair and the second are summed each by themselves.
    private static void TileProducts(uint[] sums, uint[] rows, uint[] pairs)
    {
        for (int at = 0; at < 256; at++)
        {
            uint first = 0, second = 0;
            for (int k = 0; k < 16; k++)
            {
                uint a = rows[(at & -16) + k], b = pairs[(16 * k) + (at % 16)];
                first = FusedProduct(first, a << 16, b << 16);
                second = FusedProduct(second, a & 0xFFFF_0000, b & 0xFFFF_0000);
            }

            sums[at] = Sum(sums[at], Sum(first, second));
        }

        static uint Sum(uint a, uint b) => FusedProduct(a, b, Bits(1));
    }

    // TDPBSSD: four products of signed bytes to each sum of 32 bits. What a tile does not have is zero here.
    private static void TileByteProducts(uint[] sums, uint[] rows, uint[] columns)
    {
        for (int at = 0; at < 256; at++)
        {
            for (int k = 0; k < 16; k++)
            {
                (uint a, uint b) = (rows[(at & -16) + k], columns[(16 * k) + (at % 16)]);
                for (int shift = 0; shift < 32; shift += 8)
                {
                    sums[at] += (uint)((sbyte)(a >> shift) * (sbyte)(b >> shift));
                }
            }
        }
    }

    // VGF2P8AFFINEQB: bit i of a byte is the parity of what row 7 - i of its word's matrix selects of it, turned over by bit i of the constant.
    private static void AffineBytes(uint[] result, uint[] bytes, uint[] matrices, byte constant)
    {
        for (int lane = 0; lane < 16; lane++)
        {
            ulong matrix = matrices[lane & ~1] | ((ulong)matrices[lane | 1] << 32);
            uint sum = 0;
            for (int bit = 0; bit < 32; bit++)
            {
                byte x = (byte)(bytes[lane] >> (bit & ~7));
                byte row = (byte)(matrix >> (8 * (7 - (bit % 8))));
                int parity = BitOperations.PopCount((uint)(x & row)) + (constant >> (bit % 8));
                sum |= (uint)(parity & 1) << bit;
            }

            result[lane] = sum;
        }
    }

    // VPDPBUSD: unsigned bytes of a by signed ones of b.
    private static uint ByteProducts(uint sum, uint a, uint b)
    {
        for (int shift = 0; shift < 32; shift += 8)
        {
            sum += (uint)((byte)(a >> shift) * (sbyte)(b >> shift));
        }

        return sum;
    }

    private static float Float(uint bits) => BitConverter.UInt32BitsToSingle(bits);

    private static uint Bits(float value) => BitConverter.SingleToUInt32Bits(value);

    // The index is the distance of two rows, and no part of the address.
    private ulong RowOf(Instruction instruction, int operand, int row) =>
        Address(instruction, operand) + ((ulong)row * General(instruction.MemoryIndex) * (ulong)instruction.MemoryIndexScale);

    private (int Rows, int Bytes) Size(Instruction instruction, int operand) =>
        tileSize?.Invoke(instruction.GetOpRegister(operand) - Register.TMM0) ?? (16, 64);

    // Sums of as many rows as the left operand and columns as the right, which has a row for each dword of the left; else the processor faults.
    private void RequireSizes(Instruction instruction)
    {
        ((int rows, int bytes), (int leftRows, int leftBytes), (int rightRows, int rightBytes)) =
            (Size(instruction, 0), Size(instruction, 1), Size(instruction, 2));
        Assert.Equal((leftRows, rightBytes, leftBytes), (rows, bytes, 4 * rightRows));
    }

    private uint[] Tile(Instruction instruction, int operand)
    {
        Register register = instruction.GetOpRegister(operand);
        Assert.InRange(register, Register.TMM0, Register.TMM7);
        return _tiles[register - Register.TMM0];
    }

    private void Lanes(Instruction instruction, Func<uint, uint, uint, uint> function)
    {
        uint[] sums = Vector(instruction, 0), a = Vector(instruction, 1), b = Source(instruction, 2);
        for (int lane = 0; lane < 16; lane++)
        {
            sums[lane] = function(sums[lane], a[lane], b[lane]);
        }
    }

    private void Shift(Instruction instruction, Func<uint, int, uint> function)
    {
        int count = (int)instruction.GetImmediate(2);
        Array.ConvertAll(Source(instruction, 1), a => function(a, count)).CopyTo(Vector(instruction, 0), 0);
    }

    private uint[] Source(Instruction instruction, int operand) =>
        instruction.GetOpKind(operand) != OpKind.Memory ? Vector(instruction, operand)
        : instruction.IsBroadcast ? [.. Enumerable.Repeat(Read(Address(instruction, operand), 1)[0], 16)]
        : Read(Address(instruction, operand), 16);

    private uint[] Vector(Instruction instruction, int operand)
    {
        Register register = instruction.GetOpRegister(operand);
        Assert.True(register.IsZMM(), $"{instruction}: only 512-bit registers are known");
        return _vectors[register.GetNumber()];
    }

    // The register that a 256-bit one is the lower half of.
    private uint[] LowHalf(Instruction instruction, int operand)
    {
        Register register = instruction.GetOpRegister(operand);
        Assert.True(register.IsYMM(), $"{instruction}: {register} has other than 256 bits");
        return _vectors[register.GetNumber()];
    }

    private ulong Whole(Instruction instruction, int operand) => instruction.GetOpKind(operand) switch
    {
        OpKind.Register => General(instruction.GetOpRegister(operand)),
        OpKind.Memory => Word(Address(instruction, operand)),
        _ => instruction.GetImmediate(operand),
    };

    private ulong General(Register register)
    {
        Assert.True(register.IsGPR64() && _registers.ContainsKey(register), $"{register} is read before it is written");
        return _registers[register];
    }

    private void Set(Instruction instruction, ulong value)
    {
        Assert.True(instruction.Op0Register.IsGPR64(), $"{instruction}: only 64-bit registers are known");
        _registers[instruction.Op0Register] = value;
    }

    private void SetWithFlag(Instruction instruction, ulong value)
    {
        Set(instruction, value);
        _zero = value == 0;
    }

    private ulong Address(Instruction instruction, int operand) =>
        instruction.GetVirtualAddress(operand, 0, (register, _, _) => register is Register.DS or Register.SS ? 0 : General(register));

    private ulong Word(ulong address) => Read(address, 2) is [uint low, uint high] ? low | ((ulong)high << 32) : 0;

    private uint[] Read(ulong address, int count) => Find(address, count, writes: false).ToArray();

    private void Write(ulong address, uint[] values) => values.CopyTo(Find(address, values.Length, writes: true));

    private Span<uint> Find(ulong address, int count, bool writes)
    {
        foreach ((ulong start, uint[] dwords, bool writable) in _regions)
        {
            if (address >= start && address + (4 * (ulong)count) <= start + (4 * (ulong)dwords.Length))
            {
                Assert.True(address % 4 == 0 && (writable || !writes), $"{address:x} is not aligned, or only to be read");
                return dwords.AsSpan((int)(address - start) / 4, count);
            }
        }

        Assert.Fail($"{count} dwords at {address:x} are outside of all memory");
        return default;
    }
}
