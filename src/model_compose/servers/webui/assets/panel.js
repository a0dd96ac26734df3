// One workflow on the page: what it asks, its text, and its earlier runs.
import { conversation } from "./chat.js";
import { column } from "./column.js";
import { announce, copyButton, download, enable, h, isEnabled } from "./dom.js";
import { field } from "./fields.js";
import { asMarkdown, history, toLink } from "./history.js";
import { allText, blendShown, callsShown, endedRun, liveRun, sentence } from "./output.js";

/** {element, write(state), setReady(on)}. api: the API's address, or null. */
export function panel(workflow, api) {
  const kept = history(workflow.id);
  const run = h("button", { className: "primary", onclick: start });
  const stop = h("button", { type: "button", onclick: () => one.stop() }, "Stop");
  const spec = workflow.fields.find((each) => each.kind === "messages");
  const chat = spec && conversation(workflow, spec, { buttons: [run, stop], onSend: start, onAgain: again, onNew: open });
  const fields = workflow.fields.map((each) => (each === spec ? chat : field(each)));
  const stage = chat ?? single(workflow);
  const one = column(workflow, { begin: (values) => (live = stage.begin(values)) });
  const problem = h("p", { className: "error", role: "alert", hidden: true });
  const calls = h("div");
  const earlier = h("section", { className: "earlier" });
  const asking = h("div", { className: "asked" },
    fields.filter((each) => each !== chat).map((each) => each.element), chat?.system,
    chat ? null : h("div", { className: "buttons" }, run, stop, h("kbd", {}, "Ctrl+Enter")), one.settings);
  let live = null;
  let current = null; // the run, or the conversation, that the stage shows
  let isReady = false;
  run.textContent = chat ? "Send" : "Run";
  run.title = chat ? "Enter" : "Ctrl+Enter";

  const element = h("form", { className: chat ? "panel chatting" : "panel", noValidate: true, onsubmit: (event) => event.preventDefault() },
    workflow.description ? h("p", { className: "description" }, workflow.description) : null,
    asking, h("div", { className: "told" }, stage.element, problem, calls, earlier),
  );
  element.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) start();
  });
  new ResizeObserver(() => asking.style.setProperty("--height", `${asking.offsetHeight}px`)).observe(asking);
  addEventListener("storage", drawEarlier);
  setRunning(false);
  drawEarlier();

  function setRunning(on) {
    enable(run, isReady && !on);
    enable(stop, on);
  }

  async function start() {
    if (!isEnabled(run)) return;
    problem.hidden = true;
    if (![...fields, one].every((each) => each.check())) return;
    setRunning(true);
    announce("Running");
    const ended = await one.run(Object.fromEntries(fields.map((each) => [each.name, each.read()])));
    setRunning(false);
    if (chat && current) ended.id = current.id; // history keeps a conversation once
    end(ended);
  }

  function end(ended) {
    const messages = chat && ended.input !== undefined ? at(ended.input, spec.name) : undefined;
    if (messages) ended.values = { ...ended.values, [spec.name]: messages };
    live.end(ended, messages);
    const unplaced = (ended.fields ?? []).filter(({ field: name, message }) => !showError(name, message));
    if (ended.status === "failed") {
      const isPlaced = ended.fields.length && !unplaced.length;
      problem.textContent = isPlaced ? "" : ended.fields.length ? unplaced.map((each) => each.message).join("; ") : ended.error;
      problem.hidden = isPlaced;
    } else {
      announce([ended.status === "done" ? "Finished." : "Stopped.", ...ended.notes.map(sentence)].join(" "));
    }
    if (ended.status !== "failed" || Object.keys(ended.texts).length) {
      const { calls: shown, fields: _, input, ...rest } = ended;
      calls.replaceChildren(api ? callsShown(shown, api) : "");
      current = rest;
      kept.save(current);
      drawEarlier();
    }
  }

  /** Shows an error at the field that the server names. Returns whether there is one. */
  function showError(name, message) {
    const plain = message.replace(/^input\./, "");
    const found = fields.find((each) => name === `input.${each.name}`.replace(/\.$/, ""));
    found?.fail(plain);
    found?.focus();
    return Boolean(found) || one.fail(name, plain);
  }

  /** Shows an earlier conversation, or without one an empty stage. */
  function open(earlier) {
    if (isEnabled(stop)) return;
    current = earlier ?? null;
    if (earlier) chat.show(earlier);
    else chat.write([]);
    drawEarlier();
  }

  function again() {
    if (!isEnabled(run)) return;
    chat.rewind();
    start();
  }

  function write(state) {
    fields.forEach((each) => each.name in state.values && each.write(state.values[each.name]));
    const unknown = one.write({ blend: state.blend, sampling: state.sampling });
    problem.hidden = !unknown.length;
    problem.textContent = `There is no ${unknown.join(", ")} here any more; its weight is left out.`;
  }

  function drawEarlier() {
    const runs = kept.all().filter((each) => each.id !== current?.id);
    const words = { asked: (each) => asked(each), blend: (each) => each.answers.map((answer) => blendShown(answer.blend)).join("; ") };
    const button = (label, onclick) => h("button", { type: "button", className: "quiet", onclick }, label);
    earlier.replaceChildren(...(runs.length ? [
      h("div", { className: "bar" }, h("h2", {}, chat ? "Earlier chats" : "Earlier runs"),
        button("Download JSON", () => download("runs.json", "application/json", JSON.stringify(kept.all(), null, 2))),
        button("Download Markdown", () => download("runs.md", "text/markdown", asMarkdown(workflow.name, kept.all(), words))),
        button("Clear", () => { kept.clear(); drawEarlier(); })),
      ...runs.map((each) => h("article", { className: "card run" },
        h("p", { className: "question" }, asked(each)),
        h("div", { className: "scrolled", tabIndex: 0 }, endedRun(each, workflow.markdown)),
        h("div", { className: "bar" },
          chat ? button("Continue", () => open(each)) : null,
          button("Use these weights", () => { one.write(each); announce("The weights are set"); }),
          copyButton(() => allText(each)), copyButton(() => toLink(each), "Copy link")))),
    ] : []));
  }

  return { element, write, setReady(on) { isReady = on; setRunning(!isEnabled(stop) ? false : true); } };
}

/** The place of a workflow whose runs stand alone. */
function single(workflow) {
  const element = h("section", { className: "stage" });
  const idle = h("article", { className: "card run idle" }, h("p", { className: "soft" }, "The text appears here."));
  element.append(idle);
  return {
    element,
    begin() {
      const before = element.firstChild;
      const view = liveRun(workflow);
      view.element.classList.add("card");
      element.replaceChildren(view.element);
      view.element.scrollIntoView({ block: "nearest" }); // on a phone it stands below the sliders
      return {
        add: view.add,
        end(run) {
          view.end();
          const isNothing = run.status === "failed" && !Object.keys(run.texts).length;
          element.replaceChildren(isNothing ? before : h("article", { className: `card run ${run.status}` },
            endedRun({ ...run, error: null }, workflow.markdown),
            h("div", { className: "bar" }, copyButton(() => allText(run)), copyButton(() => toLink(run), "Copy link"))));
        },
      };
    },
  };
}

/** What stands in a workflow's input under a field's dotted name. */
const at = (input, name) => (name ? name.split(".").reduce((value, key) => value?.[key], input) : input);

/** What was asked, in a few words: the text itself where there is just one, else a line for each field. */
function asked(run) {
  const words = (value) => (Array.isArray(value) && value.at(-1)?.content) || (typeof value === "string" ? value : JSON.stringify(value));
  const given = Object.entries(run.values).filter(([, value]) => value !== "");
  return given.length === 1 ? words(given[0][1]) : given.map(([name, value]) => `${name}: ${words(value)}`).join("\n");
}
