using System.Buffers.Binary;
using System.Diagnostics;
using System.Net;
using System.Net.Sockets;
using System.Security.Cryptography;
using System.Text;

namespace TinyLlama.Compute.Collectives;

/// <summary>How the ranks of a world find each other by TCP.</summary>
/// <param name="Rank">This rank.</param>
/// <param name="Size">The number of ranks.</param>
/// <param name="Address">Host name or address of rank 0.</param>
/// <param name="Port">Its port.</param>
/// <param name="RunId">What the ranks of a run have in common and no other run has; it may be empty.</param>
/// <param name="Timeout">For how long ranks wait for each other.</param>
/// <param name="Near">Whether ranks of one host may use sockets that do not leave it, which are twice as fast.</param>
internal sealed record TcpWorld(int Rank, int Size, string Address, int Port, string RunId, TimeSpan Timeout, bool Near = true);

/// <summary>
/// Opens a socket between every two ranks. All but rank 0 connect to rank 0 and say who they are and where they listen;
/// when all have come rank 0 tells them each other's addresses, and each connects to those with lower numbers.
/// </summary>
/// <remarks>
/// Whoever connects and is no rank of this run is dropped, and holds nobody up. The run's identity is a check against
/// mistakes, not a secret: nothing on these sockets is encrypted, they belong into a network of one's own.
/// </remarks>
internal sealed class TcpRendezvous : IDisposable
{
    private const int Version = 1;
    private const int MostStrangers = 256;
    private const int MostReplyBytes = 1 << 20;
    private const int SliceMilliseconds = 100;

    // The start of a greeting is the same for all ranks of a run: magic, version, hash of the run's identity.
    private const int HashOffset = 12;
    private const int RankOffset = HashOffset + SHA256.HashSizeInBytes;
    private const int SizeOffset = RankOffset + 4;
    private const int PortOffset = SizeOffset + 4;
    private const int HostOffset = PortOffset + 4;
    private const int MostHostBytes = 255;
    private const int GreetingBytes = HostOffset + 1 + MostHostBytes;

    private readonly TcpWorld _world;
    private readonly Socket?[] _sockets;
    private readonly string[] _hosts;
    private readonly int[] _ports;
    private readonly long _start = Stopwatch.GetTimestamp();
    private readonly List<Stranger> _strangers = [];

    private TcpRendezvous(TcpWorld world)
    {
        _world = world;
        (_sockets, _hosts, _ports) = (new Socket?[world.Size], new string[world.Size], new int[world.Size]);
        _hosts[world.Rank] = Environment.MachineName;
    }

    // What a greeting is answered.
    private enum Answer : byte
    {
        Welcome,
        Disagreement,
        Failure,
    }

    private static ReadOnlySpan<byte> Magic => "tllranks"u8;

    private TimeSpan Left => _world.Timeout - Stopwatch.GetElapsedTime(_start);

    /// <summary>Meets the other ranks.</summary>
    /// <exception cref="DeviceException">The port is taken, or the ranks were started with settings that disagree.</exception>
    /// <exception cref="CollectiveException">A rank did not come in time.</exception>
    public static TcpMesh Meet(TcpWorld world)
    {
        using var rendezvous = new TcpRendezvous(world);
        try
        {
            rendezvous.Meet();
            return new TcpMesh(world.Rank, rendezvous._sockets, rendezvous._hosts, world.Timeout);
        }
        catch (Exception e)
        {
            rendezvous.Leave(e);
            throw;
        }
    }

    /// <summary>Drops those who have not said who they are.</summary>
    public void Dispose() => _strangers.ForEach(static stranger => stranger.Socket.Dispose());

    private void Meet()
    {
        // Only a world on this machine alone has its meeting point on the loopback.
        bool local = IPAddress.TryParse(_world.Address, out IPAddress? address) ? IPAddress.IsLoopback(address) : _world.Address == "localhost";
        using Socket listener = Listen(_world.Rank == 0 ? _world.Port : 0, local);
        int port = ((IPEndPoint)listener.LocalEndPoint!).Port;
        using Socket? near = ListenNear(port);
        Socket[] listeners = near is null ? [listener] : [listener, near];
        if (_world.Rank == 0)
        {
            Admit(listeners, 1);
            byte[] table = Addresses();
            for (int i = 1; i < _world.Size; i++)
            {
                Reply(_sockets[i]!, Answer.Welcome, table);
            }

            return;
        }

        byte[] greeting = Greeting(port);
        _sockets[0] = Connect(0, () => Dns.GetHostAddresses(_world.Address), _world.Port, greeting);
        IPAddress[] addresses = ReadAddresses(ReadReply(0));
        for (int i = 1; i < _world.Rank; i++)
        {
            IPAddress[] target = [addresses[i]];
            _sockets[i] = Connect(i, () => target, _ports[i], greeting);
            _ = ReadReply(i);
        }

        Admit(listeners, _world.Rank + 1);
    }

    private Socket Listen(int port, bool local)
    {
        bool both = Socket.OSSupportsIPv6;
        var listener = new Socket(both ? AddressFamily.InterNetworkV6 : AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
        try
        {
            if (both)
            {
                listener.DualMode = true;
            }

            IPAddress address = local && IPAddress.TryParse(_world.Address, out IPAddress? named) && named.AddressFamily == AddressFamily.InterNetworkV6
                ? IPAddress.IPv6Loopback
                : local ? IPAddress.Loopback : IPAddress.Any;
            listener.Bind(new IPEndPoint(both ? Widen(address) : address, port));
            listener.Listen(_world.Size + MostStrangers);
            return listener;
        }
        catch (SocketException e)
        {
            listener.Dispose();
            throw new DeviceException($"rank {_world.Rank} cannot listen at port {port} of {Environment.MachineName} (MASTER_PORT): {e.Message}; choose another port", e);
        }

        static IPAddress Widen(IPAddress address) => address.Equals(IPAddress.Any) ? IPAddress.IPv6Any : address.AddressFamily == AddressFamily.InterNetwork ? address.MapToIPv6() : address;
    }

    // Where ranks of this host connect to. Linux has names for such sockets that are not files, as many as there are ports.
    private Socket? ListenNear(int port)
    {
        if (!_world.Near || !OperatingSystem.IsLinux())
        {
            return null;
        }

        var listener = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            listener.Bind(NearEndPoint(port));
            listener.Listen(_world.Size + MostStrangers);
            return listener;
        }
        catch (SocketException)
        {
            // Then they come to the port.
            listener.Dispose();
            return null;
        }
    }

    private static UnixDomainSocketEndPoint NearEndPoint(int port) => new($"\0tinyllama-ranks-{port}");

    // Lets the ranks from the first on in, until all are here.
    private void Admit(Socket[] listeners, int first)
    {
        var ready = new List<Socket>();
        while (_sockets.AsSpan(first).Contains(null))
        {
            if (Left <= TimeSpan.Zero)
            {
                IEnumerable<int> missing = Enumerable.Range(first, _world.Size - first).Where(i => _sockets[i] is null);
                throw new CollectiveException(
                    $"not all ranks came to rank {_world.Rank} ({Environment.MachineName}) within {_world.Timeout.TotalSeconds:0} s: {string.Join(", ", missing)} of {_world.Size} are missing");
            }

            ready.Clear();
            ready.AddRange(listeners);
            ready.AddRange(_strangers.Select(static stranger => stranger.Socket));
            Socket.Select(ready, null, null, SliceMilliseconds * 1000);
            foreach (Socket socket in ready)
            {
                if (listeners.Contains(socket))
                {
                    Accept(socket);
                }
                else
                {
                    Hear(_strangers.Single(stranger => stranger.Socket == socket), first);
                }
            }
        }
    }

    private void Accept(Socket listener)
    {
        Socket socket;
        try
        {
            socket = listener.Accept();
        }
        catch (SocketException)
        {
            // It left again before it was let in.
            return;
        }

        socket.Blocking = false;
        _strangers.Add(new Stranger(socket));
        if (_strangers.Count > MostStrangers)
        {
            _strangers[0].Socket.Dispose();
            _strangers.RemoveAt(0);
        }
    }

    // The next bytes of a greeting. One that cannot become a rank's is not listened to any longer.
    private void Hear(Stranger stranger, int first)
    {
        int received = stranger.Socket.Receive(stranger.Greeting.AsSpan(stranger.Received), SocketFlags.None, out SocketError error);
        if (error == SocketError.WouldBlock)
        {
            return;
        }

        stranger.Received += received;
        int known = Math.Min(stranger.Received, Magic.Length);
        if (error != SocketError.Success || received == 0 || !stranger.Greeting.AsSpan(0, known).SequenceEqual(Magic[..known]))
        {
            _strangers.Remove(stranger);
            stranger.Socket.Dispose();
        }
        else if (stranger.Received == GreetingBytes)
        {
            _strangers.Remove(stranger);
            Welcome(stranger, first);
        }
    }

    // One of us. Whoever was started for another run is sent away; settings of this run that disagree end it.
    private void Welcome(Stranger stranger, int first)
    {
        ReadOnlySpan<byte> greeting = stranger.Greeting;
        int version = BinaryPrimitives.ReadInt32LittleEndian(greeting[Magic.Length..]);
        int rank = BinaryPrimitives.ReadInt32LittleEndian(greeting[RankOffset..]);
        int size = BinaryPrimitives.ReadInt32LittleEndian(greeting[SizeOffset..]);
        int port = BinaryPrimitives.ReadInt32LittleEndian(greeting[PortOffset..]);
        int hostBytes = greeting[HostOffset];
        string host = new([.. Encoding.UTF8.GetString(greeting.Slice(HostOffset + 1, hostBytes)).Where(static c => !char.IsControl(c))]);
        string own = $"rank {_world.Rank} ({Environment.MachineName})";
        if (version != Version || !greeting.Slice(HashOffset, SHA256.HashSizeInBytes).SequenceEqual(RunHash()))
        {
            Refuse(stranger.Socket, $"{own} belongs to another run or runs another version; check MASTER_PORT and TINYLLAMA_RUN_ID");
            return;
        }

        string? disagreement =
            size != _world.Size ? $"rank {rank} ({host}) was started for {size} ranks, {own} for {_world.Size}: WORLD_SIZE must be the same everywhere"
            : rank < first || rank >= size || port is < 1 or > ushort.MaxValue ? $"a rank {rank} ({host}) came to {own}: RANK must go from 0 to {size - 1}"
            : _sockets[rank] is not null ? $"rank {rank} was started twice, on {_hosts[rank]} and on {host}: every process needs a RANK of its own"
            : null;
        if (disagreement is not null)
        {
            Refuse(stranger.Socket, disagreement);
            throw new DeviceException(disagreement);
        }

        (_sockets[rank], _hosts[rank], _ports[rank]) = (stranger.Socket, host, port);
        if (_world.Rank != 0)
        {
            Reply(stranger.Socket, Answer.Welcome, []);
        }
    }

    private byte[] RunHash() => SHA256.HashData(Encoding.UTF8.GetBytes(_world.RunId));

    private byte[] Greeting(int port)
    {
        byte[] greeting = new byte[GreetingBytes];
        Magic.CopyTo(greeting);
        BinaryPrimitives.WriteInt32LittleEndian(greeting.AsSpan(Magic.Length), Version);
        RunHash().CopyTo(greeting, HashOffset);
        BinaryPrimitives.WriteInt32LittleEndian(greeting.AsSpan(RankOffset), _world.Rank);
        BinaryPrimitives.WriteInt32LittleEndian(greeting.AsSpan(SizeOffset), _world.Size);
        BinaryPrimitives.WriteInt32LittleEndian(greeting.AsSpan(PortOffset), port);
        byte[] host = Encoding.UTF8.GetBytes(Environment.MachineName);
        greeting[HostOffset] = (byte)Math.Min(host.Length, MostHostBytes);
        host.AsSpan(0, greeting[HostOffset]).CopyTo(greeting.AsSpan(HostOffset + 1));
        return greeting;
    }

    // Tries until the other rank listens: processes start in any order, and a name may resolve only later.
    private Socket Connect(int peer, Func<IPAddress[]> addresses, int port, byte[] greeting)
    {
        string refused;
        do
        {
            try
            {
                foreach (IPAddress address in addresses())
                {
                    if ((IsNear(address) ? TryConnect(NearEndPoint(port)) : null) is Socket near)
                    {
                        _ = near.Send(greeting);
                        return near;
                    }

                    if (TryConnect(new IPEndPoint(address, port)) is Socket socket)
                    {
                        _ = socket.Send(greeting);
                        return socket;
                    }
                }

                refused = "nobody listens there";
            }
            catch (SocketException e)
            {
                refused = e.Message;
            }

            Thread.Sleep(SliceMilliseconds);
        }
        while (Left > TimeSpan.Zero);
        string where = peer == 0 ? $"{_world.Address}:{port} (MASTER_ADDR, MASTER_PORT)" : $"{_hosts[peer]}, port {port}";
        throw new CollectiveException($"rank {_world.Rank} ({Environment.MachineName}) cannot reach rank {peer} at {where} within {_world.Timeout.TotalSeconds:0} s: {refused}");
    }

    // Whether an address is this host's own, so that what listens there also listens near.
    private bool IsNear(IPAddress address)
    {
        if (!_world.Near || !OperatingSystem.IsLinux())
        {
            return false;
        }

        using var socket = new Socket(address.AddressFamily, SocketType.Dgram, ProtocolType.Udp);
        try
        {
            socket.Bind(new IPEndPoint(address, 0));
            return true;
        }
        catch (SocketException)
        {
            return false;
        }
    }

    // Not blocking, because the system would try for minutes at an address that does not answer.
    private Socket? TryConnect(EndPoint address)
    {
        ProtocolType protocol = address is IPEndPoint ? ProtocolType.Tcp : ProtocolType.Unspecified;
        var socket = new Socket(address.AddressFamily, SocketType.Stream, protocol) { Blocking = false };
        try
        {
            socket.Connect(address);
        }
        catch (SocketException e) when (e.SocketErrorCode is SocketError.WouldBlock or SocketError.InProgress)
        {
            _ = socket.Poll(TimeSpan.FromSeconds(Math.Clamp(Left.TotalSeconds, 0, 5)), SelectMode.SelectWrite);
        }
        catch (SocketException)
        {
            socket.Dispose();
            return null;
        }

        // Where nobody listens yet, a port of the range for outgoing connections can be given to this very attempt.
        if ((int)socket.GetSocketOption(SocketOptionLevel.Socket, SocketOptionName.Error)! == 0 && IsConnected(socket)
            && !(address is IPEndPoint && address.Equals(socket.LocalEndPoint)))
        {
            return socket;
        }

        socket.Dispose();
        return null;
    }

    private static bool IsConnected(Socket socket)
    {
        try
        {
            return socket.RemoteEndPoint is not null;
        }
        catch (SocketException)
        {
            return false;
        }
    }

    // An answer, the length of its bytes, the bytes.
    private static void Reply(Socket socket, Answer answer, byte[] content)
    {
        byte[] reply = new byte[5 + content.Length];
        reply[0] = (byte)answer;
        BinaryPrimitives.WriteInt32LittleEndian(reply.AsSpan(1), content.Length);
        content.CopyTo(reply, 5);
        for (int sent = 0; sent < reply.Length;)
        {
            sent += socket.Send(reply.AsSpan(sent), SocketFlags.None, out SocketError error);
            if (error == SocketError.WouldBlock)
            {
                _ = socket.Poll(TimeSpan.FromSeconds(1), SelectMode.SelectWrite);
            }
            else if (error != SocketError.Success)
            {
                // It is gone; the first operation names it.
                return;
            }
        }
    }

    private static void Refuse(Socket socket, string reason)
    {
        Reply(socket, Answer.Disagreement, Encoding.UTF8.GetBytes(reason));
        socket.Dispose();
    }

    // Rank 0, for whom the others wait, tells them why it does not go on.
    private void Leave(Exception reason)
    {
        foreach (Socket? socket in _sockets)
        {
            if (socket is not null && _world.Rank == 0)
            {
                Reply(socket, reason is DeviceException ? Answer.Disagreement : Answer.Failure, Encoding.UTF8.GetBytes(reason.Message));
            }

            socket?.Dispose();
        }
    }

    private byte[] ReadReply(int peer)
    {
        byte[] head = Read(peer, 5);
        int length = BinaryPrimitives.ReadInt32LittleEndian(head.AsSpan(1));
        var answer = (Answer)head[0];
        if (answer > Answer.Failure || length is < 0 or > MostReplyBytes)
        {
            throw NoRank();
        }

        byte[] content = Read(peer, length);
        return answer switch
        {
            Answer.Welcome => content,
            Answer.Disagreement => throw new DeviceException(Encoding.UTF8.GetString(content)),
            _ => throw new CollectiveException(Encoding.UTF8.GetString(content)),
        };
    }

    private byte[] Read(int peer, int count)
    {
        byte[] bytes = new byte[count];
        for (int received = 0; received < count;)
        {
            if (Left <= TimeSpan.Zero)
            {
                throw new CollectiveException(
                    $"rank {peer} did not answer rank {_world.Rank} ({Environment.MachineName}) within {_world.Timeout.TotalSeconds:0} s: not all ranks have come, or it hangs");
            }

            if (!_sockets[peer]!.Poll(TimeSpan.FromMilliseconds(SliceMilliseconds), SelectMode.SelectRead))
            {
                continue;
            }

            int now = _sockets[peer]!.Receive(bytes.AsSpan(received), SocketFlags.None, out SocketError error);
            if (error != SocketError.WouldBlock && now == 0)
            {
                throw new CollectiveException($"rank {peer} closed the connection of rank {_world.Rank} ({Environment.MachineName}) before all ranks had met; what it says tells why");
            }

            received += now;
        }

        return bytes;
    }

    // For each rank: its host's name, its address as rank 0 sees it (none where that is rank 0's own host), its port.
    private byte[] Addresses()
    {
        var bytes = new MemoryStream();
        using var writer = new BinaryWriter(bytes);
        for (int i = 0; i < _world.Size; i++)
        {
            IPAddress? address = (_sockets[i]?.RemoteEndPoint as IPEndPoint)?.Address;
            byte[] octets = address is null || IPAddress.IsLoopback(Narrow(address)) ? [] : Narrow(address).GetAddressBytes();
            writer.Write(_hosts[i]);
            writer.Write((byte)octets.Length);
            writer.Write(octets);
            writer.Write((ushort)_ports[i]);
        }

        return bytes.ToArray();
    }

    private IPAddress[] ReadAddresses(byte[] table)
    {
        try
        {
            using var reader = new BinaryReader(new MemoryStream(table));
            IPAddress rank0 = _sockets[0]!.RemoteEndPoint is IPEndPoint there ? Narrow(there.Address) : IPAddress.Loopback;
            var addresses = new IPAddress[_world.Size];
            for (int i = 0; i < _world.Size; i++)
            {
                _hosts[i] = reader.ReadString();
                byte[] octets = reader.ReadBytes(reader.ReadByte());
                addresses[i] = octets.Length == 0 ? rank0 : new IPAddress(octets);
                _ports[i] = reader.ReadUInt16();
            }

            return addresses;
        }
        catch (Exception e) when (e is IOException or ArgumentException or FormatException)
        {
            throw NoRank(e);
        }
    }

    private DeviceException NoRank(Exception? inner = null) =>
        new($"what listens at {_world.Address}:{_world.Port} is no rank of this program; check MASTER_ADDR and MASTER_PORT", inner);

    private static IPAddress Narrow(IPAddress address) => address.IsIPv4MappedToIPv6 ? address.MapToIPv4() : address;

    // A connection that has not yet said who it is.
    private sealed class Stranger(Socket socket)
    {
        public Socket Socket => socket;

        public byte[] Greeting { get; } = new byte[GreetingBytes];

        public int Received { get; set; }
    }
}
