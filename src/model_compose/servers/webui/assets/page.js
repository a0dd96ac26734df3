// The page: a panel for each workflow, how far the models are loaded, and what a link asks for.
import { h, newId } from "./dom.js";
import { fromLink } from "./history.js";
import { panel } from "./panel.js";

const LOOK_MS = 500;

async function open() {
  const main = document.getElementById("main");
  const page = await fetched("page.json");
  const panels = page.workflows.map((workflow) => panel(workflow, page.api));
  const loading = loadingBar();
  const choose = page.workflows.length > 1 ? tabs(page.workflows, panels) : { element: panels[0]?.element ?? "", show() {} };
  main.replaceChildren(loading.element, choose.element);

  function follow() {
    if (!location.hash) return;
    const state = fromLink(location.hash);
    const at = Math.max(page.workflows.findIndex((workflow) => workflow.id === state.workflow), 0);
    choose.show(at);
    panels[at].write(state);
  }
  addEventListener("hashchange", follow);
  follow();

  async function look() {
    const state = await fetched("state").catch(() => null);
    loading.show(state);
    panels.forEach((each) => each.setReady(state?.ready ?? false));
    if (!state?.ready) setTimeout(look, LOOK_MS);
  }
  await look();
}

async function fetched(path) {
  const answer = await fetch(path);
  if (answer.status === 401) location.reload(); // to the login
  return answer.json();
}

/** How far the loading is: {element, show(state)}. A bar of unknown length moves too. */
function loadingBar() {
  const bar = h("progress", { max: 100, "aria-label": "Loading" });
  const said = h("p", { role: "status" });
  const percent = h("b");
  const element = h("section", { className: "card loading", hidden: true }, h("p", {}, percent), said, bar);
  return {
    element,
    show(state) {
      element.hidden = Boolean(state?.ready);
      const { what, done, total } = state?.progress ?? {};
      percent.textContent = total ? `Loading… ${Math.round((100 * done) / total)} %` : state ? "Loading…" : "Waiting for the server…";
      if (total) bar.value = (100 * done) / total;
      else bar.removeAttribute("value");
      if (said.textContent !== (what ?? "")) said.textContent = what ?? "";
    },
  };
}

/** Tabs as screen readers know them; the arrow keys go from one to the next. */
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
