using System.Globalization;
using System.Text;
using Microsoft.AspNetCore.Http;
using TinyLlama.Data;
using TinyLlama.Inference;

namespace TinyLlama.Server;

/// <summary>What a request wants to be generated.</summary>
/// <param name="Prompts">The tokens of each prompt.</param>
/// <param name="Echo">The text that comes before each reply, or null for none.</param>
/// <param name="Options">How to continue them.</param>
/// <param name="Completions">Replies to each prompt.</param>
/// <param name="Stream">Whether the reply comes in events.</param>
/// <param name="IncludeUsage">Whether a stream ends with the tokens that it took.</param>
internal sealed record Work(
    IReadOnlyList<int[]> Prompts, IReadOnlyList<string>? Echo, GenerationOptions Options, int Completions, bool Stream, bool IncludeUsage);

/// <summary>Puts prompts in line and writes what comes back, whole or in events.</summary>
internal sealed class Replies(ServedModel model, ServerOptions options, ServerMetrics metrics)
{
    /// <summary>Answers a request.</summary>
    /// <exception cref="ApiException">The queue is full, or a prompt is too long.</exception>
    public async Task AnswerAsync(HttpResponse response, Work work, ReplyForm form, CancellationToken stop)
    {
        List<BatchGeneration> texts = Submit(work, stop);
        var head = new Completion
        {
            Id = form.IdPrefix + Guid.NewGuid().ToString("N", CultureInfo.InvariantCulture),
            Object = form.Object(work.Stream),
            Created = DateTimeOffset.UtcNow.ToUnixTimeSeconds(),
            Model = model.Name,
            Choices = [],
        };
        await (work.Stream ? StreamAsync(response, work, form, head, texts, stop) : WriteAsync(response, work, form, head, texts));
    }

    private static Usage UsageOf(Work work, List<BatchGeneration> texts) =>
        new(work.Prompts.Sum(static prompt => prompt.Length), texts.Sum(static text => text.NewTokens));

    private List<BatchGeneration> Submit(Work work, CancellationToken stop)
    {
        var texts = new List<BatchGeneration>();
        foreach (int[] prompt in work.Prompts)
        {
            GenerationOptions fitted = GenerationSettings.Fit(work.Options, prompt.Length, model.Generator.ContextLength, options.MaxTokens);
            texts.AddRange(model.Enqueue(generator => generator.TrySubmit(prompt, fitted, work.Completions, stop)));
        }

        return texts;
    }

    private async Task WriteAsync(HttpResponse response, Work work, ReplyForm form, Completion head, List<BatchGeneration> texts)
    {
        Choice[] choices = await Task.WhenAll(texts.Select(async (generation, index) =>
        {
            string echo = work.Echo?[index / work.Completions] ?? "";
            var text = new StringBuilder(echo);
            List<GeneratedToken>? tokens = work.Options.LogProbabilities is null ? null : [];
            await foreach (GeneratedToken token in ReadAsync(generation))
            {
                text.Append(token.Text);
                AddVisible(tokens, token);
            }

            return form.Part(index, text.ToString(), tokens, echo.Length, ReplyForm.FinishWord(generation.Finish), whole: true);
        }));
        await response.WriteAsJsonAsync(head with { Choices = choices, Usage = UsageOf(work, texts) }, ServerJson.Readable.Completion);
    }

    private async Task StreamAsync(
        HttpResponse response, Work work, ReplyForm form, Completion head, List<BatchGeneration> texts, CancellationToken stop)
    {
        using var events = new EventStream(response);
        try
        {
            await Task.WhenAll(texts.Select((generation, index) =>
                StreamChoiceAsync(events, form, head, generation, index, work.Echo?[index / work.Completions] ?? "", work.Options.LogProbabilities is not null, stop)));
            if (work.IncludeUsage)
            {
                await events.SendAsync(head with { Usage = UsageOf(work, texts) }, ServerJson.Readable.Completion, stop);
            }

            await events.EndAsync(stop);
        }
        catch (UserErrorException e)
        {
            // The status is sent already; the error is an event.
            await events.SendAsync(new ErrorBody(new ApiError(e.Message, "server_error", null, null)), ServerJson.Readable.ErrorBody, CancellationToken.None);
        }
        catch (Exception e) when (e is OperationCanceledException or ObjectDisposedException && !response.HttpContext.RequestAborted.IsCancellationRequested)
        {
            var error = new ApiError("the reply was cut off: it took too long, or the server ends", "server_error", null, "unavailable");
            await events.SendAsync(new ErrorBody(error), ServerJson.Readable.ErrorBody, CancellationToken.None);
        }
    }

    private async Task StreamChoiceAsync(
        EventStream events, ReplyForm form, Completion head, BatchGeneration generation, int index, string echo, bool logProbabilities, CancellationToken stop)
    {
        Task Send(Choice choice) => events.SendAsync(head with { Choices = [choice] }, ServerJson.Readable.Completion, stop);
        if (form.Opening(index) is { } opening)
        {
            await Send(opening);
        }

        int offset = 0;
        if (echo.Length > 0)
        {
            await Send(form.Part(index, echo, null, offset, null, whole: false));
            offset = echo.Length;
        }

        await foreach (GeneratedToken token in ReadAsync(generation))
        {
            List<GeneratedToken>? tokens = logProbabilities ? [] : null;
            AddVisible(tokens, token);
            if (token.Text.Length > 0 || tokens is { Count: > 0 })
            {
                await Send(form.Part(index, token.Text, tokens, offset, null, whole: false));
                offset += token.Text.Length;
            }
        }

        await Send(form.Part(index, "", null, offset, ReplyForm.FinishWord(generation.Finish), whole: false));
    }

    // The symbol that ends a text is no part of it.
    private void AddVisible(List<GeneratedToken>? tokens, GeneratedToken token)
    {
        if (!model.Chat.Tokenizer.IsControl(token.Token))
        {
            tokens?.Add(token);
        }
    }

    private async IAsyncEnumerable<GeneratedToken> ReadAsync(BatchGeneration generation)
    {
        bool isFirst = true;
        await foreach (GeneratedToken token in generation)
        {
            if (isFirst)
            {
                metrics.ObserveFirstToken(generation.FirstTokenTime!.Value);
            }

            isFirst = false;
            yield return token;
        }
    }
}
