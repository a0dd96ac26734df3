// The page: a panel for each workflow and a bar while the models load. Applies what the address of a link says.
import { h, newId } from "./dom.js";
import { fromLink } from "./history.js";
import { panel } from "./panel.js";

const LOOK_MS = 500;

async function open() {
  const main = document.getElementById("main");
  const page = await fetched("page.json");
  const panels = page.workflows.map((workflow) => panel(workflow, page));
  const loading = loadingBar();
  const choose = page.workflows.length > 1 ? tabs(page.workflows, panels) : null;
  main.replaceChildren(loading.element, choose?.element ?? panels[0]?.element ?? "All workflows of this file are private.");

  function follow() {
    if (!location.hash || !panels.length) return;
    const state = fromLink(location.hash);
    const found = page.workflows.findIndex((workflow) => workflow.id === state.workflow);
    const isWrong = found < 0 && state.workflow !== null;
    const missing = `names a workflow '${state.workflow}' that this page does not have; the first workflow is shown`;
    choose?.show(Math.max(found, 0));
    panels[Math.max(found, 0)].write(state, "The link", isWrong ? [missing] : []);
  }
  addEventListener("hashchange", follow);
  follow();

  async function look() {
    const state = await fetched("state").catch(() => null);
    loading.show(state);
    panels.forEach((each) => each.setReady(isReady(state)));
    if (!isReady(state)) setTimeout(look, LOOK_MS);
  }
  await look();
}

async function fetched(path) {
  const answer = await fetch(path);
  if (answer.status === 401) location.reload(); // to the login
  return answer.json();
}

const isReady = (state) => state?.status === "ok";

/** The bar for loading: {element, show(state)}. It moves even while the total is unknown. */
function loadingBar() {
  const bar = h("progress", { max: 100, "aria-label": "Loading" });
  const said = h("p", { role: "status" });
  const percent = h("b");
  const element = h("section", { className: "card loading", hidden: true }, h("p", {}, percent), said, bar);
  return {
    element,
    show(state) {
      element.hidden = isReady(state);
      const { what, done, total } = state?.progress ?? {};
      const share = total ? Math.round((100 * done) / total) : null;
      percent.textContent = state ? `Loading…${share === null ? "" : ` ${share} %`}` : "Waiting for the server…";
      if (share === null) bar.removeAttribute("value");
      else bar.value = share;
      if (said.textContent !== (what ?? "")) said.textContent = what ?? "";
    },
  };
}

/** Tabs with the roles that screen readers expect. The arrow keys move from one to the next. */
function tabs(workflows, panels) {
  const buttons = workflows.map((workflow, at) =>
    h("button", { type: "button", role: "tab", id: newId(), onclick: () => show(at) }, workflow.name));
  const bodies = panels.map((each, at) =>
    h("div", { role: "tabpanel", id: newId(), "aria-labelledby": buttons[at].id }, each.element));
  buttons.forEach((button, at) => {
    button.setAttribute("aria-controls", bodies[at].id);
    button.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step) show((at + step + buttons.length) % buttons.length, true);
    });
  });
  function show(chosen, isFocused = false) {
    buttons.forEach((button, at) => {
      button.setAttribute("aria-selected", String(at === chosen));
      button.tabIndex = at === chosen ? 0 : -1;
      bodies[at].hidden = at !== chosen;
    });
    if (isFocused) buttons[chosen].focus();
  }
  show(0);
  return { element: h("div", {}, h("div", { role: "tablist", className: "tabs" }, buttons), bodies), show };
}

open();
