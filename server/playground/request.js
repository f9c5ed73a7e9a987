// From what the form holds to the bodies that are sent. Pure: knows no page. The wire format is the server's, see
// /openapi.json; what a body leaves out is the server's default, so a field that was left empty is left out.

/** The path below /v1/ and the aligned side's body. `form` is what `readForm` of form.js returns. */
export function alignedRequest(form, model) {
  const control = controlOf(form);
  const body = given({
    model,
    ...(form.mode === "chat" ? { messages: messagesOf(form) } : { prompt: form.prompt }),
    max_tokens: form.maxTokens,
    temperature: form.temperature,
    seed: form.seed,
    stream: true,
    control,
  });
  return { path: form.mode === "chat" ? "chat/completions" : "completions", body };
}

/** The same without an edit: no step is taken, so that the tokens are the base model's, and values are reported. */
export function baseRequest({ path, body }) {
  if (!body.control) return { path, body };
  const { stop_below: _, ...control } = body.control;
  return { path, body: { ...body, control: { ...control, steps: 0 } } };
}

/** The heads that a body names anywhere, whose values are therefore reported. */
export function namedHeads({ control }) {
  if (!control) return [];
  const { weights, values, floors } = overHeads(control.objective);
  const gate = control.gate ? [control.gate.head] : [];
  return [...new Set([weights, values, floors, control.stop_below].flatMap((map) => Object.keys(map ?? {})).concat(gate))];
}

/** The levels that a body sets for a head's value: [what it is, level]. */
export function levelsOf({ control }, head) {
  if (!control) return [];
  const { values, floors } = overHeads(control.objective);
  const gate = control.gate?.head === head ? (control.gate.below ?? control.gate.above) : undefined;
  const levels = [
    ["target", values?.[head]],
    ["floor", floors?.[head]],
    ["gate", gate],
    ["guardrail", control.stop_below?.[head]],
  ];
  return levels.filter(([, level]) => level !== undefined);
}

/** What an objective asks of heads, if it asks anything. */
function overHeads(objective) {
  return objective.type === "instruction" ? (objective.beside ?? {}) : objective;
}

function messagesOf({ system, prompt }) {
  const user = { role: "user", content: prompt };
  return system ? [{ role: "system", content: system }, user] : [user];
}

function controlOf(form) {
  const objective = objectiveOf(form);
  if (!objective) return null;
  return given({
    objective,
    step_size: form.stepSize,
    max_kl: form.maxKl,
    steps: form.steps,
    max_shift: form.maxShift,
    max_response_kl: form.maxResponseKl,
    gate: form.gate.head ? given({ head: form.gate.head, [form.gate.side]: form.gate.level, hysteresis: form.gate.hysteresis }) : null,
    window: form.window.start !== null || form.window.end !== null ? given(form.window) : null,
    schedule: scheduleOf(form.schedule),
    stop_below: form.guardrail.head && form.guardrail.bound !== null ? { [form.guardrail.head]: form.guardrail.bound } : null,
    trace: true,
  });
}

function objectiveOf({ instruction: { text, weight }, ...form }) {
  const beside = headsObjectiveOf(form);
  return text.trim() ? given({ type: "instruction", text, weight, beside }) : beside;
}

function headsObjectiveOf({ objective: type, heads }) {
  const chosen = heads.filter((head) => head.isOn);
  if (!chosen.length) return null;
  const map = (some, field) => Object.fromEntries(some.map((head) => [head.name, head[field]]));
  if (type === "target") return { type, values: map(chosen, "level") };
  if (type !== "floor") return { type, weights: map(chosen, "weight") };
  const [raised, kept] = [chosen.filter((head) => head.role === "raise"), chosen.filter((head) => head.role === "keep")];
  return { type, weights: map(raised, "weight"), floors: map(kept, "level") };
}

function scheduleOf({ type, tokens, to, halfLife }) {
  if (!type) return null;
  if (type === "constant") return { type };
  return given(type === "exponential" ? { type, half_life: halfLife } : { type, tokens, to });
}

function given(fields) {
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== null && value !== undefined));
}
