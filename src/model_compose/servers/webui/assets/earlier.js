// The runs before the newest one, to compare with it and to save as files.
import { announce, button, copyButton, download, h } from "./dom.js";
import { asJson, asMarkdown, toLink } from "./history.js";
import { allText, blendShown, endedText, factsShown } from "./output.js";

/** {element, draw}. kept: the workflow's history. onOpen: continues a conversation; undefined for other workflows. */
export function earlierRuns(workflow, kept, { onWeights, onOpen }) {
  const element = h("section", { className: "earlier" });
  let shown = null;
  const save = {
    json: () => download("runs.json", "application/json", asJson(kept.all())),
    markdown: () => download("runs.md", "text/markdown", asMarkdown(workflow.name, kept.all(), { asked, blend })),
  };
  function clear() {
    kept.clear();
    draw(shown);
  }
  function use(run) {
    onWeights(run);
    announce("The weights are set");
  }

  /** current: the run that the stage shows; it is not listed. */
  function draw(current) {
    shown = current;
    const runs = kept.all().filter((run) => run.id !== current?.id);
    const head = h("div", { className: "bar" },
      h("h2", {}, onOpen ? "Earlier chats" : "Earlier runs"),
      button("Download JSON", save.json), button("Download Markdown", save.markdown), button("Clear", clear),
    );
    element.replaceChildren(...(runs.length ? [head, ...runs.map(card)] : []));
  }
  const card = (run) => h("article", { className: "card run" },
    h("p", { className: "question" }, asked(run)),
    h("div", { className: "scrolled", tabIndex: 0 }, endedText(run, workflow.markdown)),
    factsShown(run),
    h("div", { className: "bar" },
      onOpen ? button("Continue", () => onOpen(run)) : null,
      button("Use these weights", () => use(run)),
      copyButton(() => allText(run)),
      copyButton(() => toLink(run), "Copy link"),
    ),
  );
  addEventListener("storage", () => draw(shown)); // another tab has run something
  return { element, draw };
}

/** The blends that answered; the weights that were asked for if the run ended before the server told its blends. */
const blend = (run) => run.answers.map((answer) => blendShown(answer.blend)).join("; ") || run.mixed;

/** The input of a run in words: the value itself if there is one field, else a line for each field. */
function asked(run) {
  const given = Object.entries(run.values).filter(([, value]) => value !== "");
  return given.length === 1 ? words(given[0][1]) : given.map(([name, value]) => `${name}: ${words(value)}`).join("\n");
}

/** A value in words; of a conversation, its last message. */
function words(value) {
  if (typeof value === "string") return value;
  return Array.isArray(value) && value.at(-1)?.content ? value.at(-1).content : JSON.stringify(value);
}
