// Small things that every part of the page is made with. Text goes in as text, never as markup.

/** An element. props: "on…" are listeners, the element's own properties are set as such, the rest are attributes. */
export function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

export const button = (label, onclick, className = "quiet") =>
  h("button", { type: "button", className, onclick }, label);

let count = 0;
/** An id that no other element has. */
export const newId = () => `id-${++count}`;

/** Says something to screen readers. */
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}

/** Turns a button on or off. The attribute `disabled` would take the focus away from the button. */
export function enable(control, on) {
  control.setAttribute("aria-disabled", String(!on));
}

export const isEnabled = (control) => control.getAttribute("aria-disabled") !== "true";

/** Shows an error below a control; null removes it. */
export function fail(control, message) {
  const holder = control.closest("[data-field]");
  holder.querySelector(".error")?.remove();
  control.removeAttribute("aria-describedby");
  control.setAttribute("aria-invalid", String(message !== null));
  if (message === null) return;
  const error = h("p", { className: "error", role: "alert", id: newId() }, message);
  control.setAttribute("aria-describedby", error.id);
  control.addEventListener("input", () => fail(control, null), { once: true });
  holder.append(error);
}

/** A button that copies what `read` returns. */
export function copyButton(read, label = "Copy") {
  const made = button(label, copy);
  async function copy() {
    try {
      await navigator.clipboard.writeText(read());
      made.textContent = "Copied";
      announce("Copied");
      setTimeout(() => (made.textContent = label), 1500);
    } catch {
      // Browsers have a clipboard for https and localhost alone.
      prompt("This browser copies nothing here by itself. Copy the text from this box:", read());
    }
  }
  return made;
}

/** Hands the browser a file to save. */
export function download(name, type, text) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
