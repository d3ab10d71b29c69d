using System.Net;
using System.Text.Json;
using System.Text.Json.Serialization;
using Microsoft.AspNetCore.Http;

namespace TinyLlama.Server;

/// <summary>What a client is told, in the shape of OpenAI's errors.</summary>
/// <param name="Message">What is wrong and what to do.</param>
/// <param name="Type">The class of the error.</param>
/// <param name="Param">The key of the request that is at fault, or null.</param>
/// <param name="Code">A word for programs, or null.</param>
internal sealed record ApiError(
    string Message,
    string Type,
    [property: JsonIgnore(Condition = JsonIgnoreCondition.Never)] string? Param,
    [property: JsonIgnore(Condition = JsonIgnoreCondition.Never)] string? Code);

/// <summary>The body of an error.</summary>
internal sealed record ErrorBody(ApiError Error);

/// <summary>A request that is answered with an error.</summary>
internal sealed class ApiException : Exception
{
    private ApiException(HttpStatusCode status, ApiError error)
        : base(error.Message) => (Status, Error) = (status, error);

    /// <summary>Gets the HTTP status.</summary>
    public HttpStatusCode Status { get; }

    /// <summary>Gets what the client is told.</summary>
    public ApiError Error { get; }

    /// <summary>400: the request cannot be understood or fulfilled.</summary>
    public static ApiException Invalid(string message, string? param = null, string? code = null) =>
        new(HttpStatusCode.BadRequest, new ApiError(message, "invalid_request_error", param, code));

    /// <summary>400: the context does not hold the text.</summary>
    public static ApiException TooLong(string message, string? param) => Invalid(message, param, "context_length_exceeded");

    /// <summary>401: no key, or a wrong one.</summary>
    public static ApiException Unauthorized() => new(
        HttpStatusCode.Unauthorized,
        new ApiError("a valid API key is needed: send 'Authorization: Bearer KEY'", "invalid_request_error", null, "invalid_api_key"));

    /// <summary>404: no such route or model.</summary>
    public static ApiException NotFound(string message, string? param, string code) =>
        new(HttpStatusCode.NotFound, new ApiError(message, "invalid_request_error", param, code));

    /// <summary>405: the route is for another method.</summary>
    public static ApiException WrongMethod(string method, string route, string needed) => new(
        HttpStatusCode.MethodNotAllowed, new ApiError($"{route} is asked with {needed}, not {method}", "invalid_request_error", null, "method_not_allowed"));

    /// <summary>413: the body is too large.</summary>
    public static ApiException TooLarge(long most) => new(
        HttpStatusCode.RequestEntityTooLarge,
        new ApiError($"the body of a request has at most {most} bytes", "invalid_request_error", null, "request_too_large"));

    /// <summary>429: the queue is full.</summary>
    public static ApiException QueueFull(int queue) => new(
        HttpStatusCode.TooManyRequests,
        new ApiError($"the queue of {queue} is full; try again later", "rate_limit_error", null, "queue_full"));

    /// <summary>503: the server ends, or a reply took too long.</summary>
    public static ApiException Unavailable(string message, string code) =>
        new(HttpStatusCode.ServiceUnavailable, new ApiError(message, "server_error", null, code));

    /// <summary>500: a defect of the server, or of its model.</summary>
    public static ApiException Defect(string message) =>
        new(HttpStatusCode.InternalServerError, new ApiError(message, "server_error", null, "internal_error"));

    /// <summary>Answers with this error.</summary>
    public async Task WriteAsync(HttpResponse response)
    {
        response.StatusCode = (int)Status;
        response.ContentType = "application/json";
        if (Status is HttpStatusCode.TooManyRequests or HttpStatusCode.ServiceUnavailable)
        {
            response.Headers.RetryAfter = "1";
        }

        await response.Body.WriteAsync(JsonSerializer.SerializeToUtf8Bytes(new ErrorBody(Error), ServerJson.Readable.ErrorBody));
    }
}
