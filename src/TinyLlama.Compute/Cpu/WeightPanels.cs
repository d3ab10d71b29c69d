using System.Runtime.CompilerServices;

namespace TinyLlama.Compute.Cpu;

/// <summary>
/// Quantized weights of 4 to 6 bits as kernels read them: panels of as many rows as a register has lanes, block after block along the
/// inputs. In a panel a block is the rows' blocks of the file turned: first the 16-bit word that is no part of a dword, if
/// the type has one, of each row, then dword after dword of each row. So a lane is a row, and each byte of the file is
/// there once.
/// </summary>
internal static unsafe class WeightPanels
{
    // They stay in the second cache while rows pass by.
    private const long TaskBytes = 96 << 10;

    /// <summary>The panels of a task: multiples of those that are multiplied together.</summary>
    public static int OfTask(long panelBytes, int panelCount, int together) =>
        (int)Math.Clamp(TaskBytes / panelBytes / together, 1, Math.Max(1, panelCount / 8 / together)) * together;

    /// <summary>Room for a weight: of its shape and type, with rows up to a whole panel behind it.</summary>
    public static Tensor Take(Arena arena, int outputs, int inputs, DType type, int lanes)
    {
        Shape.Require(inputs % type.BlockElements() == 0, "rows of whole blocks");
        return arena.Take((outputs + lanes - 1) / lanes * lanes, inputs, type) with { Rows = outputs };
    }

    /// <summary>Writes whole rows in the order of files to their places.</summary>
    /// <param name="team">The threads.</param>
    /// <param name="panels">All panels; its shape and type are the weight's.</param>
    /// <param name="firstRow">The first row.</param>
    /// <param name="rows">Their bytes.</param>
    public static void Write<V>(ThreadTeam team, Tensor panels, int firstRow, ReadOnlySpan<byte> rows)
        where V : struct, ILanes<V>
    {
        int rowBytes = checked((int)panels.Type.RowBytes(panels.Columns));
        int count = rows.Length / rowBytes;
        Shape.Require(rows.Length % rowBytes == 0 && firstRow >= 0 && count <= panels.Rows - firstRow, "whole rows of the weight");
        if (count == 0)
        {
            return;
        }

        fixed (byte* source = rows)
        {
            int firstPanel = firstRow / V.Count;
            WriteWork<V> work = new()
            {
                Panels = (byte*)panels.Address,
                Source = source,
                FirstRow = firstRow,
                EndRow = firstRow + count,
                FirstPanel = firstPanel,
                RowBytes = rowBytes,
                BlockBytes = panels.Type.BlockBytes(),
                Word = Word(panels.Type),
            };
            team.Run(ref work, ((firstRow + count - 1) / V.Count) - firstPanel + 1);
        }
    }

    /// <summary>Widens one row.</summary>
    public static void DecodeRow(float* destination, Tensor panels, int lanes, int row)
    {
        DType type = panels.Type;
        int word = Word(type);
        (int panel, int lane) = Math.DivRem(row, lanes);
        byte* source = (byte*)panels.Address + ((nint)panel * lanes * (nint)type.RowBytes(panels.Columns));
        byte* block = stackalloc byte[type.BlockBytes()];
        for (int done = 0; done < panels.Columns; done += type.BlockElements())
        {
            byte* planes = source;
            if (word >= 0)
            {
                *(ushort*)(block + word) = ((ushort*)source)[lane];
                planes += sizeof(ushort) * lanes;
            }

            uint* dwords = (uint*)(block + (word == 0 ? sizeof(ushort) : 0));
            for (int i = 0; i < type.BlockBytes() / sizeof(uint); i++)
            {
                dwords[i] = ((uint*)planes)[(i * lanes) + lane];
            }

            QuantizedBlocks.Decode(type, new ReadOnlySpan<byte>(block, type.BlockBytes()), new Span<float>(destination + done, type.BlockElements()));
            source += type.BlockBytes() * lanes;
        }
    }

    // Where in a block the odd word lies: a scale. -1 where there is none.
    private static int Word(DType type) => type switch
    {
        DType.Q4_0 or DType.Q5_0 or DType.Q8_0 => 0,
        DType.Q6_K => 208,
        _ => -1,
    };

    private struct WriteWork<V> : IWork
        where V : struct, ILanes<V>
    {
        public byte* Panels;
        public byte* Source;
        public int FirstRow;
        public int EndRow;
        public int FirstPanel;
        public int RowBytes;
        public int BlockBytes;
        public int Word;

        // Compiled fully at once: most of a start is this.
        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public readonly void Run(int task, int thread)
        {
            int panelRow = (FirstPanel + task) * V.Count;
            byte* panel = Panels + ((nint)panelRow * RowBytes);
            int first = Math.Max(FirstRow, panelRow);
            int end = Math.Min(EndRow, panelRow + V.Count);
            int firstDword = Word == 0 ? sizeof(ushort) : 0;
            int dwords = BlockBytes / sizeof(uint);
            for (int offset = 0; offset < RowBytes; offset += BlockBytes)
            {
                byte* block = panel + ((nint)offset * V.Count);
                byte* planes = block + (Word >= 0 ? sizeof(ushort) * V.Count : 0);
                int turned = end - first == V.Count ? dwords & -4 : 0;
                byte* rows = Source + ((nint)(first - FirstRow) * RowBytes) + offset + firstDword;
                for (int i = 0; i < turned; i += 4)
                {
                    V.LoadTurned(rows + (i * sizeof(uint)), RowBytes, out V w0, out V w1, out V w2, out V w3);
                    float* destination = (float*)planes + (i * V.Count);
                    w0.Store(destination);
                    w1.Store(destination + V.Count);
                    w2.Store(destination + (2 * V.Count));
                    w3.Store(destination + (3 * V.Count));
                }

                for (int row = first; row < end; row++)
                {
                    byte* source = Source + ((nint)(row - FirstRow) * RowBytes) + offset;
                    int lane = row - panelRow;
                    if (Word >= 0)
                    {
                        ((ushort*)block)[lane] = *(ushort*)(source + Word);
                    }

                    uint* plane = (uint*)planes + lane;
                    uint* dword = (uint*)(source + firstDword);
                    for (int i = turned; i < dwords; i++)
                    {
                        plane[i * V.Count] = dword[i];
                    }
                }
            }
        }
    }
}
