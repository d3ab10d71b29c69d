namespace TinyLlama.Compute.Collectives;

/// <summary>Ranks that are processes, on any hosts, with a socket between every two. It needs nothing to be installed.</summary>
internal static class TcpCollective
{
    /// <summary>Meets the other ranks.</summary>
    /// <param name="world">Where, and as which of them.</param>
    /// <exception cref="DeviceException">The port is taken, or the ranks were started with settings that disagree.</exception>
    /// <exception cref="CollectiveException">A rank did not come in time.</exception>
    public static Collective Join(TcpWorld world)
    {
        TcpMesh mesh = TcpRendezvous.Meet(world);
        var world0 = new TcpGroup(mesh, 0, [.. Enumerable.Range(0, world.Size)]);
        return new LaneCollective(new CollectiveLane($"rank {world.Rank}", world.Timeout), world0, mesh.Hosts);
    }
}
