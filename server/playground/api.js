// What the page asks of the server: models and heads as JSON, generations as server-sent events.

const BASE = new URL("v1/", document.baseURI);

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
  return response.json();
}

/** The events of a streamed POST below /v1/, as they come; aborting `signal` hangs up. Throws ApiError. */
export async function* events(path, body, key, signal) {
  const headers = { "content-type": "application/json" };
  const response = await send(path, key, { method: "POST", body: JSON.stringify(body), headers, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await unbroken(reader.read());
    const lines = (rest + (value ?? "")).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const data = line.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw failure(event.error, null, response);
      yield event;
    }
    if (done) throw new ApiError("The connection ended before the response did.");
  }
}

async function send(path, key, options) {
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  const response = await unbroken(fetch(new URL(path, BASE), { ...options, headers, credentials: "omit" }));
  if (response.ok) return response;
  const text = await unbroken(response.text());
  let error;
  try {
    error = JSON.parse(text).error;
  } catch {
    // Not ours: something between the page and the server answered.
  }
  throw failure(error ?? { message: text || response.statusText || "no message" }, response.status, response);
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
