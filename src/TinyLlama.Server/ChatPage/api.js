/** The server's API. */

export class ApiError extends Error {
  constructor(status, body) {
    super(body?.error?.message ?? `the server answered ${status}`);
    this.status = status;
    this.code = body?.error?.code;
    this.param = body?.error?.param;
  }
}

function headers(key) {
  return { 'Content-Type': 'application/json', ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function check(response) {
  if (!response.ok) {
    throw new ApiError(response.status, await response.json().catch(() => null));
  }
  return response;
}

/** The served model: { id, meta: { n_params, n_ctx } }. */
export async function getModel(key) {
  const response = await check(await fetch('v1/models', { headers: headers(key) }));
  return (await response.json()).data[0];
}

/** The chunks of a streamed reply, as they come. */
export async function* streamChat(request, key, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const response = await check(await fetch('v1/chat/completions', { method: 'POST', headers: headers(key), body, signal }));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) {
      return;
    }
    const events = (rest + value).split('\n\n');
    rest = events.pop();
    for (const event of events) {
      const data = event.slice('data: '.length);
      if (data === '[DONE]') {
        return;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) {
        throw new ApiError(response.status, chunk);
      }
      yield chunk;
    }
  }
}
