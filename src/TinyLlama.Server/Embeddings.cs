using System.Runtime.InteropServices;
using Microsoft.AspNetCore.Http;
using TinyLlama.Inference;

namespace TinyLlama.Server;

/// <summary>Computes the vectors of texts, and writes them as numbers or as base64 of little-endian 32-bit floats.</summary>
internal sealed class Embeddings(ServedModel model, ServerOptions options)
{
    /// <summary>Answers a request.</summary>
    /// <exception cref="ApiException">The queue is full, or a text is too long.</exception>
    public async Task AnswerAsync(HttpResponse response, IReadOnlyList<int[]> texts, bool base64, CancellationToken stop)
    {
        foreach (int[] text in texts)
        {
            if (text.Length > model.Generator.ContextLength)
            {
                throw ApiException.TooLong($"a text has {text.Length} tokens, the context {model.Generator.ContextLength}: shorten it", "input");
            }
        }

        var vectors = new BatchEmbedding[texts.Count];
        for (int i = 0; i < vectors.Length; i++)
        {
            // A request of many texts leaves the queue to others.
            if (i >= options.Places)
            {
                await vectors[i - options.Places].Vector;
            }

            int[] text = texts[i];
            vectors[i] = model.Enqueue(generator => generator.TryEmbed(text, stop));
        }

        var data = new EmbeddingInfo[vectors.Length];
        for (int i = 0; i < data.Length; i++)
        {
            float[] vector = await vectors[i].Vector;
            data[i] = new EmbeddingInfo(i, base64 ? Convert.ToBase64String(MemoryMarshal.AsBytes(vector.AsSpan())) : vector);
        }

        var usage = new Usage(texts.Sum(static text => text.Length), null);
        await response.WriteAsJsonAsync(new EmbeddingList(data, model.Name, usage), ServerJson.Readable.EmbeddingList, cancellationToken: stop);
    }
}
