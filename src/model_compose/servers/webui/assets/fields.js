// A widget for each input of a workflow, and those for sampling. The server reads what was typed into them.
import { fail, h, newId } from "./dom.js";

const DRAWN = {
  text: () => h("textarea", { rows: 4, placeholder: "Type here" }),
  json: () => h("textarea", { rows: 3, className: "code", placeholder: "JSON", spellcheck: false }),
  line: () => h("input", { type: "text" }),
  integer: () => h("input", { type: "number", step: "any", inputMode: "numeric" }),
  number: () => h("input", { type: "number", step: "any", inputMode: "decimal" }),
  boolean: () => h("input", { type: "checkbox" }),
  slider: (spec) => h("input", { type: "range", min: spec.minimum, max: spec.maximum, step: spec.step }),
  select: (spec) => {
    const options = spec.required ? spec.options : ["", ...spec.options];
    return h("select", {}, options.map((option) => h("option", {}, option)));
  },
};

/** One field of a form: {name, element, read, write, fail}. spec: as /page.json has it. */
export function field(spec) {
  const control = DRAWN[spec.kind](spec);
  control.id = newId();
  if (spec.required) control.setAttribute("aria-required", "true");
  const isBox = spec.kind === "boolean";
  const isNumber = ["integer", "number", "slider"].includes(spec.kind);
  const shown = h("output", { htmlFor: control.id });
  const write = (value) => {
    if (isBox) control.checked = value === true || value === "true";
    else if (value === null || value === undefined) control.value = spec.kind === "slider" ? spec.minimum : "";
    else control.value = typeof value === "string" ? value : spec.kind === "json" ? JSON.stringify(value) : value;
    shown.value = control.value;
  };
  write(spec.default ?? (spec.required ? spec.options?.[0] : undefined));
  control.addEventListener("input", () => (shown.value = control.value));
  const element = h("div", { className: isBox ? "field box" : "field" },
    h("label", { htmlFor: control.id }, spec.name || "input", spec.required ? null : h("small", {}, "optional")),
    spec.description ? h("p", { className: "soft" }, spec.description) : null,
    control,
    spec.kind === "slider" ? shown : null,
  );
  element.dataset.field = spec.name;
  return {
    name: spec.name,
    element,
    write,
    read: () => (isBox ? control.checked : isNumber ? asNumber(control.value) : control.value),
    fail: (message) => fail(control, message),
    check: () => checkNumber(control),
    focus: () => control.focus(),
  };
}

/** The text as a number. A number that JavaScript would round stays text. */
const asNumber = (text) => (String(Number(text)) === text ? Number(text) : text);

/** Whether a number box is empty or holds a number; if not, shows an error. */
function checkNumber(control) {
  if (control.validity.badInput) fail(control, "type a number, or leave it empty");
  return !control.validity.badInput;
}

const SAMPLING = {
  temperature: { title: "Temperature", min: 0, step: 0.1 },
  max_output_length: { title: "Max tokens", min: 1, step: 1, unset: "no limit" },
  seed: { title: "Seed", min: 0, step: 1, unset: "random" },
};

/** The boxes for sampling. inFile: the file's values, by name. A name that is missing gets no box. */
export function samplingFields(inFile) {
  const boxes = Object.keys(inFile).map((name) => {
    const { title, min, step, unset } = SAMPLING[name];
    const control = h("input", { type: "number", id: newId(), min, step, placeholder: inFile[name] ?? unset });
    const label = h("label", { htmlFor: control.id }, title);
    const element = h("div", { className: "field" }, label, control);
    element.dataset.field = `sampling.${name}`;
    return { name, control, element };
  });
  const greedy = "temperature" in inFile ? " Temperature 0 is greedy." : "";
  const note = h("p", { className: "soft" }, `Left empty, each is as the file says.${greedy}`);
  return {
    element: h("section", { className: "sampling" },
      h("div", { className: "boxes" }, boxes.map((box) => box.element)), note),
    /** The typed values, without empty boxes. */
    read: () => Object.fromEntries(boxes.map((box) => [box.name, box.control.value]).filter(([, value]) => value)),
    write: (values) => boxes.forEach((box) => (box.control.value = values?.[box.name] ?? "")),
    check: () => boxes.every((box) => checkNumber(box.control)),
    fail: (name, message) => {
      const box = boxes.find((each) => name === `sampling.${each.name}`);
      if (box) fail(box.control, message);
      return box?.control;
    },
  };
}
