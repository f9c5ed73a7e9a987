// What tokens are coloured by and what is drawn of them: a head's value, or the divergence from the base model.

import { figure } from "./dom.js";
import { scaleOf } from "./heads.js";
import { levelsOf, namedHeads } from "./request.js";
import { heldBy } from "./trace.js";

const KL = "kl";
// In standard deviations of the training reward, where a colour is full: predictions spread less than rewards do.
const REACH = 0.9;

/** What there is to choose from for a body: [id, label]. */
export function choices(body) {
  const heads = namedHeads(body).map((head) => [`value:${head}`, `Value of ${head}`]);
  return body.control ? [...heads, [KL, "KL from the base model"]] : [];
}

/**
 * A view is {low, high, kind, tint(trace), plot(base, aligned)}: what the ends of the colours mean, how to colour a
 * token, and what the chart is to show of both sides' tokens. null where nothing was reported.
 */
export function viewOf(id, body, heads) {
  if (!choices(body).some(([choice]) => choice === id)) return null;
  return id === KL ? klView(body) : valueView(id.slice("value:".length), body, heads);
}

function valueView(head, body, heads) {
  const { mean, deviation } = scaleOf(heads.find(({ id }) => id === head));
  const [low, high] = [mean - REACH * deviation, mean + REACH * deviation];
  const read = (when) => (token) => token.trace?.[when][head] ?? null;
  const decimals = deviation < 2 ? 2 : 1;
  return {
    kind: "value",
    low: figure(low, decimals),
    high: figure(high, decimals),
    tint: (trace) => {
      const value = trace.value_after[head];
      if (value === null) return null;
      const share = (value - mean) / (REACH * deviation);
      return { tone: share < 0 ? "low" : "high", strength: Math.min(Math.abs(share), 1) };
    },
    plot: (base, aligned) => ({
      title: `Value of ${head} by token`,
      lines: [
        { name: "base", kind: "base", values: base.map(read("value_after")) },
        { name: "aligned, before the edit", kind: "before", values: aligned.map(read("value_before")) },
        { name: "aligned, after the edit", kind: "after", values: aligned.map(read("value_after")) },
      ],
      levels: levelsOf(body, head),
      least: mean - 0.5 * deviation,
      most: mean + 0.5 * deviation,
      decimals,
      rows: () => rows(base, aligned, head),
    }),
  };
}

function klView(body) {
  const { max_kl: most } = body.control;
  const [first] = namedHeads(body);
  return {
    kind: KL,
    low: "0",
    high: figure(most),
    tint: ({ kl }) => (kl === null ? null : { tone: "high", strength: Math.min(kl / most, 1) }),
    plot: (base, aligned) => ({
      title: "KL from the base model by token, nats",
      lines: [{ name: "aligned", kind: "after", values: aligned.map(({ trace }) => trace?.kl ?? null) }],
      levels: [["max KL per token", most]],
      least: 0,
      most,
      decimals: 2,
      rows: () => rows(base, aligned, first),
    }),
  };
}

function rows(base, aligned, head) {
  // An instruction alone names no head.
  const ofHead = (...cells) => (head ? cells : []);
  const edited = ofHead(`${head} before`, `${head} after`);
  const names = ["Index", "Base token", ...ofHead(head), "Aligned token", ...edited, "KL", "Held by"];
  const count = Math.max(base.length, aligned.length);
  const text = (token) => (token ? JSON.stringify(token.text).slice(1, -1) : "");
  const value = (number) => (number === undefined ? "" : figure(number, 3));
  const body = Array.from({ length: count }, (_, i) => {
    const [left, right] = [base[i]?.trace, aligned[i]?.trace];
    return [
      String(i),
      text(base[i]),
      ...ofHead(value(left?.value_after[head])),
      text(aligned[i]),
      ...ofHead(value(right?.value_before[head]), value(right?.value_after[head])),
      value(right?.kl),
      right?.held_by ? heldBy(right.held_by) : "",
    ];
  });
  return [names, ...body];
}
