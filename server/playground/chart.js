// Lines over tokens, drawn as SVG at the size that there is, and the same figures as a table.

import { byId, element, figure, svg } from "./dom.js";

const HEIGHT = 190;
const MARGIN = { top: 10, right: 12, bottom: 22, left: 44 };
const TICK_PX = { x: 80, y: 44 };

export class Chart {
  #place = byId("chart");
  #table = byId("table");
  #plot = null;
  #marker = null;
  #x = (index) => index;

  /** `onIndex(index)` is called with the token's index under the pointer, null when it leaves. */
  constructor(onIndex) {
    new ResizeObserver(() => this.#draw()).observe(this.#place);
    this.#place.addEventListener("pointermove", (event) => {
      const index = Math.round(this.#x.inverse?.(event.offsetX) ?? -1);
      if (index >= 0 && index < this.#count) onIndex(index);
    });
    this.#place.addEventListener("pointerleave", () => onIndex(null));
    this.#table.addEventListener("toggle", () => this.#fillTable());
  }

  /**
   * A plot is {title, lines: [{name, kind, values}], levels: [[name, level]], least, most, span, decimals, rows}; `kind`
   * is a class of the style sheet, `least` to `most` and `span` tokens are what the axes show at least, `rows` makes the
   * table's.
   */
  show(plot) {
    this.#plot = plot;
    byId("chart-title").textContent = plot.title;
    byId("chart-keys").replaceChildren(...plot.lines.map(({ name, kind }) => element("li", { class: kind }, name)));
    this.#draw();
    this.#fillTable();
  }

  mark(index) {
    if (!this.#marker) return;
    const isInside = index !== null && index < this.#count;
    this.#marker.toggleAttribute("hidden", !isInside);
    this.#marker.setAttribute("visibility", isInside ? "visible" : "hidden");
    if (isInside) this.#marker.setAttribute("transform", `translate(${this.#x(index)} 0)`);
  }

  get #count() {
    return Math.max(0, ...(this.#plot?.lines ?? []).map(({ values }) => values.length));
  }

  #draw() {
    const width = this.#place.clientWidth;
    if (!this.#plot || !width) return;
    const { lines, levels, least, most, span, decimals } = this.#plot;
    const last = Math.max(this.#count - 1, span - 1, 1);
    const shown = lines.flatMap(({ values }) => values).filter((value) => value !== null);
    const ys = ticks(Math.min(least, ...shown), Math.max(most, ...shown), (HEIGHT - MARGIN.top - MARGIN.bottom) / TICK_PX.y);
    const xs = ticks(0, last, Math.max(width / TICK_PX.x, 2)).filter((tick) => tick <= last && Number.isInteger(tick));
    this.#x = scale(0, last, MARGIN.left, width - MARGIN.right);
    const y = scale(ys[0], ys.at(-1), HEIGHT - MARGIN.bottom, MARGIN.top);
    const [left, right] = [MARGIN.left, width - MARGIN.right];
    this.#marker = svg("line", { class: "marker", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom, visibility: "hidden" });
    this.#place.replaceChildren(
      svg(
        "svg",
        { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": this.#summary() },
        ...ys.map((tick) => svg("line", { class: "grid", x1: left, x2: right, y1: y(tick), y2: y(tick) })),
        ...ys.map((tick) => label(figure(tick, decimals), { x: left - 8, y: y(tick), "text-anchor": "end", dy: "0.32em" })),
        ...xs.map((tick) => label(String(tick), { x: this.#x(tick), y: HEIGHT - 6, "text-anchor": "middle" })),
        ...levels.map(([, level]) => svg("line", { class: "level", x1: left, x2: right, y1: y(level), y2: y(level) })),
        ...levels.map(([name, level]) => label(name, { x: right, y: y(level) - 5, "text-anchor": "end" })),
        ...lines.map(({ values, kind }) => svg("path", { class: kind, d: path(values, this.#x, y) })),
        this.#marker,
      ),
    );
  }

  #summary() {
    const { title, lines } = this.#plot;
    const parts = lines.map(({ name, values }) => {
      const known = values.filter((value) => value !== null);
      if (!known.length) return `${name}: nothing yet`;
      const mean = known.reduce((sum, value) => sum + value, 0) / known.length;
      return `${name}: mean ${figure(mean)}, from ${figure(Math.min(...known))} to ${figure(Math.max(...known))}`;
    });
    return `${title}. ${parts.join("; ")}.`;
  }

  #fillTable() {
    if (!this.#table.open || !this.#plot) return;
    const [names, ...rows] = this.#plot.rows();
    const head = element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name)));
    const body = rows.map((row) => element("tr", {}, ...row.map((cell) => element("td", {}, cell))));
    const table = element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
    this.#table.querySelector(".scroll").replaceChildren(table);
  }
}

function label(text, attributes) {
  return svg("text", attributes, text);
}

function scale(from, to, start, end) {
  const slope = (end - start) / (to - from);
  const place = (value) => start + (value - from) * slope;
  place.inverse = (at) => from + (at - start) / slope;
  return place;
}

/** Round numbers that span low to high, about so many. */
function ticks(low, high, count) {
  const rough = (high - low || 1) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const [first, last] = [Math.floor(low / step + 1e-9), Math.ceil(high / step - 1e-9)];
  return Array.from({ length: Math.max(last - first, 1) + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

function path(values, x, y) {
  let isDown = false;
  return values
    .map((value, index) => {
      const command = isDown ? "L" : "M";
      isDown = value !== null;
      return isDown ? `${command}${x(index).toFixed(1)} ${y(value).toFixed(1)}` : "";
    })
    .join("");
}
