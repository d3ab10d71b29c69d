using System.Globalization;

namespace TinyLlama.Compute.Collectives;

/// <summary>What the process's environment says about the world it was started into.</summary>
internal static class RankEnvironment
{
    private const int DefaultPort = 29500;

    /// <summary>Joins that world.</summary>
    /// <param name="variable">Looks a variable up.</param>
    /// <param name="timeout">For how long ranks wait for each other.</param>
    public static Collective Join(Func<string, string?> variable, TimeSpan timeout)
    {
        if (Mpi(variable) is MpiWorld launched)
        {
            return MpiCollective.Join(launched, timeout);
        }

        if (Tcp(variable, timeout) is TcpWorld world)
        {
            return TcpCollective.Join(world);
        }

        // A step of several tasks whose processes know nothing of each other would do the same work several times over.
        int tasks = Number(variable, "SLURM_STEP_NUM_TASKS", 1, int.MaxValue) ?? 1;
        return tasks == 1 ? new SingleCollective() : throw new DeviceException(
            $"srun has started {tasks} processes that do not know each other; add --mpi=pmix or --mpi=pmi2 to srun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT");
    }

    /// <summary>The world of an MPI launcher. Which library fits is told by its variables: another one comes up as worlds of one rank each.</summary>
    /// <returns>It, or null where none has started this process.</returns>
    public static MpiWorld? Mpi(Func<string, string?> variable)
    {
        int? Size(string name) => Number(variable, name, 1, int.MaxValue);
        bool Has(string name) => !string.IsNullOrEmpty(variable(name));
        MpiWorld? world =
            Has("OMPI_COMM_WORLD_SIZE") ? new(["libmpi.so.40", "libmpi.so"], Size("OMPI_COMM_WORLD_SIZE"))
            : Has("PMI_SIZE") || Has("PMI_RANK") ? new(["libmpi_abi.so.1", "libmpi_abi.so.0", "libmpich.so.12", "libmpi.so.12"], Size("PMI_SIZE") ?? Size("SLURM_STEP_NUM_TASKS"))
            : Has("PMIX_RANK") ? new(["libmpi.so.40", "libmpi.so"], Size("SLURM_STEP_NUM_TASKS"))
            : null;
        return variable("TINYLLAMA_MPI") is { Length: > 0 } path ? new([path], world?.Size) : world;
    }

    /// <summary>The world of torchrun's variables.</summary>
    /// <returns>It, or null where there is none, or none but this rank.</returns>
    /// <exception cref="DeviceException">A variable is missing or no such number.</exception>
    public static TcpWorld? Tcp(Func<string, string?> variable, TimeSpan timeout)
    {
        int? size = Number(variable, "WORLD_SIZE", 1, 1 << 16);
        if (size is null or 1)
        {
            return null;
        }

        int rank = Number(variable, "RANK", 0, size.Value - 1)
            ?? throw new DeviceException($"WORLD_SIZE is {size} and RANK is not set; it is the number of this process, 0 to {size - 1}");
        string address = variable("MASTER_ADDR") is { Length: > 0 } name ? name
            : throw new DeviceException($"WORLD_SIZE is {size} and MASTER_ADDR is not set; it is the host of rank 0");
        int port = Number(variable, "MASTER_PORT", 1, ushort.MaxValue) ?? DefaultPort;
        return new TcpWorld(rank, size.Value, address, port, variable("TINYLLAMA_RUN_ID") ?? string.Empty, timeout);
    }

    private static int? Number(Func<string, string?> variable, string name, int least, int most)
    {
        string? text = variable(name);
        return string.IsNullOrEmpty(text) ? null
            : int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out int number) && number >= least && number <= most ? number
            : throw new DeviceException($"{name} is '{text}', which is no number from {least} to {most}");
    }
}
