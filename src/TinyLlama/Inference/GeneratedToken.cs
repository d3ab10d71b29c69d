namespace TinyLlama.Inference;

/// <summary>A new token of a text.</summary>
/// <param name="Token">Its id; the one that ended the text (EOS) comes too.</param>
/// <param name="Text">
/// The text that is certain with it, often empty: whole characters, no part of a stop string. With the last token, all
/// that is left.
/// </param>
/// <param name="LogProbabilities">How probable it was, where <see cref="GenerationOptions.LogProbabilities"/> asks for it.</param>
public readonly record struct GeneratedToken(int Token, string Text, LogProbabilities? LogProbabilities);
