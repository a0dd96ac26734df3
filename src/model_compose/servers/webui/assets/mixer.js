// The sliders of one model's blend, and the picker of its named blends. The number boxes hold the weights and take any
// number. A slider follows its box as far as it reaches; a line below it says when it does not reach the number.
import { fail, h, newId } from "./dom.js";
import { active, mixed } from "./output.js";

const RANGES = { "0 to 2": [0, 2], "−2 to 4": [-2, 4] };
const STEP = 0.05;
const CUSTOM = "custom";

/** The picker's entry that these weights mean: the picked one while they are its own, else the one whose sum they are.
    Weights that were typed mean their sum, so a blend by another method is never found by its weights alone. */
function meant(choices, weights, picked) {
  const alike = choices.filter((choice) => choice.weights.every((weight, at) => weight === weights[at]));
  return alike.find((choice) => choice === picked) ?? alike.find((choice) => !choice.method) ?? null;
}

/** A line about a model's base. isNamed: whether to say which component it belongs to. */
export function baseLine(model, isNamed) {
  const base = [model.base.source, model.base.precision, model.base.driver].filter(Boolean).join(" · ");
  const name = isNamed ? `base of ${model.component}` : "base";
  return h("p", { className: "what" }, h("b", {}, name), h("span", { title: base }, base));
}

/** {component, element, read, state, shown, write, check, fail}. isNamed: as for `baseLine`. */
export function mixer(model, isNamed) {
  const { adapters, choices } = model;
  const names = adapters.map((adapter) => adapter.name);
  let picked = choices[0];
  const rows = adapters.map((adapter, at) => row(adapter, choices[0].weights[at], show));
  const weights = () => rows.map((each) => Number(each.number.value));
  const byName = () => Object.fromEntries(rows.map((each) => [each.name, Number(each.number.value)]));
  const choice = () => meant(choices, weights(), picked);

  const picker = h("select", { id: newId(), onchange: pick },
    choices.map((each, at) => h("option", { value: at }, each.label)),
    h("option", { value: CUSTOM, disabled: true }, "Custom"),
  );
  const range = h("select", { className: "quiet", id: newId(), onchange: stretch },
    Object.keys(RANGES).map((name) => h("option", {}, name)),
  );

  function pick() {
    picked = choices[picker.value];
    rows.forEach((each, at) => each.write(picked.weights[at]));
    show();
  }
  function show() {
    picked = choice();
    picker.value = picked ? choices.indexOf(picked) : CUSTOM;
  }
  /** Why the sliders cannot be set to a blend, without the subject; null if they can. */
  function problem(blend) {
    if (typeof blend === "string") {
      const isKnown = names.includes(blend) || choices.some((each) => each.value === blend);
      return isKnown ? null : `names a blend '${blend}' that this file does not have`;
    }
    const isMapping = blend === null || (typeof blend === "object" && !Array.isArray(blend));
    if (!isMapping) return `says blend=${JSON.stringify(blend)}, which is neither a name nor weights of adapters`;
    const wrong = Object.entries(blend ?? {}).find(([, weight]) => !Number.isFinite(weight));
    return wrong ? `says that the weight of ${wrong[0]} is ${JSON.stringify(wrong[1])}, which is not a number` : null;
  }
  function stretch() {
    const [low, high] = RANGES[range.value];
    rows.forEach((each) => each.stretch(low, high));
  }
  stretch();

  const title = isNamed ? `Blend of ${model.component}` : "Blend";
  const element = h("section", { className: "card mixer" },
    h("div", { className: "field" }, h("label", { htmlFor: picker.id }, title), picker),
    baseLine(model, false),
    rows.map((each) => each.element),
    h("p", { className: "range" }, h("label", { htmlFor: range.id }, "Sliders reach"), range),
  );
  element.firstChild.dataset.field = "blend";
  return {
    component: model.component,
    element,
    /** What a run is sent: null as the file says, a name, or {adapter: weight}. */
    read: () => (choice() ? choice().value : Object.fromEntries(active(byName()))),
    /** The value that makes `write` set these sliders again: all weights, or the name of a blend by another method. */
    state: () => (choice()?.method ? choice().value : byName()),
    shown: () => mixed(byName()),
    /** Sets the sliders. blend: null, a name, or {adapter: weight}. A blend that cannot be set gives the default blend.
        Returns sentences about what cannot be set, without their subject: the link or the run. */
    write(blend) {
      const wrong = problem(blend);
      const named = wrong || blend === null ? choices[0] : choices.find((each) => each.value === blend);
      const wanted = typeof blend === "string" ? { [blend]: 1 } : (blend ?? {});
      rows.forEach((each, at) => each.write(named ? named.weights[at] : (wanted[names[at]] ?? 0)));
      picked = named ?? picked;
      show();
      if (wrong) return [`${wrong}; the default blend is set`];
      const unknown = named ? [] : Object.keys(wanted).filter((name) => !names.includes(name));
      return unknown.map((name) => `gives a weight to '${name}', which this file does not have; that weight is left out`);
    },
    check() {
      const empty = rows.filter((each) => each.number.value === "");
      const message = (name) => `the weight of ${name} is empty; type a number, 0 leaves the adapter out`;
      empty.forEach((each) => fail(each.number, message(each.name)));
      return empty.length === 0;
    },
    fail: (message) => fail(picker, message),
  };
}

/** One adapter: a line about it, its slider and its number box. onWeight: called when a weight is moved or typed. */
function row(adapter, weight, onWeight) {
  const slider = h("input", { type: "range", step: STEP, "aria-label": adapter.name });
  const number = h("input", { type: "number", step: STEP, "aria-label": `${adapter.name} weight`, value: weight });
  const beyond = h("p", { className: "beyond soft", hidden: true });
  const ticks = h("div", { className: "ticks", "aria-hidden": "true" });
  const scale = h("div", { className: "track" }, ticks, slider);
  let [low, high] = [0, 2];

  function follow() {
    const value = Number(number.value);
    slider.value = value;
    const place = (at) => (Math.min(Math.max(at, low), high) - low) / (high - low);
    scale.style.setProperty("--from", Math.min(place(0), place(value)));
    scale.style.setProperty("--to", Math.max(place(0), place(value)));
    const outside = value < low || value > high;
    slider.setAttribute("aria-valuetext", outside ? `${value}, beyond the slider` : String(value));
    beyond.hidden = !outside;
    beyond.textContent = outside ? `${value} is beyond this slider; the number counts.` : "";
  }
  slider.addEventListener("input", () => {
    number.value = slider.value;
    number.dispatchEvent(new Event("input"));
  });
  number.addEventListener("input", () => {
    follow();
    onWeight();
  });

  const rank = adapter.ranks.length ? `rank ${adapter.ranks.join(", ")}` : null;
  const origin = adapter.weight === null ? "loaded by a client" : `${adapter.weight} in the file`;
  const what = [rank, origin, adapter.source].filter(Boolean).join(" · ");
  const element = h("div", { className: "weight" },
    h("p", { className: "what" }, h("b", {}, adapter.name), h("span", { title: what }, what)),
    scale, number, beyond,
  );
  element.dataset.field = `blend.${adapter.name}`;
  return {
    name: adapter.name,
    number,
    element,
    write(value) {
      number.value = value;
      fail(number, null);
      follow();
    },
    stretch(from, to) {
      [low, high] = [from, to];
      slider.min = low;
      slider.max = high;
      const marks = Array.from({ length: high - low + 1 }, (_, at) => low + at);
      ticks.replaceChildren(...marks.map((mark) => {
        const tick = h("i", { className: mark === 1 ? "one" : "" }, String(mark).replace("-", "−"));
        tick.style.setProperty("--place", (mark - low) / (high - low));
        return tick;
      }));
      follow();
    },
  };
}
