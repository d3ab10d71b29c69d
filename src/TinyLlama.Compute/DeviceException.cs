namespace TinyLlama.Compute;

/// <summary>Something about this machine that its user can change: too little memory, a missing library, a wrong setting.</summary>
/// <param name="message">One line: what, where, and what to do.</param>
/// <param name="inner">The cause, if another exception tells it.</param>
public sealed class DeviceException(string message, Exception? inner = null) : Exception(message, inner);
