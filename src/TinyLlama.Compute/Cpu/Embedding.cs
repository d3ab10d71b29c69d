namespace TinyLlama.Compute.Cpu;

/// <summary>Rows picked by index: the embedding, its backward, and the gathering of rows.</summary>
/// <remarks>Shapes: output (N, C), table (V, C), indices (N, 1). Memory-bound: 8 · N · C bytes.</remarks>
internal static unsafe class Embedding
{
    /// <summary>Columns of a task of the backward: a few cache lines of each row.</summary>
    private const int ColumnsPerTask = 64;

    /// <summary>output row n = table row indices[n]; both of one type, whatever it is.</summary>
    public static void Gather(ThreadTeam team, Tensor output, Tensor table, Tensor indices)
    {
        output.Require(indices.Rows, table.Columns, table.Type);
        table.Require(table.Rows, table.Columns, table.Type);
        indices.RequireIndices(output.Rows, table.Rows);
        Rows rows = Rows.Of(output);
        GatherWork work = new(rows, output, table, indices);
        team.Run(ref work, rows.Tasks);
    }

    /// <summary>output row n = table row indices[n] as singles; the table is of a floating-point type or Q8_0, or in panels of so many lanes.</summary>
    public static void Widen(ThreadTeam team, Tensor output, Tensor table, Tensor indices, int lanes)
    {
        if (table.Type == DType.F32)
        {
            Gather(team, output, table, indices);
            return;
        }

        output.Require(indices.Rows, table.Columns);
        indices.RequireIndices(output.Rows, table.Rows);
        Rows rows = Rows.Of(output);
        WidenWork work = new(rows, output, table, indices, lanes);
        team.Run(ref work, rows.Tasks);
    }

    /// <summary>dTable row indices[n] += dOutput row n, n ascending: tasks are columns, so no two write one place.</summary>
    public static void Scatter<V>(ThreadTeam team, Tensor dTable, Tensor dOutput, Tensor indices)
        where V : struct, ILanes<V>
    {
        dTable.Require(dTable.Rows, dOutput.Columns);
        dOutput.Require(indices.Rows, dOutput.Columns);
        indices.RequireIndices(dOutput.Rows, dTable.Rows);
        ScatterWork<V> work = new(dTable, dOutput, indices);
        team.Run(ref work, (dOutput.Columns + ColumnsPerTask - 1) / ColumnsPerTask);
    }

    private readonly struct GatherWork(Rows rows, Tensor output, Tensor table, Tensor indices) : IWork
    {
        public void Run(int task, int thread)
        {
            int size = table.Type.ByteCount();
            int bytes = table.Columns * size;
            for (int n = rows.First(task); n < rows.End(task); n++)
            {
                byte* source = (byte*)table.Address + ((nint)(*indices.I32(n)) * table.Stride * size);
                byte* destination = (byte*)output.Address + ((nint)n * output.Stride * size);
                Buffer.MemoryCopy(source, destination, bytes, bytes);
            }
        }
    }

    private readonly struct WidenWork(Rows rows, Tensor output, Tensor table, Tensor indices, int lanes) : IWork
    {
        public void Run(int task, int thread)
        {
            for (int n = rows.First(task); n < rows.End(task); n++)
            {
                int row = *indices.I32(n);
                if (table.Type == DType.Q8_0)
                {
                    Q8MatMul.DecodeRow(output.F32(n), (byte*)table.Address + (row * table.Type.RowBytes(table.Columns)), table.Columns);
                }
                else if (table.Type.IsQuantized())
                {
                    WeightPanels.DecodeRow(output.F32(n), table, lanes, row);
                }
                else
                {
                    byte* source = (byte*)table.Address + ((nint)row * table.Stride * table.Type.ByteCount());
                    Copy.Widen(output.F32(n), source, table.Type, table.Columns);
                }
            }
        }
    }

    private readonly struct ScatterWork<V>(Tensor dTable, Tensor dOutput, Tensor indices) : IWork
        where V : struct, ILanes<V>
    {
        public void Run(int task, int thread)
        {
            int first = task * ColumnsPerTask;
            int count = Math.Min(ColumnsPerTask, dOutput.Columns - first);
            for (int n = 0; n < indices.Rows; n++)
            {
                float* x = dOutput.F32(n) + first;
                float* y = dTable.F32(*indices.I32(n)) + first;
                int i = 0;
                for (; i <= count - V.Count; i += V.Count)
                {
                    (V.Load(y + i) + V.Load(x + i)).Store(y + i);
                }

                for (; i < count; i++)
                {
                    y[i] += x[i];
                }
            }
        }
    }
}
