// The request's form: what it holds as plain data, and what of it is shown when. `request.js` makes bodies of that.

import { byId, element, figure } from "./dom.js";
import { HeadList, fillSlider } from "./heads.js";

const OBJECTIVES = {
  weighted_sum: "Raise the sum of weight × value. A negative weight steers away.",
  worst_case: "Raise the smallest of weight × value: whichever head is worst off.",
  target: "Bring each value to its level, from above or below, and hold it there.",
  floor: "Raise some heads while others stay at or above their floors.",
};
const PLAIN_SLIDERS = ["max-kl", "step-size", "temperature"];

/** Calls `onChange` after every change that may change the request. */
export class RequestForm {
  #heads = new HeadList();
  element = byId("request");

  constructor(onChange) {
    this.element.addEventListener("input", () => {
      this.#show();
      onChange();
    });
    byId("new-seed").addEventListener("click", () => {
      byId("seed").value = Math.floor(Math.random() * 1_000_000);
      onChange();
    });
    this.#show();
  }

  setHeads(heads) {
    this.#heads.fill(heads);
    for (const select of this.element.querySelectorAll(".head-choice")) {
      const options = heads.map((head) => element("option", { value: head.id }, head.id));
      select.replaceChildren(element("option", { value: "" }, "none"), ...options);
    }
  }

  read() {
    return {
      mode: this.#mode,
      system: byId("system").value,
      prompt: byId("prompt").value,
      objective: byId("objective").value,
      heads: this.#heads.read(),
      instruction: { text: byId("instruction").value, weight: number("instruction-weight") },
      maxKl: number("max-kl"),
      stepSize: number("step-size"),
      temperature: number("temperature"),
      maxTokens: number("max-tokens"),
      seed: number("seed"),
      steps: number("steps"),
      maxShift: number("max-shift"),
      maxResponseKl: number("max-response-kl"),
      gate: {
        head: byId("gate-head").value,
        side: byId("gate-side").value,
        level: number("gate-level"),
        hysteresis: number("gate-hysteresis"),
      },
      window: { start: number("window-start"), end: number("window-end") },
      schedule: {
        type: byId("schedule-type").value,
        tokens: number("schedule-tokens"),
        to: number("schedule-to"),
        halfLife: number("schedule-half-life"),
      },
      guardrail: { head: byId("guardrail-head").value, bound: number("guardrail-bound") },
    };
  }

  get #mode() {
    return this.element.elements.mode.value;
  }

  #show() {
    const isChat = this.#mode === "chat";
    byId("system-field").hidden = !isChat;
    byId("prompt-label").textContent = isChat ? "User message" : "Text to continue";
    const objective = byId("objective").value;
    byId("objective-hint").textContent = OBJECTIVES[objective];
    this.#heads.setObjective(objective);
    for (const id of PLAIN_SLIDERS) {
      const slider = byId(id);
      slider.parentElement.querySelector(".number").textContent = figure(slider.valueAsNumber);
      fillSlider(slider, slider.min);
    }
    const shape = byId("schedule-type").value;
    for (const field of this.element.querySelectorAll("[data-schedule]")) {
      field.hidden = !field.dataset.schedule.split(" ").includes(shape);
    }
  }
}

/** null where the field is empty or holds no number. */
function number(id) {
  const value = byId(id).valueAsNumber;
  return Number.isNaN(value) ? null : value;
}
