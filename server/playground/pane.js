// One side's response as it streams: its tokens, coloured, its speed, what became of it, and errors as they came.

import { byId, element, figure } from "./dom.js";
import { heldBy } from "./trace.js";

const ENDINGS = {
  length: "at max tokens",
  stop: "by itself",
  content_filter: "by the guardrail",
  guardrail: "by the guardrail",
};
const STOPPED = "by you";
const TINT_PERCENT = 50; // of the colour in a token's background, at most

/**
 * `onPoint(token)` is called with the token under the pointer or the focus, and with null when there is none.
 *
 * A token is {index, text, trace, isBase, element}; where one token completes no character its text is with the next,
 * and it has no element.
 */
export class Pane {
  tokens = [];
  /** Whether the last response came to its own end. */
  isWhole = false;
  #section;
  #text;
  #problem;
  #view = null;
  #firstMs = 0;
  #lastMs = 0;
  #isBase;

  constructor(id, onPoint) {
    this.#section = byId(id);
    this.#isBase = id === "base";
    this.#text = this.#section.querySelector(".text");
    this.#problem = this.#section.querySelector(".problem");
    const pointed = (event) => onPoint(this.#tokenOf(event.target));
    // Not "pointerover", which also comes when text is scrolled or grows under a pointer that rests.
    this.#text.addEventListener("pointermove", (event) => (event.movementX || event.movementY) && pointed(event));
    this.#text.addEventListener("focusin", pointed);
    this.#text.addEventListener("pointerleave", () => onPoint(this.#tokenOf(document.activeElement)));
    this.#text.addEventListener("focusout", () => onPoint(null));
    this.#text.addEventListener("keydown", (event) => this.#move(event));
  }

  begin(view) {
    this.tokens = [];
    this.isWhole = false;
    this.#view = view;
    this.#text.replaceChildren();
    this.#problem.hidden = true;
    this.#section.querySelector(".speed").textContent = "waiting";
    this.#section.querySelector(".facts").replaceChildren();
    this.#section.classList.remove("failed");
    this.#section.classList.add("running");
  }

  /** An event's choice: some text, and the traces of the tokens behind it. */
  add({ text, delta, control_trace: traces = [null] }) {
    const reasoning = delta?.reasoning_content ?? "";
    const whole = reasoning + (text ?? delta.content ?? "");
    this.#lastMs = performance.now();
    this.#firstMs = this.tokens.length ? this.#firstMs : this.#lastMs;
    traces.forEach((trace, i) => this.#append(i === traces.length - 1 ? whole : "", trace, reasoning !== ""));
    this.#showSpeed();
  }

  /** `reason` is a finish reason, or null where the response was stopped from here. */
  end(reason) {
    this.isWhole = reason in ENDINGS;
    this.#section.classList.remove("running");
    this.#showSpeed();
    const facts = [...this.#facts(), ["ended", reason === null ? STOPPED : (ENDINGS[reason] ?? reason)]];
    const shown = facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
    this.#section.querySelector(".facts").replaceChildren(...shown);
  }

  fail({ message, status, code, param, requestId }) {
    this.end("in an error");
    this.#section.classList.add("failed");
    showProblem(this.#problem, { message, status, code, param, requestId });
  }

  /** Colours all tokens, and those to come, by what `view.tint(trace)` returns. */
  paint(view) {
    this.#view = view;
    this.tokens.forEach((token) => this.#tint(token));
  }

  mark(index) {
    this.#text.querySelector(".marked")?.classList.remove("marked");
    this.tokens[index]?.element?.classList.add("marked");
  }

  #append(text, trace, isReasoning) {
    const token = { index: this.tokens.length, text, trace, isBase: this.#isBase, element: null };
    if (text) {
      const isFirst = !this.#text.firstChild;
      token.element = element("span", { class: "token", tabindex: isFirst ? "0" : "-1", "data-index": token.index }, text);
      token.element.classList.toggle("reasoning", isReasoning);
      // Nothing of a line break is seen, so that it could not be pointed at.
      if (/^\s*\n\s*$/.test(text)) token.element.classList.add("break");
      this.#text.append(token.element);
    }
    this.tokens.push(token);
    this.#tint(token);
  }

  #tint({ element: shown, trace }) {
    if (!shown) return;
    const { tone, strength } = (trace && this.#view?.tint(trace)) ?? { tone: "none", strength: 0 };
    shown.dataset.tone = tone;
    shown.style.setProperty("--tint", `${(strength * TINT_PERCENT).toFixed(1)}%`);
  }

  #showSpeed() {
    const count = this.tokens.length;
    const seconds = (this.#lastMs - this.#firstMs) / 1000;
    const parts = [`${count} ${count === 1 ? "token" : "tokens"}`];
    if (count > 1 && seconds > 0) parts.push(`${figure((count - 1) / seconds, 1)} tokens/s`);
    this.#section.querySelector(".speed").textContent = parts.join(" · ");
  }

  #facts() {
    const traces = this.tokens.map((token) => token.trace).filter((trace) => trace);
    if (!traces.length) return [];
    const mean = (read) => traces.reduce((sum, trace) => sum + (read(trace) ?? 0), 0) / traces.length;
    const facts = Object.keys(traces[0].value_after).map((head) => {
      const [before, after] = ["value_before", "value_after"].map((when) => figure(mean((trace) => trace[when][head])));
      return [head, this.#isBase ? after : `${before} → ${after}`];
    });
    if (!this.#isBase) {
      facts.push(["KL per token", `${figure(mean((trace) => trace.kl))} nats`]);
      facts.push(["moved", percent(mean((trace) => Number(trace.kl > 0)))]);
      for (const reason of new Set(traces.map((trace) => trace.held_by).filter(Boolean))) {
        facts.push([`held by ${heldBy(reason)}`, percent(mean((trace) => Number(trace.held_by === reason)))]);
      }
    }
    return facts;
  }

  #tokenOf(target) {
    const shown = target?.closest?.(".token");
    return shown && this.#text.contains(shown) ? this.tokens[Number(shown.dataset.index)] : null;
  }

  /** One stop for the tab key; the arrows go from token to token. */
  #move(event) {
    const from = event.target.closest(".token");
    const to = {
      ArrowRight: from?.nextElementSibling,
      ArrowLeft: from?.previousElementSibling,
      Home: this.#text.firstElementChild,
      End: this.#text.lastElementChild,
    }[event.key];
    if (!from || !to || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    from.tabIndex = -1;
    to.tabIndex = 0;
    // What is half in view would stay so.
    to.focus({ preventScroll: true });
    to.scrollIntoView({ block: "nearest" });
  }
}

/** An error as it came, in an element with the role alert. */
export function showProblem(place, { message, status, code, param, requestId }) {
  const details = [status && `HTTP ${status}`, code, param && `field ${param}`, requestId && `request ${requestId}`];
  place.replaceChildren(
    element("p", {}, message),
    element("p", { class: "hint" }, details.filter(Boolean).join(" · ")),
  );
  place.hidden = false;
}

const percent = (share) => `${Math.round(100 * share)}%`;
