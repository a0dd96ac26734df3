// One way to answer a prompt: the blends and the sampling of a workflow, and the stage where the text goes. A panel has
// one column; several side by side would each have their own settings and stage, and share the panel's fields.
import { ask, Failure } from "./ask.js";
import { h } from "./dom.js";
import { samplingFields } from "./fields.js";
import { baseLine, mixer } from "./mixer.js";

/** {settings, run, stop, state, write, check, fail}. stage: its `begin` takes the fields' values and returns {add}, to
    call with a label and a piece of text. */
export function column(workflow, stage) {
  const isNamed = workflow.models.length > 1;
  const mixers = workflow.models.filter((model) => model.adapters.length).map((model) => mixer(model, isNamed));
  const plain = workflow.models.filter((model) => !model.adapters.length).map((model) => baseLine(model, isNamed));
  const sampling = samplingFields(workflow.sampling);
  const settings = h("div", { className: "settings" },
    mixers.map((each) => each.element),
    plain,
    Object.keys(workflow.sampling).length ? sampling.element : null,
  );
  let stopper = null;

  function blend() {
    if (!workflow.by_component) return mixers[0]?.read() ?? null;
    const chosen = mixers.map((each) => [each.component, each.read()]).filter(([, value]) => value !== null);
    return chosen.length ? Object.fromEntries(chosen) : null;
  }
  const state = () => ({
    blend: Object.fromEntries(mixers.map((each) => [each.component, each.state()])),
    sampling: sampling.read(),
  });

  return {
    settings,
    state,
    /** Sets sliders and sampling as `state` gave them; "" stands for the only model. Returns sentences about
        what cannot be set, without their subject: the link or the run. */
    write(saved) {
      const blends = Object.entries(saved.blend).flatMap(([component, value]) => {
        const found = component ? mixers.find((each) => each.component === component) : mixers[0];
        const missing = component ? `model '${component}' with adapters` : "model with adapters";
        return found ? found.write(value) : [`has a blend, but this workflow has no ${missing}`];
      });
      return [...blends, ...sampling.write(saved.sampling)];
    },
    check: () => [...mixers, sampling].map((each) => each.check()).every(Boolean),
    /** Shows an error at the control that `name` is about. Returns whether there is such a control. */
    fail(name, message) {
      if (name.startsWith("sampling.")) return Boolean(sampling.fail(name, message));
      const [head, component] = name.split(".");
      const found = mixers.find((each) => each.component === component) ?? mixers[0];
      if (head !== "blend" || !found) return false;
      found.fail(message);
      return true;
    },
    stop: () => stopper?.abort(),
    /** Runs the workflow with these values. Returns the run as history keeps it; `fields` has the errors of fields. */
    async run(values) {
      const run = {
        id: `${Date.now()}-${Math.random().toString(36).slice(2)}`,
        time: Date.now(),
        workflow: workflow.id,
        values,
        ...state(),
        mixed: mixers.map((each) => each.shown()).join("; "),
        drawn: sampling.shown(),
        ...{ texts: {}, answers: [], notes: [], calls: [], status: "done" },
      };
      const said = Object.keys(run.sampling).length ? run.sampling : null;
      const body = { workflow: workflow.id, values, blend: blend(), sampling: said };
      const started = performance.now();
      stopper = new AbortController();
      const view = stage.begin(values);
      const onDelta = (label, text) => {
        run.texts[label] = (run.texts[label] ?? "") + text;
        view.add(label, text);
      };
      try {
        Object.assign(run, await ask(body, { signal: stopper.signal, onDelta }));
      } catch (error) {
        run.status = stopper.signal.aborted ? "stopped" : "failed";
        if (run.status === "failed" && !(error instanceof Failure)) throw error;
        if (run.status === "failed") Object.assign(run, { error: error.message, fields: error.fields });
      }
      run.seconds = (performance.now() - started) / 1000;
      return run;
    },
  };
}
