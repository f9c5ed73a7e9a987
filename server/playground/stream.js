// A streamed response into a pane.

import { ApiError, events } from "./api.js";

/**
 * Fills `pane` with what a request's stream brings; returns "ended", "failed" or "stopped". `isNewest()` tells whether
 * no newer run has taken the pane, `onEvent()` is called after each event.
 */
export async function fill(pane, { path, body }, { key, signal, isNewest, onEvent = () => {} }) {
  let reason = null;
  try {
    for await (const event of events(path, body, key, signal)) {
      const [choice] = event.choices;
      // The last event tells the end; where it carries no token it would count as one.
      if (choice.control_trace || choice.text || choice.delta?.content || choice.delta?.reasoning_content) pane.add(choice);
      reason = choice.finish_reason ?? reason;
      onEvent();
    }
  } catch (error) {
    if (error instanceof ApiError) {
      pane.fail(error);
      return "failed";
    }
    if (error.name !== "AbortError") throw error;
    if (isNewest()) pane.end(null);
    return "stopped";
  }
  pane.end(reason);
  return "ended";
}
