// A conversation: the messages so far, and a box for the next one. The panel uses it as a field, whose value is the
// messages to send, and as a stage, which shows the answer while it is made.
import { button, copyButton, fail, h, newId } from "./dom.js";
import { toLink } from "./history.js";
import { allText, endedRun, liveRun } from "./output.js";

const WHOLE = /^\s*(\[\{|\{")/; // JSON of messages
const HINT = 'A whole conversation may be pasted: [{"role": "user", "content": "Hello"}, …]';

/** buttons: an element with the panel's buttons, shown below the box. onSend, onAgain and onNew are called for Enter,
    "Try again" and "New chat". */
export function conversation(workflow, spec, { buttons, onSend, onAgain, onNew }) {
  let said = []; // {role, content}; an answer that was made here has its run too
  const log = h("ol", { className: "said" });
  const box = h("textarea", { id: newId(), rows: 3 });
  const system = h("textarea", { id: newId(), rows: 2, placeholder: "What the model is told before anything else" });
  const hint = h("p", { className: "soft" }, HINT);
  buttons.append(button("New chat", () => onNew()));
  const label = h("label", { htmlFor: box.id, className: "unseen" }, spec.name);
  const composer = h("div", { className: "field composer" }, label, box, buttons, hint);
  composer.dataset.field = spec.name;
  box.addEventListener("keydown", (event) => {
    // Enter that ends the typing of a Chinese or Japanese word is not the end of the message.
    if (event.key !== "Enter" || event.shiftKey || event.ctrlKey || event.metaKey || event.isComposing) return;
    event.preventDefault();
    onSend();
  });

  function draw() {
    log.replaceChildren(...said.map(({ role, content, run }, at) => h("li", { className: `turn ${role}` },
      h("p", { className: "unseen" }, role),
      role === "assistant" ? answer(content, run, at === said.length - 1) : h("div", { className: "text" }, content),
    )));
    log.hidden = !said.length;
    box.placeholder = said.length ? "Reply" : "Type a message; Enter sends it";
    hint.hidden = said.length > 0;
  }

  function answer(content, run, isLast) {
    const shown = run ?? { texts: { "": content }, answers: [], notes: [], status: "done" };
    return h("article", { className: `run ${shown.status}` },
      endedRun(shown, workflow.markdown),
      h("div", { className: "bar" },
        copyButton(() => content),
        isLast && run ? [copyButton(() => toLink(run), "Copy link"), button("Try again", onAgain)] : [],
      ),
    );
  }

  /** Shows these messages. run: the run that answered the last one. Without a run, a last message of the user goes into
      the box. */
  function write(messages, run) {
    const turns = [typeof messages === "string" ? parsed(messages) : messages].flat();
    if (turns[0]?.role === "system" || !turns.length) system.value = turns.shift()?.content ?? "";
    said = turns.map((turn, at) => (said[at]?.content === turn.content ? said[at] : turn)); // those keep their runs
    if (run) said.push({ role: "assistant", content: allText(run), run });
    else if (said.at(-1)?.role === "user") box.value = said.pop().content;
    draw();
  }
  draw();

  return {
    name: spec.name,
    element: h("section", { className: "card chat" }, log, composer),
    system: h("div", { className: "field" },
      h("label", { htmlFor: system.id }, "System prompt", h("small", {}, "optional")), system),
    write,
    show: (run) => write(run.values[spec.name], run),
    check() {
      if (!box.value.trim()) fail(box, "type a message");
      return Boolean(box.value.trim());
    },
    focus: () => box.focus(),
    fail: (message) => fail(box, message),
    read() {
      if (!said.length && WHOLE.test(box.value)) return box.value; // the server reads it
      if (!box.value.trim()) return "";
      const before = system.value.trim() ? [{ role: "system", content: system.value }] : [];
      const turns = said.map(({ role, content }) => ({ role, content }));
      return [...before, ...turns, { role: "user", content: box.value }];
    },
    /** Removes the last answer and its question, and puts the question into the box. */
    rewind() {
      said.pop();
      box.value = said.pop()?.content ?? "";
      draw();
    },
    begin(values) {
      const sent = values[spec.name];
      const typed = box.value;
      const view = liveRun(workflow);
      log.hidden = false;
      log.append(
        h("li", { className: "turn user" }, h("div", { className: "text" }, typed)),
        h("li", { className: "turn assistant" }, view.element),
      );
      box.value = "";
      return {
        add: view.add,
        /** messages: the ones that the server read; undefined if the run was stopped before the server said so. */
        end(run, messages) {
          view.end();
          if (run.status === "failed") {
            box.value = typed;
            draw();
          } else {
            write(messages ?? sent, run);
          }
        },
      };
    },
  };
}

/** The messages in JSON text. Any other text is one message of the user. */
function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return [{ role: "user", content: text }];
  }
}
