using System.Buffers.Binary;
using System.Globalization;
using System.Text;
using TinyLlama.Data;

namespace TinyLlama.Checkpoints;

/// <summary>A dictionary of a pickle, in the order of its file.</summary>
internal sealed class PickledDictionary
{
    /// <summary>Gets the pairs; a key may be of any kind.</summary>
    public List<(object? Key, object? Value)> Pairs { get; } = [];
}

/// <summary>A storage that tensors of a pickle share.</summary>
/// <param name="Type">Its element type in the words of safetensors.</param>
/// <param name="Key">Its file's name beside the pickle.</param>
/// <param name="Count">Its elements.</param>
internal sealed record PickledStorage(string Type, string Key, long Count);

/// <summary>A tensor of a pickle; nothing about it has been checked.</summary>
/// <param name="Storage">Where its elements are.</param>
/// <param name="Offset">Its first element in the storage.</param>
/// <param name="Shape">Its dimensions.</param>
/// <param name="Strides">For each dimension the distance of neighbours, in elements.</param>
internal sealed record PickledTensor(PickledStorage Storage, long Offset, long[] Shape, long[] Strides);

/// <summary>
/// Reads a pickle as <c>torch.save</c> (protocol 2) and lit-gpt's <c>incremental_save</c> (protocol 5) write it: numbers,
/// texts, lists, dictionaries, tensors. Nothing is executed: of all that a pickle can name, only tensors, their storages and
/// <c>OrderedDict</c> are known.
/// </summary>
/// <remarks>
/// Operations are those of Python's <c>pickletools</c>, <c>_rebuild_tensor_v2</c> is that of <c>torch/_utils.py</c>. Each byte of
/// the file makes one small value at most.
/// </remarks>
internal ref struct TorchPickle
{
    private const byte LeastProtocol = 2;
    private const byte MostProtocol = 5;
    private const string OrderedDictionary = "collections.OrderedDict";
    private const string RebuildTensor = "torch._utils._rebuild_tensor_v2";

    private static readonly UTF8Encoding s_strictUtf8 = new(false, throwOnInvalidBytes: true);

    private readonly ReadOnlySpan<byte> _bytes;
    private readonly string _path;
    private readonly List<object?> _stack = [];
    private readonly Stack<int> _marks = [];
    private readonly Dictionary<uint, object?> _memo = [];
    private int _position;
    private int _operation;

    private TorchPickle(ReadOnlySpan<byte> bytes, string path)
    {
        _bytes = bytes;
        _path = path;
    }

    /// <summary>The value of a pickle.</summary>
    /// <returns>
    /// Null, a <see cref="bool"/>, <see cref="long"/>, <see cref="double"/> or <see cref="string"/>, a tuple as an array, a list, a
    /// <see cref="PickledDictionary"/>, a <see cref="PickledStorage"/> or a <see cref="PickledTensor"/>.
    /// </returns>
    /// <exception cref="UserErrorException">It is damaged, or names or does something else; the message says what and where.</exception>
    public static object? Read(ReadOnlySpan<byte> pickle, string path) => new TorchPickle(pickle, path).Read();

    private object? Read()
    {
        while (true)
        {
            _operation = _position;
            char code = (char)Byte();
            switch (code)
            {
                case '\x80':
                    RequireProtocol(Byte());
                    break;
                case '\x95':
                    // How much follows, which helps those who read from a stream.
                    _ = Take(8);
                    break;
                case '.':
                    object? value = Pop();
                    return _stack.Count == 0 && _marks.Count == 0 ? value : throw Error("ends with values left: damaged");
                case '(':
                    _marks.Push(_stack.Count);
                    break;
                case 'N':
                    Push(null);
                    break;
                case '\x88' or '\x89':
                    Push(code == '\x88');
                    break;
                case 'K':
                    Push((long)Byte());
                    break;
                case 'M':
                    Push((long)BinaryPrimitives.ReadUInt16LittleEndian(Take(2)));
                    break;
                case 'J':
                    Push((long)BinaryPrimitives.ReadInt32LittleEndian(Take(4)));
                    break;
                case '\x8a':
                    Push(Integer());
                    break;
                case 'G':
                    Push(BinaryPrimitives.ReadDoubleBigEndian(Take(8)));
                    break;
                case 'X':
                    Push(Text(UInt32()));
                    break;
                case '\x8c':
                    Push(Text(Byte()));
                    break;
                case 'q':
                    _memo[Byte()] = Top();
                    break;
                case 'r':
                    _memo[UInt32()] = Top();
                    break;
                case '\x94':
                    _memo[(uint)_memo.Count] = Top();
                    break;
                case 'h':
                    Push(Remembered(Byte()));
                    break;
                case 'j':
                    Push(Remembered(UInt32()));
                    break;
                case 'c':
                    Push(Global($"{Line()}.{Line()}"));
                    break;
                default:
                    Build(code);
                    break;
            }
        }
    }

    private readonly void RequireProtocol(byte protocol)
    {
        if (protocol is < LeastProtocol or > MostProtocol)
        {
            throw Error($"is of protocol {protocol}; {LeastProtocol} to {MostProtocol} are supported");
        }
    }

    // What is made of values that are there already.
    private readonly void Build(char code)
    {
        switch (code)
        {
            case ')':
                Push(Array.Empty<object?>());
                break;
            case '\x85' or '\x86' or '\x87':
                object?[] tuple = new object?[code - '\x84'];
                for (int i = tuple.Length - 1; i >= 0; i--)
                {
                    tuple[i] = Pop();
                }

                Push(tuple);
                break;
            case 't':
                Push(PopToMark());
                break;
            case ']':
                Push(new List<object?>());
                break;
            case 'a' or 'e':
                object?[] items = code == 'a' ? [Pop()] : PopToMark();
                Top<List<object?>>("a list").AddRange(items);
                break;
            case '}':
                Push(new PickledDictionary());
                break;
            case 's':
                object? element = Pop();
                object? key = Pop();
                Top<PickledDictionary>("a dictionary").Pairs.Add((key, element));
                break;
            case 'u':
                AddPairs(PopToMark());
                break;
            case 'b':
                // Attributes of an ordered dictionary, such as the versions of the modules that its tensors belong to.
                _ = Pop();
                _ = Top<PickledDictionary>("a dictionary");
                break;
            case '\x93':
                object? name = Pop();
                Push(Global($"{Pop() as string}.{name as string}"));
                break;
            case 'R':
                object? arguments = Pop();
                Push(Call(Pop(), arguments));
                break;
            case 'Q':
                Push(Storage(Pop()));
                break;
            default:
                throw Error($"has the operation 0x{(int)code:X2}, which torch.save never writes");
        }
    }

    private readonly void AddPairs(object?[] items)
    {
        PickledDictionary dictionary = Top<PickledDictionary>("a dictionary");
        if (items.Length % 2 != 0)
        {
            throw Error("sets a key without a value: damaged");
        }

        foreach (object?[] pair in items.Chunk(2))
        {
            dictionary.Pairs.Add((pair[0], pair[1]));
        }
    }

    private readonly object Call(object? function, object? arguments) => (function, arguments) switch
    {
        (Name { Text: OrderedDictionary }, object?[] and []) => new PickledDictionary(),
        (Name { Text: RebuildTensor }, object?[] and [PickledStorage storage, long offset, object?[] shape, object?[] strides, ..]) =>
            new PickledTensor(storage, offset, Integers(shape), Integers(strides)),
        _ => throw Error($"calls {(function as Name)?.Text ?? "what is no function"} with other arguments than torch.save does"),
    };

    private readonly long[] Integers(object?[] values) =>
        values.All(static value => value is long) ? [.. values.Select(static value => (long)value!)] : throw Error("has a shape that is no numbers: damaged");

    private readonly PickledStorage Storage(object? id) =>
        id is object?[] and ["storage", Name name, (string or long) and var key, string, long count] && StorageType(name.Text) is { } type
            ? new PickledStorage(type, Convert.ToString(key, CultureInfo.InvariantCulture)!, count)
            : throw Error("refers to something else than a storage");

    private readonly Name Global(string name) =>
        name is OrderedDictionary or RebuildTensor || StorageType(name) is not null
            ? new Name(name)
            : throw Error($"names {name}; a file of tensors names none but {OrderedDictionary}, {RebuildTensor} and storages of numbers");

    private static string? StorageType(string name) => name switch
    {
        "torch.FloatStorage" => "F32",
        "torch.BFloat16Storage" => "BF16",
        "torch.HalfStorage" => "F16",
        "torch.DoubleStorage" => "F64",
        "torch.LongStorage" => "I64",
        "torch.IntStorage" => "I32",
        "torch.ShortStorage" => "I16",
        "torch.CharStorage" => "I8",
        "torch.ByteStorage" => "U8",
        "torch.BoolStorage" => "BOOL",
        _ => null,
    };

    private readonly void Push(object? value) => _stack.Add(value);

    private readonly object? Top() => _stack.Count > Floor() ? _stack[^1] : throw Error("takes a value that is not there: damaged");

    private readonly T Top<T>(string what)
        where T : class =>
        Top() as T ?? throw Error($"adds to what is not {what}: damaged");

    private readonly object? Pop()
    {
        object? value = Top();
        _stack.RemoveAt(_stack.Count - 1);
        return value;
    }

    private readonly object?[] PopToMark()
    {
        if (!_marks.TryPop(out int first))
        {
            throw Error("takes values up to a mark that is not there: damaged");
        }

        object?[] values = new object?[_stack.Count - first];
        _stack.CopyTo(first, values, 0, values.Length);
        _stack.RemoveRange(first, values.Length);
        return values;
    }

    // Values below the last mark are out of reach.
    private readonly int Floor() => _marks.TryPeek(out int floor) ? floor : 0;

    private readonly object? Remembered(uint place) =>
        _memo.TryGetValue(place, out object? value) ? value : throw Error($"recalls value {place}, which it has not kept: damaged");

    private byte Byte() => Take(1)[0];

    private uint UInt32() => BinaryPrimitives.ReadUInt32LittleEndian(Take(4));

    private long Integer()
    {
        ReadOnlySpan<byte> digits = Take(Byte());
        if (digits.Length > sizeof(long))
        {
            throw Error($"has a number of {digits.Length} bytes, {sizeof(long)} are possible");
        }

        long value = digits.Length > 0 && digits[^1] >= 0x80 ? -1 : 0;
        for (int i = digits.Length - 1; i >= 0; i--)
        {
            value = (value << 8) | digits[i];
        }

        return value;
    }

    private string Text(long count)
    {
        try
        {
            return s_strictUtf8.GetString(Take(count));
        }
        catch (DecoderFallbackException e)
        {
            throw new UserErrorException(Error("has a text that is not sound UTF-8").Message, e);
        }
    }

    private string Line()
    {
        int count = _bytes[_position..].IndexOf((byte)'\n');
        string line = Text(count >= 0 ? count : long.MaxValue);
        _position++;
        return line;
    }

    private ReadOnlySpan<byte> Take(long count)
    {
        if (count > _bytes.Length - _position)
        {
            throw Error("goes on beyond the end: cut off or damaged");
        }

        _position += (int)count;
        return _bytes.Slice(_position - (int)count, (int)count);
    }

    private readonly UserErrorException Error(string what) => new($"{_path}: its pickle, at byte {_operation}, {what}");

    private sealed record Name(string Text);
}
