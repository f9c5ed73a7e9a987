// What the page asks of the server: models and heads as JSON, generations as server-sent events.

const BASE = new URL("v1/", document.baseURI);
const MAX_SHOWN_CHARS = 200;

/** What clients write as `base_url`. */
export const baseUrl = BASE.href.replace(/\/$/, "");

/** An error body of the server, or that it could not be reached (`status` null). */
export class ApiError extends Error {
  constructor(message, { status = null, code = null, param = null, requestId = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, requestId });
  }
}

/** A GET below /v1/. Throws ApiError. */
export async function get(path, key) {
  const response = await send(path, key, {});
  return parsed(await unbroken(response.text()));
}

/** A POST below /v1/, with a body or without. Throws ApiError. */
export async function post(path, body, key) {
  const options = body === null ? {} : { body: JSON.stringify(body), headers: { "content-type": "application/json" } };
  const response = await send(path, key, { method: "POST", ...options });
  return parsed(await unbroken(response.text()));
}

/** The events of a streamed POST below /v1/, as they come; aborting `signal` hangs up. Throws ApiError. */
export async function* events(path, body, key, signal) {
  const headers = { "content-type": "application/json" };
  const response = await send(path, key, { method: "POST", body: JSON.stringify(body), headers, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await unbroken(reader.read());
      const lines = (rest + (value ?? "")).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ")) continue;
        const data = line.slice("data: ".length);
        if (data === "[DONE]") return;
        const event = parsed(data);
        if (event.error) throw failure(event.error, null, response);
        yield event;
      }
      if (done) throw new ApiError("The connection ended before the response did.");
    }
  } finally {
    // A stream that has failed says so again.
    reader.cancel().catch(() => {});
  }
}

async function send(path, key, options) {
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  const response = await unbroken(fetch(new URL(path, BASE), { ...options, headers, credentials: "omit" }));
  if (response.ok) return response;
  const text = await unbroken(response.text());
  const error = parsed(text, response.status)?.error ?? { message: text.slice(0, MAX_SHOWN_CHARS) };
  throw failure(error, response.status, response);
}

/** Throws ApiError with what came instead of JSON, from something between the page and the server. */
function parsed(text, status = null) {
  try {
    return JSON.parse(text);
  } catch {
    throw new ApiError(`The answer is not the server’s: ${text.slice(0, MAX_SHOWN_CHARS) || "nothing"}`, { status });
  }
}

function failure(error, status, response) {
  const requestId = response.headers.get("x-request-id");
  return new ApiError(error.message, { status, code: error.code, param: error.param, requestId });
}

async function unbroken(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(`The server cannot be reached (${error.message}).`);
  }
}
