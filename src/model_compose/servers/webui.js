// Runs in the browser: keeps sliders, number boxes and the picker of blends in step, and copies text.
// choices: a row of weights for each entry of the picker, in the adapters' order. approximate: which entries are not the sum
// of these weights, so that only the picker chooses them, never the weights alone.
window.modelCompose = {
  clamp: (weight) => Math.min(Math.max(Number(weight) || 0, 0), 2),
  pick(choices, choice, weights) {
    const chosen = choices[choice] ?? weights; // "custom" changes nothing
    return [...chosen, ...chosen.map(this.clamp)];
  },
  match(choices, approximate, choice, weights) {
    const equal = (row) => row?.every((weight, at) => weight === weights[at]);
    if (equal(choices[choice])) return choice;
    const found = choices.findIndex((row, at) => !approximate[at] && equal(row));
    return found < 0 ? "custom" : String(found);
  },
};

document.addEventListener("click", async (event) => {
  const button = event.target.closest?.("[data-copy]");
  if (!button) return;
  const source = button.closest(".mc-copyable").querySelector("[data-text]");
  try {
    await navigator.clipboard.writeText(source.textContent);
  } catch {
    // Without https or localhost there is no clipboard: select, so that Ctrl+C does it.
    getSelection().selectAllChildren(source);
    return;
  }
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
});
