// The runs that the browser keeps, links that hold a run's input, and runs as Markdown. None of it is sent anywhere.

const MOST_RUNS = 100;
const MOST_CHARACTERS = 2_000_000; // browsers give a site about five million
const SAMPLING = ["temperature", "max_output_length", "seed"];
const UNNAMED = "__component__";

/** The runs of one workflow, newest first: {all, save, clear}. Other tabs of the page write to the same list. */
export function history(workflow) {
  const key = `runs:${workflow}`;
  function all() {
    try {
      return JSON.parse(localStorage.getItem(key)) ?? [];
    } catch {
      return []; // the browser keeps nothing, or somebody wrote something else there
    }
  }
  function isStored(runs) {
    const text = JSON.stringify(runs);
    if (text.length > MOST_CHARACTERS) return false;
    try {
      localStorage.setItem(key, text);
      return true;
    } catch {
      return false; // the site's share is full
    }
  }
  return {
    all,
    /** Adds a run, or replaces the one with the same id. Drops the oldest runs if there are too many. */
    save(run) {
      let runs = [run, ...all().filter((each) => each.id !== run.id)].slice(0, MOST_RUNS);
      while (runs.length && !isStored(runs)) runs = runs.slice(0, Math.floor(runs.length / 2));
    },
    clear: () => localStorage.removeItem(key),
  };
}

/** An address that opens the page with this state: {workflow, values, blend, sampling}. */
export function toLink({ workflow, values, blend, sampling }) {
  const parts = new URLSearchParams(workflow.startsWith("__") ? {} : { workflow });
  for (const [name, value] of Object.entries(values)) {
    if (value !== "") parts.set(`input.${name}`, typeof value === "string" ? value : JSON.stringify(value));
  }
  for (const [component, chosen] of Object.entries(blend)) {
    parts.set(component === UNNAMED ? "blend" : `blend.${component}`, JSON.stringify(chosen));
  }
  for (const [name, value] of Object.entries(sampling)) parts.set(name, value);
  return `${location.href.split("#")[0]}#${parts}`;
}

/** The state that a link's fragment says. A blend is JSON, or a bare name; "" stands for the only component that has
    one. `prompt=…` may stand for `input.prompt=…`. */
export function fromLink(fragment) {
  const state = { workflow: null, values: {}, blend: {}, sampling: {} };
  for (const [name, value] of new URLSearchParams(fragment.replace(/^#/, ""))) {
    const [, head, rest] = name.match(/^(input|blend)(?:\.(.*))?$/) ?? [];
    if (name === "workflow") state.workflow = value;
    else if (head === "blend") state.blend[rest ?? ""] = readBlend(value);
    else if (head === "input") state.values[rest ?? ""] = value;
    else if (SAMPLING.includes(name)) state.sampling[name] = value;
    else state.values[name] = value;
  }
  return state;
}

function readBlend(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

/** Runs as JSON. A workflow or a component without an id is called "default", as in the API. */
export function asJson(runs) {
  const publicId = (id) => (id.startsWith("__") ? "default" : id);
  const named = (run) => ({
    ...run,
    workflow: publicId(run.workflow),
    blend: Object.fromEntries(Object.entries(run.blend).map(([id, value]) => [publicId(id), value])),
    answers: run.answers.map((answer) => ({ ...answer, component: publicId(answer.component) })),
  });
  return JSON.stringify(runs.map(named), null, 2);
}

/** Runs as Markdown. asked, blend: functions that put a run's input and blend into words. */
export function asMarkdown(title, runs, { asked, blend }) {
  const parts = runs.map((run) => {
    const texts = Object.entries(run.texts).map(([label, text]) => (label ? `**${label}**\n\n${text}` : text));
    const head = [`## ${new Date(run.time).toLocaleString()}`, `> ${asked(run).replaceAll("\n", "\n> ")}`];
    const facts = [run.status === "done" ? "" : run.status, blend(run)].filter(Boolean).join(": ");
    return [...head, ...texts, ...(facts ? [`*${facts}*`] : [])].join("\n\n");
  });
  return `# ${title}\n\n${parts.join("\n\n")}\n`;
}
