namespace TinyLlama.Inference;

/// <summary>All places in a grammar where a text may be. Its transitions are computed when they are first asked for.</summary>
internal sealed class ConstraintState
{
    internal ConstraintState(Place[] places, bool isComplete) => (Places, IsComplete) = (places, isComplete);

    /// <summary>Gets a value indicating whether the text so far is a whole one.</summary>
    public bool IsComplete { get; }

    /// <summary>Gets the state of a text that cannot become a whole one.</summary>
    public static ConstraintState Dead { get; } = new([], isComplete: false);

    /// <summary>Gets a value indicating whether no byte can follow.</summary>
    public bool IsFinal => Places.Length == 0;

    /// <summary>Gets or sets the tokens that may follow, a bit each; null while nobody has asked.</summary>
    public ulong[]? Mask { get; set; }

    internal Place[] Places { get; }

    /// <summary>Gets the states after each byte; null where that is not known yet.</summary>
    internal ConstraintState?[] Next { get; } = new ConstraintState?[256];

    /// <summary>A node, and where the calls around it return to.</summary>
    internal readonly record struct Place(int Node, Frame? Stack);

    /// <summary>A call: the node after it, and the call around it. Made once each, so that equal ones are the same.</summary>
    internal sealed class Frame(int returnTo, Frame? outer)
    {
        public int ReturnTo => returnTo;

        public Frame? Outer => outer;
    }
}

/// <summary>
/// A grammar that is followed byte by byte: the pushdown automaton made deterministic, a state at a time, as texts reach
/// them. States are kept, so that text that goes round in the same places costs a table look-up a byte.
/// </summary>
internal sealed class ConstraintAutomaton
{
    private const int MostStates = 4096;
    private const int MostPlaces = 1 << 20;

    private readonly JsonGrammar _grammar;
    private readonly Dictionary<(int ReturnTo, ConstraintState.Frame? Outer), ConstraintState.Frame> _frames = [];
    private readonly Dictionary<PlaceSet, ConstraintState> _states = [];
    private readonly List<ConstraintState.Place> _places = [];
    private readonly HashSet<ConstraintState.Place> _seen = [];
    private int _placeCount;

    public ConstraintAutomaton(JsonGrammar grammar, int root)
    {
        _grammar = grammar;
        Visit(new ConstraintState.Place(grammar.Start(root), null));
        Start = Close();
    }

    /// <summary>Gets the state before the first byte.</summary>
    public ConstraintState Start { get; }

    /// <summary>The state after one more byte; <see cref="ConstraintState.Dead"/> where it cannot follow.</summary>
    public ConstraintState Advance(ConstraintState state, byte next) => state.Next[next] ??= Find(state, next);

    private ConstraintState Find(ConstraintState state, byte next)
    {
        foreach ((int node, ConstraintState.Frame? stack) in state.Places)
        {
            foreach (JsonGrammar.Edge edge in _grammar.Edges(node))
            {
                if (edge.Kind == JsonGrammar.EdgeKind.Byte && edge.First <= next && next <= edge.Last)
                {
                    Visit(new ConstraintState.Place(edge.Target, stack));
                }
            }
        }

        return _places.Count == 0 ? ConstraintState.Dead : Close();
    }

    // Goes on from the places that were visited without reading a byte, as far as there is one to read.
    private ConstraintState Close()
    {
        var reading = new List<ConstraintState.Place>();
        bool complete = false;
        for (int i = 0; i < _places.Count; i++)
        {
            (int node, ConstraintState.Frame? stack) = _places[i];
            if (_grammar.IsEnd(node))
            {
                complete |= stack is null;
                if (stack is not null)
                {
                    Visit(new ConstraintState.Place(stack.ReturnTo, stack.Outer));
                }
            }

            bool reads = false;
            foreach (JsonGrammar.Edge edge in _grammar.Edges(node))
            {
                reads |= edge.Kind == JsonGrammar.EdgeKind.Byte;
                if (edge.Kind == JsonGrammar.EdgeKind.Nothing)
                {
                    Visit(new ConstraintState.Place(edge.Target, stack));
                }
                else if (edge.Kind == JsonGrammar.EdgeKind.Call)
                {
                    Visit(new ConstraintState.Place(_grammar.Start(edge.Rule), Enter(edge.Target, stack)));
                }
            }

            if (reads)
            {
                reading.Add(_places[i]);
            }
        }

        _places.Clear();
        _seen.Clear();
        return State(new PlaceSet([.. reading], complete));
    }

    private void Visit(ConstraintState.Place place)
    {
        if (_seen.Add(place))
        {
            _places.Add(place);
        }
    }

    private ConstraintState.Frame Enter(int returnTo, ConstraintState.Frame? outer)
    {
        if (!_frames.TryGetValue((returnTo, outer), out ConstraintState.Frame? frame))
        {
            frame = new ConstraintState.Frame(returnTo, outer);
            _frames.Add((returnTo, outer), frame);
        }

        return frame;
    }

    private ConstraintState State(PlaceSet set)
    {
        if (!_states.TryGetValue(set, out ConstraintState? state))
        {
            if (_states.Count == MostStates || _placeCount > MostPlaces)
            {
                // Those in use live on with their texts; the others, which only the start leads to, are computed again when they are reached again.
                _states.Clear();
                _frames.Clear();
                _placeCount = 0;
                Array.Clear(Start.Next);
            }

            state = new ConstraintState(set.Places, set.IsComplete);
            _states.Add(set, state);
            _placeCount += set.Places.Length;
        }

        return state;
    }

    private readonly record struct PlaceSet(ConstraintState.Place[] Places, bool IsComplete)
    {
        public bool Equals(PlaceSet other) => IsComplete == other.IsComplete && Places.AsSpan().SequenceEqual(other.Places);

        public override int GetHashCode()
        {
            var hash = default(HashCode);
            foreach (ConstraintState.Place place in Places)
            {
                hash.Add(place);
            }

            return hash.ToHashCode();
        }
    }
}
