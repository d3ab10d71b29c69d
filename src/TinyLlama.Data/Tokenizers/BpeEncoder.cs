namespace TinyLlama.Data.Tokenizers;

/// <summary>
/// Encodes normalized text; one thread at a time. The text is cut where no merge can join, each stretch is looked up in a
/// cache, and what is not there is merged with a priority queue: O(n log n) for a stretch of n characters.
/// </summary>
internal sealed class BpeEncoder(BpeTables tables, SymbolMatcher symbols)
{
    private const int LargestKeptCapacity = 1 << 20;
    private readonly StretchCache _cache = new();
    private int[] _symbol = [];
    private int[] _start = [];
    private int[] _next = [];
    private int[] _previous = [];
    private int[] _rank = [];
    private int[] _result = [];
    private ulong[] _queue = [];
    private int _queueCount;

    /// <summary>Gets how many entries have gone into the priority queue, for tests of the cost.</summary>
    public long QueuedCount { get; private set; }

    /// <summary>Gets whether the working memory is small enough to keep for the next text.</summary>
    public bool IsWorthKeeping => _symbol.Length <= LargestKeptCapacity;

    /// <summary>The length in bytes that a character's first byte announces; for a byte that cannot be first, 1.</summary>
    public static int CharacterLength(byte first) => first < 0xC0 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;

    /// <summary>Appends the ids of a text.</summary>
    /// <param name="buffer">The normalized text, and at least <see cref="StretchCache.KeyBytes"/> bytes more.</param>
    /// <param name="length">The length of the text in bytes.</param>
    /// <param name="tokens">Where ids are appended.</param>
    public void Encode(ReadOnlySpan<byte> buffer, int length, List<int> tokens)
    {
        bool hasSymbols = symbols.Any;
        int start = 0;
        int position = 0;
        while (position < length)
        {
            if (hasSymbols)
            {
                int matched = symbols.Match(buffer[position..length], out int id);
                if (matched > 0)
                {
                    EncodeStretch(buffer[start..], position - start, tokens);
                    tokens.Add(id);
                    position += matched;
                    start = position;
                    continue;
                }
            }

            position = Math.Min(length, position + CharacterLength(buffer[position]));
            if (position < length && tables.CanCut(buffer[position - 1], buffer[position]))
            {
                EncodeStretch(buffer[start..], position - start, tokens);
                start = position;
            }
        }

        EncodeStretch(buffer[start..], length - start, tokens);
    }

    private void EncodeStretch(ReadOnlySpan<byte> buffer, int length, List<int> tokens)
    {
        if (length == 0)
        {
            return;
        }

        if (length > StretchCache.KeyBytes)
        {
            Merge(buffer[..length], tokens);
            return;
        }

        if (!_cache.TryAppend(buffer, length, tokens))
        {
            int before = tokens.Count;
            Merge(buffer[..length], tokens);
            _cache.Remember(buffer, length, tokens, before);
        }
    }

    private void Merge(ReadOnlySpan<byte> text, List<int> tokens)
    {
        int count = Split(text);
        for (int i = 0; i + 1 < count; i++)
        {
            _rank[i] = tables.Merges.Find(_symbol[i], _symbol[i + 1], out _result[i]);
            if (_rank[i] != MergeTable.NoMerge)
            {
                _queue[_queueCount++] = Entry(_rank[i], i);
            }
        }

        _rank[count - 1] = MergeTable.NoMerge;
        QueuedCount += _queueCount;
        Heapify();
        while (_queueCount > 0)
        {
            ulong entry = Pop();
            int left = (int)(uint)entry;
            if (_rank[left] != (int)(entry >> 32))
            {
                // The pair that this entry was for has changed since.
                continue;
            }

            int right = _next[left];
            int after = _next[right];
            _symbol[left] = _result[left];
            _next[left] = after;
            _rank[right] = MergeTable.NoMerge;
            _rank[left] = MergeTable.NoMerge;
            if (after >= 0)
            {
                _previous[after] = left;
                Consider(left, after);
            }

            if (_previous[left] >= 0)
            {
                Consider(_previous[left], left);
            }
        }

        Emit(text, tokens);
    }

    /// <summary>Fills the list of symbols with the text's characters; returns their number.</summary>
    private int Split(ReadOnlySpan<byte> text)
    {
        if (_symbol.Length < text.Length)
        {
            Grow(text.Length);
        }

        int count = 0;
        for (int position = 0; position < text.Length; count++)
        {
            int length = Math.Min(CharacterLength(text[position]), text.Length - position);
            _symbol[count] = tables.SymbolOf(text.Slice(position, length));
            _start[count] = position;
            _previous[count] = count - 1;
            _next[count] = count + 1;
            position += length;
        }

        _next[count - 1] = -1;
        return count;
    }

    private void Grow(int capacity)
    {
        capacity = Math.Max(64, capacity > LargestKeptCapacity ? capacity : capacity * 2);
        _symbol = new int[capacity];
        _start = new int[capacity];
        _next = new int[capacity];
        _previous = new int[capacity];
        _rank = new int[capacity];
        _result = new int[capacity];
        _queue = new ulong[capacity];
    }

    private void Consider(int left, int right)
    {
        int rank = tables.Merges.Find(_symbol[left], _symbol[right], out _result[left]);
        _rank[left] = rank;
        if (rank != MergeTable.NoMerge)
        {
            Push(Entry(rank, left));
        }
    }

    private void Emit(ReadOnlySpan<byte> text, List<int> tokens)
    {
        for (int i = 0; i >= 0; i = _next[i])
        {
            int symbol = _symbol[i];
            if ((uint)symbol < (uint)tables.VocabularySize)
            {
                tokens.Add(symbol);
                continue;
            }

            int end = _next[i] >= 0 ? _start[_next[i]] : text.Length;
            ReadOnlySpan<byte> character = text[_start[i]..end];
            if (tables.ByteIds is { } byteIds)
            {
                character = tables.EscapesSpace && character[0] == ' ' ? "\u2581"u8 : character;
                foreach (byte value in character)
                {
                    tokens.Add(byteIds[value]);
                }
            }
            else
            {
                tokens.Add(tables.UnknownId);
            }
        }
    }

    private static ulong Entry(int rank, int left) => ((ulong)(uint)rank << 32) | (uint)left;

    private void Push(ulong entry)
    {
        if (_queueCount == _queue.Length)
        {
            Array.Resize(ref _queue, _queue.Length * 2);
        }

        QueuedCount++;
        int child = _queueCount++;
        while (child > 0)
        {
            int parent = (child - 1) / 2;
            if (_queue[parent] <= entry)
            {
                break;
            }

            _queue[child] = _queue[parent];
            child = parent;
        }

        _queue[child] = entry;
    }

    private ulong Pop()
    {
        ulong least = _queue[0];
        ulong last = _queue[--_queueCount];
        if (_queueCount > 0)
        {
            SiftDown(0, last);
        }

        return least;
    }

    private void Heapify()
    {
        for (int i = (_queueCount / 2) - 1; i >= 0; i--)
        {
            SiftDown(i, _queue[i]);
        }
    }

    private void SiftDown(int parent, ulong entry)
    {
        while (true)
        {
            int child = (2 * parent) + 1;
            if (child >= _queueCount)
            {
                break;
            }

            if (child + 1 < _queueCount && _queue[child + 1] < _queue[child])
            {
                child++;
            }

            if (_queue[child] >= entry)
            {
                break;
            }

            _queue[parent] = _queue[child];
            parent = child;
        }

        _queue[parent] = entry;
    }
}
