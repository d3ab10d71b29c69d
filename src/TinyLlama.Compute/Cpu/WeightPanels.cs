using System.Runtime.CompilerServices;
using TinyLlama.Compute.Native;

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

    // Bytes of rows that are packed between two times that pages are dropped.
    private const int PackedBytes = 2 << 20;

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

    /// <summary>Turns a weight in place into its panels, and drops its pages: some at a time, as both are in memory until then.</summary>
    public static void Pack<V>(ThreadTeam team, Weight weight)
        where V : struct, ILanes<V>
    {
        PackWork<V> work = new()
        {
            Rows = weight.Rows,
            Panels = (byte*)weight.PackedForward.Address,
            RowBytes = (nint)weight.Type.RowBytes(weight.Inputs),
            BlockBytes = weight.Type.BlockBytes(),
        };
        foreach (StoredRows rows in weight.Rows)
        {
            // Rows of heads do not lie in their order.
            int atOnce = rows.HeadDim > 0 ? rows.Count : (int)Math.Max(1, PackedBytes / (work.RowBytes * V.Count)) * V.Count;
            for (int row = 0; row < rows.Count; row += atOnce)
            {
                int count = Math.Min(atOnce, rows.Count - row);
                team.Run(ref work, count / V.Count);
                work.FirstPanel += count / V.Count;
                PageMemory.DropFilePages(rows.Address + (row * work.RowBytes), count * (long)work.RowBytes);
            }
        }
    }

    /// <summary>The first row of a panel and the bytes to the next.</summary>
    public static byte* Rows<V>(StoredRows[] ranges, nint rowBytes, int panel, out nint step)
        where V : struct, ILanes<V>
    {
        int row = panel * V.Count;
        int i = 0;
        for (; row >= ranges[i].Count; i++)
        {
            row -= ranges[i].Count;
        }

        (nint address, step) = ranges[i].At(row, rowBytes);
        return (byte*)address;
    }

    /// <summary>Rows become a panel: of each block, a scale and then whole registers of dwords, the scales of all rows, then dword after dword.</summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static void Turn<V>(byte* panel, byte* rows, nint step, int blocks, int blockBytes)
        where V : struct, ILanes<V>
    {
        for (int block = 0; block < blocks; block++)
        {
            for (int lane = 0; lane < V.Count; lane++)
            {
                ((ushort*)panel)[lane] = *(ushort*)(rows + (lane * step));
            }

            float* dwords = (float*)(panel + (sizeof(ushort) * V.Count));
            for (int i = sizeof(ushort); i < blockBytes; i += 4 * sizeof(uint), dwords += 4 * V.Count)
            {
                V.LoadTurned(rows + i, step, out V w0, out V w1, out V w2, out V w3);
                w0.Store(dwords);
                w1.Store(dwords + V.Count);
                w2.Store(dwords + (2 * V.Count));
                w3.Store(dwords + (3 * V.Count));
            }

            rows += blockBytes;
            panel += blockBytes * V.Count;
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

    private struct PackWork<V> : IWork
        where V : struct, ILanes<V>
    {
        public StoredRows[] Rows;
        public byte* Panels;
        public int FirstPanel;
        public nint RowBytes;
        public int BlockBytes;

        public readonly void Run(int task, int thread)
        {
            int panel = FirstPanel + task;
            byte* source = WeightPanels.Rows<V>(Rows, RowBytes, panel, out nint step);
            Turn<V>(Panels + (panel * RowBytes * V.Count), source, step, (int)RowBytes / BlockBytes, BlockBytes);
        }
    }

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
