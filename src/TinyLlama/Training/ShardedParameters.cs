using System.Numerics;
using TinyLlama.Compute;
using TinyLlama.Compute.Collectives;
using TinyLlama.Model;

namespace TinyLlama.Training;

/// <summary>The rows of a unit that a rank updates.</summary>
/// <param name="Unit">The unit.</param>
/// <param name="FirstRow">Their first row in it.</param>
/// <param name="Values">Their values, (rows, <see cref="ParameterUnit.Columns"/>).</param>
/// <param name="Gradient">Their gradient once all micro-batches of all ranks are in it.</param>
public sealed record OwnedRows(ParameterUnit Unit, int FirstRow, Tensor Values, Tensor Gradient);

/// <summary>
/// Parameters of which each rank keeps a part: ZeRO stages 1 to 3 over <see cref="Collective"/>s, with one sum for any number of
/// ranks.
/// </summary>
/// <remarks>
/// A lane's micro-batches add up in the gradient. Lanes of one rank wait for their neighbour in slots, one for each level of
/// the tree, as carries do in a binary counter; the tree goes on over ranks in reduce-scatters. What is sent runs beside the
/// backward of the blocks below; what is gathered beside the forward of the blocks above.
/// </remarks>
public sealed class ShardedParameters : ParameterStore
{
    private readonly LlamaModel _model;
    private readonly Backend _backend;
    private readonly Sharding _sharding;
    private readonly Mesh? _mesh;
    private readonly int _shard;
    private readonly OwnedRows[] _owned;
    private readonly Tensor[][] _slots;
    private readonly Tensor[] _wire = [];
    private readonly Ticket[] _wired = new Ticket[2];
    private readonly Tensor _scratch;

    // What is under way or done with each unit, and with what units take turns in.
    private readonly Ticket[] _reduced;
    private readonly Ticket[] _gathered;
    private readonly bool[] _stale;
    private readonly Ticket[] _sent = new Ticket[TurnArenas.Count];
    private readonly int[] _resident = [-1, -1, -1];
    private readonly bool[] _packed = new bool[TurnArenas.Count];
    private int _incomplete = -1;
    private int _sends;
    private int _turn;
    private bool _endsLane = true;

    /// <summary>Takes what a rank needs beside the model.</summary>
    /// <param name="model">A model over <see cref="ModelArenas.PlanSharded"/> of the same stage.</param>
    /// <param name="backend">The device.</param>
    /// <param name="sharding">How ranks share.</param>
    /// <param name="mesh">The ranks; null to count the bytes.</param>
    /// <param name="rank">This rank.</param>
    /// <param name="shards">Owner of this rank's parts, and of what lanes wait in.</param>
    /// <param name="communication">Owner of what passes between ranks.</param>
    public ShardedParameters(LlamaModel model, Backend backend, Sharding sharding, Mesh? mesh, int rank, Arena shards, Arena communication)
    {
        (_model, _backend, _sharding, _mesh, _shard) = (model, backend, sharding, mesh, rank % sharding.Shards);
        int units = model.Units.Count;
        (_reduced, _gathered, _stale) = (new Ticket[units], new Ticket[units], new bool[units]);
        _owned = [.. model.Units.Select(unit => Own(unit, shards))];

        // A rank's own lanes meet in whole gradients, unless these were reduced before.
        int levels = BitOperations.Log2((uint)sharding.LanesOfRank);
        _slots =
        [
            .. model.Units.Select(unit => Enumerable.Range(0, levels)
                .Select(_ => shards.Take((sharding.ReducesEachMicroBatch ? _owned[unit.Index].Gradient : unit.Gradient).Rows, ParameterUnit.Columns))
                .ToArray()),
        ];
        if (sharding.DataRanks > 1)
        {
            int most = model.Units.Max(static unit => unit.Gradient.Rows);
            _scratch = communication.Take(most, ParameterUnit.Columns);
            if (sharding.Wire != DType.F32)
            {
                _wire = [communication.Take(most, ParameterUnit.Columns, sharding.Wire), communication.Take(most, ParameterUnit.Columns, sharding.Wire)];
            }
        }
    }

    /// <summary>Gets what this rank updates, a part of each unit.</summary>
    public IReadOnlyList<OwnedRows> Owned => _owned;

    /// <summary>Lets each unit's parameters be filled where they lie for the moment, and keeps this rank's part.</summary>
    public void Fill(Action<IReadOnlyList<Parameter>> fill)
    {
        ArgumentNullException.ThrowIfNull(fill);
        foreach (OwnedRows owned in _owned)
        {
            fill(owned.Unit.Parameters);
            if (_sharding.ShardsWeights)
            {
                _backend.Copy(owned.Values, owned.Unit.Values.RowRange(owned.FirstRow, owned.Values.Rows));
            }
        }

        Array.Fill(_stale, true);
        Array.Fill(_resident, -1);
    }

    /// <summary>Shows each unit with its values, one after the other; they may be gone when the next one is shown.</summary>
    public void ForEach(Action<ParameterUnit> visit)
    {
        ArgumentNullException.ThrowIfNull(visit);
        for (int u = 0; u < _owned.Length; u++)
        {
            Gather(u, -1);
            visit(_owned[u].Unit);
        }
    }

    /// <summary>Announces a micro-batch.</summary>
    /// <param name="turn">Which of the rank's lanes it adds to.</param>
    /// <param name="endsLane">Whether it is the last of the lane.</param>
    public void BeginMicroBatch(int turn, bool endsLane) => (_turn, _endsLane) = (turn, endsLane);

    /// <inheritdoc/>
    public override void Gather(int unit, int next)
    {
        if (_sharding.ShardsWeights)
        {
            Send(unit);
            if (next >= 0)
            {
                Send(next);
            }

            int turn = TurnOf(unit);
            _gathered[unit].Wait();
            if (!_packed[turn])
            {
                _model.Pack(_model.Units[unit]);
                _packed[turn] = true;
            }
        }
        else if (_stale[unit])
        {
            _gathered[unit].Wait();
            _model.Pack(_model.Units[unit]);
            _stale[unit] = false;
        }
    }

    /// <inheritdoc/>
    public override void BeginGradient(int unit)
    {
        if (_sharding.ReducesEachMicroBatch)
        {
            _sent[TurnOf(unit)].Wait();
            _backend.Zero(_model.Units[unit].Gradient);
        }
    }

    /// <inheritdoc/>
    public override void EndGradient(int unit)
    {
        if (!_endsLane)
        {
            return;
        }

        if (_sharding.ReducesEachMicroBatch)
        {
            // What came of the turn before makes room for what comes of this one.
            if (_turn > 0)
            {
                _reduced[unit].Wait();
                Carry(unit, _owned[unit].Gradient, _turn - 1);
            }

            _sent[TurnOf(unit)] = _reduced[unit] = Reduce(unit);
            if (_turn == _sharding.LanesOfRank - 1)
            {
                // The unit before has had this one's backward to arrive.
                Complete(_incomplete);
                _incomplete = unit;
            }

            return;
        }

        Tensor gradient = _model.Units[unit].Gradient;
        Carry(unit, gradient, _turn);
        if (_turn == _sharding.LanesOfRank - 1)
        {
            _reduced[unit] = AllReduce(unit, Reduce(unit));
        }
        else
        {
            _backend.Zero(gradient);
        }
    }

    /// <summary>Waits until every gradient of <see cref="Owned"/> is whole, after the last micro-batch of a step.</summary>
    public void EndStep()
    {
        if (_sharding.ReducesEachMicroBatch)
        {
            Complete(_incomplete);
            _incomplete = -1;
        }

        for (int u = 0; u < _owned.Length; u++)
        {
            _reduced[u].Wait();
            if (!_sharding.ReducesEachMicroBatch)
            {
                ZeroOthers(_owned[u]);
            }
        }
    }

    /// <summary>Lets all ranks have what each has updated: starts to gather, or forgets what was gathered.</summary>
    public void Publish()
    {
        Array.Fill(_stale, true);
        Array.Fill(_resident, -1);
        if (!_sharding.ShardsWeights && _sharding.Shards > 1)
        {
            for (int u = 0; u < _owned.Length; u++)
            {
                _gathered[u] = _mesh!.Shard.AllGather(_owned[u].Unit.Values, _owned[u].Values);
            }
        }
    }

    private OwnedRows Own(ParameterUnit unit, Arena shards)
    {
        int rows = unit.Values.Rows / _sharding.Shards;
        int first = _shard * rows;
        return new OwnedRows(
            unit, first,
            _sharding.ShardsWeights ? shards.Take(rows, ParameterUnit.Columns) : unit.Values.RowRange(first, rows),
            _sharding.ReducesEachMicroBatch ? shards.Take(rows, ParameterUnit.Columns) : unit.Gradient.RowRange(first, rows));
    }

    private int TurnOf(int unit) => unit == 0 || unit > _model.Config.Layers ? 0 : 1 + ((unit - 1) % 2);

    // Starts to gather a unit's values in its turn's place, unless they are there or on their way.
    private void Send(int unit)
    {
        int turn = TurnOf(unit);
        if (_resident[turn] != unit)
        {
            (_resident[turn], _packed[turn]) = (unit, false);
            _gathered[unit] = _mesh!.Shard.AllGather(_model.Units[unit].Values, _owned[unit].Values);
        }
    }

    // Adds what a lane's neighbours left, or leaves its sum for them: the carries of a binary counter that counts lanes.
    private void Carry(int unit, Tensor sum, int turn)
    {
        int level = 0;
        for (; (turn >> level & 1) == 1; level++)
        {
            _backend.Add(sum, _slots[unit][level]);
        }

        if (turn < _sharding.LanesOfRank - 1)
        {
            _backend.Copy(_slots[unit][level], sum);
        }
    }

    // Starts to sum a unit's gradient over the ranks of a shard group into the rows that this one owns.
    private Ticket Reduce(int unit)
    {
        Tensor gradient = _model.Units[unit].Gradient;
        if (_sharding.Shards == 1)
        {
            if (_sharding.ReducesEachMicroBatch)
            {
                _backend.Copy(_owned[unit].Gradient, gradient);
            }

            return default;
        }

        Tensor scratch = _scratch.RowRange(0, gradient.Rows);
        if (_sharding.Wire == DType.F32)
        {
            return _mesh!.Shard.ReduceScatter(_owned[unit].Gradient, gradient, scratch);
        }

        int turn = _sends++ % _wire.Length;
        Tensor rounded = _wire[turn].RowRange(0, gradient.Rows);
        _wired[turn].Wait();
        _backend.Copy(rounded, gradient);
        return _wired[turn] = _mesh!.Shard.ReduceScatter(_owned[unit].Gradient, rounded, scratch with { Type = _sharding.Wire });
    }

    // Adds a unit's last turn to those before, once it is there, and starts to sum over the groups.
    private void Complete(int unit)
    {
        if (unit >= 0)
        {
            _reduced[unit].Wait();
            Carry(unit, _owned[unit].Gradient, _sharding.LanesOfRank - 1);
            _reduced[unit] = AllReduce(unit, default);
        }
    }

    // Starts to sum the owned rows over the groups, after what was started before.
    private Ticket AllReduce(int unit, Ticket before)
    {
        if (_sharding.Replicas == 1)
        {
            return before;
        }

        Tensor gradient = _owned[unit].Gradient;
        int rows = gradient.Rows / _sharding.Replicas;
        Tensor part = gradient.RowRange(_mesh!.Replica.Rank * rows, rows);
        _mesh.Replica.ReduceScatter(part, gradient, _scratch.RowRange(0, gradient.Rows));
        return _mesh.Replica.AllGather(gradient, part);
    }

    // The next step adds to zeros; the optimizer sees to the owned rows.
    private void ZeroOthers(OwnedRows owned)
    {
        int end = owned.FirstRow + owned.Gradient.Rows;
        _backend.Zero(owned.Unit.Gradient.RowRange(0, owned.FirstRow));
        _backend.Zero(owned.Unit.Gradient.RowRange(end, owned.Unit.Gradient.Rows - end));
    }
}
