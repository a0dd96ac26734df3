// How the page draws runs: the texts, notes for a person, and a line about the blend that answered.
import { copyButton, h } from "./dom.js";
import { markdown } from "./markdown.js";

/** A text that grows: {element, add}. */
function growing(label, isMarkdown) {
  const body = h("div", { className: isMarkdown ? "text markdown" : "text" });
  let text = "";
  let isDue = false;
  const draw = () => {
    isDue = false;
    body.replaceChildren(isMarkdown ? markdown(text) : text);
  };
  return {
    element: h("div", { className: "part" }, label ? h("h3", {}, label) : null, body),
    add(piece) {
      text += piece;
      if (!isDue) requestAnimationFrame(draw);
      isDue = true;
    },
  };
}

/** A run that is going on: {element, add, end}. */
export function liveRun(workflow) {
  const parts = new Map();
  const first = growing("", workflow.markdown);
  const started = performance.now();
  const clock = h("p", { className: "facts" });
  const element = h("article", { className: "run running", "aria-busy": "true" }, first.element, clock);
  const tick = () => {
    clock.textContent = `running, ${((performance.now() - started) / 1000).toFixed(1)} s`;
    if (element.getAttribute("aria-busy") === "true") setTimeout(tick, 100);
  };
  tick();
  return {
    element,
    add(label, piece) {
      if (parts.size === 0) first.element.remove();
      if (!parts.has(label)) {
        parts.set(label, growing(label.includes(".") || parts.size ? label : "", workflow.markdown));
        clock.before(parts.get(label).element);
      }
      parts.get(label).add(piece);
    },
    end: () => element.setAttribute("aria-busy", "false"),
  };
}

/** The elements that show a finished run. run: as history keeps it. */
export const endedRun = (run, isMarkdown) => [...endedText(run, isMarkdown), ...factsShown(run)];

/** Its texts, error and notes. */
export function endedText(run, isMarkdown) {
  const texts = Object.entries(run.texts);
  const isTold = run.notes.length > 0 && texts.length === 1; // a note says already that the text is empty
  return [
    texts.map(([label, text]) => h("div", { className: "part" },
      texts.length > 1 ? h("h3", {}, label) : null,
      h("div", { className: isMarkdown ? "text markdown" : "text" }, isMarkdown ? markdown(text) : text),
      text || isTold || run.status !== "done" ? null : h("p", { className: "soft" }, "empty text"),
    )),
    run.error ? h("p", { className: "error" }, run.error) : null,
    run.notes.map((note) => h("p", { className: "note" }, sentence(note))),
  ].flat();
}

/** The lines about its blends, speed and sampling. */
export const factsShown = (run) =>
  factLines(run).map((parts) => h("p", { className: "facts" }, parts.map((part) => h("span", {}, part))));

/** "the text is empty" as "The text is empty." */
export const sentence = (note) => `${note[0].toUpperCase()}${note.slice(1)}.`;

/** All texts of a run as one text, to copy. */
export const allText = (run) => Object.values(run.texts).join("\n\n");

/** The pairs [adapter, weight] whose weight is not 0. */
export const active = (weights) => Object.entries(weights).filter(([, weight]) => weight);

/** "alpaca 0.5 · pirate 1.25". weights: {adapter: weight}. */
export const mixed = (weights) => active(weights).map((pair) => pair.join(" ")).join(" · ") || "bare base";

/** "alpaca 0.5 · pirate 1.25 (captain)"; of weights without a name "(custom)". */
export function blendShown({ name, weights, method }) {
  if (!active(weights).length) return ["default", null].includes(name) ? "bare base" : `bare base (${name})`;
  return `${mixed(weights)} (${[name ?? "custom", method].filter(Boolean).join(", ")})`;
}

/** The lines under a text, each a list of facts: blend, sampling, tokens, speed, time, identity. */
function factLines(run) {
  if (run.status === "failed") return [];
  const blendFact = (text) => ["blend ", h("b", {}, text)];
  const sampling = run.drawn || null; // runs that older versions kept have none
  if (run.status === "stopped") {
    return [[`stopped after ${run.seconds.toFixed(1)} s`, run.mixed ? blendFact(run.mixed) : null, sampling].filter(Boolean)];
  }
  return run.answers.map(({ component, blend, usage }) => {
    const isPlain = !Object.keys(blend.weights).length && blend.name === "default"; // a model without adapters
    const tokens = `${usage.completion_tokens} token${usage.completion_tokens === 1 ? "" : "s"}`;
    return [
      run.answers.length > 1 ? component : null,
      isPlain ? null : blendFact(blendShown(blend)),
      sampling,
      tokens,
      `${usage.tokens_per_second.toFixed(1)} tok/s`,
      `${run.seconds.toFixed(1)} s`,
      ["identity ", h("code", { title: blend.identity }, blend.identity.slice(0, 8))],
    ].filter(Boolean);
  });
}

/** "Do this by API": the calls that do the same, to copy. */
export function callsShown(calls, address) {
  return h("details", { className: "card calls", hidden: !calls.length },
    h("summary", {}, "Do this by API"),
    calls.map(({ title, code }) => h("section", {},
      h("div", { className: "bar" }, h("h3", {}, title), copyButton(() => code)),
      h("pre", { tabIndex: 0 }, h("code", {}, code)),
    )),
    h("p", { className: "soft" }, "Every route: ", h("a", { href: `${address}/docs` }, `${address}/docs`)),
  );
}
