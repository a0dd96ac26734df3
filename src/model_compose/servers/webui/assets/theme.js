// Light, dark, or as the system has it. Runs before the page is drawn, so that it never flashes in the other one.
const THEMES = ["auto", "light", "dark"];

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("theme", theme);
  const button = document.getElementById("theme");
  if (button) button.textContent = `Theme: ${theme}`;
}

setTheme(THEMES.includes(localStorage.getItem("theme")) ? localStorage.getItem("theme") : "auto");
addEventListener("DOMContentLoaded", () => {
  const now = () => document.documentElement.dataset.theme;
  setTheme(now());
  document.getElementById("theme").addEventListener("click", () => {
    setTheme(THEMES[(THEMES.indexOf(now()) + 1) % THEMES.length]);
  });
});
