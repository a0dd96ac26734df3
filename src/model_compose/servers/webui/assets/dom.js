// Small things that every part of the page is made with. Text goes in as text, never as markup.

/** An element. props: "on…" are listeners, what the element has as a property is set as such, the rest are attributes. */
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

let count = 0;
/** An id that no other element has. */
export const newId = () => `id-${++count}`;

/** Says something to screen readers. */
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}

/** Switches a button without taking the focus from it, as `disabled` would. */
export function enable(button, on) {
  button.setAttribute("aria-disabled", String(!on));
}

export const isEnabled = (button) => button.getAttribute("aria-disabled") !== "true";

/** Says below a control what is wrong with it; null takes it back. */
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
  const button = h("button", { type: "button", className: "quiet", onclick: copy }, label);
  async function copy() {
    try {
      await navigator.clipboard.writeText(read());
      button.textContent = "Copied";
      announce("Copied");
      setTimeout(() => (button.textContent = label), 1500);
    } catch {
      // Browsers have a clipboard for https and localhost alone.
      prompt("This browser copies nothing here by itself. Copy the text from this box:", read());
    }
  }
  return button;
}

/** Hands the browser a file to save. */
export function download(name, type, text) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
