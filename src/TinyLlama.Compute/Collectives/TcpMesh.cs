using System.Diagnostics;
using System.Net.Sockets;
using System.Runtime.InteropServices;
using System.Text;

namespace TinyLlama.Compute.Collectives;

/// <summary>What a message on a socket belongs to. Ranks that call the same operations in the same order expect what they get.</summary>
internal enum TcpOperation
{
    AllGather,
    AllToAll,
    Broadcast,
    Send,

    /// <summary>The rank leaves, having done everything.</summary>
    End,

    /// <summary>The rank has failed; the bytes say why.</summary>
    Failure,
}

/// <summary>What precedes the bytes of a message; both ends are little-endian.</summary>
/// <param name="Group">The group that calls.</param>
/// <param name="Operation">What it calls.</param>
/// <param name="Sequence">Its operations before this one.</param>
/// <param name="Bytes">Bytes that follow.</param>
internal readonly record struct TcpHeader(int Group, TcpOperation Operation, long Sequence, long Bytes)
{
    /// <inheritdoc/>
    public override string ToString()
    {
        string name = Operation switch
        {
            TcpOperation.AllGather => "all-gather",
            TcpOperation.AllToAll => "all-to-all",
            TcpOperation.Broadcast => "broadcast",
            TcpOperation.Send => "send",
            TcpOperation.End => "end",
            TcpOperation.Failure => "failure",
            _ => $"unknown operation {(int)Operation}",
        };
        return $"{name} of {Bytes} bytes (number {Sequence} of group {Group})";
    }
}

/// <summary>A socket to every other rank, and the exchange of messages on them by one thread.</summary>
/// <remarks>
/// Sockets do not block: a rank sends and receives at once, so that no order or size of messages can lock two ranks. While
/// it waits it watches all sockets: the death of any rank is seen at once by all that wait for whomever.
/// </remarks>
internal sealed unsafe class TcpMesh : IDisposable
{
    // The header and small values leave in one packet.
    private const int FirstBytes = 4096;
    private const int MostBytesPerCall = 256 << 10;
    private const int NearBufferBytes = 1 << 20;
    private const int MostTextBytes = 1024;
    private const int SliceMilliseconds = 250;

    private readonly Socket?[] _sockets;
    private readonly string[] _hosts;
    private readonly TimeSpan _timeout;
    private readonly List<Socket> _readable;
    private readonly List<Socket> _writable;
    private readonly bool[] _heard;
    private readonly byte* _first = (byte*)NativeMemory.Alloc(FirstBytes);
    private int _halfSent = -1;
    private int _halfReceived = -1;
    private long _unread;
    private volatile string? _reason;
    private CollectiveException? _failure;
    private bool _disposed;

    /// <summary>Takes sockets that the ranks have opened to each other.</summary>
    /// <param name="rank">This rank.</param>
    /// <param name="sockets">One for each rank but this.</param>
    /// <param name="hosts">The name of each rank's host.</param>
    /// <param name="timeout">For how long no byte may move while one is waited for.</param>
    public TcpMesh(int rank, Socket?[] sockets, string[] hosts, TimeSpan timeout)
    {
        (Rank, _sockets, _hosts, _timeout) = (rank, sockets, hosts, timeout);
        (_readable, _writable, _heard) = (new(sockets.Length), new(1), new bool[sockets.Length]);
        foreach (Socket? socket in sockets)
        {
            if (socket is not null)
            {
                socket.Blocking = false;
                if (socket.AddressFamily == AddressFamily.Unix)
                {
                    socket.SendBufferSize = NearBufferBytes;
                }
                else
                {
                    // Buffers of TCP grow by themselves, and no longer when they are set.
                    socket.NoDelay = true;
                    socket.SetSocketOption(SocketOptionLevel.Socket, SocketOptionName.KeepAlive, true);
                    socket.SetSocketOption(SocketOptionLevel.Tcp, SocketOptionName.TcpKeepAliveTime, 10);
                    socket.SetSocketOption(SocketOptionLevel.Tcp, SocketOptionName.TcpKeepAliveInterval, 5);
                    socket.SetSocketOption(SocketOptionLevel.Tcp, SocketOptionName.TcpKeepAliveRetryCount, 3);
                }
            }
        }
    }

    /// <summary>Gets the number of this rank.</summary>
    public int Rank { get; }

    /// <summary>Gets the name of each rank's host.</summary>
    public IReadOnlyList<string> Hosts => _hosts;

    /// <summary>Gets the number of the next group; ranks agree on it when they split.</summary>
    public int NextGroup { get; set; } = 1;

    /// <summary>Sends a message to one rank while receiving the same kind of message of another, or does one of both.</summary>
    /// <param name="header">What both messages are.</param>
    /// <param name="to">The rank that gets the source; -1 for none.</param>
    /// <param name="source">The bytes to send.</param>
    /// <param name="from">The rank that fills the destination; -1 for none.</param>
    /// <param name="destination">Receives as many bytes.</param>
    /// <param name="origin">The rank that these were of at first, if the other one passes them on.</param>
    /// <exception cref="CollectiveException">A rank ended, sent nothing for too long, or called something else.</exception>
    public void Exchange(in TcpHeader header, int to, byte* source, int from, byte* destination, int? origin = null)
    {
        if (_failure is not null)
        {
            throw new CollectiveException(_failure.Message, _failure);
        }

        long length = sizeof(TcpHeader) + header.Bytes;
        long toSend = to < 0 ? 0 : length;
        long toReceive = from < 0 ? 0 : length;
        long copied = Math.Min(toSend, FirstBytes) - sizeof(TcpHeader);
        if (copied >= 0)
        {
            MemoryMarshal.Write(new Span<byte>(_first, sizeof(TcpHeader)), header);
            Buffer.MemoryCopy(source, _first + sizeof(TcpHeader), copied, copied);
        }

        Array.Clear(_heard);
        TcpHeader incoming;
        long sent = 0;
        long received = 0;
        long moved = Stopwatch.GetTimestamp();
        while (sent < toSend || received < toReceive)
        {
            long before = sent + received;
            if (sent < toSend)
            {
                bool first = sent < FirstBytes;
                sent += Send(to, first ? _first + sent : source + sent - sizeof(TcpHeader), (first ? Math.Min(toSend, FirstBytes) : toSend) - sent, header);
                _halfSent = sent > 0 && sent < toSend ? to : -1;
            }

            if (received < toReceive)
            {
                received += received < sizeof(TcpHeader)
                    ? ReceiveHeader(from, &incoming, (int)received, header)
                    : Receive(from, destination + received - sizeof(TcpHeader), toReceive - received, header);
                (_halfReceived, _unread) = (from, toReceive - received);
            }

            if (sent + received > before)
            {
                moved = Stopwatch.GetTimestamp();
            }
            else
            {
                Wait(header, sent < toSend ? to : -1, received < toReceive ? from : -1, origin ?? from, moved);
            }
        }
    }

    /// <summary>Lets the operation that runs and all later ones fail, here and on the other ranks. Any thread may call it.</summary>
    /// <param name="reason">One line.</param>
    public void Abort(string reason) => _reason ??= reason;

    /// <summary>Closes the sockets, telling the others why.</summary>
    public void Dispose()
    {
        if (_disposed)
        {
            return;
        }

        _disposed = true;
        if (_reason is not null)
        {
            _ = Fail($"{Name(Rank)}: {_reason}");
        }
        else if (_failure is null)
        {
            Tell(new TcpHeader(0, TcpOperation.End, 0, 0), []);
        }

        foreach (Socket? socket in _sockets)
        {
            socket?.Dispose();
        }

        NativeMemory.Free(_first);
    }

    /// <summary>A rank, for people.</summary>
    public string Name(int rank) => $"rank {rank} ({_hosts[rank]})";

    private int Send(int to, byte* bytes, long count, in TcpHeader header)
    {
        int sent = _sockets[to]!.Send(new ReadOnlySpan<byte>(bytes, (int)Math.Min(count, MostBytesPerCall)), SocketFlags.None, out SocketError error);
        return error switch
        {
            SocketError.Success => sent,
            SocketError.WouldBlock => 0,
            _ => throw Lost(to, error, header),
        };
    }

    private int Receive(int from, byte* bytes, long count, in TcpHeader header)
    {
        int received = _sockets[from]!.Receive(new Span<byte>(bytes, (int)Math.Min(count, MostBytesPerCall)), SocketFlags.None, out SocketError error);
        return error switch
        {
            SocketError.Success when received > 0 => received,
            SocketError.WouldBlock => 0,
            _ => throw Lost(from, error, header),
        };
    }

    // The header's next bytes; the last one shows whether the other rank does what this one does.
    private int ReceiveHeader(int from, TcpHeader* incoming, int have, in TcpHeader expected)
    {
        int received = Receive(from, (byte*)incoming + have, sizeof(TcpHeader) - have, expected);
        if (have + received == sizeof(TcpHeader) && *incoming != expected)
        {
            throw LastWord(from, *incoming, expected)
                ?? Fail($"the ranks are out of step: {Name(from)} called {*incoming}, {Name(Rank)} called {expected}");
        }

        return received;
    }

    // Sleeps until bytes can move, or something has happened to any rank.
    private void Wait(in TcpHeader header, int to, int from, int origin, long moved)
    {
        _readable.Clear();
        _writable.Clear();
        for (int i = 0; i < _sockets.Length; i++)
        {
            if (_sockets[i] is Socket socket && (i == from || !_heard[i]))
            {
                _readable.Add(socket);
            }
        }

        if (to >= 0)
        {
            _writable.Add(_sockets[to]!);
        }

        Socket.Select(_readable, _writable, null, SliceMilliseconds * 1000);
        foreach (Socket socket in _readable)
        {
            int peer = Array.IndexOf(_sockets, socket);
            if (peer != from)
            {
                Listen(peer, header);
            }
        }

        if (_reason is not null)
        {
            throw Fail($"{Name(Rank)}: {_reason}");
        }

        if (_readable.Count + _writable.Count == 0)
        {
            int awaited = from >= 0 ? origin : to;
            if (Stopwatch.GetElapsedTime(moved) > _timeout)
            {
                throw Fail($"{Name(awaited)} did not come to {header} of {Name(Rank)} within {_timeout.TotalSeconds:0} s");
            }

            RequireLink(to, header);
            RequireLink(from, header);
        }
    }

    // A rank that nothing is expected of now has sent something, for later or as its last word, or is gone.
    private void Listen(int peer, in TcpHeader header)
    {
        _heard[peer] = true;
        int received = Peek(peer, out TcpHeader next, out SocketError error);
        if (received == 0 || error != SocketError.Success || (received == sizeof(TcpHeader) && next.Operation == TcpOperation.Failure))
        {
            throw Lost(peer, error, header);
        }
    }

    private int Peek(int peer, out TcpHeader next, out SocketError error)
    {
        TcpHeader header = default;
        int received = _sockets[peer]!.Receive(new Span<byte>(&header, sizeof(TcpHeader)), SocketFlags.Peek, out error);
        next = header;
        return received;
    }

    // Linux says how often it has sent the same bytes in vain: the 7th time is after about 25 s on a local network. It
    // would try for a quarter of an hour. A rank that is only busy acknowledges what it does not read.
    private void RequireLink(int peer, in TcpHeader header)
    {
        const int TcpLevel = 6;
        const int TcpInformation = 11;
        const int MostAttempts = 7;
        if (peer >= 0 && OperatingSystem.IsLinux())
        {
            // Bytes 2 and 3 of tcp_info: retransmissions and probes without an answer.
            Span<byte> information = stackalloc byte[8];
            if (_sockets[peer]!.AddressFamily != AddressFamily.Unix
                && _sockets[peer]!.GetRawSocketOption(TcpLevel, TcpInformation, information) >= 4
                && information[2] + information[3] >= MostAttempts)
            {
                throw Fail($"{Name(peer)} cannot be reached any more: {header} of {Name(Rank)} is not acknowledged");
            }
        }
    }

    // No more can come from a rank but what it said before.
    private CollectiveException Lost(int peer, SocketError error, in TcpHeader header)
    {
        TcpHeader next = default;
        for (long skipped = _halfReceived == peer ? _unread : 0; Read(peer, null, skipped) && Read(peer, (byte*)&next, sizeof(TcpHeader)); skipped = next.Bytes)
        {
            if (LastWord(peer, next, header) is CollectiveException told)
            {
                return told;
            }
        }

        string cause = error == SocketError.Success ? "its connection was closed" : new SocketException((int)error).Message;
        return Fail($"{Name(peer)} is gone ({cause}) while {Name(Rank)} was in {header}");
    }

    // Bytes that are here already; without a destination they are dropped.
    private bool Read(int peer, byte* destination, long count)
    {
        Span<byte> dropped = stackalloc byte[FirstBytes];
        long read = 0;
        while (read < count)
        {
            Span<byte> next = destination is null ? dropped[..(int)Math.Min(FirstBytes, count - read)] : new Span<byte>(destination + read, (int)(count - read));
            int received = _sockets[peer]!.Receive(next, SocketFlags.None, out SocketError error);
            if (received == 0 || error != SocketError.Success)
            {
                return false;
            }

            read += received;
        }

        return true;
    }

    // What a rank says when it leaves; a reason comes in one packet with its header.
    private CollectiveException? LastWord(int peer, in TcpHeader last, in TcpHeader header)
    {
        if (last.Operation == TcpOperation.End)
        {
            return Fail($"{Name(peer)} left before {header} of {Name(Rank)}");
        }

        if (last.Operation != TcpOperation.Failure)
        {
            return null;
        }

        Span<byte> text = stackalloc byte[MostTextBytes];
        int received = _sockets[peer]!.Receive(text[..(int)Math.Clamp(last.Bytes, 0, MostTextBytes)], SocketFlags.None, out _);
        return Fail(received > 0 ? Encoding.UTF8.GetString(text[..received]) : $"{Name(peer)} has failed");
    }

    // The first failure is the one that counts; the other ranks are told it, so that all name the same culprit.
    private CollectiveException Fail(string message)
    {
        if (_failure is null)
        {
            _failure = new CollectiveException(message);
            byte[] text = Encoding.UTF8.GetBytes(message);
            text = text[..Math.Min(text.Length, MostTextBytes)];
            Tell(new TcpHeader(0, TcpOperation.Failure, 0, text.Length), text);
        }

        return _failure;
    }

    // Last words, to every rank that is not in the midst of a message. Whoever cannot take them sees the connection end.
    private void Tell(in TcpHeader header, ReadOnlySpan<byte> text)
    {
        byte[] message = new byte[sizeof(TcpHeader) + text.Length];
        MemoryMarshal.Write(message, header);
        text.CopyTo(message.AsSpan(sizeof(TcpHeader)));
        for (int i = 0; i < _sockets.Length; i++)
        {
            if (_sockets[i] is not Socket socket)
            {
                continue;
            }

            if (i != _halfSent)
            {
                _ = socket.Send(message, SocketFlags.None, out _);
            }

            try
            {
                socket.Shutdown(SocketShutdown.Send);
            }
            catch (SocketException)
            {
                // The rank was gone before.
            }
        }
    }
}
