using System.Diagnostics;
using System.Globalization;
using TinyLlama.Data.Tokenizers;
using TinyLlama.Inference;

namespace TinyLlama.Bench;

/// <summary>
/// What a JSON schema costs a step: the mask over the vocabulary, the draw from what it leaves and the way through the
/// token's bytes. Logits are random, so that the texts go everywhere that the schema lets them.
/// </summary>
internal static class TokenMaskBench
{
    private const string Usage = "usage: TinyLlama.Bench masks TOKENIZER";
    private const int Texts = 200;

    private const string Schema = """
        {"type":"array","maxItems":8,"items":{"$ref":"#/$defs/entry"},"$defs":{"entry":{
        "type":"object","additionalProperties":false,"required":["name","kind","size","tags"],"properties":{
        "name":{"type":"string","minLength":1,"maxLength":40},"kind":{"enum":["file","folder","link"]},"size":{"type":"integer"},"share":{"type":"number"},
        "tags":{"type":"array","items":{"type":"string","maxLength":12},"maxItems":5},"parent":{"anyOf":[{"type":"null"},{"$ref":"#/$defs/entry"}]}}}}}
        """;

    public static int Run(string[] args)
    {
        if (args is not [string path])
        {
            Console.Error.WriteLine(Usage);
            return 2;
        }

        BpeTokenizer tokenizer = Tokenizer.Load(path);
        Console.WriteLine(string.Create(CultureInfo.InvariantCulture, $"vocabulary {tokenizer.VocabularySize}; microseconds a step"));
        Console.WriteLine("texts                             steps     mean   median      99 %      most");

        // The first texts compile the code; what counts begins with a constraint that nobody has used.
        var vocabulary = new SortedVocabulary(tokenizer);
        Generate(tokenizer, Fresh(vocabulary), Texts);
        TokenMasks masks = Fresh(vocabulary);
        Report("the first, each state new", Generate(tokenizer, masks, 1));
        Report($"the next {Texts}", Generate(tokenizer, masks, Texts));
        Report("the same again", Generate(tokenizer, masks, Texts));
        return 0;
    }

    private static TokenMasks Fresh(SortedVocabulary vocabulary) => new(JsonConstraint.FromSchema(Schema), vocabulary);

    private static List<double> Generate(BpeTokenizer tokenizer, TokenMasks masks, int texts)
    {
        var times = new List<double>();
        float[] logits = new float[tokenizer.VocabularySize];
        int[] endings = [tokenizer.Eos!.Value];
        var random = new Random(1);
        for (int text = 0; text < texts; text++)
        {
            ConstraintState state = masks.Start;
            for (int length = 0; length < 500 && !state.IsFinal; length++)
            {
                for (int id = 0; id < logits.Length; id++)
                {
                    logits[id] = random.NextSingle();
                }

                long start = Stopwatch.GetTimestamp();
                masks.Apply(logits, state, endings);
                int token = Sampler.Greedy(logits);
                state = masks.Advance(state, tokenizer.TokenBytes(token).Span);
                times.Add(Stopwatch.GetElapsedTime(start).TotalMicroseconds);
                if (token == endings[0])
                {
                    break;
                }
            }
        }

        return times;
    }

    private static void Report(string texts, List<double> times)
    {
        times.Sort();
        Console.WriteLine(string.Create(
            CultureInfo.InvariantCulture,
            $"{texts,-30} {times.Count,8} {times.Average(),8:F0} {times[times.Count / 2],8:F0} {times[times.Count * 99 / 100],9:F0} {times[^1],9:F0}"));
    }
}
