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

/** One field of a form: {name, element, read, write, check, fail, focus}. spec: as /page.json has it. */
export function field(spec) {
  const control = DRAWN[spec.kind](spec);
  control.id = newId();
  if (spec.required) control.setAttribute("aria-required", "true");
  const isBox = spec.kind === "boolean";
  const isNumber = ["integer", "number", "slider"].includes(spec.kind);
  const name = spec.name || "input";
  const limits = { isWhole: spec.kind === "integer", min: spec.minimum, max: spec.maximum };
  /** What is wrong with a value for the widget: "heat must be a number from 0 to 2"; null if nothing is. */
  function problem(value) {
    const text = String(value ?? "");
    if (isNumber && text && !isNumberIn(text, limits)) return `${name} must be ${expected(limits)}`;
    if (isBox && !["true", "false"].includes(text)) return `${name} must be true or false`;
    return spec.kind === "select" && text && !spec.options.includes(text)
      ? `${name} must be one of ${spec.options.join(", ")}` : null;
  }
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
    h("label", { htmlFor: control.id }, name, spec.required ? null : h("small", {}, "optional")),
    spec.description ? h("p", { className: "soft" }, spec.description) : null,
    control,
    spec.kind === "slider" ? shown : null,
  );
  element.dataset.field = spec.name;
  return {
    name: spec.name,
    element,
    /** Returns what is wrong with a value that the field cannot hold: a list of sentences about a link or a run. */
    write(value) {
      write(value);
      const wrong = problem(value);
      return wrong ? [`says ${name}=${value}, but ${wrong}`] : [];
    },
    read: () => (isBox ? control.checked : isNumber ? asNumber(control.value) : control.value),
    fail: (message) => fail(control, message),
    check() {
      const isMissing = spec.required && !isBox && !control.value.trim() && !control.validity.badInput;
      if (isMissing) fail(control, `${name} is required`);
      return !isMissing && (!isNumber || checkNumber(control, name, limits));
    },
    focus: () => control.focus(),
  };
}

/** The text as a number. A number that JavaScript would round stays text. */
const asNumber = (text) => (String(Number(text)) === text ? Number(text) : text);

/** Whether the text is a number within these limits. BigInt compares whole numbers that JavaScript would round. */
function isNumberIn(text, { isWhole, min, max }) {
  if (isWhole ? !/^[+-]?\d+$/.test(text) : !Number.isFinite(Number(text)) || !text.trim()) return false;
  const value = isWhole ? BigInt(text.replace("+", "")) : Number(text);
  return value >= (min ?? -Infinity) && value <= (max ?? Infinity);
}

/** The numbers that a box takes, in words: "a whole number of at least 1". */
function expected({ isWhole, min, max }) {
  const kind = isWhole ? "a whole number" : "a number";
  if (typeof max === "number" || typeof max === "bigint") return `${kind} from ${min} to ${max}`;
  return typeof min === "number" ? `${kind} of at least ${min}` : kind;
}

/** Whether a number box is empty or holds a number within the limits; if not, shows an error. */
function checkNumber(control, name, limits) {
  const isRight = !control.validity.badInput && (!control.value || isNumberIn(control.value, limits));
  if (!isRight) fail(control, `${name} must be ${expected(limits)}`);
  return isRight;
}

const SAMPLING = {
  temperature: { title: "Temperature", min: 0, step: 0.1 },
  max_output_length: { title: "Max tokens", isWhole: true, min: 1, step: 1, unset: "no limit" },
  seed: { title: "Seed", isWhole: true, min: 0, max: 2n ** 63n - 1n, step: 1, unset: "random" },
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
    /** The typed values that differ from the file's: "temperature 99 · seed 7". */
    shown: () => boxes
      .filter(({ name, control }) => control.value && Number(control.value) !== inFile[name])
      .map(({ name, control }) => `${SAMPLING[name].title.toLowerCase()} ${control.value}`).join(" · "),
    /** Returns a sentence about a link or a run for each value that no box can hold. */
    write(values = {}) {
      const isRight = (name) => name in inFile && isNumberIn(String(values[name]), SAMPLING[name]);
      for (const { name, control } of boxes) {
        control.value = name in values && isRight(name) ? values[name] : "";
        fail(control, null);
      }
      return Object.entries(values).filter(([name]) => !isRight(name)).map(([name, value]) => (name in inFile
        ? `says ${name}=${value}, but ${SAMPLING[name].title} must be ${expected(SAMPLING[name])}; the file's value is kept`
        : `says ${name}=${value}, but this form has no box for it`));
    },
    check: () => boxes.map((box) => checkNumber(box.control, SAMPLING[box.name].title, SAMPLING[box.name])).every(Boolean),
    fail: (name, message) => {
      const box = boxes.find((each) => name === `sampling.${each.name}`);
      if (box) fail(box.control, message);
      return box?.control;
    },
  };
}
