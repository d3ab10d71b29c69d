using TinyLlama.Compute;

namespace TinyLlama.Inference;

/// <summary>
/// Gives texts their next tokens after a forward. From a GPU the likeliest tokens of each row come first, and a whole row only for a
/// text that needs it: rows of a large vocabulary take longer to read, and to sample from, than the forward.
/// </summary>
/// <remarks>A text gets the token that it would get from the whole row. Which of the two is read depends on its options and its row alone.</remarks>
internal sealed class NextTokens
{
    private readonly InferenceEngine _engine;
    private readonly int _vocabulary;
    private readonly int _count;
    private readonly int _width;
    private readonly float[] _top;
    private readonly float[] _inverseTemperatures;
    private readonly float[] _logits;

    /// <summary>Takes memory for the rows.</summary>
    /// <param name="engine">Computes logits.</param>
    /// <param name="rows">Most tokens of a forward whose logits are wanted.</param>
    /// <param name="vocabulary">The number of the tokenizer's tokens; ids beyond it are padding of the model's vocabulary.</param>
    public NextTokens(InferenceEngine engine, int rows, int vocabulary)
    {
        (_engine, _vocabulary) = (engine, vocabulary);
        _count = vocabulary > engine.TopLogitsCount ? engine.TopLogitsCount : 0;
        _width = _count > 0 ? TopLogitsRow.Width(_count) : 0;
        _top = new float[rows * _width];
        _inverseTemperatures = new float[rows];
        _logits = new float[(_count > 0 ? 1 : rows) * engine.VocabularySize];
    }

    /// <summary>Reads what <see cref="Accept"/> needs. Waits for the device.</summary>
    /// <param name="texts">The text of each row of logits that the last forward was asked for; null where they are not needed.</param>
    public void Read(ReadOnlySpan<GenerationState?> texts)
    {
        if (_count == 0)
        {
            _engine.ReadLogits(_logits.AsSpan(0, texts.Length * _engine.VocabularySize));
            return;
        }

        bool mayFollow = false;
        for (int row = 0; row < texts.Length; row++)
        {
            _inverseTemperatures[row] = (float)(texts[row]?.InverseTemperature ?? 1);
            mayFollow |= texts[row]?.MayFollowFrom(_count) ?? false;
        }

        if (mayFollow)
        {
            _engine.ReadTopLogits(_top.AsSpan(0, texts.Length * _width), _inverseTemperatures.AsSpan(0, texts.Length), _vocabulary);
        }
        else
        {
            _engine.ComputeLogits();
        }
    }

    /// <summary>Gives a text its next token.</summary>
    /// <param name="text">The text, or another one of the same prompt and options but for the seed.</param>
    /// <param name="row">Its row of the logits.</param>
    /// <param name="again">Whether another text follows from the same row.</param>
    public GeneratedToken Accept(GenerationState text, int row, bool again = false)
    {
        if (_count == 0)
        {
            Span<float> logits = _logits.AsSpan(row * _engine.VocabularySize, _engine.VocabularySize);
            return text.Accept(again ? logits.ToArray() : logits);
        }

        if (text.MayFollowFrom(_count) && text.TryAccept(new TopLogitsRow(_top.AsSpan(row * _width, _width)), out GeneratedToken token))
        {
            return token;
        }

        _engine.ReadComputedLogits(_logits, row);
        return text.Accept(_logits);
    }
}
