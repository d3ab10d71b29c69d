namespace TinyLlama.Data;

/// <summary>A mistake that the user can mend. The command line prints the message alone, on one line, and exits with 2.</summary>
/// <param name="message">What, where (file, line, offset, key) and what to do.</param>
/// <param name="inner">The cause, if another exception tells it.</param>
public sealed class UserErrorException(string message, Exception? inner = null) : Exception(message, inner);
