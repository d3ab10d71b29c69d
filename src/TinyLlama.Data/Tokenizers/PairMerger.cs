using System.Runtime.InteropServices;
using System.Text;

namespace TinyLlama.Data.Tokenizers;

/// <summary>
/// Merges the most frequent pair of neighbours in a set of weighted chunks, again and again. A merge visits only the places
/// where its pair occurs, and changes only the counts of the pairs beside them.
/// </summary>
/// <remarks>
/// A text between two ends of symbols has been merged as if it stood alone, so equal texts consist of equal symbols: no two
/// pairs make the same piece.
/// </remarks>
internal sealed class PairMerger
{
    /// <summary>Between chunks, and in place of characters without a piece.</summary>
    private const int Separator = -1;

    /// <summary>
    /// Where a symbol began that is now part of a longer one. The last place of a symbol of n characters, n above 1, holds
    /// -n, so that the symbol before a place can be found.
    /// </summary>
    private const int Gone = int.MinValue;

    private const int None = -1;
    private readonly int _maximumCharacters;
    private readonly List<Symbol> _symbols = [];
    private readonly Dictionary<ulong, int> _pairs = [];
    private readonly List<int> _touched = [];
    private readonly int[] _places;
    private readonly int[] _chunkOfPlace;
    private readonly long[] _weights;
    private Pair[] _pair = new Pair[1 << 12];
    private int _pairCount;
    private Node[] _nodes = new Node[1 << 14];
    private int _nodeCount;
    private int _freeNode = None;
    private HeapEntry[] _heap = new HeapEntry[1 << 12];
    private int _heapCount;
    private int _step;

    /// <param name="chunks">The chunks with their weights.</param>
    /// <param name="alphabet">The characters that may be in pieces.</param>
    /// <param name="maximumCharacters">The most characters that a piece may have.</param>
    public PairMerger(ChunkCounter chunks, List<(Rune Character, long Count)> alphabet, int maximumCharacters)
    {
        _maximumCharacters = maximumCharacters;
        var symbolOf = new Dictionary<Rune, int>();
        foreach ((Rune rune, _) in alphabet)
        {
            symbolOf.Add(rune, AddSymbol(Encoding.UTF8.GetBytes(rune.ToString()), 1));
        }

        int placeCount = 1;
        for (int i = 0; i < chunks.Count; i++)
        {
            placeCount += CharacterCount(chunks.Text(i)) + 1;
        }

        _places = new int[placeCount];
        _chunkOfPlace = new int[placeCount];
        _weights = new long[chunks.Count];
        int place = 0;
        _places[place++] = Separator;
        for (int i = 0; i < chunks.Count; i++)
        {
            _weights[i] = chunks.Occurrences(i);
            ReadOnlySpan<byte> text = chunks.Text(i);
            while (!text.IsEmpty)
            {
                Rune.DecodeFromUtf8(text, out Rune rune, out int length);
                text = text[length..];
                _places[place] = symbolOf.GetValueOrDefault(rune, Separator);
                _chunkOfPlace[place] = i;
                if (_places[place - 1] != Separator && _places[place] != Separator)
                {
                    Increase(_places[place - 1], _places[place], _weights[i], place - 1);
                }

                place++;
            }

            _places[place++] = Separator;
        }

        PushTouched();
    }

    /// <summary>Merges the most frequent pair; returns the new piece, or null where no two neighbours may merge.</summary>
    public string? Next()
    {
        while (_heapCount > 0)
        {
            HeapEntry top = Pop();
            long count = _pair[top.Pair].Count;
            if (count != top.Count)
            {
                if (count > 0 && count < top.Count)
                {
                    Push(new HeapEntry(count, top.Pair));
                }

                continue;
            }

            int left = _pair[top.Pair].Left;
            int right = _pair[top.Pair].Right;
            byte[] text = [.. _symbols[left].Text, .. _symbols[right].Text];
            int merged = AddSymbol(text, _symbols[left].Characters + _symbols[right].Characters);
            Merge(top.Pair, merged);
            PushTouched();
            return Encoding.UTF8.GetString(text);
        }

        return null;
    }

    private void Merge(int pair, int merged)
    {
        int left = _pair[pair].Left;
        int right = _pair[pair].Right;
        int leftLength = _symbols[left].Characters;
        int rightLength = _symbols[right].Characters;
        int node = _pair[pair].FirstNode;
        int lastNode = _pair[pair].LastNode;
        int firstNode = node;
        _pairs.Remove(Key(left, right));
        _pair[pair].Count = 0;
        _pair[pair].FirstNode = None;
        _step++;
        for (; node != None; node = _nodes[node].Next)
        {
            int place = _nodes[node].Place;
            int rightPlace = place + leftLength;
            if (_places[place] != left || _places[rightPlace] != right)
            {
                // One of the two has become part of another symbol since.
                continue;
            }

            long weight = _weights[_chunkOfPlace[place]];
            int tag = _places[place - 1];
            int before = tag >= 0 ? place - 1 : tag == Separator ? None : place + tag;
            int after = rightPlace + rightLength;
            if (before != None)
            {
                Decrease(_places[before], left, weight);
            }

            if (_places[after] >= 0)
            {
                Decrease(right, _places[after], weight);
            }

            _places[rightPlace] = Gone;
            _places[place] = merged;
            _places[after - 1] = -(leftLength + rightLength);
            if (before != None)
            {
                Increase(_places[before], merged, weight, before);
            }

            if (_places[after] >= 0)
            {
                Increase(merged, _places[after], weight, place);
            }
        }

        if (firstNode != None)
        {
            _nodes[lastNode].Next = _freeNode;
            _freeNode = firstNode;
        }
    }

    private void Increase(int left, int right, long weight, int place)
    {
        ref int index = ref CollectionsMarshal.GetValueRefOrAddDefault(_pairs, Key(left, right), out bool exists);
        if (!exists)
        {
            bool isTooLong = _symbols[left].Characters + _symbols[right].Characters > _maximumCharacters;
            index = isTooLong ? None : AddPair(left, right);
        }

        if (index == None)
        {
            return;
        }

        ref Pair pair = ref _pair[index];
        pair.Count += weight;
        int node = NewNode(place);
        if (pair.FirstNode == None)
        {
            pair.FirstNode = node;
        }
        else
        {
            _nodes[pair.LastNode].Next = node;
        }

        pair.LastNode = node;
        if (pair.TouchedIn != _step)
        {
            pair.TouchedIn = _step;
            _touched.Add(index);
        }
    }

    private void Decrease(int left, int right, long weight)
    {
        if (_pairs.TryGetValue(Key(left, right), out int index) && index != None)
        {
            _pair[index].Count -= weight;
        }
    }

    private int AddPair(int left, int right)
    {
        if (_pairCount == _pair.Length)
        {
            Array.Resize(ref _pair, _pairCount * 2);
        }

        _pair[_pairCount] = new Pair
        {
            Left = left,
            Right = right,
            FirstNode = None,
            LastNode = None,
            TouchedIn = -1,
        };
        return _pairCount++;
    }

    private int NewNode(int place)
    {
        int node = _freeNode;
        if (node != None)
        {
            _freeNode = _nodes[node].Next;
        }
        else
        {
            if (_nodeCount == _nodes.Length)
            {
                Array.Resize(ref _nodes, _nodeCount * 2);
            }

            node = _nodeCount++;
        }

        _nodes[node] = new Node { Place = place, Next = None };
        return node;
    }

    private int AddSymbol(byte[] text, int characters)
    {
        _symbols.Add(new Symbol(text, characters));
        return _symbols.Count - 1;
    }

    private static int CharacterCount(ReadOnlySpan<byte> text)
    {
        int count = 0;
        foreach (byte value in text)
        {
            count += (value & 0xC0) != 0x80 ? 1 : 0;
        }

        return count;
    }

    private static ulong Key(int left, int right) => ((ulong)(uint)left << 32) | (uint)right;

    /// <summary>The order of bytes of a pair's text and of another's.</summary>
    private static int Compare(Symbol left, Symbol right, Symbol otherLeft, Symbol otherRight)
    {
        int length = left.Text.Length + right.Text.Length;
        int otherLength = otherLeft.Text.Length + otherRight.Text.Length;
        for (int i = 0; i < length && i < otherLength; i++)
        {
            byte a = i < left.Text.Length ? left.Text[i] : right.Text[i - left.Text.Length];
            byte b = i < otherLeft.Text.Length ? otherLeft.Text[i] : otherRight.Text[i - otherLeft.Text.Length];
            if (a != b)
            {
                return a - b;
            }
        }

        return length - otherLength;
    }

    private bool IsBefore(HeapEntry entry, HeapEntry other)
    {
        if (entry.Count != other.Count)
        {
            return entry.Count > other.Count;
        }

        Symbol left = _symbols[_pair[entry.Pair].Left];
        Symbol right = _symbols[_pair[entry.Pair].Right];
        Symbol otherLeft = _symbols[_pair[other.Pair].Left];
        Symbol otherRight = _symbols[_pair[other.Pair].Right];
        int difference = left.Characters + right.Characters - otherLeft.Characters - otherRight.Characters;
        return difference != 0 ? difference < 0 : Compare(left, right, otherLeft, otherRight) < 0;
    }

    private void PushTouched()
    {
        foreach (int pair in _touched)
        {
            if (_pair[pair].Count > 0)
            {
                Push(new HeapEntry(_pair[pair].Count, pair));
            }
        }

        _touched.Clear();
    }

    private void Push(HeapEntry entry)
    {
        if (_heapCount == _heap.Length)
        {
            Array.Resize(ref _heap, _heapCount * 2);
        }

        int child = _heapCount++;
        while (child > 0)
        {
            int parent = (child - 1) / 2;
            if (!IsBefore(entry, _heap[parent]))
            {
                break;
            }

            _heap[child] = _heap[parent];
            child = parent;
        }

        _heap[child] = entry;
    }

    private HeapEntry Pop()
    {
        HeapEntry top = _heap[0];
        HeapEntry last = _heap[--_heapCount];
        int parent = 0;
        while (true)
        {
            int child = (2 * parent) + 1;
            if (child >= _heapCount)
            {
                break;
            }

            if (child + 1 < _heapCount && IsBefore(_heap[child + 1], _heap[child]))
            {
                child++;
            }

            if (!IsBefore(_heap[child], last))
            {
                break;
            }

            _heap[parent] = _heap[child];
            parent = child;
        }

        _heap[parent] = last;
        return top;
    }

    private sealed record Symbol(byte[] Text, int Characters);

    private readonly record struct HeapEntry(long Count, int Pair);

    private struct Node
    {
        public int Place;
        public int Next;
    }

    private struct Pair
    {
        public int Left;
        public int Right;
        public int FirstNode;
        public int LastNode;
        public int TouchedIn;
        public long Count;
    }
}
