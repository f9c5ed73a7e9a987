// The value heads as rows of a form: whether a head takes part, and a slider for its weight or its level.

import { byId, element, figure } from "./dom.js";

const WEIGHT = { min: -2, max: 2, step: 0.1 };
const LEVEL_REACH = 2.5; // standard deviations of the training reward, to either side of its mean

/** Value heads as /v1/heads lists them. `change` events bubble from the rows. */
export class HeadList {
  #container = byId("heads");
  #rows = [];
  #objective = "weighted_sum";

  fill(heads) {
    const first = heads.find((head) => head.id === "positive" && !head.is_pinned) ?? heads.find((head) => !head.is_pinned);
    this.#rows = heads.map((head) => new Row(head, head === first, () => this.#objective));
    const none = element("p", { class: "hint" }, "This server has no value heads for its model, so both sides are alike.");
    this.#container.replaceChildren(...(heads.length ? this.#rows.map((row) => row.element) : [none]));
    this.setObjective(this.#objective);
  }

  setObjective(objective) {
    this.#objective = objective;
    for (const row of this.#rows) row.update();
  }

  read() {
    return this.#rows.map((row) => row.read());
  }
}

/** The scale on which a head's values are shown: mean and standard deviation of its training reward. */
export function scaleOf(head) {
  return { mean: head?.reward_mean ?? 0, deviation: head?.reward_scale || 1 };
}

class Row {
  constructor(head, isOn, objective) {
    const { mean, deviation } = scaleOf(head);
    const hint = `head-hint-${head.id}`;
    this.head = head;
    this.objective = objective;
    this.weight = 1;
    this.levelRange = niceRange(mean - LEVEL_REACH * deviation, mean + LEVEL_REACH * deviation);
    this.level = rounded(mean, this.levelRange.step);
    const off = { disabled: head.is_pinned };
    this.box = element("input", { type: "checkbox", checked: isOn, ...off });
    this.role = element(
      "select",
      { "aria-label": `What to do with ${head.id}`, ...off },
      element("option", { value: "raise" }, "raise"),
      element("option", { value: "keep" }, "keep above"),
    );
    this.slider = element("input", { type: "range", "aria-describedby": hint, ...off });
    // The slider tells its value itself.
    this.number = element("span", { class: "number", "aria-hidden": "true" });
    this.element = element(
      "div",
      { class: "head", "data-head": head.id },
      element("label", { class: "check" }, this.box, element("span", {}, head.id)),
      this.slider,
      this.number,
      this.role,
      element("p", { class: "hint", id: hint }, hintOf(head)),
    );
    this.slider.addEventListener("input", () => {
      this[this.quantity] = rounded(this.slider.valueAsNumber, Number(this.slider.step));
      this.box.checked = true;
      this.update();
    });
    this.box.addEventListener("input", () => this.update());
    this.role.addEventListener("input", () => this.update());
  }

  /** Which of the two numbers the slider sets. */
  get quantity() {
    const objective = this.objective();
    return objective === "target" || (objective === "floor" && this.role.value === "keep") ? "level" : "weight";
  }

  update() {
    const { quantity } = this;
    const { min, max, step } = quantity === "weight" ? WEIGHT : this.levelRange;
    // Bounds before the value, which they clamp.
    Object.assign(this.slider, { min, max, step, value: this[quantity] });
    const what = quantity === "weight" ? "Weight" : this.objective() === "target" ? "Target" : "Floor";
    this.slider.setAttribute("aria-label", `${what} of ${this.head.id}`);
    const isOn = this.box.checked;
    this.number.textContent = isOn ? figure(this[quantity], quantity === "weight" ? 1 : decimalsOf(step)) : "off";
    this.role.hidden = this.objective() !== "floor" || !isOn;
    this.element.classList.toggle("off", !isOn);
    fillSlider(this.slider, quantity === "weight" ? 0 : min);
  }

  read() {
    const { head, box, role, weight, level } = this;
    return { name: head.id, isOn: box.checked, role: role.value, weight, level };
  }
}

/** What a head is for, and what to know of it: that it is pinned, or was made for another model. */
function hintOf({ description, is_pinned: isPinned, warnings = [] }) {
  const pinned = isPinned ? [". Pinned by this server, on both sides."] : [];
  return [description, ...pinned, ...warnings.map((warning) => ` \u26a0 ${warning}`)].join("");
}

/** Paints the track from `from` to the value. */
export function fillSlider(slider, from) {
  const share = (value) => (100 * (value - slider.min)) / (slider.max - slider.min);
  const ends = [share(from), share(slider.valueAsNumber)].sort((a, b) => a - b);
  slider.style.setProperty("--from", `${ends[0]}%`);
  slider.style.setProperty("--to", `${ends[1]}%`);
}

function niceRange(low, high) {
  const rough = (high - low) / 100;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  return { min: Math.floor(low / step) * step, max: Math.ceil(high / step) * step, step };
}

/** To a multiple of the step, and without the error of floating point, so that what is shown is what is sent. */
function rounded(value, step) {
  return Number((Math.round(value / step) * step).toFixed(decimalsOf(step)));
}

function decimalsOf(step) {
  return Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
}
