namespace TinyLlama.Compute;

/// <summary>What a device keeps of operations that are repeated: see <see cref="Backend.Repeat"/>.</summary>
public sealed class Recording : IDisposable
{
    /// <summary>Gets or sets a value indicating whether the operations have run once.</summary>
    internal bool HasRun { get; set; }

    /// <summary>Gets or sets the device's form of them; null where it has none.</summary>
    internal IDisposable? Replayed { get; set; }

    /// <summary>Forgets them. Before the end of the device.</summary>
    public void Dispose()
    {
        Replayed?.Dispose();
        (HasRun, Replayed) = (false, null);
    }
}
