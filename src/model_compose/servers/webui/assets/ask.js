// Asks the server for a run, and reads the text while it is made.

/** Why a run failed. fields: a list of {field, message} for the fields that the server found wrong. */
export class Failure extends Error {
  constructor(message, fields = []) {
    super(message);
    this.fields = fields;
  }
}

const asFailure = (problem) => new Failure(problem.detail, problem.errors);

/** Runs `body` on the server, and calls onDelta with a label and a piece of its text. Returns what "done" tells.
    Raises Failure, and what `signal` raises once it is aborted. */
export async function ask(body, { signal, onDelta }) {
  const answer = await send(body, signal);
  try {
    for await (const { name, data } of events(answer.body)) {
      if (name === "delta") onDelta(data.label, data.text);
      else if (name === "done") return data;
      else throw asFailure(data);
    }
  } catch (error) {
    if (error instanceof Failure || signal.aborted) throw error;
  }
  throw new Failure("The connection to the server was lost before the run had ended.");
}

async function send(body, signal) {
  const headers = { "Content-Type": "application/json" };
  let answer;
  try {
    answer = await fetch("runs", { method: "POST", headers, body: JSON.stringify(body), signal });
  } catch (error) {
    throw signal.aborted ? error : new Failure("The server does not answer; is it still up?");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) throw new Failure("You are signed out. Sign in in another tab, then run this again.");
  const isProblem = answer.headers.get("Content-Type")?.includes("json");
  throw isProblem ? asFailure(await answer.json()) : new Failure(await answer.text());
}

/** Server-sent events: {name, data} with the data read as JSON. Comments are skipped. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const blocks = (rest + part.value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s, 2)));
      if (fields.data) yield { name: fields.event, data: JSON.parse(fields.data) };
    }
  }
}
