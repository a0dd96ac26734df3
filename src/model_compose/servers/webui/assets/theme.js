// The theme: light, dark, or the system's. Runs before the page is drawn, so that no other theme flashes up.
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
