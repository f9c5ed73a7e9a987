// The page: form, both sides, chart and snippets put together. Enter here.

import { ApiError, baseUrl, get } from "./api.js";
import { Chart } from "./chart.js";
import { byId, element } from "./dom.js";
import { RequestForm } from "./form.js";
import { Pane, showProblem } from "./pane.js";
import { alignedRequest, baseRequest } from "./request.js";
import { curl, python } from "./snippets.js";
import { fill } from "./stream.js";
import { TraceCard } from "./trace.js";
import { choices, viewOf } from "./view.js";

const NARROW = "(max-width: 60rem)";
const LANGUAGES = { curl, python };
const NO_PLOT = { title: "Value by token", lines: [], levels: [], least: 0, most: 1, decimals: 1, rows: () => [[]] };

// The key lives in this variable and nowhere else.
let key = "";
let model = "";
let heads = [];
let running = null;
/** The body that the panes show, or will show. */
let shown = {};
let view = null;
let isDrawn = true;

const card = new TraceCard();
const panes = { base: new Pane("base", point), aligned: new Pane("aligned", point) };
const chart = new Chart(mark);
const form = new RequestForm(onChange);

async function connect() {
  try {
    const [models, cards] = [(await get("models", key)).data, (await get("heads", key)).data];
    model = models.find(({ parent }) => !parent).id;
    heads = cards;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    byId("model").textContent = "not connected";
    showProblem(byId("connection-problem"), error);
    showKeyForm(true);
    return;
  }
  byId("model").textContent = model;
  byId("connection-problem").hidden = true;
  form.setHeads(heads);
  onChange();
}

/** After any change of the form, and once it is filled. */
function onChange() {
  const request = alignedRequest(form.read(), model);
  const language = document.querySelector("[name=language]:checked").value;
  byId("code").textContent = LANGUAGES[language](request, { baseUrl, hasKey: key !== "" });
  if (!panes.base.tokens.length && !running) setShown(request.body);
}

function setShown(body) {
  shown = body;
  const select = byId("view");
  const before = select.value;
  const offered = choices(body);
  select.replaceChildren(...offered.map(([id, label]) => element("option", { value: id }, label)));
  if (!offered.length) select.append(element("option", { value: "" }, "nothing was reported"));
  if (offered.some(([id]) => id === before)) select.value = before;
  setView();
}

function setView() {
  view = viewOf(byId("view").value, shown, heads);
  byId("legend").hidden = !view;
  byId("legend-low").textContent = view?.low ?? "";
  byId("legend-high").textContent = view?.high ?? "";
  byId("legend-ramp").dataset.kind = view?.kind ?? "";
  Object.values(panes).forEach((pane) => pane.paint(view));
  draw();
}

async function generate() {
  running?.abort();
  const controller = new AbortController();
  running = controller;
  byId("stop").setAttribute("aria-disabled", "false");
  announce("Generating.");
  const aligned = alignedRequest(form.read(), model);
  setShown(aligned.body);
  const sides = [
    [panes.base, baseRequest(aligned)],
    [panes.aligned, aligned],
  ];
  sides.forEach(([pane]) => pane.begin(view));
  draw();
  if (matchMedia(NARROW).matches) byId("responses").scrollIntoView({ block: "start" });
  const isNewest = () => running === controller || running === null;
  const options = { key, signal: controller.signal, isNewest, onEvent: drawSoon };
  const endings = await Promise.all(sides.map(([pane, request]) => fill(pane, request, options)));
  if (running !== controller) return;
  running = null;
  byId("stop").setAttribute("aria-disabled", "true");
  draw();
  announce(endings.includes("failed") ? "Failed." : endings.includes("stopped") ? "Stopped." : ended());
}

function stop() {
  running?.abort();
}

function ended() {
  const counts = Object.entries(panes).map(([name, pane]) => `${name} ${pane.tokens.length} tokens`);
  return `Done: ${counts.join(", ")}.`;
}

function announce(text) {
  byId("status").textContent = text;
}

function drawSoon() {
  if (!isDrawn) return;
  isDrawn = false;
  requestAnimationFrame(draw);
}

function draw() {
  isDrawn = true;
  const { base, aligned } = panes;
  const plot = view?.plot(base.tokens, aligned.tokens) ?? NO_PLOT;
  // Lines grow into a place that is kept for all tokens, so that what is drawn does not move.
  const isWhole = !running && base.tokens.length + aligned.tokens.length > 0;
  chart.show({ ...plot, span: isWhole ? 0 : (shown.max_tokens ?? 0) });
}

function point(token) {
  if (token) card.show(token);
  else card.hideSoon();
  mark(token?.index ?? null);
}

function mark(index) {
  chart.mark(index);
  Object.values(panes).forEach((pane) => pane.mark(index));
}

async function copy() {
  const text = byId("code").textContent;
  try {
    await navigator.clipboard.writeText(text);
    announce("Copied.");
  } catch {
    // Without HTTPS, or without leave, there is no clipboard: the text is selected for the copy key.
    getSelection().selectAllChildren(byId("code"));
    announce("Selected: press Ctrl+C to copy.");
  }
}

function showKeyForm(isShown) {
  byId("key-form").hidden = !isShown;
  byId("key-toggle").setAttribute("aria-expanded", String(isShown));
  if (isShown) byId("key").focus();
}

form.element.addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
});
byId("stop").addEventListener("click", stop);
byId("view").addEventListener("input", setView);
byId("copy").addEventListener("click", copy);
document.querySelectorAll("[name=language]").forEach((radio) => radio.addEventListener("input", onChange));
byId("key-toggle").addEventListener("click", () => showKeyForm(byId("key-form").hidden));
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = byId("key").value.trim();
  connect();
});
connect();
