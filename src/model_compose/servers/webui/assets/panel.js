// One workflow on the page: what it asks, its text, and its earlier runs.
import { conversation } from "./chat.js";
import { column } from "./column.js";
import { announce, button, copyButton, enable, h, isEnabled } from "./dom.js";
import { earlierRuns } from "./earlier.js";
import { field } from "./fields.js";
import { history, toLink } from "./history.js";
import { allText, callsShown, endedRun, liveRun, sentence } from "./output.js";

/** {element, write, setReady}. page: as /page.json has it; it says where the API is, and whose history this is. */
export function panel(workflow, page) {
  const kept = history(`${page.key}/${workflow.id}`);
  const spec = workflow.fields.find((each) => each.kind === "messages");
  const run = button(spec ? "Send" : "Run", start, "primary");
  const stop = button("Stop", () => one.stop(), "");
  const buttons = h("div", { className: "buttons" }, run, stop);
  const chat = spec && conversation(workflow, spec, { buttons, onSend: start, onAgain: again, onNew: open });
  const fields = workflow.fields.map((each) => (each === spec ? chat : field(each)));
  const stage = chat ?? single(workflow);
  const one = column(workflow, { begin: (values) => (live = stage.begin(values)) });
  const problem = h("p", { className: "error", role: "alert", hidden: true });
  const calls = h("div");
  const onWeights = (old) => write({ ...old, values: {} }, "The run");
  const earlier = earlierRuns(workflow, kept, { onWeights, onOpen: chat && open });
  let live = null; // where the stage shows a run that goes on
  let current = null; // the run, or the conversation, that the stage shows
  let isReady = false;

  if (!chat) buttons.append(h("kbd", {}, "Ctrl+Enter"));
  const asking = h("div", { className: "asked" },
    fields.filter((each) => each !== chat).map((each) => each.element),
    chat ? chat.system : buttons,
    one.settings,
  );
  const element = h("form", { className: chat ? "panel chatting" : "panel", noValidate: true },
    workflow.description ? h("p", { className: "description" }, workflow.description) : null,
    asking,
    h("div", { className: "told" }, stage.element, problem, calls, earlier.element),
  );
  element.addEventListener("submit", (event) => event.preventDefault());
  element.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) start();
  });
  new ResizeObserver(() => asking.style.setProperty("--height", `${asking.offsetHeight}px`)).observe(asking);
  setRunning(false);
  earlier.draw(current);

  function setRunning(on) {
    enable(run, isReady && !on);
    enable(stop, on);
  }

  async function start() {
    if (!isReady) announce("The models are still loading");
    if (!isEnabled(run)) return;
    tell("");
    if ([...fields, one].map((each) => each.check()).includes(false)) {
      element.querySelector("[aria-invalid=true]").focus();
      return;
    }
    setRunning(true);
    announce("Running");
    const { input, fields: wrong = [], calls: shown, ...ended } = await one.run(
      Object.fromEntries(fields.map((each) => [each.name, each.read()])),
    );
    setRunning(false);
    const messages = chat && input && at(input, spec.name); // as the server has read them
    if (messages) ended.values[spec.name] = messages;
    live.end(ended, messages);
    if (ended.status === "failed") {
      const unplaced = wrong.filter((each, at) => !showError(each, at === 0));
      tell(wrong.length ? unplaced.map((each) => each.message).join("; ") : ended.error);
    } else {
      announce([ended.status === "done" ? "Finished." : "Stopped.", ...ended.notes.map(sentence)].join(" "));
    }
    if (ended.status === "failed" && !Object.keys(ended.texts).length) return; // nothing to compare
    if (chat && current) ended.id = current.id; // history keeps a conversation once
    current = ended;
    kept.save(current);
    calls.replaceChildren(page.api ? callsShown(shown, page.api) : "");
    earlier.draw(current);
  }

  /** Shows an error that belongs to no field; "" removes it. */
  function tell(message) {
    problem.hidden = !message;
    problem.textContent = message;
  }

  /** Shows an error at the field that the server names. Returns whether the form has that field. */
  function showError({ field: name, message }, isFirst) {
    const plain = message.replace(/^input\./, ""); // on a form a field is called by its label
    const found = fields.find((each) => name === `input.${each.name}`.replace(/\.$/, ""));
    found?.fail(plain);
    if (isFirst) found?.focus();
    return Boolean(found) || one.fail(name, plain);
  }

  function again() {
    if (!isEnabled(run)) return;
    chat.rewind();
    start();
  }

  /** Shows an earlier conversation, or starts a new one. */
  function open(conversation) {
    if (isEnabled(stop)) return;
    current = conversation ?? null;
    if (current) chat.show(current);
    else chat.write([]);
    earlier.draw(current);
  }

  /** Sets fields, sliders and sampling, and tells what cannot be set. state: as a link or an earlier run has it.
      source: "The link" or "The run". problems: sentences about the source, without this subject. */
  function write(state, source, problems = []) {
    const named = (name) => fields.find((each) => each.name === name);
    const wrong = Object.entries(state.values).flatMap(([name, value]) => (named(name)
      ? named(name).write(value) ?? []
      : [`says ${name}=${value}, but this form has no such field`]));
    tell([...problems, ...wrong, ...one.write(state)].map((each) => `${source} ${each}.`).join(" "));
  }

  return {
    element,
    write,
    setReady(on) {
      isReady = on;
      setRunning(isEnabled(stop));
    },
  };
}

/** The stage of a workflow whose runs stand alone. */
function single(workflow) {
  const idle = h("article", { className: "card run idle" }, h("p", { className: "soft" }, "The text appears here."));
  const element = h("section", { className: "stage" }, idle);
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
          element.replaceChildren(isNothing ? before : ended(run));
        },
      };
    },
  };

  function ended(run) {
    return h("article", { className: `card run ${run.status}` },
      endedRun({ ...run, error: null }, workflow.markdown), // the panel tells the error
      h("div", { className: "bar" }, copyButton(() => allText(run)), copyButton(() => toLink(run), "Copy link")),
    );
  }
}

/** The value in a workflow's input under a field's dotted name. */
const at = (input, name) => (name ? name.split(".").reduce((value, key) => value?.[key], input) : input);
