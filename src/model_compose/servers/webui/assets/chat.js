// A conversation: what was said, and a box for the next message. As a field it reads as the messages to send; as a stage it
// shows the answer as it comes.
import { copyButton, fail, h, newId } from "./dom.js";
import { toLink } from "./history.js";
import { allText, endedRun, liveRun } from "./output.js";

const WHOLE = /^\s*(\[\{|\{")/; // JSON of messages

/** onSend, onAgain, onNew: what the box and the buttons do. */
export function conversation(workflow, spec, { buttons, onSend, onAgain, onNew }) {
  let said = []; // {role, content, run}: run as history keeps it, of an answer
  const log = h("ol", { className: "said" });
  const box = h("textarea", { id: newId(), rows: 3 });
  const hint = h("p", { className: "soft" }, 'A whole conversation may be pasted: [{"role": "user", "content": "Hello"}, …]');
  const system = h("textarea", { id: newId(), rows: 2, placeholder: "What the model is told before anything else" });
  const composer = h("div", { className: "field composer" },
    h("label", { htmlFor: box.id, className: "unseen" }, spec.name), box,
    h("div", { className: "buttons" }, buttons, h("button", { type: "button", className: "quiet", onclick: () => onNew() }, "New chat")), hint);
  composer.dataset.field = spec.name;
  box.addEventListener("keydown", (event) => {
    // Enter that ends the typing of a Chinese or Japanese word is not the end of the message.
    if (event.key !== "Enter" || event.shiftKey || event.ctrlKey || event.metaKey || event.isComposing) return;
    event.preventDefault();
    onSend();
  });

  const plain = ({ role, content }) => ({ role, content });
  function draw() {
    log.replaceChildren(...said.map((turn, at) => h("li", { className: `turn ${turn.role}` },
      h("p", { className: "unseen" }, turn.role),
      turn.role === "assistant" ? answer(turn, at === said.length - 1) : h("div", { className: "text" }, turn.content))));
    log.hidden = !said.length;
    box.placeholder = said.length ? "Reply" : "Type a message; Enter sends it";
    hint.hidden = said.length > 0;
  }
  function answer(turn, isLast) {
    const run = turn.run ?? { texts: { "": turn.content }, answers: [], notes: [], status: "done" };
    const again = h("button", { type: "button", className: "quiet", onclick: onAgain }, "Try again");
    return h("article", { className: `run ${run.status}` }, endedRun(run, workflow.markdown),
      h("div", { className: "bar" }, copyButton(() => allText(run)),
        isLast && turn.run ? [copyButton(() => toLink(run), "Copy link"), again] : []));
  }
  /** Shows these messages. run: how the last was answered; without one, a question that comes last goes into the box. */
  function write(messages, run) {
    const turns = [typeof messages === "string" ? parsed(messages) : messages].flat();
    if (turns[0]?.role === "system" || !turns.length) system.value = turns.shift()?.content ?? "";
    const known = turns.map((turn, at) => (said[at]?.content === turn.content ? said[at] : turn)); // with their figures
    said = run ? [...known, { role: "assistant", content: allText(run), run }] : known;
    if (!run && said.at(-1)?.role === "user") box.value = said.pop().content;
    draw();
  }
  draw();

  return {
    name: spec.name,
    element: h("section", { className: "card chat" }, log, composer),
    system: h("div", { className: "field" }, h("label", { htmlFor: system.id }, "System prompt", h("small", {}, "optional")), system),
    write,
    check: () => true,
    focus: () => box.focus(),
    fail: (message) => fail(box, message),
    read() {
      if (!said.length && WHOLE.test(box.value)) return box.value; // the server reads it, and says what is wrong with it
      if (!box.value.trim()) return "";
      const before = system.value.trim() ? [{ role: "system", content: system.value }] : [];
      return [...before, ...said.map(plain), { role: "user", content: box.value }];
    },
    /** Takes the last answer back, and its question into the box. */
    rewind() {
      said.pop();
      box.value = said.pop()?.content ?? "";
      draw();
    },
    begin(values) {
      const sent = values[spec.name];
      const view = liveRun(workflow);
      const typed = box.value;
      log.hidden = false;
      log.append(h("li", { className: "turn user" }, h("div", { className: "text" }, typed)),
        h("li", { className: "turn assistant" }, view.element));
      box.value = "";
      return {
        add: view.add,
        /** run: how it ended. messages: as the server has read them; else as they were sent. */
        end(run, messages) {
          view.end();
          if (run.status === "failed" || !sent.length) {
            box.value = typed;
            return draw();
          }
          write(messages ?? sent, run);
        },
      };
    },
    show: (run) => write(run.values[spec.name], run),
  };
}

/** The messages that JSON says; any other text is one message. */
function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return [{ role: "user", content: text }];
  }
}
