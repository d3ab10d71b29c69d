using System.Globalization;
using System.Text;
using TinyLlama.Compute;
using TinyLlama.Compute.Collectives;

namespace TinyLlama.Checkpoints;

/// <summary>How far a rank is with its part of a checkpoint.</summary>
public enum CheckpointState
{
    /// <summary>None is being written.</summary>
    Idle,

    /// <summary>Its files are being written.</summary>
    Writing,

    /// <summary>Its files are on the disk, or could not be written: <see cref="CheckpointWriter.Finish"/> is due.</summary>
    Written,
}

/// <summary>What became of a checkpoint; alike on all ranks.</summary>
/// <param name="Step">Its step.</param>
/// <param name="Failure">Null where it is whole and has its name, else which rank failed and why, in one line.</param>
public sealed record CheckpointOutcome(long Step, string? Failure);

/// <summary>
/// Writes the checkpoints of a run, each rank its part: <see cref="Begin"/>, <see cref="Copy"/>, <see cref="Write"/>, then
/// <see cref="Finish"/> where every rank's <see cref="State"/> is <see cref="CheckpointState.Written"/>. Rank 0 lists all
/// files in the manifest and renames the folder only when all are on the disk; if one rank fails, there is no checkpoint
/// and those before it are as they were.
/// </summary>
/// <remarks>With a snapshot training goes on while the files are written; without one <see cref="Finish"/> follows at once.</remarks>
public sealed class CheckpointWriter : IDisposable
{
    // A rank's report to rank 0: two files at most, or why there are none.
    private const int ReportBytes = 1024;
    private const int LongestFailure = 250;

    private readonly string _runFolder;
    private readonly Collective _world;
    private readonly Backend _backend;
    private readonly CheckpointPart _part;
    private readonly CheckpointPart? _snapshot;
    private readonly TimeSpan _limit;
    private readonly byte[] _reports;
    private long _step;
    private volatile FolderWriter? _folder;
    private Task<Report>? _write;

    /// <summary>Writes for one rank.</summary>
    /// <param name="runFolder">The run; one folder for all ranks.</param>
    /// <param name="world">The ranks that write.</param>
    /// <param name="backend">The device of the parameters.</param>
    /// <param name="part">What this rank writes.</param>
    /// <param name="snapshot">Room for a copy of it (<see cref="CheckpointPart.Snapshot"/>); null to write before training goes on.</param>
    /// <param name="limit">How long others wait for this rank's disk while it takes nothing, or <see cref="Timeout.InfiniteTimeSpan"/>.</param>
    public CheckpointWriter(string runFolder, Collective world, Backend backend, CheckpointPart part, CheckpointPart? snapshot, TimeSpan limit)
    {
        (_runFolder, _world, _backend, _part, _snapshot, _limit) = (runFolder, world, backend, part, snapshot, limit);
        _reports = new byte[ReportBytes * world.Size];
    }

    /// <summary>Gets how far this rank is. Does not wait.</summary>
    public CheckpointState State =>
        _write is null ? CheckpointState.Idle : _write.IsCompleted ? CheckpointState.Written : CheckpointState.Writing;

    /// <summary>Begins the checkpoint of a step. All ranks call it, when the one before is finished.</summary>
    /// <param name="step">Number of steps done.</param>
    public void Begin(long step)
    {
        if (_write is not null)
        {
            throw new InvalidOperationException($"the checkpoint of step {_step} is not finished");
        }

        (_step, _folder) = (step, null);
        if (_world.Rank == 0)
        {
            // Where this fails, joining fails too, and says so.
            _ = Attempt(() => TrainingCheckpoint.Begin(_runFolder, step));
        }

        _world.Barrier();
    }

    /// <summary>
    /// Copies to the snapshot what this rank writes of a tensor: called for all that it writes, between <see cref="Begin"/> and
    /// <see cref="Write"/>. Nothing without a snapshot.
    /// </summary>
    /// <param name="name">The tensor's name in the files.</param>
    /// <param name="first">The first of the elements in the whole tensor.</param>
    /// <param name="elements">Some or all of the tensor's, contiguous.</param>
    public void Copy(string name, long first, Tensor elements) => _snapshot?.CopyFrom(_backend, name, first, elements);

    /// <summary>Starts to write this rank's part: from the snapshot, or from what must not change until <see cref="Finish"/>.</summary>
    /// <param name="others">Writes the files that hold no tensors; on rank 0 only, on another thread.</param>
    public void Write(Action<FolderWriter> others)
    {
        _write = Task.Run(() => WritePart(_snapshot ?? _part, others));
    }

    /// <summary>Waits until this rank's part is written, then for the other ranks, and makes the checkpoint of all parts. All ranks call it.</summary>
    /// <exception cref="CollectiveException">This rank's disk hangs, or another rank is lost.</exception>
    public CheckpointOutcome Finish()
    {
        Report own = _world.Await(Written(_write ?? throw new InvalidOperationException("no checkpoint was begun")));
        _write = null;
        Report[] reports = Exchange(own);
        string? failure = reports.Select((report, rank) => report.Failure is null || reports.Length == 1 ? report.Failure : $"rank {rank}: {report.Failure}")
            .FirstOrDefault(static text => text is not null);
        if (_world.Rank == 0)
        {
            failure ??= Attempt(() => TrainingCheckpoint.Commit(_runFolder, _step, [.. reports.SelectMany(static report => report.Files)]));
            if (failure is not null)
            {
                TrainingCheckpoint.Abandon(_runFolder, _step);
            }
        }

        // Rank 0 knows how it ended; and none begins another one before.
        return new CheckpointOutcome(_step, Exchange(new Report([], failure))[0].Failure);
    }

    /// <summary>Waits for what is being written; a checkpoint that was not finished leaves what the next start removes.</summary>
    public void Dispose()
    {
        if (_write is not null)
        {
            // Does not throw what the task did.
            _ = Task.WaitAny(_write);
        }
    }

    private async Task<Report> Written(Task<Report> write)
    {
        while (true)
        {
            long before = _folder?.Written ?? 0;
            try
            {
                return await write.WaitAsync(_limit).ConfigureAwait(false);
            }
            catch (TimeoutException) when ((_folder?.Written ?? 0) > before)
            {
                // Slow is no fault.
            }
            catch (TimeoutException e)
            {
                throw new CollectiveException(
                    $"host {_world.Hosts[_world.Rank]}: the disk of {_runFolder} has taken nothing of the checkpoint of step {_step} for {_limit.TotalSeconds:0.#} s", e);
            }
        }
    }

    private Report WritePart(CheckpointPart part, Action<FolderWriter> others)
    {
        IReadOnlyList<ListedFile> files = [];
        string? failure = Attempt(() =>
        {
            FolderWriter writer = TrainingCheckpoint.Join(_runFolder, _step);
            _folder = writer;
            part.Write(writer);
            if (_world.Rank == 0)
            {
                others(writer);
            }

            files = writer.Files;
        });
        return new Report(files, failure);
    }

    // Rank 0 has more files than fit, and alone needs to know of them.
    private Report[] Exchange(Report own)
    {
        Span<byte> report = stackalloc byte[ReportBytes];
        report.Clear();
        (_world.Rank == 0 ? own with { Files = [] } : own).Write(report);
        _world.AllGather<byte>(_reports, report);
        Report[] all = [.. Enumerable.Range(0, _world.Size).Select(rank => Report.Read(_reports.AsSpan(rank * ReportBytes, ReportBytes)))];
        all[0] = _world.Rank == 0 ? all[0] with { Files = own.Files } : all[0];
        return all;
    }

    private static string? Attempt(Action action)
    {
        try
        {
            action();
            return null;
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            return e.Message;
        }
    }

    /// <summary>What a rank tells of its part: its files, a line each of name, bytes and SHA-256, or <c>!</c> and why there are none.</summary>
    private sealed record Report(IReadOnlyList<ListedFile> Files, string? Failure)
    {
        public void Write(Span<byte> destination)
        {
            string text = Failure is null
                ? string.Join('\n', Files.Select(static file => string.Create(CultureInfo.InvariantCulture, $"{file.Name} {file.ByteCount} {file.Sha256}")))
                : '!' + (Failure.Length <= LongestFailure ? Failure : Failure[..LongestFailure] + "…");
            Encoding.UTF8.GetBytes(text, destination);
        }

        public static Report Read(ReadOnlySpan<byte> source)
        {
            string text = Encoding.UTF8.GetString(source.TrimEnd((byte)0));
            return text.StartsWith('!')
                ? new Report([], text[1..])
                : new Report([.. text.Split('\n', StringSplitOptions.RemoveEmptyEntries).Select(ReadFile)], null);
        }

        private static ListedFile ReadFile(string line)
        {
            string[] words = line.Split(' ');
            return new ListedFile(words[0], long.Parse(words[1], CultureInfo.InvariantCulture), words[2]);
        }
    }
}
