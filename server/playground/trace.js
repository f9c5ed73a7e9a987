// What control did to one token, as a card beside it and, for screen readers, as that token's description.

import { byId, element, figure } from "./dom.js";

const GAP_PX = 6;
const EDGE_PX = 8;
const LEAVE_MS = 150; // so that the pointer can reach the card
const HELD_BY = {
  window: "window",
  schedule: "schedule",
  gate: "closed gate",
  max_kl: "max KL per token",
  max_response_kl: "max KL per response",
  max_shift: "max shift",
  target: "target reached",
  floor: "floor reached",
};

export const heldBy = (reason) => HELD_BY[reason] ?? reason;

export class TraceCard {
  #card = byId("trace");
  #anchor = null;
  #leaving = 0;

  constructor() {
    this.#card.addEventListener("pointerenter", () => clearTimeout(this.#leaving));
    this.#card.addEventListener("pointerleave", () => this.hideSoon());
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.hide());
    // Focus scrolls its token into view, and the card goes with it.
    document.addEventListener("scroll", () => this.#anchor && this.#place(), { capture: true, passive: true });
  }

  show(token) {
    clearTimeout(this.#leaving);
    if (token.element === this.#anchor) return;
    this.hide();
    this.#card.replaceChildren(...content(token));
    this.#card.hidden = false;
    this.#anchor = token.element;
    this.#anchor.setAttribute("aria-describedby", this.#card.id);
    this.#place();
  }

  hide() {
    clearTimeout(this.#leaving);
    this.#anchor?.removeAttribute("aria-describedby");
    this.#anchor = null;
    this.#card.hidden = true;
  }

  /** Unless the card tells of the token that has the focus. */
  hideSoon() {
    clearTimeout(this.#leaving);
    this.#leaving = setTimeout(() => document.activeElement !== this.#anchor && this.hide(), LEAVE_MS);
  }

  /** Below the token, or above where there is no room, and inside the window. */
  #place() {
    // A token over two lines has a box for each; the card belongs to the first.
    const [token] = this.#anchor.getClientRects();
    const card = this.#card.getBoundingClientRect();
    if (!token) return;
    const isRoomBelow = token.bottom + GAP_PX + card.height <= innerHeight;
    const top = isRoomBelow ? token.bottom + GAP_PX : token.top - GAP_PX - card.height;
    const left = Math.min(token.left, document.documentElement.clientWidth - card.width - EDGE_PX);
    this.#card.style.setProperty("top", `${Math.max(EDGE_PX, top)}px`);
    this.#card.style.setProperty("left", `${Math.max(EDGE_PX, left)}px`);
  }
}

function content({ index, text, trace, isBase }) {
  const title = element(
    "p",
    { class: "trace-title" },
    element("code", {}, JSON.stringify(text)),
    element("span", {}, ` token ${index}`, trace ? `, id ${trace.token_id}` : ""),
  );
  if (!trace) return [title, element("p", { class: "hint" }, "No head was named, so nothing was read or moved here.")];
  const values = Object.keys(trace.value_after).map((head) => row(head, valueText(trace, head, isBase)));
  const rows = isBase ? values : [...values, row("KL", `${figure(trace.kl, 3)} nats`), row("shift", figure(trace.shift_ratio, 3))];
  if (trace.held_by && !isBase) rows.push(row("held by", heldBy(trace.held_by)));
  if (trace.is_nonfinite) rows.push(row("edit", "dropped: not finite"));
  return [title, element("div", { class: "trace-rows" }, ...rows)];
}

function valueText({ value_before, value_after }, head, isBase) {
  const after = figure(value_after[head], 3);
  return isBase ? after : `${figure(value_before[head], 3)} → ${after}`;
}

function row(name, value) {
  // The stop is for the ear: a description is read out as one text.
  return element("div", {}, element("span", {}, name), element("span", {}, value, element("span", { class: "visually-hidden" }, ".")));
}
