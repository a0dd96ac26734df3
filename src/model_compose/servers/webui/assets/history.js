// Runs that a browser keeps, links to a run's input, and runs as files. Nothing of it leaves the browser.

const MOST_RUNS = 100;
const MOST_CHARACTERS = 2_000_000; // browsers give a site about five million

/** The runs of one workflow, newest first: {all, save, clear}. Other tabs of the page write to the same list. */
export function history(workflow) {
  const key = `runs:${workflow}`;
  const all = () => {
    try {
      return JSON.parse(localStorage.getItem(key)) ?? [];
    } catch {
      return [];
    }
  };
  return {
    all,
    /** Adds a run, or puts it in the place of the one with its id. */
    save(run) {
      const runs = [run, ...all().filter((each) => each.id !== run.id)].slice(0, MOST_RUNS);
      let text = JSON.stringify(runs);
      while (text.length > MOST_CHARACTERS && runs.length > 1) {
        runs.pop();
        text = JSON.stringify(runs);
      }
      try {
        localStorage.setItem(key, text);
      } catch {
        localStorage.setItem(key, JSON.stringify([run])); // other workflows have filled the site's share
      }
    },
    clear: () => localStorage.removeItem(key),
  };
}

/** An address that opens the page with this state: {workflow, values, blend, sampling}. */
export function toLink({ workflow, values, blend, sampling }) {
  const parts = new URLSearchParams({ workflow });
  for (const [name, value] of Object.entries(values)) {
    if (value !== "") parts.set(`input.${name}`, typeof value === "string" ? value : JSON.stringify(value));
  }
  for (const [component, chosen] of Object.entries(blend)) parts.set(`blend.${component}`, JSON.stringify(chosen));
  for (const [name, value] of Object.entries(sampling)) parts.set(name, value);
  return `${location.href.split("#")[0]}#${parts}`;
}

/** The state that a link's fragment says. A blend is JSON, or a bare name; `prompt=…` may stand for `input.prompt=…`. */
export function fromLink(fragment) {
  const state = { workflow: null, values: {}, blend: {}, sampling: {} };
  for (const [name, value] of new URLSearchParams(fragment.replace(/^#/, ""))) {
    const [, head, rest] = name.match(/^(input|blend)(?:\.(.*))?$/) ?? [];
    if (name === "workflow") state.workflow = value;
    else if (head === "blend") state.blend[rest ?? ""] = readBlend(value);
    else if (head === "input") state.values[rest ?? ""] = value;
    else if (["temperature", "max_output_length", "seed"].includes(name)) state.sampling[name] = value;
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

/** Runs as Markdown, to read. shown: {asked, blend} of a run in words. */
export function asMarkdown(title, runs, { asked, blend }) {
  const parts = runs.map((run) => {
    const texts = Object.entries(run.texts).map(([label, text]) => (label ? `**${label}**\n\n${text}` : text));
    return [`## ${new Date(run.time).toLocaleString()}`, `> ${asked(run).replaceAll("\n", "\n> ")}`, ...texts,
      `*${blend(run)}*`].join("\n\n");
  });
  return `# ${title}\n\n${parts.join("\n\n")}\n`;
}
