// The page that trains a head: what it is made of, how far the job is, and then its strength under a slider. Enter here.

import { ApiError, get, post } from "./api.js";
import { byId, element, figure } from "./dom.js";
import { fillSlider } from "./heads.js";
import { Pane, showProblem } from "./pane.js";
import { alignedRequest, baseRequest } from "./request.js";
import { fill } from "./stream.js";
import { TraceCard } from "./trace.js";
import { viewOf } from "./view.js";

const POLL_MS = 500;
const PHASES = {
  waiting: "Waits for another job",
  reading: "The model reads texts",
  fitting: "Fits the head",
  saving: "Writes the head",
  done: "Trained",
};
const SAMPLING = { maxKl: 0.3, stepSize: 0.12, temperature: 0.7, maxTokens: 64, seed: 4 };
const PLAIN = { gate: {}, window: { start: null, end: null }, schedule: {}, guardrail: {}, instruction: { text: "" } };

let model = "";
/** The job that this page follows, or null. */
let followed = null;
/** The head that is tried, as /v1/heads has it. */
let head = null;
let running = null;

const card = new TraceCard();
const point = (token) => (token ? card.show(token) : card.hideSoon());
const panes = { base: new Pane("base", point), aligned: new Pane("aligned", point) };

async function connect() {
  const problem = byId("connection-problem");
  try {
    model = (await get("models", key())).data.find(({ parent }) => !parent).id;
    problem.hidden = true;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    showProblem(problem, error);
  }
  byId("model").textContent = model || "not connected";
}

async function train() {
  if (followed) return;
  byId("job-problem").hidden = true;
  let job = null;
  try {
    job = await post("heads", wanted(), managementKey());
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    byId("progress-part").hidden = false;
    showProblem(byId("job-problem"), error);
    announce("Not started.");
    return;
  }
  announce(`Training ${job.head}.`);
  await follow(job);
}

/** The body; throws ApiError for a line that is no JSON. */
function wanted() {
  const form = byId("train");
  const common = { name: byId("name").value.trim(), replace: byId("replace").checked };
  if (form.elements.method.value === "pairs") return { ...common, pairs: pairs(), plain_as_chat: true };
  const contrast = byId("contrast").value.trim();
  return {
    ...common,
    instruction: byId("instruction").value,
    ...(contrast ? { contrast } : {}),
    instruction_prompts: byId("num-prompts").valueAsNumber,
  };
}

function pairs() {
  const lines = byId("pairs").value.split("\n");
  return lines.flatMap((line, index) => {
    if (!line.trim()) return [];
    try {
      return [JSON.parse(line)];
    } catch (error) {
      throw new ApiError(`Line ${index + 1} of the pairs is no JSON object (${error.message}).`, { param: "pairs" });
    }
  });
}

async function follow(job) {
  followed = job;
  byId("cancel").setAttribute("aria-disabled", "false");
  byId("start").setAttribute("aria-disabled", "true");
  try {
    while (isOpen(followed)) {
      show(followed);
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
      followed = await get(`management/jobs/${job.id}`, managementKey());
    }
    show(followed);
    await end(followed);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    showProblem(byId("job-problem"), error);
    announce("The job cannot be followed.");
  } finally {
    followed = null;
    byId("cancel").setAttribute("aria-disabled", "true");
    byId("start").setAttribute("aria-disabled", "false");
  }
}

const isOpen = ({ status }) => status === "queued" || status === "running";

function show({ progress: { phase, done, of }, seconds }) {
  byId("progress-part").hidden = false;
  const counted = phase === "reading" ? `: ${done} of ${of}` : "";
  byId("phase").textContent = `${PHASES[phase]}${counted}${seconds === null ? "" : `, ${figure(seconds, 0)} s`}`;
  // What comes after the texts takes about a third as long as they do.
  const share = { waiting: 0, reading: (0.75 * done) / of, fitting: 0.8, saving: 0.98, done: 1 }[phase];
  byId("progress").value = share;
}

async function end(job) {
  if (job.status === "succeeded") {
    await offer(job);
    return;
  }
  if (job.error) showProblem(byId("job-problem"), job.error);
  announce(job.status === "cancelled" ? "Cancelled." : "Failed.");
}

async function offer({ head: name, seconds, result }) {
  head = await get(`heads/${encodeURIComponent(name)}`, key());
  byId("head-title").textContent = name;
  const shown = figures(result.card, seconds);
  byId("figures").replaceChildren(
    ...shown.map(([what, value]) => element("div", {}, element("dt", {}, what), element("dd", {}, value))),
  );
  byId("nothing-yet").hidden = true;
  byId("try").hidden = byId("panes").hidden = false;
  announce(`Trained ${name} in ${figure(seconds, 0)} s.`);
  slide();
  await generate({ isNew: true });
}

function figures({ validation, distillation }, seconds) {
  const { order, r2 } = validation;
  const percent = (share) => (share === null || share === undefined ? "–" : `${Math.round(100 * share)}%`);
  const rows = [["trained in", `${figure(seconds, 1)} s`]];
  if (order) rows.push([`${order.what} in order`, `${percent(order.by_direction)} of ${order.compared}`]);
  if (distillation) rows.push(["closes of the instruction", percent(distillation.nearest.share_closed)]);
  rows.push(["value explains", percent(r2.all)]);
  return rows;
}

function slide() {
  const slider = byId("strength");
  byId("strength-number").textContent = figure(slider.valueAsNumber, 1);
  fillSlider(slider, 0);
}

/** Both sides anew, or only the one that the slider changes. */
async function generate({ isNew }) {
  running?.abort();
  const controller = new AbortController();
  running = controller;
  const heads = [{ name: head.id, isOn: true, weight: byId("strength").valueAsNumber }];
  const form = { mode: "chat", system: "", prompt: byId("prompt").value, objective: "weighted_sum", heads };
  const aligned = alignedRequest({ ...form, ...SAMPLING, ...PLAIN }, model);
  const isBaseWhole = !isNew && panes.base.isWhole;
  const sides = [[panes.aligned, aligned], ...(isBaseWhole ? [] : [[panes.base, baseRequest(aligned)]])];
  const view = viewOf(`value:${head.id}`, aligned.body, [head]);
  sides.forEach(([pane]) => pane.begin(view));
  byId("try-status").textContent = "Generating.";
  const options = { key: key(), signal: controller.signal, isNewest: () => running === controller };
  const endings = await Promise.all(sides.map(([pane, request]) => fill(pane, request, options)));
  if (running !== controller) return;
  running = null;
  byId("try-status").textContent = endings.includes("failed") ? "Failed." : "Done.";
}

async function cancel() {
  if (!followed) return;
  try {
    await post(`management/jobs/${followed.id}/cancel`, null, managementKey());
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    showProblem(byId("job-problem"), error);
  }
}

function announce(text) {
  byId("status").textContent = text;
}

const key = () => byId("key").value.trim();
const managementKey = () => byId("management-key").value.trim();

byId("train").addEventListener("submit", (event) => {
  event.preventDefault();
  train();
});
byId("train").addEventListener("input", ({ target }) => {
  if (target.name !== "method") return;
  byId("instruction-fields").hidden = target.value !== "instruction";
  byId("pairs-fields").hidden = target.value !== "pairs";
});
byId("cancel").addEventListener("click", cancel);
byId("key").addEventListener("change", connect);
byId("strength").addEventListener("input", slide);
byId("strength").addEventListener("change", () => generate({ isNew: false }));
byId("try").addEventListener("submit", (event) => {
  event.preventDefault();
  generate({ isNew: true });
});
connect();
