using TinyLlama.Compute;

namespace TinyLlama.Checkpoints;

/// <summary>A tensor on a device and the name that files know it by.</summary>
/// <param name="Name">Its Hugging Face name.</param>
/// <param name="Data">The values, contiguous.</param>
/// <param name="IsVector">Whether files give a (1, C) tensor the shape [C].</param>
public readonly record struct NamedTensor(string Name, Tensor Data, bool IsVector);
